# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy: every implementation against the definition, with ``[T,V]`` logits."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Unsupported, linear_cross_entropy, target
from pallas_kernels.linear_cross_entropy import TPUConfig, XLAConfig
from pallas_kernels.testing import TOLERANCE, assert_close, relative_rms, value_and_gradients

IMPLEMENTATIONS = ("xla", "mosaic_tpu")
SMALL = {
  "xla": XLAConfig(vocab_block=96, token_block=40),
  "mosaic_tpu": TPUConfig(
    token_block=128,
    vocab_block=256,
    backward_token_block=128,
    backward_vocab_block=128,
    sub_block=128,
  ),
}


@contextlib.contextmanager
def traced_for(implementation):
  if implementation == "mosaic_tpu":
    with target("tpu", interpret=True):
      yield
  else:
    yield


def arrays(tokens, vocab, width, kind="labels", dtype="float32", size=1.0, seed=0):
  """Inputs of one kind: ``labels``, or ``teacher`` of another width."""
  keys = jax.random.split(jax.random.key(seed), 5)

  def normal(key, *shape):
    return jax.random.normal(key, shape, jnp.float32)

  out = {
    "hidden": (size * normal(keys[0], tokens, width)).astype(dtype),
    "head": (normal(keys[1], vocab, width) / 4).astype(dtype),
  }
  if kind == "labels":
    out["labels"] = jax.random.randint(keys[2], (tokens,), 0, vocab)
  else:
    out["teacher_hidden"] = normal(keys[3], tokens, width + 8).astype(dtype)
    out["teacher_head"] = (normal(keys[4], vocab, width + 8) / 4).astype(dtype)
  return out


def run(inputs, implementation, config="small", **options):
  """Loss and gradients of all inputs but labels."""
  inputs = {name: x for name, x in inputs.items() if x is not None}
  rest = {n: inputs.pop(n) for n in ("labels",) if n in inputs}
  config = SMALL.get(implementation) if config == "small" else config
  with traced_for(implementation):
    return value_and_gradients(
      lambda **xs: linear_cross_entropy(
        **xs, **rest, **options, implementation=implementation, config=config
      ),
      inputs,
    )


_expected = {}  # by inputs and options: both implementations are compared with one computation


def check(inputs, implementation, dtype="float32", **options):
  got = run(inputs, implementation, **options)
  wide = jax.tree.map(
    lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs
  )
  key = tuple(np.asarray(x).tobytes() for x in jax.tree.leaves(wide)), tuple(options.items())
  if key not in _expected:
    _expected[key] = run(wide, "reference", config=None, **options)
  expected = _expected[key]
  assert got["out"].dtype == jnp.float32
  for name, gradient in got["grad"].items():
    assert gradient.dtype == inputs[name].dtype and gradient.shape == inputs[name].shape
  assert_close(got, expected, TOLERANCE[dtype])
  return got, expected


