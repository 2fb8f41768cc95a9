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
from jaxtyping import Array, Bool, Float, Int

from jaxdec.decoding.executables import Executable
from jaxdec.decoding.lossy import common
from jaxdec.decoding.lossy.hypotheses import Hypotheses, unpack
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
  state: DecoderState
  logits: Float[Array, "R V"]
  groups: tuple[Hypotheses, ...]
  step: Int[Array, ""]

  @property
  def done(self) -> Bool[Array, "B G"]:
    return jnp.stack([group.done for group in self.groups], axis=1)


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
  by_group = map(unpack, pools)
  found = [
    # A stable sort: of equal ranks the lower group comes first.
    sorted(((*text, g) for g, texts in enumerate(row) for text in texts), key=lambda x: -x[0])
    for row in zip(*by_group)
  ]
  pick = lambda i: [[text[i] for text in row] for row in found]  # noqa: E731
  tokens = pick(2)
  text = common.decode_all(tokenizer, tokens)
  return Beams(tokens, pick(1), pick(0), pick(3), text, int(passes))


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
  ids = jnp.broadcast_to(vocab, (batch, vocab.size))

  def rank(score, length):
    return score / length.astype(jnp.float32) ** length_penalty

  def choose(c: _Carry):
    """The groups in turn: new groups; parent and token of every beam ``[B, W]``."""
    log_p = jax.nn.log_softmax(c.logits.reshape(batch, groups, size, -1))
    taken = jnp.zeros((batch, vocab.size))
    chosen = []
    for g, group in enumerate(c.groups):
      score = group.score[..., None] + log_p[:, g]
      objective = score - diversity * taken[:, None]
      group, parent, token = group.grow(objective, score, ids, stop, c.step, rank)
      taken += jnp.sum((token[..., None] == vocab) & group.alive[..., None], axis=1)
      chosen.append((group, parent + g * size, token))
    grown, parent, token = zip(*chosen)
    return grown, jnp.concatenate(parent, axis=1), jnp.concatenate(token, axis=1)

  def step(c: _Carry):
    grown, parent, token = choose(c)
    c = c.replace(groups=grown)
    going = jnp.repeat(~c.done, size, axis=1)
    position = jnp.where(going, lengths[:, None] + c.step, -1)
    state = common.take_rows(c.state, (first + parent).ravel())
    state, logits = common.extend(model, params, state, token.ravel(), position.ravel())
    return c.replace(state=state, logits=logits, step=c.step + 1)

  c = _Carry(
    state=common.repeat_rows(state, rows),
    logits=common.repeat_rows(common.unembed(model, params, hidden), rows),
    groups=tuple(Hypotheses.start(batch, size, budget) for _ in range(groups)),
    step=jnp.int32(0),
  )
  c = jax.lax.while_loop(lambda c: (c.step < budget - 1) & ~jnp.all(c.done), step, c)
  grown, *_ = choose(c)  # the budget's last token; nobody needs what would follow
  return tuple(group.close(rank) for group in grown), c.step


_search = Executable("beams", _beams)
