# SPDX-License-Identifier: Apache-2.0
"""Several sources fill one tree, best-first by the probability that a node is accepted.

Every source states probabilities, but sources boast differently, and differently from text to text.
So each is held to what it said: wherever its guesses reached the text that was emitted, whether
they had room in the tree or not, depth by depth and row by row,

  hits  <- (1 - rate) hits  + rate [one of its guesses was right]
  hoped <- (1 - rate) hoped + rate (sum of the conditional probabilities it gave its guesses)

and a prefix of d tokens competes with its source's probability times ``prod_{i <= d} hits_i /
hoped_i`` (1 at most). Both begin at ``prior``: at first every source is believed. Where sources
agree on a prefix, the larger value counts. With one source its own order stands.

Sources that meet in one tree: the retrieval-plus-model drafts of SuffixDecoding (arXiv 2411.04975)
choose one of two; here they share the nodes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.merge import shared_prefixes
from jaxdec.drafting.source import Candidates, Source
from jaxdec.drafting.suffix import Suffix
from jaxdec.drafting.token_recycling import TokenRecycling
from jaxdec.errors import UserError

_LEAST = 1e-3  # hopes too small to be held to


@struct.dataclass
class CombinedState:
  """K sources' states, their records of L depths, and the lists of the last step."""

  parts: tuple[Any, ...]
  hits: Float[Array, "B K L"]
  hoped: Float[Array, "B K L"]
  tokens: Int[Array, "B R L"]
  valid: Bool[Array, "B R L"]
  hope: Float[Array, "B R L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combined(Source):
  """Attributes:

  sources: who guesses; ``drafter_params`` is a tuple of their parameters (None: none has any).
  size: M, nodes of the tree, root included.
  rate: weight of the newest observation in the records.
  prior: what records begin with: how slowly the first observations change them.
  corrects: whether probabilities are corrected by the records; None: where there are several
    sources. True for one as well where its probabilities matter, not their order alone.
  """

  sources: tuple[Source, ...] = (Suffix(), TokenRecycling(size=32))
  size: int = 16
  rate: float = 0.05
  prior: float = 0.5
  corrects: bool | None = None

  name: ClassVar[str] = "combined"

  def __post_init__(self):
    object.__setattr__(self, "sources", tuple(self.sources))
    if not self.sources or not all(isinstance(s, Source) for s in self.sources):
      names = [getattr(s, "name", type(s).__name__) for s in self.sources]
      raise UserError(
        "combined needs sources that list continuations (suffix, prompt_lookup, token_recycling "
        f"and the like), got {names}"
      )
    if self.size < 2 or not 0 < self.rate < 1 or not self.prior > 0:
      raise UserError(
        f"combined needs size >= 2, 0 < rate < 1 and prior > 0, got size={self.size}, "
        f"rate={self.rate:g}, prior={self.prior:g}"
      )

  @property
  def num_nodes(self) -> int:
    return self.size

  @property
  def max_depth(self) -> int:
    return min(self.size - 1, max(s.max_depth for s in self.sources))

  @property
  def num_candidates(self) -> int:
    return sum(s.num_candidates for s in self.sources)

  @property
  def trained(self) -> bool:
    return any(s.trained for s in self.sources)

  @property
  def needs_prompt_hidden(self) -> bool:
    return any(s.needs_prompt_hidden for s in self.sources)

  @property
  def may_pass(self) -> bool:
    """Steps in which no source has a guess teach nothing about any of them."""
    return all(s.may_pass for s in self.sources)

  def has_draft(self, params, state, context):
    drafts = [
      s.has_draft(p, part, context)
      for s, p, part in zip(self.sources, self._params(params), state.parts)
    ]
    return jnp.any(jnp.stack(drafts), axis=0)

  def init_params(self, rng, target=None):
    return tuple(s.init_params(rng, target) for s in self.sources)

  def _params(self, params):
    if params is None:
      return (None,) * len(self.sources)
    if not isinstance(params, tuple | list) or len(params) != len(self.sources):
      raise UserError(
        f"the drafter_params of combined must be a tuple of {len(self.sources)}, one for each of "
        f"{', '.join(s.name for s in self.sources)}"
      )
    return tuple(params)

  def init_state(self, batch, capacity):
    return tuple(s.init_state(batch, capacity) for s in self.sources)

  def start(self, params, state, prompt, output, target):
    """Starts every source; what sources keep from call to call is kept, the records are new."""
    parts = state.parts if isinstance(state, CombinedState) else state
    if len(parts) != len(self.sources):
      raise UserError(
        f"the drafter_state has {len(parts)} parts, this combination {len(self.sources)}"
      )
    parts = tuple(
      s.start(p, part, prompt, output, target)
      for s, p, part in zip(self.sources, self._params(params), parts)
    )
    batch = prompt.root.shape[0]
    records = jnp.full((batch, len(self.sources), self.max_depth), self.prior, jnp.float32)
    lists = (batch, self.num_candidates, self.max_depth)
    return CombinedState(
      parts, records, records, jnp.zeros(lists, jnp.int32), jnp.zeros(lists, bool), jnp.zeros(lists)
    )

  def candidates(self, params, state, context, rng):
    return self._listed(params, state, context, rng)[0]

  def listed(self, params, state, context, rng):
    found, hope = self._listed(params, state, context, rng)
    return found, state.replace(tokens=found.tokens, valid=found.valid, hope=hope)

  def _listed(self, params, state, context, rng):
    """All lists as one, each prefix with its corrected probability; and what each source itself
    hopes for each of its guesses, given the prefix before it (once for equal guesses)."""
    lists, hopes = [], []
    for k, (source, own) in enumerate(zip(self.sources, self._params(params))):
      key = jax.random.fold_in(rng, k)
      found = _fit(source.candidates(own, state.parts[k], context, key), self.max_depth)
      prefix = jax.vmap(shared_prefixes)(found.tokens, found.valid)
      index = jnp.arange(prefix.shape[1])[:, None]
      first = found.valid & (jnp.argmax(prefix, axis=2) == index)
      before = jnp.pad(found.weight, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)[..., :-1]
      hopes.append(jnp.where(first, found.weight / jnp.where(before > 0, before, 1.0), 0.0))
      if self.corrects or (self.corrects is None and len(self.sources) > 1):
        record = jnp.cumprod(state.hits[:, k] / jnp.maximum(state.hoped[:, k], _LEAST), axis=-1)
        weight = jnp.minimum(found.weight * record[:, None], 1.0)
        found = found.replace(weight=jax.lax.cummin(weight, axis=2))
      lists.append(found)
    merged = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *lists)
    return merged, jnp.concatenate(hopes, axis=1)

  def observe(self, params, state, tree, accepted, output, context):
    parts = tuple(
      s.observe(p, part, tree, accepted, output, context)
      for s, p, part in zip(self.sources, self._params(params), state.parts)
    )
    emitted = accepted.tokens[:, None, : self.max_depth]
    known = jnp.arange(self.max_depth) < accepted.count[:, None, None]
    right = jnp.cumprod(state.valid & known & (state.tokens == emitted), axis=-1).astype(bool)
    before = jnp.pad(right, ((0, 0), (0, 0), (1, 0)), constant_values=True)[..., :-1]
    judged = before & state.valid & known  # guesses after a prefix that was right

    def by_source(x, reduce):
      ends = [sum(s.num_candidates for s in self.sources[:k]) for k in range(1, len(self.sources))]
      return jnp.stack([reduce(part, axis=1) for part in jnp.split(x, ends, axis=1)], axis=1)

    seen = by_source(judged, jnp.any)
    hit = by_source(right, jnp.any).astype(jnp.float32)
    hoped = by_source(jnp.where(judged, state.hope, 0.0), jnp.sum)
    move = lambda old, new: jnp.where(seen, old + self.rate * (new - old), old)  # noqa: E731
    return state.replace(parts=parts, hits=move(state.hits, hit), hoped=move(state.hoped, hoped))


def _fit(found: Candidates, length: int) -> Candidates:
  """Cut or padded to ``length`` tokens."""
  beyond = max(0, length - found.tokens.shape[2])

  def cut(x):
    return jnp.pad(x[..., :length], ((0, 0), (0, 0), (0, beyond)))

  return Candidates(cut(found.tokens), cut(found.valid), cut(found.weight))