CASES = {
  "labels": ("labels", {}),
  "temperature and cap": ("labels", {"temperature": 0.7, "logit_cap": 2.0}),
  "teacher": ("teacher", {}),
  "teacher, temperature and cap": ("teacher", {"temperature": 2.0, "logit_cap": 3.0}),
  "top 5": ("teacher", {"top_k": 5, "temperature": 1.5, "logit_cap": 3.0}),
  "top 20": ("teacher", {"top_k": 20}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case, implementation):
  kind, options = CASES[case]
  check(arrays(131, 509, 24, kind), implementation, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_whole_blocks(implementation):
  check(arrays(128, 384, 32), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_and_fewer_words_than_a_block(implementation):
  check(arrays(1, 7, 16, "teacher"), implementation, top_k=7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["labels", "teacher", "top 5"])
def test_bfloat16(case, implementation):
  kind, options = CASES[case]
  check(arrays(63, 509, 64, kind, "bfloat16"), implementation, "bfloat16", **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_states_and_head_of_different_dtypes(implementation):
  inputs = arrays(17, 131, 16)
  inputs["hidden"] = inputs["hidden"].astype(jnp.bfloat16)
  got, expected = check(inputs, implementation, "bfloat16")
  # Products are formed in the wider dtype: what float32 rounding leaves of the head's gradient.
  assert relative_rms(got["out"], expected["out"]) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leading_axes_and_weights(implementation):
  inputs = arrays(30, 131, 16)
  flat = inputs | {"weights": jax.random.uniform(jax.random.key(9), (30,))}
  shaped = {n: x if n == "head" else x.reshape(2, 15, *x.shape[1:]) for n, x in flat.items()}
  got, _ = check(shaped, implementation)
  assert got["out"].shape == (2, 15)
  with traced_for(implementation):
    f = functools.partial(linear_cross_entropy, implementation=implementation)
    weighted = f(**flat)
    assert_close(weighted, flat["weights"] * f(**inputs), 1e-6)
    with pytest.raises(AssertionError):  # the weights matter
      assert_close(weighted, f(**inputs), 0.1)


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
def test_a_token_of_weight_zero_costs_nothing_whatever_its_label(implementation):
  inputs = arrays(20, 131, 16)
  keep = jnp.arange(20) % 3 > 0
  clean = inputs | {"weights": keep.astype(jnp.float32)}
  spoilt = clean | {"labels": jnp.where(keep, inputs["labels"], jnp.array([-1, -100, 131, 5] * 5))}
  expected, got = (run(x, implementation, config=None) for x in (clean, spoilt))
  assert_close(got, expected, 1e-7)
  assert float(jnp.max(jnp.abs(got["out"][~keep]))) == 0
  assert float(jnp.max(jnp.abs(got["grad"]["hidden"][~keep]))) == 0
  assert np.all(np.isfinite(got["grad"]["head"]))
  # the same label where it counts is loud
  loud = run(spoilt | {"weights": jnp.ones(20)}, implementation, config=None)["out"]
  valid = (spoilt["labels"] >= 0) & (spoilt["labels"] < 131)
  assert np.array_equal(np.isnan(loud), ~valid)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_top_k_of_all_words_is_the_full_divergence(implementation):
  inputs = arrays(9, 61, 16, "teacher")
  full = run(inputs, implementation)
  assert_close(run(inputs, implementation, top_k=61), full, 1e-5)
  with pytest.raises(AssertionError):
    assert_close(run(inputs, implementation, top_k=60), full, 1e-5)


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
def test_a_student_equal_to_its_teacher(implementation):
  inputs = arrays(19, 300, 16)
  del inputs["labels"]
  same = inputs | {"teacher_hidden": inputs["hidden"], "teacher_head": inputs["head"]}
  got = run(same, implementation, logit_cap=5.0)
  assert float(jnp.max(jnp.abs(got["out"]))) < 1e-6
  for gradient in got["grad"].values():  # the teacher's is 0 whatever it is
    assert float(jnp.max(jnp.abs(gradient))) < 1e-7
  other = run(same | {"teacher_hidden": 1.1 * inputs["hidden"]}, implementation, logit_cap=5.0)
  assert float(jnp.min(other["out"])) > 1e-5  # positive, as a divergence must be
  assert float(jnp.max(jnp.abs(other["grad"]["hidden"]))) > 1e-3


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
def test_ties_go_to_the_lowest_ids(implementation):
  inputs = arrays(5, 300, 16, "teacher")
  inputs["teacher_head"] = jnp.zeros_like(inputs["teacher_head"])  # every word is as likely
  got = run(inputs, implementation, top_k=3)["out"]
  log_q = jax.nn.log_softmax(inputs["hidden"] @ inputs["head"].T)
  expected = jnp.sum(-np.log(300) - log_q[:, :3], axis=-1) / 300
  assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "kind, options", [("labels", {}), ("teacher", {}), ("teacher", {"top_k": 4})]
)
def test_logits_of_ten_thousand(kind, options, implementation):
  inputs = arrays(11, 300, 8, kind, size=1.0)
  largest = float(jnp.max(jnp.abs(inputs["hidden"] @ inputs["head"].T)))
  inputs["hidden"] = inputs["hidden"] * (1e4 / largest)
  got, _ = check(inputs, implementation, **options)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
  assert float(jnp.max(got["out"])) > 100


def test_the_definition_against_numpy_in_float64():
  inputs = arrays(13, 101, 16, "teacher")
  x, w, y, u = (np.asarray(a, np.float64) for a in inputs.values())

  def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)

  q, p = (softmax(3 * np.tanh(a @ b.T / 3) / 2) for a, b in ((x, w), (y, u)))
  got = run(inputs, "reference", temperature=2.0, logit_cap=3.0)
  assert_close(got["out"], np.sum(p * np.log(p / q), axis=-1), 1e-5)
  labels = jnp.arange(13)
  got = run(
    {"hidden": inputs["hidden"], "head": inputs["head"], "labels": labels},
    "reference",
    temperature=2.0,
    logit_cap=3.0,
  )
  assert_close(got["out"], -np.log(q[np.arange(13), np.arange(13)]), 1e-5)


def test_the_gradient_is_soft_cross_entropy_s():
  losses = pytest.importorskip("jaxdec.drafting.losses")
  inputs = arrays(33, 200, 16, "teacher")

  def whole(hidden, head):
    teacher = inputs["teacher_hidden"] @ inputs["teacher_head"].T
    return jnp.sum(losses.soft_cross_entropy(hidden @ head.T, teacher))

  def fused(hidden, head):
    rest = {n: inputs[n] for n in ("teacher_hidden", "teacher_head")}
    return jnp.sum(linear_cross_entropy(hidden, head, **rest))

  state = inputs["hidden"], inputs["head"]
  got, expected = (jax.grad(f, argnums=(0, 1))(*state) for f in (fused, whole))
  assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}])
