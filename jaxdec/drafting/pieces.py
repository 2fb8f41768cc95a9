# SPDX-License-Identifier: Apache-2.0
"""Losses over a vocabulary a piece of the slots at a time: no array of ``[B, T, V]``.

A drafter of K depths would hold K times the logits of a batch, and the target's besides: at
T = 2,048, V = 128,256 and K = 7, 8 GB a sequence. Here the logits of a piece of slots are formed,
reduced to a few numbers a slot, and formed again for the gradients (recomputation, arXiv
1604.06174); the target's too, from its states. Depths whose slots are consecutive share them: piece
by piece the target's law at positions ``p .. p + c`` is computed once and every depth k is compared
with it at its own slots ``p - k .. p + c - k``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

LOGITS = 2**20  # formed at once on a device, of one depth
SLOTS = 256  # but no fewer slots: each piece reads the whole head


@struct.dataclass
class Example:
  """What is learned at one depth: S slots a row, wherever they lie in the text.

  Attributes:
    depth: 1-based; ``head`` gets it, and metrics are named by it.
    states: what ``head`` reads (a pytree whose leaves begin with ``[B,S]``).
    labels: the token of the text that the draft should be.
    teacher: the target's logits at the position before it; None: they are computed from ``hidden``
      (where there are many slots, they always are).
    hidden: the target's post-norm states at that position.
    weights: 1.0 where the slot counts; other numbers weigh it.
    start: where slot s has the state of position ``start + s``, for all s: that number. Examples
      that all have one share the target's law, which is then computed only once.
  """

  depth: int = struct.field(pytree_node=False)
  states: Any
  labels: Int[Array, "B S"]
  teacher: Float[Array, "B S V"] | None
  hidden: Float[Array, "B S D"]
  weights: Float[Array, "B S"]
  start: int | None = struct.field(pytree_node=False, default=None)

  @property
  def stop(self) -> int:
    return self.start + self.labels.shape[1]


def piecewise(
  measure: Callable[[Example], tuple[Any, Any]],
  examples: Sequence[Example],
  law: Callable[[Float[Array, "B S D"]], Float[Array, "B S V"]],
  vocab_size: int,
) -> list[tuple[Any, Any]]:
  """``measure`` of every example, from the logits of a piece of its slots at a time.

  Args:
    measure: an example, its ``teacher`` present, to arrays by slot (``[B,S]``), and to sums over
      the slots. Slots of weight 0 are added where a piece must be filled.
    law: the target's logits of its post-norm states.

  Returns:
    What ``measure`` returns, one entry an example.
  """
  results = []
  for group in _sharing(list(examples)):
    results += _measured(measure, group, law, vocab_size)
  return results


def _sharing(examples: list[Example]) -> list[list[Example]]:
  """Examples that share the target's law, the one that spans all of them first."""
  if all(e.start is not None for e in examples):
    widest = max(range(len(examples)), key=lambda i: examples[i].labels.shape[1])
    first, stop = examples[widest].start, examples[widest].stop
    if widest == 0 and all(first <= e.start and e.stop <= stop for e in examples):
      return [examples]
  return [[e.replace(start=0)] for e in examples]


def _measured(measure, group, law, vocab_size):
  first, hidden = group[0].start, group[0].hidden
  batch, width = group[0].labels.shape
  count = -(-width // _size(batch, vocab_size))
  if count == 1:
    if any(e.teacher is None for e in group):
      shared = law(hidden)
      group = [e.replace(teacher=shared[:, e.start - first : e.stop - first]) for e in group]
    return [measure(e) for e in group]
  size = -(-width // count)

  def cut(example):
    # The first one's states of the target serve all.
    hidden = example.hidden if example is group[0] else None
    sides = (example.start - first, first + count * size - example.stop)

    def pieces(x):
      x = jnp.pad(x, ((0, 0), sides, *((0, 0),) * (x.ndim - 2)))
      return x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(pieces, example.replace(teacher=None, hidden=hidden))

  def join(x, example):
    x = x.swapaxes(0, 1).reshape(batch, count * size, *x.shape[3:])
    return x[:, example.start - first : example.stop - first]

  # Inside of a loop nothing can be merged with the forward pass: no barriers are needed.
  again = functools.partial(jax.checkpoint, prevent_cse=False)

  def piece(cut):
    hidden = cut[0].hidden
    teacher = law(hidden)
    # Each depth by itself, so that the backward pass holds the logits of one.
    return [again(measure)(e.replace(teacher=teacher, hidden=hidden)) for e in cut]

  results = jax.lax.map(again(piece), [cut(e) for e in group])
  return [
    (jax.tree.map(lambda x, e=e: join(x, e), slots), jax.tree.map(lambda x: jnp.sum(x, 0), sums))
    for e, (slots, sums) in zip(group, results)
  ]


def _size(batch: int, vocab_size: int) -> int:
  """Slots of a row at a time."""
  mesh = jax.sharding.get_abstract_mesh()
  devices = 1 if mesh.empty else mesh.size
  return max(1, devices * max(SLOTS, LOGITS // vocab_size) // batch)
