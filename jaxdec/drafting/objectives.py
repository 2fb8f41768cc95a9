# SPDX-License-Identifier: Apache-2.0
"""What a drafter is trained for: weighted sums of named terms, the same for every drafter.

An objective is a term's name (``"hard"``, ``"soft"``, ...) or a tuple of ``Term``. With p the
target's law at a slot, q the drafter's, x the text's token, h the target's state and f the
drafter's prediction of it, a term is one number a slot:

  ================  ============================================================================
  ``hard``          ``-log q(x)``
  ``soft``          ``-sum_v p_v log q_v``; option: temperature of q (Falcon, arXiv 2412.12639)
  ``kl``            ``sum_v p_v log(p_v / q_v)``
  ``top_k``         ``-sum_{v in top-K of p} p_v log q_v``; option: K, 10 (HASS, arXiv 2408.15766)
  ``tv``            ``1/2 sum_v |p_v - q_v|``
  ``nla``           ``-log max(alpha, 1e-5)``, ``alpha = sum_v min(p_v, q_v)`` (arXiv 2602.23881)
  ``lk``            ``l KL + (1 - l)(1 - alpha)``, ``l = exp(-eta mean alpha)`` of the depth,
                    detached; option: eta, 3 (LK loss, arXiv 2602.23881)
  ``list_mle``      ``-sum_i (z_i - logsumexp_{j>=i} z_j)`` over the top-K of p in its order;
                    option: K, 10 (ViSpec, arXiv 2509.15235)
  ``smooth_l1``     mean over D of SmoothL1(f - h) (EAGLE, arXiv 2401.15077)
  ``mse``           mean over D of ``(f - h)^2``
  ``confidence``    ``-alpha log c - (1 - alpha) log(1 - c)``, alpha detached: c, the drafter's own
                    guess of alpha, learns to say it (DSpark, arXiv 2607.05147)
  ``base``          ``-log p_base(x)``, p_base the target's head on the drafter's state
                    (arXiv 2507.11851)
  ================  ============================================================================

Where the drafter has a draft vocabulary S, p is renormalised over S in ``soft``, ``kl``, ``top_k``
and ``list_mle``; in ``tv``, ``nla`` and ``alpha`` it is not: mass outside S can't be accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdec.drafting import losses
from jaxdec.errors import UserError, nearest


@struct.dataclass
class Slots:
  """One depth of a batch, as terms see it; the teacher's side carries no gradient.

  Attributes:
    logits: the drafter's, over its draft vocabulary. teacher: the target's logits on the same
      tokens. mass: log-normaliser of the target's whole law; None: nothing was cut off.
    labels: the text's tokens, as numbers of the draft vocabulary.
    weights: 1.0 where the slot counts.
    predicted, hidden: the drafter's prediction of the target's post-norm state, and that state.
    confidence: log-odds of the drafter's guess of ``alpha``, where it makes one.
    base: logits of the target's own head on the drafter's states, where a sampler head gives q.
  """

  logits: Float[Array, "B S V"]
  teacher: Float[Array, "B S V"]
  labels: Int[Array, "B S"]
  weights: Float[Array, "B S"]
  predicted: Float[Array, "B S D"]
  hidden: Float[Array, "B S D"]
  mass: Float[Array, "B S"] | None = None
  confidence: Float[Array, "B S"] | None = None
  base: Float[Array, "B S V"] | None = None


@dataclasses.dataclass(frozen=True)
class Term:
  """One term of an objective; ``option``: see the table above (None: the default there)."""

  name: str
  weight: float = 1.0
  option: float | None = None


Objective = str | tuple[Term, ...]


def _base(s: Slots, _):
  if s.base is None:
    raise UserError("objective term 'base' is for drafters with a sampler head (masked_mtp)")
  return losses.cross_entropy(s.base, s.labels)


def _confidence(s: Slots, _):
  if s.confidence is None:
    raise UserError("objective term 'confidence' is for drafters with a confidence head")
  alpha = jax.lax.stop_gradient(losses.overlap(s.logits, s.teacher, s.mass))
  return jax.nn.softplus(s.confidence) - alpha * s.confidence


def _soft(s: Slots, temperature: float | None):
  return losses.soft_cross_entropy(s.logits / (temperature or 1.0), s.teacher)


def _lk(s: Slots, _):
  return losses.kl_divergence(s.logits, s.teacher), losses.overlap(s.logits, s.teacher, s.mass)


def _lk_of_depth(parts, weights: Float[Array, "B S"], eta: float | None):
  kl, alpha = parts
  mean = jax.lax.stop_gradient(losses.masked_mean(alpha, weights))
  share = jnp.exp(-(3.0 if eta is None else eta) * mean)
  return share * kl + (1 - share) * (1 - alpha)


# Terms of a slot by itself; what ``COMBINED`` names gives the parts of a term of the whole depth.
TERMS: dict[str, Callable[[Slots, float | None], Any]] = {
  "hard": lambda s, _: losses.cross_entropy(s.logits, s.labels),
  "soft": _soft,
  "kl": lambda s, _: losses.kl_divergence(s.logits, s.teacher),
  "top_k": lambda s, k: losses.top_k_cross_entropy(s.logits, s.teacher, int(k or 10)),
  "tv": lambda s, _: losses.total_variation(s.logits, s.teacher, s.mass),
  "nla": lambda s, _: -jnp.log(jnp.maximum(losses.overlap(s.logits, s.teacher, s.mass), 1e-5)),
  "lk": _lk,
  "list_mle": lambda s, k: losses.list_mle(s.logits, s.teacher, int(k or 10)),
  "smooth_l1": lambda s, _: losses.smooth_l1(s.predicted, s.hidden),
  "mse": lambda s, _: losses.squared_error(s.predicted, s.hidden),
  "confidence": _confidence,
  "base": _base,
}

COMBINED = {"lk": _lk_of_depth}


def parse(objective: Objective) -> tuple[Term, ...]:
  """The terms of an objective.

  Raises:
    UserError: an unknown term, or none at all.
  """
  terms = (Term(objective),) if isinstance(objective, str) else tuple(objective)
  for term in terms:
    if not isinstance(term, Term) or term.name not in TERMS:
      name = term.name if isinstance(term, Term) else term
      raise UserError(
        f"objective has no term {name!r}{nearest(str(name), TERMS)}; known: {', '.join(TERMS)}"
      )
  if not terms:
    raise UserError(f"objective is empty; name at least one of {', '.join(TERMS)}")
  return terms


def needs_labels(objective: Objective) -> bool:
  """Whether the text's own token must lie in the draft vocabulary."""
  return any(t.name == "hard" for t in parse(objective))


