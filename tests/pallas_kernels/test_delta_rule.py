# SPDX-License-Identifier: Apache-2.0
"""delta_rule: every implementation against the token recurrence, adversarial keys and decays."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pallas_kernels import Unsupported, target
from pallas_kernels._chunks import Products
from pallas_kernels.delta_rule import TPUConfig, XLAConfig, _inverse, check_keys, delta_rule, xla
from pallas_kernels.testing import TOLERANCE, assert_close, relative_rms, value_and_gradients

IMPLEMENTATIONS = ("xla", "mosaic_tpu")


def make(
  b=1, t=64, q=1, k=1, v=1, n=1, h=32, width=32, decay="scalar", dtype=jnp.float32, seed=0
) -> dict[str, jax.Array]:
  """Random arguments of delta_rule with keys of norm 1 and decays around exp(-0.4)."""
  keys = iter(jax.random.split(jax.random.key(seed), 8))

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  arrays = dict(
    q=normal(b, t, q, h),
    k=unit(normal(b, t, k, h)),
    v=normal(b, t, v, width),
    beta=jax.nn.sigmoid(normal(b, t, n)),
  )
  arrays = {name: x.astype(dtype) for name, x in arrays.items()}
  if decay != "none":
    arrays["log_decay"] = -jnp.exp(normal(b, t, n, *([h] if decay == "channel" else [])) - 1)
  arrays["initial_state"] = normal(b, n, h, width)
  return arrays


def unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def run(implementation, arrays, **options):
  """Outputs, final state and all gradients."""
  if implementation == "mosaic_tpu":  # interpreted: a chunk a step keeps the programs small
    options["config"] = options.get("config") or TPUConfig(group=1)
  with target("tpu" if implementation == "mosaic_tpu" else "cpu", interpret=True):
    op = functools.partial(delta_rule, implementation=implementation, **options)
    return value_and_gradients(lambda **xs: op(**xs), arrays)


def check(implementation, arrays, *, tolerance=None, **options):
  dtype = str(arrays["q"].dtype)
  config = options.pop("config", None)
  chunk = options.pop("chunk_size", None)
  got = run(implementation, arrays, chunk_size=chunk, config=config, **options)
  wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
  expected = run("reference", wide, **options)
  finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(got))
  assert finite
  assert_close(got, expected, tolerance or TOLERANCE[dtype])
  return got, expected


CASES = {
  "value heads are twice the key heads": make(t=127, q=2, k=2, v=4, n=4),
  "every head count its own": make(t=63, q=2, k=1, v=4, n=4, h=64, width=16),
  "channel decay, two batches": make(b=2, t=101, n=2, k=2, decay="channel"),
  "no decay, one token": make(t=1, decay="none", n=2, k=2),
  "wide heads": make(t=37, h=256, width=128, decay="channel"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outputs_state_and_all_gradients(implementation, case):
  if implementation == "mosaic_tpu" and case == "no decay, one token":
    pytest.skip("one token is left to xla, tested below")
  check(implementation, CASES[case], chunk_size=32 if implementation == "mosaic_tpu" else None)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation, decay):
  got, _ = check(implementation, make(t=70, decay=decay, dtype=jnp.bfloat16), chunk_size=32)
  out, state = got["out"]
  assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_groups_of_chunks(implementation):
  """States are saved every second chunk and recomputed between; T is not whole groups."""
  config = {"xla": XLAConfig(group=2), "mosaic_tpu": TPUConfig(group=2)}[implementation]
  check(implementation, make(t=83), chunk_size=16, config=config)


# --- adversarial: one batch, one compilation; each element judged alone ---------------------------


def alike(cosine, shape, seed):
  """Unit keys with that mutual cosine."""
  shared, own = jax.random.normal(jax.random.key(seed), (2, *shape))
  shared = unit(shared[:, :1] * jnp.ones_like(own))
  own = own - jnp.sum(own * shared, -1, keepdims=True) * shared
  return np.sqrt(cosine) * shared + np.sqrt(1 - cosine) * unit(own)


def correlated() -> tuple[list[str], dict[str, jax.Array]]:
  names = ["cosine 0.9", "cosine 0.99", "equal, beta 1", "equal, beta 2", "beta 0"]
  arrays = make(b=5, t=128, seed=1, decay="none")
  shape = (1, *arrays["k"].shape[1:])
  # exactly of norm 1: at beta 2 the state is reflected, and 1 + 1e-7 would be the growth a token
  equal = jnp.zeros(shape).at[..., :16].set(0.25)
  keys = [alike(0.9, shape, 0), alike(0.99, shape, 1), equal, equal, alike(0.5, shape, 2)]
  beta = [arrays["beta"][0], jnp.ones_like(arrays["beta"][0])] + [
    jnp.full_like(arrays["beta"][0], x) for x in (1.0, 2.0, 0.0)
  ]
  return names, arrays | dict(k=jnp.concatenate(keys), beta=jnp.stack(beta))


STRONG = ("-20 each", "-100 each", "one -20", "one -1e9", "one -inf", "half at -20", "-5", "0")


def strong(decay) -> tuple[list[str], dict[str, jax.Array]]:
  arrays = make(b=len(STRONG), t=64, seed=2, decay=decay)
  g = np.full(arrays["log_decay"].shape, -0.01, np.float32)
  g[0], g[1], g[6], g[7] = -20, -100, -5, 0
  g[2, 5::19], g[3, 23], g[4, 24] = -20, -1e9, -np.inf
  if decay == "channel":
    g[5, ..., ::2] = -20
  else:
    g[5, ::2] = -20
  return list(STRONG), arrays | dict(log_decay=jnp.asarray(g))


def each(implementation, names, arrays, tolerance, **options):
  got, expected = run(implementation, arrays, **options), run("reference", arrays)
  errors = {}
  leaves = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected))
  for (path, x), y in leaves:
    assert bool(jnp.isfinite(x).all()), path
    for i, name in enumerate(names):
      scale = 1.0 if float(jnp.abs(y[i]).max()) < 1e-30 else None  # gradients through exp(-100)
      error = float(jnp.abs(x[i] - y[i]).max()) if scale else relative_rms(x[i], y[i])
      errors[name, jax.tree_util.keystr(path)] = error
  wrong = {where: error for where, error in errors.items() if not error <= tolerance}
  assert not wrong, wrong


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_that_resemble_one_another(implementation):
  each(implementation, *correlated(), tolerance=TOLERANCE["float32"])


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strong_decay(implementation, decay):
  each(implementation, *strong(decay), tolerance=TOLERANCE["float32"], chunk_size=32)


def test_neumann_product_fails_where_doubling_does_not():
  """The negative control of the inverse: powers of A cancel, blocks don't."""
  highest = Products(precision=jax.lax.Precision.HIGHEST)
  k = alike(0.9, (1, 128, 1, 128), 0)[0, :, 0]
  a = jnp.tril(k @ k.T, -1)
  eye = np.eye(128)
  expected = np.linalg.inv(eye + np.asarray(a, np.float64))
  solve = jax.scipy.linalg.solve_triangular(eye + a, eye, lower=True, unit_diagonal=True)
  neumann, power = eye - a, a
  for _ in range(6):
    power = power @ power
    neumann = neumann @ (eye + power)
  assert relative_rms(solve, expected) < 1e-6
  assert relative_rms(_inverse.doubling(a, highest), expected) < 1e-6
  assert relative_rms(_inverse.small(a, highest), expected) < 1e-6
  halves = Products(passes=3)
  assert relative_rms(_inverse.doubling(a, halves), expected) < 1e-4
  assert not relative_rms(neumann, expected) < 1.0


