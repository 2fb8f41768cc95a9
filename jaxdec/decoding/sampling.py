# SPDX-License-Identifier: Apache-2.0
"""The sampling law, in one place: decoding, verification and drafting all call it.

  logits -> / temperature -> top-k -> top-p -> min-p -> log-softmax,   all in float32.

Noise is counter-based: the token at absolute position t of a request is
``argmax(log p + Gumbel(k_t))`` with ``k_t = fold_in(request key, t)``. What is
drawn at t then depends on the law and the key only, so any drafter gives the tokens of plain
decoding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxdec.drafting.selection import argmax
from jaxdec.errors import UserError

# Purposes of noise at one position. Tags sit far above any position, so no two keys coincide.
ACCEPT, RESAMPLE, DRAFT, FILL = (2**32 - 1 - i for i in range(4))


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is drawn; hashable, so it is static under ``jit``.

  Attributes:
    temperature: 0 is greedy (the filters then change nothing).
    top_k: keep the k most likely tokens; tokens tied with the k-th are kept too.
    top_p: keep the fewest most likely tokens whose mass reaches p, those tied with the last too.
    min_p: keep tokens at least ``min_p`` times as likely as the most likely one.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise UserError(f"temperature must be a number >= 0, got {self.temperature}; 0 is greedy")
    if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
      raise UserError(f"top_k must be an integer >= 1, got {self.top_k}; None keeps every token")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise UserError(f"top_p must lie in (0, 1], got {self.top_p}; None keeps every token")
    if self.min_p is not None and not 0 <= self.min_p <= 1:
      raise UserError(f"min_p must lie in [0, 1], got {self.min_p}; None keeps every token")

  @property
  def greedy(self) -> bool:
    return self.temperature == 0

  def process(self, logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
    """Unnormalised float32 log-probabilities of the law; dropped tokens are -inf.

    The filters find their thresholds by bisection over the bits of float32 (31 passes over V, no
    sort: several times cheaper on a CPU, and exact).
    """
    z = logits.astype(jnp.float32)
    if self.greedy:
      return jnp.where(jnp.arange(z.shape[-1]) == argmax(z)[..., None], 0.0, -jnp.inf)
    # A product with the rounded inverse, which is how a compiler divides by a constant anyway: so
    # that temperatures given as data (``RowSampler``) round alike. After the difference: a product
    # before it may be fused into it, unrounded, in one place that reads z and not in another, and
    # then a filter's threshold is no value of z.
    z = (z - jnp.max(z, axis=-1, keepdims=True)) * inverse(self.temperature)
    if self.top_k is not None and self.top_k < z.shape[-1]:
      z = keep_top_k(z, float(self.top_k))
    if self.top_p is not None and self.top_p < 1:
      z = keep_top_p(z, self.top_p)
    if self.min_p:
      z = jnp.where(z >= np.log(np.float32(self.min_p)), z, -jnp.inf)
    return z

  def log_probs(self, logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
    """``log p`` of the law, float32; dropped tokens are -inf, the kept ones sum to 1."""
    return jax.nn.log_softmax(self.process(logits), axis=-1)

  def draw(
    self, logits: Float[Array, "B *T V"], keys: Key[Array, "B"], positions: Int[Array, "B *T"]
  ) -> Int[Array, "B *T"]:
    """One token per (row, position) from the noise of that position; greedy: the argmax.

    Args:
      logits: of the token *at* ``positions``, i.e. computed from the tokens before it.
      keys: one request key per row.
    """
    if self.greedy:
      return argmax(logits)
    noise = gumbel(position_keys(keys, positions), logits.shape[-1])
    return argmax(self.process(logits) + noise)  # the normaliser would not move the argmax

  def draw_independently(
    self, logits: Float[Array, "B *T V"], keys: Key[Array, "B"], positions: Int[Array, "B *T"]
  ) -> Int[Array, "B *T"]:
    """``draw`` with the DRAFT noise of the position: what rule ``ratio`` needs of its drafts."""
    if self.greedy:
      return argmax(logits)
    noise = gumbel(position_keys(keys, positions, DRAFT), logits.shape[-1])
    return argmax(self.process(logits) + noise)

  def noise(
    self, keys: Key[Array, "B"], positions: Int[Array, "B *T"], size: int
  ) -> Float[Array, "B *T V"]:
    """The noise ``draw`` adds at ``positions``: a drafter that ranks its guesses with it agrees
    with the target's draw more often, and the output doesn't depend on it."""
    return gumbel(position_keys(keys, positions), size)


def request_keys(seed: int | list[int], batch: int) -> Key[Array, "B"]:
  """One key per row: row i of an integer seed has ``fold_in(key(seed), i)``; row i of a list of
  seeds has ``fold_in(key(seed[i]), 0)``, what a batch of one with that seed has."""
  if isinstance(seed, int):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))
  return jnp.stack([jax.random.fold_in(jax.random.key(s), 0) for s in seed])


def position_keys(
  keys: Key[Array, "B"], positions: Int[Array, "B *T"], purpose: int | None = None
) -> Key[Array, "B *T"]:
  """``fold_in(key, position)`` row by row; ``purpose`` (ACCEPT, ..., FILL) gives noise
  independent of the target's own draw at the same position."""
  if purpose is not None:
    keys = jax.vmap(lambda k: jax.random.fold_in(k, jnp.uint32(purpose)))(keys)
  if positions.ndim == 1:
    return jax.vmap(jax.random.fold_in)(keys, positions)
  return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)


