# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers over several devices are the op on one device, rank by rank."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from linear_cases import (
  EXCHANGES,
  KINDS,
  assert_equal,
  both_directions,
  documents,
  errors,
  inputs,
  many_devices,
  one_device,
  run,
)

from jaxdec.errors import UserError
from jaxdec.parallel import sequence
from jaxdec.parallel.mesh import make_mesh
from jaxdec.parallel.sequence import exchange
from jaxdec.parallel.sequence.exchange import incoming
from jaxdec.parallel.sequence.summary import adjoint
from pallas_kernels.testing import relative_rms


@functools.cache
def expected(kind, packed, oracle=one_device, decay=None):
  arrays = inputs(kind, decay=decay)
  return run({"one": oracle}, arrays, documents() if packed else None)["one"]


def compare(kind, packed, ranks, layers, oracle=one_device, decay=None):
  got = run(layers, inputs(kind, decay=decay), documents() if packed else None)
  wanted = expected(kind, packed, oracle, decay)
  for name, results in got.items():
    try:
      assert_equal(results, wanted, ranks, 1e-12)
    except AssertionError as error:
      raise AssertionError(f"{name}: {error}") from None


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("kind", ["scalar", "gated delta"])
def test_exchanges_agree_with_one_device(kind):
  """float64, outputs, final state and all gradients, with documents that straddle shards."""
  layers = {x: many_devices(4, check_vma=x == "chain", exchange=x) for x in EXCHANGES}
  compare(kind, True, 4, layers)


@pytest.mark.parametrize(
  ("kind", "packed"),
  [
    ("none", False),
    pytest.param("scalar", True, marks=pytest.mark.slow),
    pytest.param("channel", True, marks=pytest.mark.slow),
    pytest.param("none", True, marks=pytest.mark.slow),
  ],
)
def test_both_directions(kind, packed):
  """Contiguous and zigzag; without decay and documents it is one sum."""
  layers = {
    f"{layout}, {x}": many_devices(
      4, check_vma=layout == "zigzag", exchange=x, layout=layout, causal=False
    )
    for layout, x in (("contiguous", "gather"), ("zigzag", "scan"))
  }
  compare(kind, packed, 4, layers, both_directions)


@pytest.mark.slow
def test_both_directions_of_no_decay_are_those_of_a_decay_of_zero():
  layer = many_devices(4, check_vma=True, causal=False)
  plain = run({"x": layer}, inputs("none"))["x"]
  arrays = inputs("none") | {"log_decay": jnp.zeros((1, 1, 1))}
  zero = run({"x": layer}, arrays)["x"]
  zero.pop("d log_decay")
  assert_equal(zero, plain, 4, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [-20.0, -jnp.inf])
@pytest.mark.parametrize("kind", ["scalar", "channel", "gated delta"])
def test_strong_decays(kind, decay):
  layers = {x: many_devices(4, check_vma=True, exchange=x) for x in EXCHANGES}
  compare(kind, False, 4, layers, decay=decay)


@pytest.mark.slow
@pytest.mark.parametrize("slices", [2, 3, 6])
def test_slices_of_a_chain(slices):
  options = dict(exchange="chain", slices=slices)
  layers = {
    layout: many_devices(4, check_vma=layout == "zigzag", layout=layout, **options)
    for layout in ("contiguous", "zigzag")
  }
  compare("gated delta", True, 4, layers)