def test_no_gradient_reaches_the_teacher(options):
  inputs = arrays(5, 50, 8, "teacher")
  grads = jax.grad(lambda xs: jnp.sum(linear_cross_entropy(**xs, **options)))(inputs)
  for name in ("teacher_hidden", "teacher_head"):
    assert float(jnp.max(jnp.abs(grads[name]))) == 0
  assert float(jnp.max(jnp.abs(grads["hidden"]))) > 0


@pytest.mark.parametrize(
  "kind, options", [("labels", {}), ("teacher", {}), ("teacher", {"top_k": 8})]
)
def test_memory_does_not_grow_with_the_vocabulary(kind, options):
  def temp(vocab, implementation, config=None):
    inputs = jax.eval_shape(lambda: arrays(256, vocab, 64, kind, "bfloat16"))
    rest = {n: x for n, x in inputs.items() if n not in ("hidden", "head")}

    def f(hidden, head, rest):
      def total(hidden, head):
        loss = linear_cross_entropy(
          hidden, head, **rest, **options, implementation=implementation, config=config
        )
        return jnp.sum(loss)

      return jax.value_and_grad(total, argnums=(0, 1))(hidden, head)

    compiled = jax.jit(f).lower(inputs["hidden"], inputs["head"], rest).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  small, large = (temp(v, "xla", XLAConfig(512, 128)) for v in (4099, 4 * 4099))
  assert large <= 1.02 * small
  assert temp(4 * 4099, "reference") > 3 * temp(4099, "reference")  # what the test would notice
  assert temp(4 * 4099, "reference") > 10 * large