def gumbel(keys: Key[Array, "*B"], size: int) -> Float[Array, "*B V"]:
  """Gumbel noise, one row of ``size`` per key."""
  draw = lambda k: jax.random.gumbel(k, (size,), jnp.float32)  # noqa: E731
  for _ in range(keys.ndim):
    draw = jax.vmap(draw)
  return draw(keys)


def inverse(temperature: float) -> np.float32:
  """``1 / temperature``, rounded once."""
  return np.float32(1) / np.float32(temperature)


def keep_top_k(z: Float[Array, "... V"], k: float | Float[Array, "... 1"]) -> Float[Array, "... V"]:
  """``z <= 0`` with -inf below the k-th largest; k = inf keeps all."""
  # exp keeps the order but may merge far-away values: count on the logits, as bits of -z >= 0.
  return jnp.where(-z <= _smallest(-z, jnp.ones_like(z), k), z, -jnp.inf)


def keep_top_p(z: Float[Array, "... V"], p: float | Float[Array, "... 1"]) -> Float[Array, "... V"]:
  """``z <= 0`` with -inf outside the fewest whose mass reaches p; p = inf keeps all."""
  return jnp.where(-z <= _smallest(-z, jax.nn.softmax(z, axis=-1), p), z, -jnp.inf)


def _smallest(
  cost: Float[Array, "... V"], weight: Float[Array, "... V"], mass: float | Float[Array, "... 1"]
) -> Float[Array, "... 1"]:
  """The least t >= 0 for which the tokens of ``cost <= t`` weigh at least ``mass``; costs are >= 0.

  Non-negative floats are ordered like their bits, so 31 halvings of the bit pattern find t exactly.
  Falls back to +inf (keep all) where rounding leaves the total below ``mass``.
  """
  # -0.0 has the sign bit set: adding 0.0 makes it +0.0.
  bits = jax.lax.bitcast_convert_type(cost + 0.0, jnp.int32)
  low = jnp.zeros((*cost.shape[:-1], 1), jnp.int32)
  high = jnp.full_like(low, 0x7F800000)  # +inf

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    enough = jnp.sum(jnp.where(bits <= middle, weight, 0.0), -1, keepdims=True) >= mass
    # Not beyond +inf, whose next bits are a NaN's.
    return (
      jnp.where(enough, low, jnp.minimum(middle + 1, high)),
      jnp.where(enough, middle, high),
    )

  low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
  return jax.lax.bitcast_convert_type(low, jnp.float32)
