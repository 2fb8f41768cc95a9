# SPDX-License-Identifier: Apache-2.0
"""The selective scan: every implementation against the definition, the definition against numpy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.selective_scan import TPUConfig, XLAConfig, selective_scan
from pallas_kernels.testing import (
  TOLERANCE,
  assert_close,
  relative_rms,
  value_and_gradients,
)

IMPLEMENTATIONS = ("xla", "mosaic_tpu")


def on(implementation):
  """The context in which this machine can run it."""
  if implementation != "mosaic_tpu":
    return contextlib.nullcontext()
  return pallas_kernels.target("tpu", interpret=True)


@dataclasses.dataclass(frozen=True)
class Case:
  B: int = 2
  T: int = 63
  D: int = 20
  S: int = 16
  dtype: str = "float32"
  skip: bool = True
  gate: bool = True
  state: bool = True
  segments: tuple[int, ...] = ()  # starts of documents
  decay: float = 1.0
  chunk: int | None = 16
  config: object = None

  def arrays(self, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
      return jnp.asarray(rng.standard_normal(shape), self.dtype)

    b, t, d, s = self.B, self.T, self.D, self.S
    arrays = dict(
      x=normal(b, t, d),
      dt=jnp.asarray(np.exp(rng.uniform(np.log(1e-3), np.log(0.5), (b, t, d))), self.dtype),
      A=jnp.asarray(-self.decay * np.exp(rng.standard_normal((d, s))), jnp.float32),
      B=normal(b, t, s),
      C=normal(b, t, s),
    )
    if self.skip:
      arrays["D"] = jnp.asarray(rng.standard_normal(d), jnp.float32)
    if self.gate:
      arrays["z"] = normal(b, t, d)
    if self.state:
      arrays["initial_state"] = jnp.asarray(rng.standard_normal((b, d, s)), jnp.float32)
    return arrays

  def segment_ids(self):
    ids = np.zeros((self.B, self.T), np.int32)
    for start in self.segments:
      ids[0, start:] += 1
      ids[1:, max(0, start - 3) :] += 1
    return jnp.asarray(ids) if self.segments else None

  def run(self, implementation, arrays):
    config = (
      self.config if isinstance(self.config, XLAConfig) == (implementation == "xla") else None
    )
    call = functools.partial(
      selective_scan, segment_ids=self.segment_ids(), chunk_size=self.chunk,
      implementation=implementation, config=None if implementation == "reference" else config,
    )  # fmt: skip
    return jax.jit(lambda kw: call(**kw))(arrays)


CASES = {
  "plain": Case(T=63),
  "one-token": Case(T=1, chunk=None),
  "prime": Case(B=1, T=127, D=130, S=5, chunk=None),
  "bare": Case(T=31, skip=False, gate=False, state=False),
  "two-blocks": Case(B=1, T=150, D=256, S=8, chunk=None, config=TPUConfig(128, 128)),
  "associative": Case(T=40, config=XLAConfig(associative=True)),
  "documents": Case(T=67, segments=(5, 16, 17, 48)),
  "strong": Case(T=40, decay=2000.0, segments=(20,)),
  "bf16": Case(T=50, dtype="bfloat16"),
}


@functools.cache
def definition(name):
  """Outputs and gradients of the reference, in float32 on the same (rounded) inputs."""
  case = CASES[name]
  arrays = jax.tree.map(lambda x: x.astype(jnp.float32), case.arrays())
  return value_and_gradients(lambda **a: case.run("reference", a), arrays)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_and_gradients(implementation, name):
  case = CASES[name]
  arrays = case.arrays()
  with on(implementation):
    got = value_and_gradients(lambda **a: case.run(implementation, a), arrays)
  out, state = got["out"]
  assert out.dtype == case.dtype and state.dtype == jnp.float32
  assert set(got["grad"]) == set(arrays)
  assert_close(got, definition(name), TOLERANCE[case.dtype])


def numpy_scan(x, dt, A, B, C, D, z, initial_state, starts):
  """One sequence, token by token in float64."""
  h, out = initial_state.copy(), []
  for t in range(len(x)):
    if starts[t]:
      h = np.zeros_like(h)
    h = np.exp(dt[t][:, None] * A) * h + np.outer(dt[t] * x[t], B[t])
    out.append((h @ C[t] + D * x[t]) * z[t] / (1 + np.exp(-z[t])))
  return np.stack(out), h


@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_against_float64(implementation):
  case = CASES["documents"]
  arrays = case.arrays(1)
  out, state = case.run(implementation, arrays)
  a = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
  ids = np.asarray(case.segment_ids())
  for b in range(case.B):
    starts = np.concatenate([[False], ids[b, 1:] != ids[b, :-1]])
    mine = {n: (x if n in ("A", "D") else x[b]) for n, x in a.items()}
    expected = numpy_scan(**mine, starts=starts)
    assert_close((out[b], state[b]), expected, 2e-6)


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
def test_zero_step_is_the_identity(implementation):
  case = Case(B=1, T=20)
  arrays = case.arrays()
  padded = {**arrays, "dt": arrays["dt"].at[:, 13:].set(0.0)}
  short = {n: x[:, :13] if n in ("x", "dt", "B", "C", "z") else x for n, x in arrays.items()}
  with on(implementation):
    out, state = case.run(implementation, padded)
    wanted_out, wanted = dataclasses.replace(case, T=13).run(implementation, short)
    _, moved = case.run(implementation, arrays)
  assert_close((out[:, :13], state), (wanted_out, wanted), 1e-6)
  assert relative_rms(moved, wanted) > 1e-2  # without the zeros the state does move


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_halves_equal_the_whole(implementation):
  case = Case(B=1, T=40)
  arrays = case.arrays()
  per_token = ("x", "dt", "B", "C", "z")
  first = {n: x[:, :17] if n in per_token else x for n, x in arrays.items()}
  second = {n: x[:, 17:] if n in per_token else x for n, x in arrays.items()}
  with on(implementation):
    out, state = case.run(implementation, arrays)
    out1, middle = dataclasses.replace(case, T=17).run(implementation, first)
    out2, last = dataclasses.replace(case, T=23).run(
      implementation, {**second, "initial_state": middle}
    )
  assert_close((jnp.concatenate([out1, out2], 1), last), (out, state), 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_documents_leak_nothing(implementation):
  case = Case(B=1, T=40, segments=(23,))
  arrays = case.arrays()
  with on(implementation):
    run = jax.jit(lambda a: case.run(implementation, a)[0])
    base = run(arrays)
    changed = run({**arrays, "x": arrays["x"].at[:, 5].add(1.0)})
  assert relative_rms(changed[:, 23:], base[:, 23:]) == 0
  assert relative_rms(changed[:, 5:23], base[:, 5:23]) > 1e-3


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
def test_extreme_decays_stay_finite(implementation):
  case = Case(B=1, T=20)
  arrays = case.arrays()
  arrays["A"] = jnp.where(jnp.arange(case.S) % 2 == 0, -1e6, arrays["A"])  # dt * A far below -100
  with on(implementation):
    got = value_and_gradients(lambda **a: case.run(implementation, a), arrays)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
  assert np.all(got["grad"]["initial_state"][..., 0] == 0)


def test_no_tokens():
  arrays = Case(T=0).arrays()
  out, state = selective_scan(**arrays)
  assert out.shape == (2, 0, 20)
  np.testing.assert_array_equal(state, arrays["initial_state"])


def test_memory_does_not_hold_all_states():
  """Forward and backward together stay far below one ``[B,T,D,S]`` array."""
  shape = dict(B=1, T=4096, D=64, S=16)
  arrays = jax.eval_shape(lambda: Case(**shape, chunk=None).arrays())

  def temporary(implementation):
    loss = lambda a: jnp.sum(selective_scan(**a, implementation=implementation)[0])  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(arrays).compile().memory_analysis().temp_size_in_bytes

  states = 4 * 4096 * 64 * 16
  assert temporary("xla") < 0.75 * states < temporary("reference")


@pytest.mark.compare
def test_against_transformers():
  torch = pytest.importorskip("torch", reason="needs the compare extra")
  mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
  if not hasattr(mamba, "mamba_selective_scan"):
    pytest.skip("this transformers has its scan elsewhere")
  case = Case(T=31, state=False)
  arrays = case.arrays()
  t = {name: torch.tensor(np.asarray(x)) for name, x in arrays.items()}
  x, dt, z = (t[n].transpose(1, 2) for n in ("x", "dt", "z"))
  b, c = (t[n].transpose(1, 2) for n in "BC")
  expected, state = mamba.mamba_selective_scan(
    x, dt, t["A"], b, c, t["D"], z=z, return_last_state=True
  )
  got = case.run("xla", arrays)
  assert_close(got, (expected.transpose(1, 2).numpy(), state.numpy()), 1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dt=jnp.zeros((1, 4, 3))), "dt has shape"),
    (dict(A=jnp.zeros((3, 2))), "A has shape"),
    (dict(C=jnp.zeros((1, 4, 5))), "C has shape"),
    (dict(initial_state=jnp.zeros((1, 3, 2))), "initial_state has shape"),
    (dict(chunk_size=0), "chunk_size is at least 1"),
    (dict(implementation="cuda"), "unknown implementation"),
  ],
)
def test_errors(change, message):
  x, b = jnp.zeros((1, 4, 2)), jnp.zeros((1, 4, 3))
  arguments = dict(x=x, dt=x, A=jnp.zeros((2, 3)), B=b, C=b)
  selective_scan(**arguments)
  with pytest.raises(ValueError, match=message):
    selective_scan(**{**arguments, **change})


def test_dispatch():
  case = Case(T=4)
  arrays = case.arrays()
  with pytest.raises(NotImplementedError, match="traced for 'cpu'"):
    case.run("mosaic_tpu", arrays)
  with pytest.raises(NotImplementedError, match="not implemented yet"):
    case.run("mosaic_gpu", arrays)
  assert_close(case.run(("mosaic_gpu", "xla"), arrays), case.run("xla", arrays), 0)
  with pytest.raises(ValueError, match="multiple of 128"):
    TPUConfig(block_t=64)