@pytest.mark.slow
def test_order_of_devices_is_that_of_the_mesh():
  devices = jax.devices()[:4][::-1]
  compare("gated delta", False, 4, {"x": many_devices(4, check_vma=False, devices=devices)})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
  arrays = inputs(kind, jnp.float32)
  layers = {x: many_devices(4, check_vma=True, exchange=x) for x in EXCHANGES}
  got = run(layers, arrays, documents())
  for results in got.values():
    assert results["final_state"].dtype == jnp.float32
    assert_equal(results, expected(kind, True), 4, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_zigzag(kind, ranks):
  layers = {
    f"{x}, check_vma={check}": many_devices(ranks, check_vma=check, exchange=x, layout="zigzag")
    for x, check in zip(EXCHANGES, (True, False, ranks == 2))
  }
  compare(kind, True, ranks, layers)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_exchange_and_number_of_ranks(kind, ranks, packed):
  layers = {
    f"{x}, check_vma={check}": many_devices(ranks, check_vma=check, exchange=x)
    for x, check in zip(EXCHANGES, (packed, not packed, packed))
  }
  compare(kind, packed, ranks, layers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["channel", "gated delta", "mamba"])
@pytest.mark.parametrize("result", [0, 1])
def test_gradients_of_one_result_alone(kind, result):
  """Of the outputs, or of the final state: the other's gradient is absent, not zero."""

  def only(layer):
    def zeroed(arrays, segment_ids):
      results = layer(arrays, segment_ids)
      return [x if i == result else jax.lax.stop_gradient(x) for i, x in enumerate(results)]

    return zeroed

  layers = {
    f"{x}, {check}": only(many_devices(4, check_vma=check, exchange=x))
    for x in ("gather", "scan")
    for check in (False, True)
  }
  results = run({"one": only(one_device)} | layers, inputs(kind), documents())
  for name in layers:
    assert_equal(results[name], results["one"], 4, 1e-12)


def test_batch_and_sequence_both_split():
  """Four arrays of one mesh: what varies over ``data`` too, and a state that does not over seq."""
  arrays = inputs("gated delta")
  mesh = make_mesh(data=2, seq=4)
  specs = {n: P("data") if n == "initial_state" else P("data", "seq") for n in arrays}

  def layer(arrays, segment_ids):
    return jax.shard_map(
      lambda x, ids: sequence.linear_attention(**x, segment_ids=ids, axis_name="seq"),
      mesh=mesh,
      in_specs=(specs, P("data", "seq")),
      out_specs=(P("data", "seq"), P("data")),
    )(arrays, segment_ids)

  compare("gated delta", True, 4, {"x": layer})


HEADS = {
  "one group of B and C for all heads (Mamba-2)": dict(q=1, k=1, v=4, decay=(4,)),
  "decays of two heads, one key": dict(q=4, k=1, v=2, decay=(2,)),
  "channel decays of two heads, one value": dict(q=4, k=4, v=1, decay=(2, 4)),
  "nothing but queries has all heads": dict(q=4, k=2, v=1, decay=()),
  "a state of fewer heads": dict(q=4, k=1, v=4, decay=(4,), state=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_head_counts(name):
  rng = np.random.default_rng(0)
  heads = dict(HEADS[name])
  decay, state = heads.pop("decay"), heads.pop("state", None)
  widths = {"q": 4, "k": 4, "v": 6}
  arrays = {x: jnp.asarray(rng.normal(size=(2, 32, n, widths[x]))) for x, n in heads.items()}
  if state is not None:
    arrays["initial_state"] = jnp.asarray(rng.normal(size=(2, state, 4, 6)))
  if decay:
    arrays["log_decay"] = -jnp.asarray(rng.exponential(size=(2, 32, *decay)))
  results = run(
    {"one": one_device} | {x: many_devices(4, check_vma=True, exchange=x) for x in EXCHANGES},
    arrays,
    documents(),
  )
  for x in EXCHANGES:
    assert_equal(results[x], results["one"], 4, 1e-12)


@pytest.mark.slow
def test_a_fixed_decay_and_a_state_of_its_own_heads():
  """Log-decays ``[1,1,N]`` (RetNet, Lightning), gradients of them too, in both layouts."""
  arrays = inputs("none") | {"log_decay": -jnp.array([0.0, 0.1, 1.0, 3.0])[None, None]}
  layers = {
    layout: many_devices(4, check_vma=check, layout=layout)
    for layout, check in (("contiguous", False), ("zigzag", True))
  }
  results = run({"one": one_device} | layers, arrays, documents())
  for layout in layers:
    assert_equal(results[layout], results["one"], 4, 1e-12)


@pytest.mark.slow
def test_bfloat16():
  """Close to float32, and so are its gradients; states stay float32."""
  arrays = {n: x.astype(jnp.float32) for n, x in inputs("scalar").items()}
  rounded = {n: x.astype(jnp.bfloat16) if n in "qkv" else x for n, x in arrays.items()}
  got = run({"x": many_devices(4, check_vma=True)}, rounded)["x"]
  assert got["out"].dtype == jnp.bfloat16 and got["final_state"].dtype == jnp.float32
  wanted = run({"one": one_device}, {n: x.astype(jnp.float64) for n, x in rounded.items()})["one"]
  for x in ("out", "final_state", "d q", "d k", "d v", "d log_decay"):
    assert relative_rms(got[x], wanted[x]) < 1e-2, x


def test_a_dropped_state_is_seen_where_it_is_missing(monkeypatch):
  """Negative control: without the state that enters rank 2, its outputs and no others are wrong."""

  def broken(run, initial_state, plan):
    state, final = incoming(run, initial_state, plan)
    return jnp.where(jax.lax.axis_index("seq") == 2, 0, state), final

  monkeypatch.setattr(sequence.linear, "incoming", broken)
  got = run({"x": many_devices(4, check_vma=True)}, inputs("scalar"))["x"]
  found = errors(got, expected("scalar", False), 4)
  wrong = {rank for rank in range(4) if found[f"out on rank {rank}"] > 1e-3}
  assert wrong == {2}
  with pytest.raises(AssertionError, match="out on rank 2"):
    assert_equal(got, expected("scalar", False), 4, 1e-12)


def test_a_dropped_gradient_is_seen_on_every_rank_but_the_last(monkeypatch):
  """Negative control: forward exact, and the last rank's gradients too."""
  wanted = expected("scalar", False)
  monkeypatch.setattr(exchange, "adjoint", lambda run, d: adjoint(run, jnp.zeros_like(d)))
  got = run({"x": many_devices(4, check_vma=True)}, inputs("scalar"))["x"]
  found = errors(got, wanted, 4)
  assert all(found[f"out on rank {rank}"] < 1e-12 for rank in range(4))
  assert {rank for rank in range(4) if found[f"d k on rank {rank}"] > 1e-3} == {0, 1, 2}


@pytest.mark.parametrize(
  ("options", "sentence"),
  [
    (dict(exchange="gathr"), "did you mean 'gather'"),
    (dict(layout="zig"), "is not one of contiguous, zigzag"),
    (
      dict(exchange="chain", slices=4),
      r"slices=4 does not divide 6 values; use one of \[1, 2, 3, 6",
    ),
    (dict(causal=False, beta=True), "has no bidirectional form"),
    (dict(layout="zigzag", length=20), "even number of tokens on a rank, got 5"),
  ],
)
def test_mistakes_are_one_sentence(options, sentence):
  options = dict(options)
  length = options.pop("length", 32)
  arrays = inputs("delta" if options.pop("beta", False) else "none")
  arrays = {n: x if n == "initial_state" else x[:, :length] for n, x in arrays.items()}
  layer = functools.partial(
    sequence.linear_attention, axis_name="seq", initial_state=arrays.pop("initial_state"), **options
  )
  with pytest.raises(UserError, match=sentence):
    jax.eval_shape(
      jax.shard_map(
        lambda x: layer(**x),
        mesh=make_mesh(seq=4),
        in_specs=P(None, "seq"),
        out_specs=(P(None, "seq"), P()),
      ),
      arrays,
    )


def test_an_axis_that_is_not_there():
  arrays = inputs("none")
  with pytest.raises(UserError, match="axis_name='sq' is not a mesh axis here"):
    sequence.linear_attention(**arrays, axis_name="sq")
