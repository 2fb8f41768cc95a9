# SPDX-License-Identifier: Apache-2.0
"""Linear attention: every implementation against the token loop, and that against numpy."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.linear_attention import TPUConfig, XLAConfig, linear_attention
from pallas_kernels.testing import TOLERANCE, assert_close, relative_rms, value_and_gradients


def run(implementation: str, inputs: dict, seed: int = 0, **static) -> dict:
  """Outputs and gradients of all float inputs; ``mosaic_tpu`` is interpreted."""
  config = {"xla": XLAConfig, "mosaic_tpu": TPUConfig}.get(implementation)
  steps = static.pop("chunks_per_step", None)
  if config is not None and steps:
    static["config"] = config(chunks_per_step=steps)
  others = {name: inputs[name] for name in inputs if name == "segment_ids"}
  floats = {name: x for name, x in inputs.items() if name not in others}
  where = contextlib.nullcontext()
  if implementation == "mosaic_tpu":
    where = pallas_kernels.target("tpu", interpret=True)
  op = functools.partial(linear_attention, implementation=implementation, **static, **others)
  with where:
    return value_and_gradients(op, floats, seed)


def decays(kind: str | None, shape: tuple[int, ...]) -> np.ndarray | None:
  """Log-decays: of one strength, mixed, or isolated hits among weak ones."""
  rng = np.random.default_rng(1)
  if kind is None:
    return None
  if kind == "mixed":
    return -rng.uniform(0, 20, shape)
  if kind == "halves":  # -20 and 0 in one token
    return np.where(rng.random(shape) < 0.5, -20.0, 0.0)
  if kind == "fixed":
    return np.linspace(-0.3, -0.01, shape[2])[None, None]
  if kind.startswith("hits"):
    g = np.full(shape, -0.01)
    g[:, ::7] = float(kind.removeprefix("hits"))
    return g
  return np.full(shape, float(kind))


def arrays(
  t, *, b=1, heads=(2, 2, 2), h=8, width=8, g=None, g_heads=2, channel=False, state=True,
  documents=False, dtype=np.float32,
):  # fmt: skip
  rng = np.random.default_rng(t)
  shapes = {"q": heads[0], "k": heads[1], "v": heads[2]}
  inputs = {
    name: rng.normal(size=(b, t, n, width if name == "v" else h)) for name, n in shapes.items()
  }
  if g is not None:
    inputs["log_decay"] = decays(g, (b, t, g_heads, h) if channel else (b, t, g_heads))
  if state:
    inputs["initial_state"] = rng.normal(size=(b, max(*heads, g_heads), h, width))
  inputs = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
  inputs = {name: x.astype(dtype) if name in "qkv" else x for name, x in inputs.items()}
  if documents:
    ids = np.cumsum(rng.random((b, t)) < 0.2, axis=1)
    inputs["segment_ids"] = jnp.asarray(ids, jnp.int32)
  return inputs


CASES = {
  "one token": dict(t=1, g="-1", channel=True),
  "no decay, GQA 4, 63 tokens": dict(t=63, heads=(4, 1, 1), state=False, g_heads=1, h=16),
  "mixed, GQA 8, documents, 127 tokens": dict(
    t=127, heads=(8, 1, 1), g="mixed", g_heads=1, documents=True
  ),
  "hits of -20, heads of 2, 3 and 6": dict(t=37, heads=(2, 3, 6), g="hits-20", g_heads=1),
  "hits of -inf, 128 by 64": dict(t=63, h=128, width=64, heads=(1, 1, 2), g="hits-inf"),
  "-20 everywhere, 64 by 256": dict(t=31, h=64, width=256, heads=(1, 1, 1), g_heads=1, g="-20"),
  "everything forgotten": dict(t=17, g="-inf"),
  "a fixed decay a head": dict(t=37, b=2, g="fixed"),
  "channels of -20 and 0": dict(t=37, heads=(2, 1, 1), g="halves", channel=True),
  "channels, hits of -1e9, documents": dict(
    t=45, heads=(2, 1, 2), g="hits-1e9", g_heads=1, channel=True, documents=True
  ),
  "documents without decay": dict(t=53, b=2, documents=True),
}
# What happens before the kernels, or in the same code as another case; interpreting is slow.
XLA_IS_ENOUGH = ("everything forgotten", "a fixed decay a head", "documents without decay")
IMPLEMENTATIONS = ("xla", "mosaic_tpu")


@functools.cache
def reference(case: str, dtype: str = "float32"):
  inputs = arrays(**CASES[case], dtype=dtype)
  exact = {n: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for n, x in inputs.items()}
  return inputs, run("reference", exact)


@pytest.mark.parametrize(
  "implementation, case",
  [(x, c) for x in IMPLEMENTATIONS for c in CASES if x == "xla" or c not in XLA_IS_ENOUGH],
)
def test_against_reference(implementation, case):
  inputs, expected = reference(case)
  got = run(implementation, inputs, chunk_size=16, chunks_per_step=2)
  assert_close(got, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("case", ["hits of -20, heads of 2, 3 and 6", "channels of -20 and 0"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation, case):
  inputs, expected = reference(case, "bfloat16")
  got = run(implementation, inputs, chunk_size=16, chunks_per_step=2)
  assert got["out"][0].dtype == jnp.bfloat16 and got["out"][1].dtype == jnp.float32
  assert got["grad"]["q"].dtype == jnp.bfloat16
  assert_close(got, expected, TOLERANCE["bfloat16"])


def numpy_loop(q, k, v, log_decay, initial_state, segment_ids=None, scale=None):
  """The recurrence in float64 loops, where a new document starts from an empty state."""
  q, k, v, g, s = (np.asarray(x, np.float64) for x in (q, k, v, log_decay, initial_state))
  b, t, n, h = q.shape
  s, out = s.copy(), np.zeros((b, t, n, v.shape[-1]))
  for row in range(b):
    for i in range(t):
      new = segment_ids is not None and i > 0 and segment_ids[row, i] != segment_ids[row, i - 1]
      for head in range(n):
        decay = np.exp(g[row, i, head]).reshape(-1, 1)
        past = 0.0 if new else decay * s[row, head]
        s[row, head] = past + np.outer(k[row, i, head], v[row, i, head])
        out[row, i, head] = q[row, i, head] @ s[row, head] * (h**-0.5 if scale is None else scale)
  return out, s


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_against_a_numpy_loop(implementation, channel):
  inputs = arrays(37, g="hits-1e9", channel=channel, documents=True)
  got = linear_attention(**inputs, implementation=implementation, chunk_size=8)
  assert_close(got, numpy_loop(**inputs), 1e-6)
  with jax.enable_x64(True):
    wide = {n: jnp.asarray(x, jnp.int32 if n == "segment_ids" else jnp.float64)
            for n, x in inputs.items()}  # fmt: skip
    out, state = linear_attention(**wide, implementation=implementation, chunk_size=8)
    for x, y in zip((out, state), numpy_loop(**inputs)):
      assert x.dtype == jnp.float64
      np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_gradients_of_strong_decays_token_by_token():
  """Also those gradients that are 1e-9 of their neighbours'."""
  inputs, expected = reference("hits of -20, heads of 2, 3 and 6")
  exact = np.asarray(expected["grad"]["log_decay"])
  got = np.asarray(run("xla", inputs, chunk_size=16)["grad"]["log_decay"])
  small = np.abs(exact) < 1e-6
  assert small.any()
  for which in (small, ~small):
    assert relative_rms(got[which], exact[which]) < 1e-5