@pytest.mark.parametrize("tokens", [100, 300])  # one block of them, which is fetched as it was sent
def test_two_cores_share_the_vocabulary(tokens):
  inputs = arrays(tokens, 3 * 128 - 5, 16)  # the second core has a block less
  labels = inputs.pop("labels")

  with target("tpu", generation="v5p", interpret=True):
    got = value_and_gradients(
      lambda **x: linear_cross_entropy(
        **x, labels=labels, implementation="mosaic_tpu", config=SMALL["mosaic_tpu"]
      ),
      inputs,
    )
  expected = run(inputs | {"labels": labels}, "reference", config=None)
  assert_close(got, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("tokens", [100, 300])
def test_copies_do_not_race(tokens):
  inputs = arrays(tokens, 300, 16)
  labels = inputs.pop("labels")
  with target("tpu", interpret=pltpu.InterpretParams(detect_races=True)):
    got = value_and_gradients(
      lambda **x: linear_cross_entropy(
        **x, labels=labels, implementation="mosaic_tpu", config=SMALL["mosaic_tpu"]
      ),
      inputs,
    )
    jax.block_until_ready(got)
  assert not interpret_pallas_call.races.races_found
  expected = run(inputs | {"labels": labels}, "reference", config=None)
  assert_close(got, expected, TOLERANCE["float32"])


def test_vocab_block_changes_nothing_but_memory():
  inputs = arrays(17, 257, 16)
  one, other = (linear_cross_entropy(**inputs, vocab_block=b) for b in (16, 257))
  assert_close(one, other, 1e-6)


def test_no_tokens():
  inputs = arrays(0, 50, 8)
  out = run(inputs, "xla")
  assert out["out"].shape == (0,) and float(jnp.max(jnp.abs(out["grad"]["head"]))) == 0


def test_float64():
  with jax.enable_x64(True):
    inputs = arrays(9, 101, 8, dtype="float64")
    got, expected = (run(inputs, i, config=None) for i in ("xla", "reference"))
    assert got["out"].dtype == jnp.float64
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
      assert float(jnp.max(jnp.abs(x - y))) < 1e-12


def test_the_kernels_refuse_what_they_cannot_do():
  inputs = arrays(4, 40, 8)
  with pytest.raises(Unsupported, match="mosaic_tpu runs on TPUs"):
    linear_cross_entropy(**inputs, implementation="mosaic_tpu")
  with pytest.raises(Unsupported, match="not implemented yet; use implementation='xla'"):
    linear_cross_entropy(**inputs, implementation="mosaic_gpu")
  with target("tpu", interpret=True), pytest.raises(Unsupported, match="multiple of 128"):
    linear_cross_entropy(**inputs, implementation="mosaic_tpu", vocab_block=100)
  with target("tpu", generation="v4"), pytest.raises(Unsupported, match="VMEM"):
    wide = jax.eval_shape(lambda: arrays(128, 256, 32768))
    jax.eval_shape(lambda x: linear_cross_entropy(**x, implementation="mosaic_tpu"), wide)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"labels": None}, "got neither of labels and teacher"),
    ({"teacher_hidden": 0, "teacher_head": 0}, "got both of labels and teacher"),
    ({"teacher_hidden": 0}, "teacher_head is missing"),
    ({"labels": jnp.zeros(3, jnp.int32)}, r"labels has shape \(3,\), expected \[a0\] with 4"),
    ({"labels": jnp.zeros(4)}, "labels have dtype float32, expected integers"),
    ({"head": jnp.zeros((40, 9))}, r"head has shape \(40, 9\), expected \[V,D\] with 8"),
    ({"head": jnp.zeros((0, 8))}, "at least one row"),
    ({"weights": jnp.ones(3)}, r"weights have shape \(3,\), expected \(4,\)"),
    ({"top_k": 3}, "top_k=3 goes with a teacher"),
    ({"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
    ({"logit_cap": -1.0}, "logit_cap is -1.0, expected a positive number or None"),
    ({"vocab_block": 0}, "vocab_block is 0, expected a positive integer"),
    ({"vocab_block": 8, "config": XLAConfig()}, "set vocab_block in the config"),
    ({"implementation": "xls"}, "did you mean 'xla'"),
  ],
)
def test_one_sentence_for_a_wrong_call(change, message):
  inputs = arrays(4, 40, 8) | change
  for name in ("teacher_hidden", "teacher_head"):
    if name in change:
      inputs[name] = arrays(4, 40, 8, "teacher")[name]
  with pytest.raises(ValueError, match=message) as caught:
    linear_cross_entropy(**inputs)
  assert "\n" not in str(caught.value)


def test_more_words_than_there_are():
  with pytest.raises(ValueError, match="top_k is 41, expected at most V=40"):
    linear_cross_entropy(**arrays(4, 40, 8, "teacher"), top_k=41)


def test_configs_are_checked():
  for wrong in (
    lambda: XLAConfig(vocab_block=0),
    lambda: TPUConfig(token_block=100),
    lambda: TPUConfig(vocab_block=256, sub_block=384),
  ):
    with pytest.raises(ValueError, match=r"expected|doesn't divide"):
      wrong()
