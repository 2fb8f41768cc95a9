# SPDX-License-Identifier: Apache-2.0
"""Sampling under a constraint that is checked on the host, token by token.

Each step draws a token from the model's law among those that the constraint allows, by adaptive
weighted rejection sampling (arXiv 2504.05410): few tokens are ever checked. Token by token that is
not the model's law given the constraint (it walks into dead ends with open eyes), and the weights
put it right: the product of a text's weights is an unbiased importance weight. With several
particles per prompt, sequential Monte Carlo resamples them by weight where the effective sample
size falls below half their number; their weighted law tends to the model's law given the
constraint, and ``exp(log_evidence)`` is an unbiased estimate of the probability that a text of the
model satisfies it (up to ``max_new_tokens``). One particle is the usual local constraint.

The model runs on the device for all rows and particles at once; tokens come to the host in Gumbel
order, a few per row. The compiled part is one step: the constraint lies between two of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.decoding.executables import Executable
from jaxdec.decoding.lossy import awrs, common
from jaxdec.decoding.lossy.common import HOST, PARTICLE, ROUND
from jaxdec.decoding.request import TextCodec
from jaxdec.decoding.sampling import Sampler, gumbel, position_keys
from jaxdec.drafting.selection import top_k
from jaxdec.errors import UserError
from jaxdec.models.decoder import Decoder

SURE = 2 / 3  # of a token as likely as this, two orders estimate Z with less variance than one


class Constraint(Protocol):
  """What texts may be continued by; states are values, never changed."""

  def start(self) -> Any:
    """The state before the first new token."""

  def allows(self, state: Any, token: int) -> bool:
    """Whether ``token`` may follow; a stop token may where the text may end."""

  def advance(self, state: Any, token: int) -> Any:
    """The state after an allowed token."""


@dataclasses.dataclass(frozen=True)
class Constrained:
  """Particles of each prompt.

  Attributes:
    tokens: new token ids, ending with the stop token if one was drawn.
    weights: they sum to 1 for each prompt; 0 where nothing was allowed after the tokens there are,
      and all 0 if that befell every particle.
    log_evidence: log of the estimate of the constraint's probability; -inf if all died.
    complete: whether a stop token ended the text (else the budget did, or it died).
    calls: how often each prompt's constraint was asked.
    text: None without a tokenizer. passes: model passes after the prompts.
  """

  tokens: list[list[list[int]]]
  weights: list[list[float]]
  log_evidence: list[float]
  complete: list[list[bool]]
  calls: list[int]
  text: list[list[str]] | None
  passes: int


def generate_constrained(
  model: Decoder,
  params: Any,
  prompts,
  *,
  constraint: Constraint | list[Constraint],
  max_new_tokens: int,
  particles: int = 1,
  sampler: Sampler = Sampler(temperature=1.0),  # noqa: B008
  variant: Literal["auto", "simple", "geometric"] = "auto",
  max_accepts: int = 2,
  max_rejects: int | None = None,
  pull: int = 32,
  stop: Any = ...,
  seed: int | list[int] = 0,
  tokenizer: TextCodec | None = None,
  prefill_chunk: int | None = None,
) -> Constrained:
  """Samples texts that satisfy a constraint, with importance weights.

  Args:
    model, params, prompts, max_new_tokens, sampler, stop, seed, tokenizer, prefill_chunk: as of
      ``generate`` (``stop``: ids only; temperature > 0). Every mixer kind is served. Particle 0 has
      the noise of plain sampling: alone, with everything allowed, it has its tokens.
    constraint: one for all prompts, or one each; see ``jaxdec.decoding.lossy.grammar`` for regular
      expressions and JSON schemas.
    particles: rows per prompt.
    variant: "simple" or "geometric" (``jaxdec.decoding.lossy.awrs``); "auto" takes the latter where
      ``max_accepts`` > 2 or a token has probability 2/3.
    max_accepts: A of "geometric". max_rejects: its limit of rejects a step, or None.
    pull: tokens that come to the host at first; all of them follow where they don't suffice.

  Raises:
    UserError: a mistake in any argument, before anything is compiled.
  """
  if variant not in ("auto", "simple", "geometric"):
    raise UserError(f"variant must be 'auto', 'simple' or 'geometric', got {variant!r}")
  if particles < 1 or pull < 1 or max_accepts < 2 or (max_rejects is not None and max_rejects < 1):
    raise UserError(
      "particles, pull and max_rejects must be at least 1 and max_accepts at least 2, got "
      f"{particles}, {pull}, {max_rejects} and {max_accepts}"
    )
  if isinstance(sampler, Sampler) and sampler.greedy:
    raise UserError("constrained sampling needs a temperature > 0; write Sampler(temperature=1.0)")
  constraints = list(constraint) if isinstance(constraint, (list, tuple)) else [constraint]
  if isinstance(constraint, (list, tuple)) and len(constraints) != len(prompts):
    raise UserError(
      f"{len(constraints)} constraints for {len(prompts)} prompts; give one each, or one for all"
    )
  r = common.read(
    model,
    params,
    prompts,
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    stop=stop,
    seed=seed,
    tokenizer=tokenizer,
    prefill_chunk=prefill_chunk,
  )
  if len(constraints) == 1:
    constraints = constraints * len(r.prompts)
  static = dict(
    model=model,
    sampler=sampler,
    orders=1 if variant == "simple" else int(max_accepts),
    pull=min(int(pull), model.config.vocab_size),
  )
  stops = set(np.asarray(r.stop).tolist()) - {-1}
  streams = np.asarray(jax.random.key_data(position_keys(r.keys, r.lengths, HOST)))
  clouds = [
    _Cloud(c, particles, stops, np.random.default_rng(stream.tolist()), variant, max_rejects)
    for c, stream in zip(constraints, streams)
  ]
  keys, state, offer = _begin(
    params, r.state, r.hidden, r.lengths, r.keys, particles=int(particles), **static
  )
  first = np.repeat(np.arange(len(clouds)) * particles, particles)
  lengths = np.repeat(np.asarray(r.lengths), particles)
  passes = 0
  while True:
    rows = _Offer(offer)
    for b, cloud in enumerate(clouds):
      cloud.draw(rows, b * particles)
    if passes == max_new_tokens - 1 or not any(cloud.alive.any() for cloud in clouds):
      break
    moved = [cloud.resample() for cloud in clouds]
    # Where nobody moved, nothing is copied.
    index = None
    if any(m is not None for m in moved):
      within = [np.arange(particles) if m is None else m for m in moved]
      index = jnp.asarray(first + np.concatenate(within), jnp.int32)
    last = [text[-1] if text else 0 for cloud in clouds for text in cloud.tokens]
    alive = np.concatenate([cloud.alive for cloud in clouds])
    position = np.where(alive, lengths + passes, -1).astype(np.int32)
    state, offer = _step(
      params, state, keys, index, np.int32(last), position, np.int32(lengths + passes + 1), **static
    )
    passes += 1
  tokens = [cloud.tokens for cloud in clouds]
  weights, evidence = zip(*(cloud.summary() for cloud in clouds))
  return Constrained(
    tokens=tokens,
    weights=list(weights),
    log_evidence=list(evidence),
    complete=[cloud.complete.tolist() for cloud in clouds],
    calls=[cloud.calls for cloud in clouds],
    text=common.decode_all(tokenizer, tokens),
    passes=passes,
  )


class _Cloud:
  """The particles of one prompt, on the host."""

  def __init__(self, constraint, particles, stops, rng, variant, max_rejects):
    self.constraint, self.stops, self.rng = constraint, stops, rng
    self.variant, self.max_rejects = variant, max_rejects
    self.tokens: list[list[int]] = [[] for _ in range(particles)]
    self.states = [constraint.start()] * particles
    self.log_w = np.zeros(particles)
    self.log_z = 0.0  # of the resamplings so far
    self.alive, self.complete = np.ones(particles, bool), np.zeros(particles, bool)
    self.calls = 0

  def draw(self, rows: _Offer, first: int) -> None:
    """One token for every particle that is alive."""
    for j in np.flatnonzero(self.alive):
      state = self.states[j]
      ok = functools.partial(self.constraint.allows, state)
      if rows.geometric(first + j, self.variant):
        orders = [rows.order(first + j, a) for a in range(rows.orders)]
        drawn = awrs.geometric(orders, ok, self.rng, self.max_rejects)
      else:
        drawn = awrs.simple(rows.order(first + j, 0), ok)
      self.calls += drawn.calls
      if drawn.token is None or drawn.weight <= 0:
        self.alive[j], self.log_w[j] = False, -np.inf
        continue
      self.tokens[j] = [*self.tokens[j], drawn.token]
      self.log_w[j] += np.log(drawn.weight)
      if drawn.token in self.stops:
        self.alive[j], self.complete[j] = False, True
      else:
        self.states[j] = self.constraint.advance(state, drawn.token)

  def resample(self) -> np.ndarray | None:
    """Which particle each is replaced by, where the effective sample size calls for it."""
    w, total = self._weights()
    if not self.alive.any() or w.size == 1 or 1 / np.sum(w * w) >= w.size / 2:
      return None
    # Systematic: one uniform, evenly spaced points.
    points = (self.rng.random() + np.arange(w.size)) / w.size
    index = np.minimum(np.searchsorted(np.cumsum(w), points, side="right"), np.flatnonzero(w)[-1])
    self.log_z += total
    self.log_w = np.zeros(w.size)
    self.tokens = [self.tokens[i] for i in index]
    self.states = [self.states[i] for i in index]
    self.alive, self.complete = self.alive[index], self.complete[index]
    return index

  def summary(self) -> tuple[list[float], float]:
    """Normalised weights, log evidence."""
    w, total = self._weights()
    return w.tolist(), float(self.log_z + total)

  def _weights(self):
    """Normalised weights (all 0 where all are), log of their mean."""
    top = np.max(self.log_w)
    if top == -np.inf:
      return np.zeros(self.log_w.size), -np.inf
    w = np.exp(self.log_w - top)
    return w / w.sum(), top + np.log(w.mean())


class _Offer:
  """A step's tokens in their orders: a few at once, the rest when they are asked for."""

  def __init__(self, offer):
    few, best, self._rest = offer
    self._ids, self._log_p, self._best = jax.device_get((*few, best))
    self.orders = self._ids.shape[1]
    self._all: dict[int, tuple[np.ndarray, np.ndarray]] = {}

  def geometric(self, row: int, variant: str) -> bool:
    if variant == "auto":
      return self.orders > 2 or self._best[row] >= np.log(SURE)
    return variant == "geometric"

  def order(self, row: int, number: int) -> Iterator[tuple[int, float]]:
    """Tokens of the law's support with their probabilities."""
    yield from self._possible(self._ids[row, number], self._log_p[row, number])
    if row not in self._all:
      self._all[row] = jax.device_get((self._rest[0][row], self._rest[1][row]))
    log_p, keyed = self._all[row]
    ids = np.argsort(-keyed[number], kind="stable")[self._ids.shape[2] :]
    yield from self._possible(ids, log_p[ids])

  @staticmethod
  def _possible(ids, log_p):
    for token, x in zip(ids.tolist(), log_p.tolist()):
      if x == -np.inf:
        return  # what follows is impossible as well
      yield token, float(np.exp(x))