def test_the_short_formula_for_decays_would_fail():
  """Negative control: ``dg = reverse cumulative sum of q dq - k dk`` loses strong decays."""
  inputs, expected = reference("-20 everywhere, 64 by 256")
  grad, final = expected["grad"], expected["out"][1]
  difference = jnp.sum(inputs["q"] * grad["q"] - inputs["k"] * grad["k"], axis=-1)
  weight = jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), final.shape)
  last = jnp.sum(final * weight, axis=(-2, -1))[:, None]
  short = jax.lax.cumsum(difference, axis=1, reverse=True) + last
  assert relative_rms(short, grad["log_decay"]) > 100 * TOLERANCE["float32"]


@pytest.mark.parametrize("channel", [False, True])
def test_chunk_sizes_agree(channel):
  inputs = arrays(61, g="-0.1", channel=channel)
  expected = linear_attention(**inputs, implementation="reference")
  for chunk in (1, 4, 32, 64):
    got = linear_attention(**inputs, implementation="xla", chunk_size=chunk)
    assert_close(got, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_prefill_then_decode(implementation):
  inputs = arrays(21, g="-0.1", channel=True)
  whole, final = linear_attention(**inputs, implementation="reference")
  where = contextlib.nullcontext()
  if implementation == "mosaic_tpu":
    where = pallas_kernels.target("tpu", interpret=True)
  state, outs, start = inputs.pop("initial_state"), [], 0
  with where:
    for length in (19, 1, 1):
      part = {n: x[:, start : start + length] for n, x in inputs.items()}
      out, state = linear_attention(**part, initial_state=state, implementation=implementation)
      outs, start = [*outs, out], start + length
  assert_close((jnp.concatenate(outs, 1), state), (whole, final), TOLERANCE["float32"])


def test_one_token_is_one_update():
  """Decoding has no chunks, loops or products left: one pass over the state."""
  inputs = arrays(1, g="-1")
  op = functools.partial(linear_attention, implementation="xla")
  names = {str(e.primitive) for e in jax.make_jaxpr(op)(inputs["q"], inputs["k"], inputs["v"]).eqns}
  assert not names & {"scan", "while", "dot_general", "custom_vjp_call", "cumsum"}, names


def test_no_tokens():
  inputs = arrays(1)
  empty = {n: x if n == "initial_state" else x[:, :0] for n, x in inputs.items()}
  out, state = linear_attention(**empty)
  assert out.shape == (1, 0, 2, 8)
  np.testing.assert_array_equal(state, inputs["initial_state"])


def test_padding_leaves_the_state():
  inputs = arrays(20, g="-0.1")
  expected = linear_attention(**inputs)
  padded = {n: jnp.pad(x, [(0, 0), (0, 9)] + [(0, 0)] * (x.ndim - 2)) if n != "initial_state" else x
            for n, x in inputs.items()}  # fmt: skip
  out, state = linear_attention(**padded)
  assert_close((out[:, :20], state), expected, 1e-6)


def test_documents_are_separate():
  """A packed document gets what it gets alone; without the ids it doesn't."""
  inputs = arrays(40, g="-0.01", state=False)
  ids = jnp.where(jnp.arange(40) < 23, 7, 3)[None]
  packed, final = linear_attention(**inputs, segment_ids=ids)
  second = {n: x[:, 23:] for n, x in inputs.items()}
  alone, state = linear_attention(**second)
  assert_close((packed[:, 23:], final), (alone, state), 1e-6)
  leaky, _ = linear_attention(**inputs)
  assert relative_rms(leaky[:, 23:], alone) > 0.1


def ssd(x, dt, A, B, C):
  """Mamba-2's recurrence: ``h <- exp(dt A) h + dt x B^T; y = h C``; groups share B and C."""
  b, t, n, p = x.shape
  B, C = (np.repeat(y, n // y.shape[2], axis=2) for y in (B, C))
  h, out = np.zeros((b, n, p, B.shape[3])), np.zeros((b, t, n, p))
  for i in range(t):
    h *= np.exp(dt[:, i] * A)[..., None, None]
    h += (dt[:, i, :, None] * x[:, i])[..., None] * B[:, i, :, None]
    out[:, i] = np.einsum("bnps,bns->bnp", h, C[:, i])
  return out, h.swapaxes(2, 3)


def mamba2_arrays(t=37, heads=4, groups=2, width=6, state=8):
  rng = np.random.default_rng(0)
  x, B, C = (
    rng.normal(size=(2, t, n, w)) for n, w in ((heads, width), (groups, state), (groups, state))
  )
  dt, A = rng.uniform(0.01, 1, (2, t, heads)), -rng.uniform(0.5, 16, heads)
  return [np.asarray(y, np.float32) for y in (x, dt, A, B, C)]


def mamba2(x, dt, A, B, C):
  return linear_attention(q=C, k=B, v=dt[..., None] * x, log_decay=dt * A, scale=1.0)


def test_mamba2_mapping():
  inputs = mamba2_arrays()
  assert_close(mamba2(*inputs), ssd(*(np.asarray(y, np.float64) for y in inputs)), 1e-6)


@pytest.mark.compare
def test_against_transformers_mamba2():
  torch = pytest.importorskip("torch", reason="needs the `compare` extra (torch, transformers)")
  theirs = pytest.importorskip(
    "transformers.models.mamba2.modeling_mamba2", reason="needs the `compare` extra"
  )
  if not hasattr(theirs, "mamba2_chunk_scan"):
    pytest.skip("this transformers has no function for Mamba-2's chunked scan")
  x, dt, A, B, C = mamba2_arrays()
  tensors = map(torch.from_numpy, (x, dt, A, B, C))
  out, state = theirs.mamba2_chunk_scan(*tensors, chunk_size=16, return_final_states=True)
  expected = (out.numpy(), state.numpy().swapaxes(2, 3))
  assert_close(mamba2(x, dt, A, B, C), expected, TOLERANCE["float32"])


@pytest.mark.compare
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_against_flash_linear_attention(channel):
  torch = pytest.importorskip("torch", reason="needs the `compare` extra (torch)")
  name = "fla.ops.gla.naive" if channel else "fla.ops.simple_gla.naive"
  if importlib.util.find_spec("fla") is None:
    pytest.skip("flash-linear-attention is not installed")
  theirs = importlib.import_module(name)
  function = theirs.naive_recurrent_gla if channel else theirs.naive_recurrent_simple_gla
  inputs = arrays(37, g="mixed", channel=channel)
  tensors = {n: torch.tensor(np.asarray(x), requires_grad=True) for n, x in inputs.items()}
  out, state = function(*tensors.values(), output_final_state=True) if channel else function(
    *(tensors[n] for n in ("q", "k", "v", "log_decay")), initial_state=tensors["initial_state"]
  )  # fmt: skip
  got = run("xla", inputs, chunk_size=16)
  leaves = [x.detach().numpy() for x in (out, state)]
  assert_close(got["out"], tuple(leaves), TOLERANCE["float32"])
  total = sum(
    (
      y
      * torch.from_numpy(
        np.array(jax.random.normal(jax.random.fold_in(jax.random.key(0), i), y.shape))
      )
    ).sum()
    for i, y in enumerate((out, state))
  )
  total.backward()
  assert_close(got["grad"], {n: x.grad.numpy() for n, x in tensors.items()}, TOLERANCE["float32"])


def wrong(**changes):
  inputs = {**arrays(9, g="-1"), **changes}
  return functools.partial(linear_attention, **inputs)


@pytest.mark.parametrize(
  "call, message",
  [
    (wrong(v=jnp.zeros((1, 8, 2, 8))), "v has shape (1, 8, 2, 8), expected [B,T,V,W] with 9"),
    (wrong(k=jnp.zeros((1, 9, 3, 8))), "q has 2 heads, which don't divide 3"),
    (wrong(log_decay=jnp.zeros((9, 2))), "log_decay has shape (9, 2), expected [B,T,heads]"),
    (wrong(log_decay=jnp.zeros((1, 9, 2, 4))), "log_decay has shape (1, 9, 2, 4), expected"),
    (wrong(chunk_size=48), "chunk_size is 48, expected a power of two"),
    (wrong(implementation="xls"), "did you mean 'xla'"),
  ],
)
def test_mistakes(call, message):
  with pytest.raises(ValueError) as raised:
    call()
  assert message in str(raised.value)


def test_configs():
  for config in (XLAConfig, TPUConfig):
    with pytest.raises(ValueError, match="chunks_per_step is 0, expected a positive integer"):
      config(chunks_per_step=0)
  out, _ = wrong(config=XLAConfig(chunks_per_step=1))()  # a config chooses its implementation
  assert out.shape == (1, 9, 2, 8)


def test_dispatch():
  with pytest.raises(pallas_kernels.Unsupported, match="mosaic_tpu runs on TPUs"):
    wrong(implementation="mosaic_tpu")()
  with pytest.raises(pallas_kernels.Unsupported, match="not implemented yet"):
    wrong(implementation="mosaic_gpu")()
  with pallas_kernels.target("gpu"):
    assert wrong()()[0].shape == (1, 9, 2, 8)  # auto goes on to plain XLA


MEMORY = """
import json, sys
from pallas_kernels import _aot
_aot.prepare(dump=False)
import jax, jax.numpy as jnp
from pallas_kernels.linear_attention import linear_attention, xla

B, T, N, H = 1, 65536, 16, 128

def both(f, flat):
  # flat: arrays as a projection leaves them, [B,T,N*H], which the kernels read in place
  def split(x):
    return x.reshape(B, T, N, H) if flat else x
  def program(q, k, v, g, d_out, d_state):
    heads = lambda q, k, v, g: f(split(q), split(k), split(v), g)
    (out, state), pullback = jax.vjp(heads, q, k, v, g)
    return out.reshape(d_out.shape), state, pullback((split(d_out), d_state))
  return program

def plain(q, k, v, g):
  return xla._chunked(q, k, v, g, jnp.zeros((B, N, H, H), jnp.float32), scale=H**-0.5)

def op(implementation):
  return lambda q, k, v, g: linear_attention(q, k, v, log_decay=g, implementation=implementation)

g = jax.ShapeDtypeStruct((B, T, N), jnp.float32)
s = jax.ShapeDtypeStruct((B, N, H, H), jnp.float32)
temp = {}
for flat, implementation in ((False, "xla"), (True, "mosaic_tpu")):
  x = jax.ShapeDtypeStruct((B, T, N * H) if flat else (B, T, N, H), jnp.bfloat16)
  sizes = []
  for f in (op(implementation), plain):
    compiled = _aot.compile_for("v5p", both(f, flat), x, x, x, g, x, s)
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  temp[implementation] = sizes
print(json.dumps(temp))
"""


@pytest.mark.aot
def test_memory_of_a_long_sequence():
  """Forward and backward at 65,536 tokens: a quarter of what autodiff keeps, or less."""
  from pallas_kernels import _aot

  if not _aot.available():
    pytest.skip("libtpu is not installed (the `aot` extra)")
  command = [sys.executable, "-c", MEMORY]
  done = subprocess.run(command, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-3000:]
  temp = json.loads(done.stdout.splitlines()[-1])
  assert all(ours <= plain / 4 for ours, plain in temp.values()), temp
