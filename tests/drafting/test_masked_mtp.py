# SPDX-License-Identifier: Apache-2.0
"""Masked multi-token prediction: the gate, the sampler head, latent consistency, decoding modes."""

from __future__ import annotations

from probing import Probing

from jaxdec.drafting.masked_mtp import MaskedMTP


class TestMaskedMTP(Probing):
  kind = MaskedMTP
  options = {"anchors": None, "rank": 4}  # noqa: RUF012