def test_gradient_of_the_decay_by_the_short_formula_fails():
  """The negative control of dg: exact algebra, no digits left at -20 a token."""
  arrays = make(t=256, seed=3)
  arrays["log_decay"] = jnp.full_like(arrays["log_decay"], -20.0)
  got, expected = run("xla", arrays), run("reference", arrays)
  assert relative_rms(got["grad"]["log_decay"], expected["grad"]["log_decay"]) < 1e-5
  state, d_state = (
    got["out"][1],
    jax.random.normal(  # the cotangent value_and_gradients draws
      jax.random.fold_in(jax.random.key(0), 1), arrays["initial_state"].shape
    ),
  )
  grads = got["grad"]
  wrong = jnp.sum(arrays["q"] * grads["q"] - arrays["k"] * grads["k"], -1)
  wrong = jnp.cumsum(wrong[:, ::-1], 1)[:, ::-1] + jnp.sum(state * d_state)
  assert not relative_rms(wrong, expected["grad"]["log_decay"]) < 1e-2


# --- what the recurrence is -----------------------------------------------------------------------


def test_reference_against_float64():
  x = {name: np.asarray(a, np.float64) for name, a in make(t=50, decay="channel").items()}
  state, out = x["initial_state"][0, 0], []
  for t in range(50):
    q, k, v = (x[name][0, t, 0] for name in "qkv")
    state = np.exp(x["log_decay"][0, t, 0])[:, None] * state
    state = state + x["beta"][0, t, 0] * np.outer(k, v - k @ state)
    out.append(q @ state * 32**-0.5)
  got = delta_rule(**make(t=50, decay="channel"), implementation="reference")
  assert relative_rms(got[0][0, :, 0], np.stack(out)) < 1e-6
  assert relative_rms(got[1][0, 0], state) < 1e-6


