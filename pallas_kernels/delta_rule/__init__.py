# SPDX-License-Identifier: Apache-2.0
"""The delta rule: a recurrent memory that overwrites what a key held before.

DeltaNet, its scalar gate (Gated DeltaNet, Qwen3-Next) and its channel gate (Kimi Delta Attention).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from pallas_kernels import _checks, _numerics
from pallas_kernels._dispatch import Op

__all__ = ["TPUConfig", "XLAConfig", "check_keys", "delta_rule"]

CHUNKS = (8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class XLAConfig:
  """Chunks whose state-independent part is computed at once; one state in ``group`` is saved."""

  group: int = 8

  def __post_init__(self):
    if self.group < 1:
      raise ValueError(f"XLAConfig: group is at least 1, got {self.group}.")


@dataclasses.dataclass(frozen=True)
class TPUConfig:
  """Work of one grid step; a zero means: chosen by the backend for the chip and the shapes.

  Attributes:
    group: chunks a step; their triangular systems are independent and hide one another's latency.
      One state in ``group`` is saved for the backward pass.
    heads: heads a step; their walks over states are independent too.
  """

  group: int = 0
  heads: int = 0

  def __post_init__(self):
    if self.group < 0 or self.heads < 0:
      raise ValueError(f"TPUConfig: group and heads are 0 (automatic) or more, got {self}.")


_OP = Op("delta_rule", __name__, {"xla": XLAConfig, "mosaic_tpu": TPUConfig})


def delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  *,
  log_decay: jax.Array | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  scale: float | None = None,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] = "auto",
  config: XLAConfig | TPUConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Gated delta rule, per head with state ``S [H,Hv]``, from the first token to the last:

    S   <- exp(g_t) S                            decay, a number or one per row of S
    S   <- S + beta_t k_t (v_t - k_t^T S)^T      replace what k_t reads by v_t
    o_t  = scale S^T q_t

  Keys should have norm 1 (more exactly ``beta |k|^2 <= 2``): the caller normalises, and
  ``check_keys`` tests it. Beyond that the recurrence itself grows without bound.

  Args:
    q, k, v: ``[B,T,Nq,H]``, ``[B,T,Nk,H]``, ``[B,T,Nv,Hv]``. N is the largest of all head counts
      and a multiple of each; head n uses head ``n // (N / K)`` of an array with K heads.
    beta: ``[B,T,N]``, how much of the old value is replaced.
    log_decay: g <= 0, ``[B,T,N]``, or ``[B,T,N,H]`` for one decay per channel of the keys; axes B
      and T may be 1. Values below -100, also -inf, forget everything. None: no decay.
    initial_state: ``[B,N,H,Hv]``. None: zeros.
    segment_ids: int32 ``[B,T]``; the state is cleared where the id differs from the previous
      token's (never at the first token: the initial state belongs to its segment).
    scale: of the queries; None: ``H ** -0.5``.
    chunk_size: a power of two from 8 to 256; None: chosen by the backend. Not of influence on the
      result beyond rounding.
    implementation: see ``pallas_kernels._dispatch``.
    config: ``XLAConfig`` or ``TPUConfig``.

  Returns:
    Outputs ``[B,T,N,Hv]`` in q's dtype and the state after the last token, ``[B,N,H,Hv]`` float32.

  Raises:
    ValueError: shapes that don't fit, or a chunk_size that isn't available.
    NotImplementedError: the named implementation can't run this call; says why.

  Sources: DeltaNet, arXiv:2406.06484; Gated DeltaNet, arXiv:2412.06464, eq. 10; Kimi Linear,
  arXiv:2510.26692, eq. 1.

  >>> import jax.numpy as jnp
  >>> k = jnp.eye(2).reshape(1, 2, 1, 2)  # two tokens, one head: orthonormal keys
  >>> v = jnp.array([3.0, 4.0]).reshape(1, 2, 1, 1)
  >>> out, state = delta_rule(k, k, v, jnp.ones((1, 2, 1)), scale=1.0)
  >>> out.ravel().tolist(), state.ravel().tolist()  # a key-value store
  ([3.0, 4.0], [3.0, 4.0])
  """
  name = "delta_rule"
  sizes = _checks.shapes(
    name, q=(q, "B T Nq H"), k=(k, "B T Nk H"), v=(v, "B T Nv Hv"), beta=(beta, "B T N")
  )
  heads = {"q": sizes["Nq"], "k": sizes["Nk"], "v": sizes["Nv"], "beta": sizes["N"]}
  n = _checks.divides(name, heads)
  b, t, h = sizes["B"], sizes["T"], sizes["H"]
  if sizes["N"] != n:
    raise ValueError(f"{name}: beta has {sizes['N']} heads, expected {n}, the largest head count.")
  channel = log_decay is not None and jnp.ndim(log_decay) == 4
  _checks.shapes(
    name,
    q=(q, f"{b} {t} Nq {h}"),
    log_decay=(log_decay, f"#B #T {n} {h}" if channel else f"#B #T {n}"),
    initial_state=(initial_state, f"{b} {n} {h} {sizes['Hv']}"),
    segment_ids=(segment_ids, f"{b} {t}"),
  )
  if log_decay is not None:
    _broadcasts(name, log_decay, b, t)
  if chunk_size is not None and chunk_size not in CHUNKS:
    raise ValueError(f"{name}: chunk_size is one of {CHUNKS} or None, got {chunk_size}.")
  if initial_state is None:
    initial_state = jnp.zeros((b, n, h, sizes["Hv"]), _numerics.accumulator(q))
  initial_state = initial_state.astype(_numerics.accumulator(initial_state))
  if t == 0:
    return jnp.zeros((b, 0, n, sizes["Hv"]), q.dtype), initial_state
  decays = _numerics.log_decays(log_decay, segment_ids, (b, t, n, h) if channel else (b, t, n))
  return _OP(
    q,
    k,
    v,
    beta,
    decays,
    initial_state,
    scale=_checks.scale_of(scale, h),
    chunk_size=chunk_size,
    implementation=implementation,
    config=config,
  )