def _offer(logits, keys, position, sampler: Sampler, orders: int, pull: int):
  """``(ids, log p) [R, A, pull]``, the largest log p, and everything ``([R, V], [R, A, V])``."""
  log_p = sampler.log_probs(logits)
  own = [position_keys(keys, position)]
  later = position_keys(keys, position, ROUND)
  own += [jax.vmap(jax.random.fold_in, (0, None))(later, a) for a in range(1, orders)]
  # The unnormalised law, as plain sampling adds noise to it: the same argmax to the last bit.
  law = sampler.process(logits)
  keyed = jnp.stack([law + gumbel(k, law.shape[-1]) for k in own], axis=1)
  _, ids = top_k(keyed, pull)
  few = ids, jnp.take_along_axis(log_p[:, None], ids, axis=-1)
  return few, jnp.max(log_p, axis=-1), (log_p, keyed)


def _start(params, state, hidden, lengths, keys, *, model: Decoder, particles: int, **how):
  # Particle 0 draws with the request's own key.
  other = jax.vmap(lambda k: jax.random.fold_in(k, jnp.uint32(PARTICLE)))(keys)
  keys = jnp.concatenate([keys[:, None], common.branch_keys(other, particles)[:, 1:]], axis=1)
  keys = keys.ravel()
  state = common.repeat_rows(state, particles)
  logits = common.repeat_rows(common.unembed(model, params, hidden), particles)
  return keys, state, _offer(logits, keys, jnp.repeat(lengths, particles), **how)


def _next(params, state, keys, index, last, position, at, *, model: Decoder, **how):
  if index is not None:
    state = common.take_rows(state, index)
  state, logits = common.extend(model, params, state, last, position)
  return state, _offer(logits, keys, at, **how)


_begin = Executable("constrained_begin", _start)
_step = Executable("constrained_step", _next, donate=(1,))
