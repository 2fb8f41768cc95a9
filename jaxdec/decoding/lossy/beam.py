# SPDX-License-Identifier: Apache-2.0
"""Beam search and Diverse Beam Search (arXiv 1610.02424): a search for probable texts, no sampling.

Width W in G groups of k = W / G beams. At every step the groups choose in turn; group g takes the k
best continuations by

  S + log p(v) - lambda * n(v),   n(v): beams of groups before g that chose v at this step

(the Hamming diversity of section 4 of the paper), and keeps ``S + log p(v)``, without the penalty.
G = 1 is beam search; lambda = 0 makes all groups equal; group 0 is always beam search of width k.

Finished texts: a continuation that is a stop token leaves the beams for its group's pool if it is
among the group's k best; the k best others go on. A group has finished when its pool holds k texts,
or with the budget, when the texts under way join those of an unfilled pool. Pools are ordered by
``S / length ** length_penalty``. Finished texts and groups count for nobody's diversity. The paper
leaves these rules open; with k = 1 they are greedy decoding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdec.decoding.executables import Executable
from jaxdec.decoding.lossy import common
from jaxdec.decoding.lossy.hypotheses import Pool, append, continuations
from jaxdec.decoding.request import TextCodec
from jaxdec.errors import UserError
from jaxdec.models.decoder import Decoder, DecoderState


@dataclasses.dataclass(frozen=True)
class Beams:
  """Texts found for each prompt, best first.

  Attributes:
    tokens: new token ids, ending with the stop token if one was met; fewer than the width where the
      vocabulary has no more.
    scores: their log-probabilities, no penalties. ranks: what they are ordered by.
    groups: the group that found each. text: None without a tokenizer.
    passes: model passes after the prompts.
  """

  tokens: list[list[list[int]]]
  scores: list[list[float]]
  ranks: list[list[float]]
  groups: list[list[int]]
  text: list[list[str]] | None
  passes: int


@struct.dataclass
class _Carry:
  """Beams under way, and one pool per group. ``done``: pool full, or no beam left."""

  state: DecoderState
  logits: Float[Array, "R V"]
  tokens: Int[Array, "B G k T"]
  score: Float[Array, "B G k"]
  pools: tuple[Pool, ...]
  done: Array
  step: Int[Array, ""]


def generate_beams(
  model: Decoder,
  params: Any,
  prompts,
  *,
  max_new_tokens: int,
  width: int = 4,
  groups: int = 1,
  diversity: float = 0.5,
  length_penalty: float = 0.0,
  stop: Any = ...,
  tokenizer: TextCodec | None = None,
  prefill_chunk: int | None = None,
) -> Beams:
  """The most probable continuations of prompts that beams find.

  Args:
    model, params, prompts, max_new_tokens, stop, tokenizer, prefill_chunk: as of ``generate``
      (``stop``: ids only). Every mixer kind is served.
    width: beams per prompt (W). groups: a divisor of it (G).
    diversity: lambda >= 0; without effect in a single group.
    length_penalty: finished texts are ordered by ``S / length ** length_penalty``; 0 orders them by
      probability, larger values favour long ones.

  Raises:
    UserError: a mistake in any argument, before anything is compiled.
  """
  if width < 1 or groups < 1 or width % groups:
    raise UserError(
      f"width must be a positive multiple of groups, got width {width} in {groups} groups"
    )
  if not 0 <= diversity < float("inf"):
    raise UserError(f"diversity must be a finite number >= 0, got {diversity}")
  if not 0 <= length_penalty < float("inf"):
    raise UserError(f"length_penalty must be a finite number >= 0, got {length_penalty}")
  if width // groups > model.config.vocab_size:
    raise UserError(
      f"{width // groups} beams in a group, but the vocabulary has {model.config.vocab_size} tokens"
    )
  r = common.read(
    model,
    params,
    prompts,
    max_new_tokens=max_new_tokens,
    stop=stop,
    tokenizer=tokenizer,
    prefill_chunk=prefill_chunk,
  )
  pools, passes = _search(
    params,
    r.state,
    r.hidden,
    r.lengths,
    r.stop,
    np.float32(diversity),
    np.float32(length_penalty),
    model=model,
    size=width // groups,
    groups=groups,
    budget=int(max_new_tokens),
  )
  found: list[list[tuple]] = [[] for _ in r.prompts]
  for g, pool in enumerate(jax.device_get(pools)):
    for row, texts in enumerate(found):
      for j in range(pool.rank.shape[1]):
        if np.isfinite(pool.rank[row, j]):
          tokens = pool.tokens[row, j, : pool.length[row, j]].tolist()
          texts.append((float(pool.rank[row, j]), float(pool.score[row, j]), g, tokens))
  for texts in found:
    texts.sort(key=lambda text: -text[0])  # stable: of equal ranks the lower group first
  pick = lambda i: [[text[i] for text in texts] for texts in found]  # noqa: E731
  tokens = pick(3)
  return Beams(tokens, pick(1), pick(0), pick(2), common.decode_all(tokenizer, tokens), int(passes))


def _beams(
  params,
  state,
  hidden,
  lengths,
  stop,
  diversity,
  length_penalty,
  *,
  model: Decoder,
  size: int,
  groups: int,
  budget: int,
):
  batch, rows = lengths.shape[0], size * groups
  first = jnp.arange(batch)[:, None] * rows  # row of a prompt's first beam
  vocab = jnp.arange(model.config.vocab_size)
  ends = common.is_stop(vocab, stop)

  def rank(score, length):
    return score / length.astype(jnp.float32) ** length_penalty

  def choose(c: _Carry):
    """Every group's continuations: the carry without its new logits; parent and token of beams."""
    log_p = jax.nn.log_softmax(c.logits.reshape(batch, groups, size, -1))
    total = c.score[..., None] + log_p
    taken = jnp.zeros((batch, vocab.size))
    length = jnp.broadcast_to(c.step + 1, (batch, size))
    chosen = []
    for g in range(groups):
      done = c.done[:, g, None]
      objective = total[:, g] - diversity * taken[:, None]
      value, text, token = continuations(objective, size)
      over = ends[token] & jnp.isfinite(value) & ~done
      score = _pick(total[:, g], text, token)
      pool = c.pools[g].add(
        append(c.tokens[:, g], text, token, c.step),
        length,
        score,
        jnp.where(over, rank(score, length), -jnp.inf),
      )
      value, text, token = continuations(jnp.where(ends, -jnp.inf, objective), size)
      alive = jnp.isfinite(value) & ~done
      one_hot = (token[..., None] == vocab) & alive[..., None]
      taken = taken + jnp.sum(one_hot, axis=1)
      chosen.append(
        (
          pool,
          append(c.tokens[:, g], text, token, c.step),
          jnp.where(alive, _pick(total[:, g], text, token), -jnp.inf),
          c.done[:, g] | pool.full | ~jnp.any(alive, axis=1),
          text + g * size,
          token,
        )
      )
    pools, tokens, score, done, parent, token = zip(*chosen)
    stack = lambda x: jnp.stack(x, axis=1)  # noqa: E731
    c = c.replace(
      pools=pools, tokens=stack(tokens), score=stack(score), done=stack(done), step=c.step + 1
    )
    return c, stack(parent).reshape(batch, rows), stack(token).reshape(batch, rows)

  def step(c: _Carry):
    c, parent, token = choose(c)
    live = jnp.repeat(~c.done, size, axis=1)
    position = jnp.where(live, lengths[:, None] + c.step - 1, -1)
    state = common.take_rows(c.state, (first + parent).ravel())
    state, logits = common.extend(model, params, state, token.ravel(), position.ravel())
    return c.replace(state=state, logits=logits)

  start = jnp.where(jnp.arange(size) == 0, 0.0, -jnp.inf)  # the beams of a group are equal at first
  c = _Carry(
    state=common.repeat_rows(state, rows),
    logits=common.repeat_rows(common.unembed(model, params, hidden), rows),
    tokens=jnp.zeros((batch, groups, size, budget), jnp.int32),
    score=jnp.broadcast_to(start, (batch, groups, size)),
    pools=tuple(Pool.empty(batch, size, budget) for _ in range(groups)),
    done=jnp.zeros((batch, groups), bool),
    step=jnp.int32(0),
  )
  c = jax.lax.while_loop(lambda c: (c.step < budget - 1) & ~jnp.all(c.done), step, c)
  passes = c.step
  c, *_ = choose(c)  # the budget's last token; nobody needs what would follow
  length = jnp.full((batch, size), budget)
  pools = []
  for g, pool in enumerate(c.pools):
    under_way = jnp.where(pool.full[:, None], -jnp.inf, rank(c.score[:, g], length))
    pools.append(pool.add(c.tokens[:, g], length, c.score[:, g], under_way))
  return tuple(pools), passes


def _pick(total: Float[Array, "B k V"], text: Int[Array, "B k"], token: Int[Array, "B k"]):
  rows = jnp.arange(total.shape[0])[:, None]
  return total[rows, text, token]


_search = Executable("beams", _beams)