def test_orthonormal_keys_are_a_key_value_store():
  arrays = make(t=64, h=32, decay="none")
  k = jnp.concatenate([jnp.eye(32), jnp.eye(32)])[None, :, None]  # every key is written twice
  ones, zero = jnp.ones((1, 64, 1)), jnp.zeros((1, 1, 32, 32))
  out, state = delta_rule(k, k, arrays["v"], ones, initial_state=zero, scale=1.0)
  np.testing.assert_allclose(out, arrays["v"], atol=1e-6)
  np.testing.assert_allclose(state[0, 0], arrays["v"][0, 32:, 0], atol=1e-6)  # the last write wins


def test_chunk_size_does_not_matter():
  arrays = make(t=75, seed=4)
  results = [delta_rule(**arrays, chunk_size=c) for c in (8, 32, 128)]
  for got in results[1:]:
    assert_close(got, results[0], 1e-5)


def test_prefill_then_steps_is_the_whole():
  arrays = make(t=40, n=2, q=2, decay="channel")
  state = arrays.pop("initial_state")
  whole = delta_rule(**arrays, initial_state=state)
  out, state = delta_rule(**{a: x[:, :37] for a, x in arrays.items()}, initial_state=state)
  outs = [out]
  for t in range(37, 40):
    out, state = delta_rule(**{a: x[:, t : t + 1] for a, x in arrays.items()}, initial_state=state)
    outs.append(out)
  assert_close((jnp.concatenate(outs, 1), state), whole, 1e-5)


def test_packed_documents_equal_single_ones():
  arrays = make(t=90, decay="scalar")
  state = arrays.pop("initial_state")
  ids = jnp.asarray(np.repeat([7, 3, 7], [17, 48, 25]))[None]
  packed, last = delta_rule(**arrays, initial_state=state, segment_ids=ids, chunk_size=16)
  parts = []
  for first, end in ((0, 17), (17, 65), (65, 90)):
    piece = {name: x[:, first:end] for name, x in arrays.items()}
    out, final = delta_rule(**piece, initial_state=state if first == 0 else None)
    parts.append(out)
  assert_close((packed, last), (jnp.concatenate(parts, 1), final), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_broadcast_decay_and_segments_have_gradients(implementation):
  arrays = make(b=2, t=33, n=2)
  arrays["log_decay"] = arrays["log_decay"][:1, :1]
  ids = jnp.asarray(np.repeat([0, 1], [20, 13]))[None].repeat(2, 0)
  got, _ = check(implementation, arrays, segment_ids=ids, chunk_size=16)
  assert got["grad"]["log_decay"].shape == (1, 1, 2)


def test_no_tokens():
  arrays = make(t=1)
  state = arrays["initial_state"]
  out, last = delta_rule(**{a: x[:, :0] if x is not state else x for a, x in arrays.items()})
  assert out.shape == (1, 0, 1, 32)
  np.testing.assert_array_equal(last, state)


def test_float64():
  with jax.enable_x64(True):
    arrays = {a: x.astype(jnp.float64) for a, x in make(t=40).items()}
    got, expected = (delta_rule(**arrays, implementation=i) for i in ("xla", "reference"))
  assert got[0].dtype == jnp.float64
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-12, atol=1e-13)


def test_one_token_makes_no_copy_of_the_state():
  """Decoding is bound by memory: q and k read the state as it is, then it is updated once."""
  arrays = make(b=4, t=1, q=8, k=8, v=8, n=8, h=128, width=128)
  step = jax.jit(functools.partial(delta_rule, implementation="xla")).lower(**arrays).compile()
  assert step.memory_analysis().temp_size_in_bytes < arrays["initial_state"].nbytes / 20


def test_memory_of_gradients():
  """What the explicit gradients are for; the TPU compiler's numbers are in the README."""
  shape = jax.eval_shape(lambda: make(t=8192, h=64, width=64, dtype=jnp.bfloat16))
  names = tuple(shape)

  def program(op):
    def loss(*arrays):
      out, state = op(dict(zip(names, arrays)))
      return jnp.sum(out.astype(jnp.float32)) + jnp.sum(state)

    return jax.jit(jax.grad(loss, tuple(range(len(names))))).lower(*shape.values()).compile()

  def plain(x):
    return xla._autodiff(
      *(x[a] for a in ("q", "k", "v", "beta", "log_decay", "initial_state")), scale=0.125
    )

  ours = program(lambda x: delta_rule(**x, implementation="xla")).memory_analysis()
  theirs = program(plain).memory_analysis()
  assert ours.temp_size_in_bytes < theirs.temp_size_in_bytes / 4


