# SPDX-License-Identifier: Apache-2.0
"""What the backward pass keeps of each block and what it computes again (rematerialisation).

From most memory to least; ``jaxdec plan`` tells the bytes of a model on its hardware:

  ===============  ==========================================  ===================================
  policy           kept of each block until the backward pass  computed again
  ===============  ==========================================  ===================================
  ``none``         all that the backward pass reads            nothing
  ``dots``         its input, outputs of its projections       elementwise parts, sequence mixing
  ``collectives``  its input, states, gathered keys, values    the block (a third more FLOPs)
  ``full``         its input, states                           the block, with the gathers of keys
                                                               and values
  ``offload``      states; its input waits in host memory      as ``full``
  ===============  ==========================================  ===================================

``sequence_state`` marks what a sequence-parallel layer has communicated and is no larger than its
activations: states, which do not grow with T, or a ring's output. Computing it again would run the
collective again, so every policy keeps it. Gathered keys and values (``sequence_kv``) are as long
as the whole sequence; only ``collectives`` keeps them. Gradients are the same under every policy.

Sources: Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174); Reducing Activation
Recomputation in Large Transformer Models (arXiv 2205.05198); LASP-2 (arXiv 2502.07563) for states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax

from jaxdec.errors import UserError, nearest

Remat = Literal["none", "dots", "collectives", "full", "offload"]

STATE, KEYS_VALUES, BLOCK_INPUT = "sequence_state", "sequence_kv", "block_input"
_POLICIES = jax.checkpoint_policies
_STATES = _POLICIES.save_only_these_names(STATE)

_TABLE: dict[str, Callable[..., Any]] = {
  "dots": _POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, _STATES),
  "collectives": _POLICIES.save_only_these_names(STATE, KEYS_VALUES),
  "full": _STATES,
  "offload": _POLICIES.save_and_offload_only_these_names(
    names_which_can_be_saved=[STATE],
    names_which_can_be_offloaded=[BLOCK_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


def rematerialised(module: Any, remat: Remat, *, scanned: bool) -> Any:
  """The module class, recomputed in the backward pass as ``remat`` says.

  Args:
    scanned: it is the body of a scan, where nothing can be merged with the forward pass anyway.

  Raises:
    UserError: an unknown policy.
  """
  if remat == "none":
    return module
  if remat not in _TABLE:
    known = get_args(Remat)
    raise UserError(
      f"remat={remat!r}{nearest(str(remat), known)} is no policy; use one of {', '.join(known)}"
    )
  return nn.remat(module, policy=_TABLE[remat], prevent_cse=not scanned)