def parts(objective: Objective, slots: Slots) -> tuple[Any, ...]:
  """What each term needs of a slot, arrays ``[B,S]``: a depth may be cut into pieces of slots."""
  return tuple(TERMS[t.name](slots, t.option) for t in parse(objective))


def combine(objective: Objective, parts: tuple[Any, ...], weights: Float[Array, "B S"]):
  """The objective at every slot of a depth from the ``parts`` of all its slots: ``[B,S]``."""
  return sum(
    t.weight * (COMBINED[t.name](part, weights, t.option) if t.name in COMBINED else part)
    for t, part in zip(parse(objective), parts)
  )


def value(objective: Objective, slots: Slots) -> Float[Array, "B S"]:
  """The objective at every slot."""
  return combine(objective, parts(objective, slots), slots.weights)


def dpace_weights(
  label_probs: Sequence[Float[Array, "B S"]],
  weights: Sequence[Float[Array, "B S"]],
  smoothing: float = 0.5,
) -> list[Float[Array, "B S"]]:
  """D-PACE (arXiv 2605.18810): a depth matters as much as the drafts that hang on it.

  ``w_j = sum_{m>=j} c_m``, ``c_m = prod_{i<=m} s_i``, ``s_i = (1 - a) q(label_i) + a``; slots that
  don't count have s = 1 and are not summed. Detached. Depths lie in the lists' order, at the same
  slots.
  """
  probs, counted = jnp.stack(label_probs, -1), jnp.stack(weights, -1)
  s = jnp.where(counted > 0, (1 - smoothing) * probs + smoothing, 1.0)
  c = jnp.cumprod(s, axis=-1) * (counted > 0)
  tail = jnp.cumsum(c[..., ::-1], axis=-1)[..., ::-1] * counted
  return list(jnp.moveaxis(jax.lax.stop_gradient(tail), -1, 0))
