# SPDX-License-Identifier: Apache-2.0
"""TPU kernels: logits of a block live in VMEM only, forward and backward.

Forward: a block of tokens stays, the head streams by, running maxima and sums are kept (online
softmax). Backward: one pass in which logits are formed once and serve both gradients. The teacher's
top k is selected in XLA (``xla.teacher_top_k``); the loss on it is a kernel's.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _tpu
from pallas_kernels._dispatch import Unsupported, require_tpu
from pallas_kernels.linear_cross_entropy import _tpu_kernels as kernels
from pallas_kernels.linear_cross_entropy import xla
from pallas_kernels.linear_cross_entropy._config import TPUConfig, XLAConfig
from pallas_kernels.linear_cross_entropy._tpu_kernels import Rules

_NAME = "linear_cross_entropy"
_MEGACORE = ("v4", "v5p")  # two cores are one device, and split an axis of the grid


def linear_cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array | None,
  teacher_hidden: jax.Array | None,
  teacher_head: jax.Array | None,
  *,
  top_k: int | None,
  temperature: float,
  logit_cap: float | None,
  vocab_block: int | None,
  config: TPUConfig | None,
) -> jax.Array:
  """Per-token loss ``[T]``."""
  interpret = require_tpu(_NAME)
  dtype = jnp.promote_types(hidden.dtype, head.dtype)
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise Unsupported(
      f"{_NAME}: mosaic_tpu multiplies float32 or bfloat16, got {hidden.dtype} states and a "
      f"{head.dtype} head; use implementation='xla'."
    )
  if vocab_block is not None:
    if vocab_block % _tpu.LANES:
      raise Unsupported(
        f"{_NAME}: vocab_block of mosaic_tpu is a multiple of {_tpu.LANES}, got {vocab_block}; use "
        f"{max(1, vocab_block // _tpu.LANES) * _tpu.LANES} or implementation='xla'."
      )
    config = TPUConfig(vocab_block=vocab_block, backward_vocab_block=vocab_block)
  dense = labels is None and top_k is None
  rules = plan(
    config or TPUConfig(),
    hidden.shape,
    head,
    dtype,
    teacher_head if dense else None,
    temperature,
    logit_cap,
    interpret,
  )
  if dense:
    return _loss(rules, hidden, head, (teacher_hidden, teacher_head), None)
  if labels is not None:
    return _loss(rules, hidden, head, None, (labels[:, None], None))
  blocks = xla._blocks(XLAConfig(), hidden.shape[0], head.shape[0])
  options = xla.Options(*blocks, temperature, logit_cap)
  teacher_hidden = xla.pad(teacher_hidden, options.token_block)
  ids, log_p = xla.teacher_top_k(teacher_hidden, teacher_head, top_k, options)
  ids, log_p = ids[: hidden.shape[0]], log_p[: hidden.shape[0]]
  p = jnp.exp(log_p)
  return _loss(rules, hidden, head, None, (ids, p)) + jnp.sum(p * log_p, axis=-1)


def plan(
  config, shape, head, dtype, teacher_head, temperature, logit_cap, interpret=False, on=None
) -> tuple[Rules, Rules]:
  """Sizes of the blocks, forward and backward: the largest that fit VMEM, up to a limit.

  The forward kernel does ``token_block`` multiply-adds for every number of the head it reads, the
  backward one ``vocab_block / 2`` or so for every byte of the states and their gradient.
  """
  (tokens, width), vocab, chip = shape, head.shape[0], on or _tpu.chip()
  teacher_width = 0 if teacher_head is None else teacher_head.shape[1]
  size = jnp.dtype(dtype).itemsize
  states = size * (width + teacher_width)  # the wider dtype's: an upper bound, as are all below
  # Six passes make a float32 product, and a program six times as long.
  small = size == 4 or chip.vmem_bytes < 2**25
  sub = config.sub_block or (128 if small else min(256, _round(vocab)))

  def forward(t, v):
    return 2 * (t + v) * states + 4 * 4 * sub * t

  def backward(t, v):
    sums = 4 * width * (2 * t + v) + 2 * size * width * v
    return 2 * (t + v) * states + sums + 2 * size * t * v + 5 * 4 * sub * t + 4 * 128 * (t + v)

  def choose(count, t, v, largest_t, largest_v):
    ts = [t] if t else [n for n in (1024, 512, 256, 128) if n <= max(128, min(largest_t, tokens))]
    vs = [v] if v else [n for n in (2048, 1024, 512, 256, 128) if n <= largest_v and n % sub == 0]
    vs = vs or [sub]
    fitting = [(a, b) for a in ts for b in vs if count(a, b) <= 0.85 * chip.vmem_bytes]
    if not fitting:
      raise Unsupported(
        f"{_NAME}: mosaic_tpu needs {count(ts[-1], vs[-1]) / 2**20:.0f} MiB of VMEM for blocks of "
        f"{ts[-1]} tokens and {vs[-1]} words of width {width}, and {chip.name} has "
        f"{chip.vmem_bytes / 2**20:.0f}; use implementation='xla'."
      )
    return max(fitting, key=lambda ab: ab[0] * ab[1] / (ab[0] + ab[1]))

  cap = _round(vocab, sub)
  t, v = choose(forward, config.token_block, config.vocab_block, 1024, min(512, cap))
  rules = Rules(vocab, jnp.dtype(dtype), temperature, logit_cap, t, v, sub, interpret)
  rules = dataclasses.replace(rules, chunk=128 if size == 4 else 256)
  t, v = choose(
    backward, config.backward_token_block, config.backward_vocab_block, 512, min(1024, cap)
  )
  cores = 2 if chip.name in _MEGACORE and vocab > v else 1
  return rules, dataclasses.replace(rules, tokens=t, rows=v, cores=cores)


def _round(n: int, multiple: int = _tpu.LANES) -> int:
  return -(-n // multiple) * multiple


def _vmem_limit() -> int:
  return int(0.96 * _tpu.chip().vmem_bytes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(rules, hidden, head, teacher, target):
  """KL to ``teacher``, or ``(sum_k p_k) lse - sum_k p_k z[i_k]`` of ``target = (ids, p)``."""
  return _loss_fwd(rules, hidden, head, teacher, target)[0]


def _loss_fwd(rules, hidden, head, teacher, target):
  lse, value, teacher_lse = _forward(rules[0], hidden, head, teacher, target)
  if teacher is not None:
    loss = value
  else:
    mass = 1.0 if target[1] is None else jnp.sum(target[1], axis=-1)
    loss = mass * lse - value
  return loss, (hidden, head, teacher, target, lse, teacher_lse)


def _loss_bwd(rules, saved, g):
  hidden, head, teacher, target, lse, teacher_lse = saved
  grads = _backward(rules[1], hidden, head, teacher, target, lse, teacher_lse, g)
  return *grads, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _operands(rules: Rules, hidden, head, teacher, target, token_axis: int, vocab_axis: int, at):
  """Arrays and block specs common to both kernels; ``at(*grid) -> vocabulary block``."""

  def by_token(width):
    return pl.BlockSpec((rules.tokens, width), lambda *grid: (grid[token_axis], 0))

  def by_vocab(width):
    return pl.BlockSpec((rules.rows, width), lambda *grid: (at(*grid), 0))

  def rows_of(count):
    return pl.BlockSpec((count, rules.tokens), lambda *grid: (0, grid[token_axis]))

  states, heads = [hidden], [head]
  if teacher is not None:
    states, heads = [hidden, teacher[0]], [head, teacher[1]]
  arrays, specs = [], []
  for x, w in zip(states, heads):
    arrays += [xla.pad(x, rules.tokens), xla.pad(w, rules.rows) if len(w) < rules.rows else w]
    specs += [by_token(x.shape[1]), by_vocab(w.shape[1])]
  for row in target or ():
    if row is not None:
      arrays.append(xla.pad(row, rules.tokens).T)
      specs.append(rows_of(row.shape[1]))
  return arrays, specs, by_vocab, rows_of


def _forward(rules: Rules, hidden, head, teacher, target):
  """``(lse, value, teacher's lse or None)``, all ``[T]``."""
  tokens, width = hidden.shape
  dense, weighted = teacher is not None, target is not None and target[1] is not None
  arrays, specs, _, rows_of = _operands(rules, hidden, head, teacher, target, 0, 1, lambda i, j: j)
  grid = (-(-tokens // rules.tokens), rules.blocks)
  padded = grid[0] * rules.tokens
  count = 3 if dense else 2
  widths = width + (teacher[0].shape[1] if dense else 0)
  row = pltpu.VMEM((1, rules.tokens), jnp.float32)
  out = _tpu.call(
    functools.partial(kernels.forward, rules, dense=dense, weighted=weighted),
    name=f"{_NAME}_forward",
    out_shape=[jax.ShapeDtypeStruct((1, padded), jnp.float32)] * count,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0,
      grid=grid,
      in_specs=specs,
      out_specs=[rows_of(1)] * count,
      scratch_shapes=[row] * (5 if dense else 3),
    ),
    dimension_semantics=("parallel", "arbitrary"),
    flops=2 * padded * rules.vocab * widths,
    bytes_accessed=(padded + grid[0] * rules.vocab) * widths * rules.dtype.itemsize,
    transcendentals=(2 if dense else 1) * padded * rules.vocab,
    interpret=rules.interpret,
    vmem_limit_bytes=_vmem_limit(),
  )(*arrays)
  lse, value, *rest = (x[0, :tokens] for x in out)
  return lse, value, rest[0] if rest else None


def _backward(rules: Rules, hidden, head, teacher, target, lse, teacher_lse, g):
  """Gradients of states and head."""
  tokens, width = hidden.shape
  dense, weighted = teacher is not None, target is not None and target[1] is not None
  per_core = -(-rules.blocks // rules.cores)

  def at(core, local, token):
    del token  # a core with a block less than others stays at its last one
    return jnp.minimum(core * per_core + local, rules.blocks - 1)

  arrays, specs, by_vocab, rows_of = _operands(rules, hidden, head, teacher, target, 2, 1, at)
  extra = teacher_lse if dense else jnp.sum(target[1], axis=-1) if weighted else None
  for row in (g.astype(jnp.float32), lse, extra):
    if row is not None:
      arrays.append(xla.pad(row, rules.tokens)[None])
      specs.append(rows_of(1))
  grid = (rules.cores, per_core, -(-tokens // rules.tokens))
  padded = grid[2] * rules.tokens
  widths = width + (teacher[0].shape[1] if dense else 0)
  size = rules.dtype.itemsize
  shape = (max(head.shape[0], rules.rows), width)
  d_hidden, d_head = _tpu.call(
    functools.partial(kernels.backward, rules, dense=dense, weighted=weighted),
    name=f"{_NAME}_backward",
    out_shape=[
      jax.ShapeDtypeStruct((rules.cores, padded, width), jnp.float32),
      jax.ShapeDtypeStruct(shape, head.dtype),
    ],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=0,
      grid=grid,
      in_specs=specs,
      out_specs=[pl.BlockSpec(memory_space=pl.ANY), by_vocab(width)],
      scratch_shapes=[
        pltpu.VMEM((rules.rows, width), jnp.float32),
        pltpu.VMEM((2, rules.tokens, width), jnp.float32),
        pltpu.VMEM((rules.rows, rules.tokens), rules.dtype),
        pltpu.VMEM((rules.tokens, rules.rows), rules.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    dimension_semantics=("parallel", "arbitrary", "arbitrary"),
    flops=2 * padded * rules.vocab * (2 * width + widths),
    bytes_accessed=2 * rules.vocab * widths * size
    + rules.blocks * padded * (widths * size + 8 * width),
    transcendentals=(2 if dense else 1) * padded * rules.vocab,
    interpret=rules.interpret,
    vmem_limit_bytes=_vmem_limit(),
  )(*arrays)
  d_hidden = jnp.sum(d_hidden, axis=0)[:tokens].astype(hidden.dtype)
  return d_hidden, d_head[: head.shape[0]]
