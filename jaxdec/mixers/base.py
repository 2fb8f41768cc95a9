# SPDX-License-Identifier: Apache-2.0
"""The sequence-mixer contract: one interface for attention, linear attention and hybrids.

A mixer is a thin Flax module around pure functions. It has five ways in and one state type:

  ==================================  ======================================  =====================
  call                                input -> output                         used by
  ==================================  ======================================  =====================
  ``mixer(x, positions, segments)``   ``[B,T,D] -> [B,T,D]``                  training, no state
  ``mixer.extend(x, state, pos)``     ``[B,T,D], State -> [B,T,D], State``    prefill and decoding
  ``mixer.verify(x, state, topo)``    ``[B,M,D], State -> [B,M,D], Pending``  draft trees; pure
  ``mixer.commit(state, pending,      ``-> State``                            keep the accepted path
  path, count)``
  ``mixer.read_packed(x, state,       ``[R,T,D] -> [R,T,D], State of B``      ragged prefill
  packing)``
  ==================================  ======================================  =====================

Conventions shared by every mixer:

* ``state.length [B]`` counts the tokens in the state. Slot index = absolute position.
* ``extend``: a position of ``-1`` marks padding. Padding is a suffix of the row's T tokens, leaves
  the state of the row unchanged, and its output is undefined. Valid tokens of row ``b`` have the
  positions ``length[b], length[b] + 1, ...``. The caller guarantees ``length[b] + T <= capacity``
  (padding included), because a clamped write would overwrite live keys.
* ``verify``: node ``i`` sits at position ``length + depth[i]``; node 0 (the root, the last emitted
  token) is not in the state yet. Nodes a drafter marks invalid are computed like the others.
* ``read_packed(x, state, packing)``: ``extend`` of an empty state by prompts that lie packed in
  rows, see ``Packing``.
* ``commit``: ``path [B,P]`` holds node ids, root first; the first ``count [B]`` of them are kept
  (``0 <= count <= P``; 0 leaves the row as it was). ``length`` grows by ``count``.

Dimension letters: B batch, T tokens, S cache capacity, M tree nodes, P = maximal path length,
D model width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

State = Any  # a frozen pytree with a ``length: Int[Array, "B"]`` field
Pending = Any  # what ``verify`` learned about the nodes, enough for ``commit``


@struct.dataclass
class Topology:
  """Shape of a draft tree, all a mixer needs to know of it.

  Attributes:
    depth: distance from the root; the root has depth 0.
    ancestors: ``ancestors[b, i, j]`` is True iff node ``j`` is node ``i`` or one of its ancestors.
  """

  depth: Int[Array, "B M"]
  ancestors: Bool[Array, "B M M"]


@struct.dataclass
class Packing:
  """Where B prompts lie in R rows of T slots, one after the other.

  Attributes:
    positions: of each slot in its prompt. segment_ids: the prompt of each slot; -1: none.
    row, offset, length: of each prompt.
    width: W, the longest prompt at most.
  """

  positions: Int[Array, "R T"]
  segment_ids: Int[Array, "R T"]
  row: Int[Array, "B"]
  offset: Int[Array, "B"]
  length: Int[Array, "B"]
  width: int = struct.field(pytree_node=False)

  @property
  def valid(self) -> Bool[Array, "B W"]:
    """Which entries of ``unpack`` hold a token."""
    return jnp.arange(self.width) < self.length[:, None]

  def unpack(self, x: Array) -> Array:
    """``[R,T,...] -> [B,W,...]``: one row a prompt; slots of others beyond its length."""
    slots = x.shape[0] * x.shape[1]
    start = self.row * x.shape[1] + self.offset
    index = jnp.minimum(start[:, None] + jnp.arange(self.width), slots - 1)
    return x.reshape(slots, *x.shape[2:])[index]

  def pack(self, x: Array) -> Array:
    """``[B,W,...] -> [R,T,...]``, the inverse (anything in slots that hold no token)."""
    index = jnp.maximum(self.segment_ids, 0) * self.width + self.positions
    return x.reshape(-1, *x.shape[2:])[index]


class Mixer(Protocol):
  """What a decoder block asks of a sequence mixer (see the module docstring)."""

  def __call__(self, x: Array, positions: Array, segment_ids: Array | None) -> Array: ...

  def init_state(self, batch: int, capacity: int, dtype: jnp.dtype) -> State: ...

  def extend(self, x: Array, state: State, positions: Array) -> tuple[Array, State]: ...

  def verify(self, x: Array, state: State, topology: Topology) -> tuple[Array, Pending]: ...

  def commit(self, state: State, pending: Pending, path: Array, count: Array) -> State: ...

  def read_packed(self, x: Array, state: State, packing: Packing) -> tuple[Array, State]: ...


def ancestors_from_parents(parent: Int[Array, "B M"], max_depth: int) -> Bool[Array, "B M M"]:
  """Ancestor-or-self matrix of trees given by parent pointers (``parent[0] = 0``, parent < child).

  Squares the one-step relation ``ceil(log2(max_depth))`` times.
  """
  m = parent.shape[-1]
  step = jax.nn.one_hot(parent, m, dtype=jnp.float32) + jnp.eye(m, dtype=jnp.float32)
  reach = jnp.minimum(step, 1.0)
  for _ in range(max(1, (max(max_depth, 1) - 1).bit_length())):
    reach = jnp.minimum(reach @ reach, 1.0)
  return reach > 0


def gather_nodes(x: Array, path: Int[Array, "B P"]) -> Array:
  """``x [B,M,...] -> [B,P,...]``: the rows of ``x`` named by ``path``."""
  index = path.reshape(path.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def write_rows(buffer: Array, rows: Array, start: Int[Array, "B"], *, axis: int = 1) -> Array:
  """Writes ``rows`` (T long on ``axis``) into ``buffer`` (S long) at ``start[b]``; start + T <= S.

  Unrolled over small batches: one in-place ``dynamic_update_slice`` a row, where a vmapped one
  becomes a scatter, which XLA:CPU runs element by element.
  """
  rows = rows.astype(buffer.dtype)
  if buffer.shape[0] > 8:
    update = jax.lax.dynamic_update_slice_in_dim
    return jax.vmap(lambda b, r, s: update(b, r, s, axis - 1))(buffer, rows, start)
  for b in range(buffer.shape[0]):
    at = [0] * buffer.ndim
    at[0], at[axis] = b, start[b]
    buffer = jax.lax.dynamic_update_slice(buffer, rows[b : b + 1], at)
  return buffer