# --- dispatch and errors --------------------------------------------------------------------------


def test_named_implementations_say_why_not():
  arrays = make(t=2)
  with pytest.raises(Unsupported, match="mosaic_tpu runs on TPUs"):
    delta_rule(**arrays, implementation="mosaic_tpu")
  with pytest.raises(Unsupported, match="not implemented yet; use implementation='xla'"):
    delta_rule(**arrays, implementation="mosaic_gpu")
  with target("tpu", interpret=True), pytest.raises(Unsupported, match="one token"):
    delta_rule(**make(t=1), implementation="mosaic_tpu")
  with target("gpu"):
    delta_rule(**arrays)  # auto ends in xla


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(k=(1, 4, 1, 8)), "k has shape .* with 16 in axis 3; q has H=16"),
    (dict(v=(1, 4, 3, 16)), "v has 3 heads, which don't divide 4; use one of"),
    (dict(beta=(1, 4, 2)), "beta has 2 heads, expected 4, the largest head count"),
    (dict(log_decay=(1, 3, 4)), "log_decay has shape"),
    (dict(log_decay=(1, 4, 4, 8)), "log_decay has shape"),
    (dict(initial_state=(1, 4, 16, 8)), "initial_state has shape"),
    (dict(segment_ids=(4,)), "segment_ids has shape"),
    (dict(chunk_size=48), "chunk_size is one of"),
  ],
)
def test_errors_say_what_is_wrong(change, message):
  arrays = make(t=4, q=4, v=2, n=4, h=16, width=16)
  change = {a: jnp.zeros(x) if isinstance(x, tuple) else x for a, x in change.items()}
  with pytest.raises(ValueError, match=message):
    delta_rule(**arrays | change)


def test_configs_check_themselves():
  with pytest.raises(ValueError, match="group is at least 1"):
    XLAConfig(group=0)
  with pytest.raises(ValueError, match="0 \\(automatic\\) or more"):
    TPUConfig(group=-1)


def test_check_keys():
  good, beta = make(t=4)["k"], jnp.full((1, 4, 1), 2.0)
  check_keys(good, beta)
  with pytest.raises(ValueError, match="normalise the keys"):
    check_keys(2 * good, beta)
  checked = jax.jit(checkify.checkify(check_keys))
  assert checked(good, beta)[0].get() is None
  assert "normalise the keys" in checked(2 * good, beta)[0].get()
  jax.jit(check_keys)(2 * good, beta)  # free and silent outside of checkify


# --- other people's code, on CPU ------------------------------------------------------------------


def torch_inputs(arrays):
  torch = pytest.importorskip("torch", reason="needs the compare extra")
  return {name: torch.from_numpy(np.asarray(x).copy()) for name, x in arrays.items()}


@pytest.mark.compare
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_against_transformers(form):
  theirs = pytest.importorskip(
    "transformers.models.qwen3_next.modeling_qwen3_next",
    reason="needs the compare extra",
    exc_type=ImportError,
  )
  arrays = make(b=2, t=71, q=2, k=2, v=2, n=2)
  x = torch_inputs(arrays)
  f = inspect.unwrap(getattr(theirs, f"torch_{form}_gated_delta_rule"))  # the torch code itself
  expected = f(
    x["q"], x["k"], x["v"], g=x["log_decay"], beta=x["beta"],
    initial_state=x["initial_state"], output_final_state=True,
  )  # fmt: skip
  assert_close(delta_rule(**arrays), tuple(e.numpy() for e in expected), 1e-5)


@pytest.mark.compare
@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
def test_against_flash_linear_attention(kind):
  where = {"none": "delta_rule", "scalar": "gated_delta_rule", "channel": "kda"}[kind]
  naive = pytest.importorskip(
    f"fla.ops.{where}.naive", reason="needs the compare extra", exc_type=ImportError
  )
  arrays = make(b=2, t=66, q=2, k=2, v=2, n=2, decay=kind)
  x = torch_inputs(arrays)
  start = dict(initial_state=x["initial_state"], output_final_state=True)
  if kind == "none":
    heads_first = [x[name].transpose(1, 2) for name in ("q", "k", "v", "beta")]
    out, state = naive.delta_rule_recurrence(*heads_first, **start)
    out = out.transpose(1, 2)
  elif kind == "scalar":
    out, state = naive.naive_recurrent_gated_delta_rule(
      x["q"], x["k"], x["v"], x["beta"], x["log_decay"], **start
    )
  else:
    out, state = naive.naive_recurrent_kda(
      x["q"], x["k"], x["v"], x["log_decay"], x["beta"], **start
    )
  assert_close(delta_rule(**arrays), (out.numpy(), state.numpy()), 1e-5)
