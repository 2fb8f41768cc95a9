# SPDX-License-Identifier: Apache-2.0
"""Losses of a language model's head, without the array of its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import _checks
from pallas_kernels._dispatch import Op
from pallas_kernels._numerics import accumulator
from pallas_kernels.linear_cross_entropy._config import TPUConfig, XLAConfig

__all__ = ["TPUConfig", "XLAConfig", "linear_cross_entropy"]

_NAME = "linear_cross_entropy"
_OP = Op(_NAME, __name__, {"xla": XLAConfig, "mosaic_tpu": TPUConfig})


def linear_cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array | None = None,
  *,
  teacher_hidden: jax.Array | None = None,
  teacher_head: jax.Array | None = None,
  top_k: int | None = None,
  weights: jax.Array | None = None,
  temperature: float = 1.0,
  logit_cap: float | None = None,
  vocab_block: int | None = None,
  implementation: str | Sequence[str] = "auto",
  config: XLAConfig | TPUConfig | None = None,
) -> jax.Array:
  """Cross-entropy or KL of ``softmax(hidden head^T)``, without an array of ``[..., V]``.

  With ``z = cap(hidden head^T) / temperature``, ``cap(x) = logit_cap tanh(x / logit_cap)``,
  ``q = softmax(z)``, and p the same of the teacher's states and head, a token's loss is its weight
  times

  * labels:           ``-log q_label``
  * teacher:          ``sum_v p_v (log p_v - log q_v)``
  * teacher, top_k:   the same sum over the k tokens of largest p (ties: lowest ids), where p and q
    stay normalised over all V tokens. Its gradient is that of the top-K distillation loss of HASS
    (arXiv 2408.15766, section 3.1), ``-sum_{v in top-k} p_v log q_v``. It may be negative, and
    only at ``top_k=V`` is p = q where its gradient vanishes.

  There is no factor ``temperature^2``; multiply by it to make gradients comparable across
  temperatures (Hinton et al., arXiv 1503.02531, section 2). The KL is ``soft_cross_entropy`` less
  the teacher's entropy, so both have the gradient ``(q - p) / temperature`` in the logits before
  the temperature. No gradient reaches the teacher.

  Blocks of logits are formed, reduced to running maxima and sums (as in online softmax, arXiv
  1805.02867), and formed again for the gradients: what is kept is one or two numbers a token (2k
  for top_k), and peak memory doesn't grow with V beyond ``head`` and its gradient.

  Args:
    hidden: ``[..., D]``. head: ``[V, D]``. Products are formed in the wider of their dtypes and
      accumulated in float32.
    labels: ids ``[...]``. One outside ``0..V-1`` costs nothing where the weight is 0 and gives NaN
      elsewhere.
    teacher_hidden, teacher_head: ``[..., Dt]`` and ``[V, Dt]``, instead of labels.
    top_k: with a teacher, 1..V.
    weights: ``[...]`` or a shape that broadcasts to it; a token of weight 0 costs exactly 0 and
      passes no gradient on, its weight's included.
    temperature, logit_cap: positive; of student and teacher alike.
    vocab_block: head rows at a time; None: chosen by the implementation. Belongs to ``config``
      where one is given.

  Returns:
    Loss ``[...]``, float32 (float64 for float64 states).

  Raises:
    ValueError: shapes don't fit, both or neither of labels and teacher, an option out of range.
    NotImplementedError: the implementation named can't run this call.

  >>> hidden, head = jnp.eye(3), 9.0 * jnp.eye(3)
  >>> linear_cross_entropy(hidden, head, jnp.array([0, 1, 0])).round(3).tolist()
  [0.0, 0.0, 9.0]
  """
  _check(labels, teacher_hidden, teacher_head, top_k, temperature, logit_cap, vocab_block, config)
  hidden, head, labels, teacher_hidden, teacher_head, weights = (
    None if x is None else jnp.asarray(x)
    for x in (hidden, head, labels, teacher_hidden, teacher_head, weights)
  )
  lead = hidden.shape[:-1]
  letters = " ".join(f"a{i}" for i in range(len(lead)))
  sizes = _checks.shapes(
    _NAME,
    hidden=(hidden, f"{letters} D"),
    head=(head, "V D"),
    labels=(labels, letters),
    teacher_hidden=(teacher_hidden, f"{letters} Dt"),
    teacher_head=(teacher_head, "V Dt"),
  )
  if labels is not None and not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"{_NAME}: labels have dtype {labels.dtype}, expected integers.")
  if sizes["V"] == 0:
    raise ValueError(f"{_NAME}: head has shape {head.shape}, expected at least one row.")
  if top_k is not None and top_k > sizes["V"]:
    raise ValueError(f"{_NAME}: top_k is {top_k}, expected at most V={sizes['V']}.")
  if weights is not None:
    shape = weights.shape
    if len(shape) > len(lead) or any(n not in (1, m) for n, m in zip(shape[::-1], lead[::-1])):
      raise ValueError(
        f"{_NAME}: weights have shape {shape}, expected {lead} as of the tokens, or 1s in it."
      )
  dtype = accumulator(hidden)
  if math.prod(lead) == 0:
    return jnp.zeros(lead, dtype)

  def flat(x):
    return None if x is None else x.reshape(-1, *x.shape[len(lead) :])

  valid = None
  if labels is not None:
    valid = (labels >= 0) & (labels < sizes["V"])
    labels = jnp.where(valid, labels, 0).astype(jnp.int32)
  if teacher_hidden is not None:
    teacher_hidden = jax.lax.stop_gradient(teacher_hidden)
    teacher_head = jax.lax.stop_gradient(teacher_head)
  loss = _OP(
    flat(hidden),
    head,
    flat(labels),
    flat(teacher_hidden),
    teacher_head,
    top_k=top_k,
    temperature=float(temperature),
    logit_cap=None if logit_cap is None else float(logit_cap),
    vocab_block=vocab_block,
    implementation=implementation,
    config=config,
  ).reshape(lead)
  if valid is not None:
    loss = jnp.where(valid, loss, jnp.nan)
  if weights is not None:
    weights = weights.astype(dtype)
    # Selected before it is multiplied: 0 * NaN is NaN, in the gradient too.
    loss = weights * jnp.where(weights != 0, loss, 0)
  return loss


def _check(
  labels, teacher_hidden, teacher_head, top_k, temperature, logit_cap, vocab_block, config
):
  """Options that need no shapes."""
  teacher = [x is not None for x in (teacher_hidden, teacher_head)]
  if any(teacher) != all(teacher):
    missing = "teacher_head" if teacher[0] else "teacher_hidden"
    raise ValueError(
      f"{_NAME}: {missing} is missing; a teacher is teacher_hidden and teacher_head."
    )
  if (labels is not None) == teacher[0]:
    got = "both" if teacher[0] else "neither"
    raise ValueError(
      f"{_NAME}: got {got} of labels and teacher; give labels (cross-entropy), or teacher_hidden "
      "and teacher_head (KL)."
    )
  if top_k is not None and not teacher[0]:
    raise ValueError(f"{_NAME}: top_k={top_k} goes with a teacher, and labels were given; drop it.")
  for name, value in (("top_k", top_k), ("vocab_block", vocab_block)):
    if value is not None and (not isinstance(value, int) or value < 1):
      raise ValueError(f"{_NAME}: {name} is {value!r}, expected a positive integer or None.")
  for name, value in (("temperature", temperature), ("logit_cap", logit_cap)):
    optional = name == "logit_cap"
    if not (value is None and optional) and not (
      isinstance(value, (int, float)) and 0 < value < math.inf
    ):
      raise ValueError(
        f"{_NAME}: {name} is {value!r}, expected a positive number{' or None' if optional else ''}."
      )
  if config is not None and vocab_block is not None:
    raise ValueError(f"{_NAME}: got vocab_block and config; set vocab_block in the config.")