def check_keys(k: jax.Array, beta: jax.Array, *, tolerance: float = 1e-2) -> None:
  """Debugging aid: are keys and betas such that the recurrence can't grow?

  A token multiplies the state by ``I - beta k k^T``, whose norm is at most 1 exactly if
  ``0 <= beta |k|^2 <= 2``. On arrays it raises at once; inside ``jit`` it acts only under
  ``jax.experimental.checkify.checkify`` (and costs nothing otherwise).

  Args:
    k: ``[B,T,Nk,H]``. beta: ``[B,T,N]``, N a multiple of Nk. tolerance: allowed beyond 2.

  Raises:
    ValueError: the bound is exceeded (a ``JaxRuntimeError`` from ``checkify``).

  >>> import jax.numpy as jnp
  >>> check_keys(jnp.ones((1, 1, 1, 4)) / 2, jnp.ones((1, 1, 1)))
  """
  squares = jnp.sum(jnp.square(k.astype(jnp.float32)), axis=-1)
  squares = jnp.repeat(squares, beta.shape[-1] // k.shape[-2], axis=-1)
  growth = squares * beta.astype(jnp.float32)
  worst, least = jnp.max(growth), jnp.min(growth)
  fine = (worst <= 2 + tolerance) & (least >= -tolerance)
  text = "delta_rule: beta |k|^2 spans [{}, {}], expected within [0, 2]; normalise the keys."
  if isinstance(fine, jax.core.Tracer):
    checkify.debug_check(fine, text, least, worst)
  elif not fine:
    raise ValueError(text.format(least, worst))


def _broadcasts(name: str, log_decay: jax.Array, b: int, t: int) -> None:
  got = jnp.shape(log_decay)
  if got[0] not in (1, b) or got[1] not in (1, t):
    raise ValueError(f"{name}: log_decay has shape {got}, expected B in (1, {b}), T in (1, {t}).")
