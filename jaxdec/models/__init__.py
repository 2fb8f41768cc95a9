# SPDX-License-Identifier: Apache-2.0
"""What a decoder is: configurations, the Flax module, Hugging Face families."""

from jaxdec.mixers.norms import NormConfig
from jaxdec.models.config import (
  BlockFFNConfig,
  Capture,
  DecoderConfig,
  LayerConfig,
  MLPConfig,
  tiny_llama,
)
from jaxdec.models.decoder import (
  Decoder,
  DecoderOutput,
  DecoderState,
  stack_layers,
  unstack_layers,
)
from jaxdec.models.prefill import Prefix

__all__ = [
  "BlockFFNConfig",
  "Capture",
  "Decoder",
  "DecoderConfig",
  "DecoderOutput",
  "DecoderState",
  "LayerConfig",
  "MLPConfig",
  "NormConfig",
  "Prefix",
  "stack_layers",
  "tiny_llama",
  "unstack_layers",
]
