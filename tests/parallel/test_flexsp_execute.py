# SPDX-License-Identifier: Apache-2.0
"""FlexSP's executor: groups of several degrees give the gradient of one device, however planned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdec.errors import UserError
from jaxdec.models import Decoder, tiny_llama
from jaxdec.parallel.flexsp import (
  CostModel,
  Executor,
  Group,
  Plan,
  Planner,
  Result,
  exchange_bytes,
  measure,
  task_gradients,
)
from jaxdec.parallel.flexsp.packing import pack, token_bounds
from jaxdec.parallel.mesh import make_mesh
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.training import LanguageModel
from pallas_kernels.testing import COMPILE_ONCE
from tests.parallel import processes
from tests.training import tiny

CAP = 16
COSTS = CostModel(
  a1=1e-3, a2=0.5, b1=1.0, bandwidth={2: 4.0, 4: 1.0, 8: 0.2}, bytes_per_token=2.0**18, cap=CAP
)
# One sequence needs four devices, one two; the rest fit on one.
LENGTHS = (50, 20, 9, 3, 14, 5, 12, 7, 11, 2, 6, 30)


def sequences(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [
    {
      "tokens": rng.integers(0, tiny.VOCAB, n).astype(np.int32),
      # Weights other than the number of tokens, some sequences with none at all.
      "loss_mask": rng.random(n) < rng.choice([0.0, 0.3, 1.0]),
    }
    for n in lengths
  ]


def plan(lengths=LENGTHS, method="greedy"):
  return Planner(devices=8, model=COSTS, method=method).plan(list(lengths))


def regression(mesh, params, batch, scale=1.0):
  """Weighted least squares of a number for each token: sums and gradients known in closed form."""
  weight = batch["loss_mask"].astype(jnp.float32)
  total = jnp.sum(weight)

  def loss(w):
    x = jnp.stack([batch["tokens"], batch["positions"]], -1).astype(jnp.float32) / 50
    error = jnp.square(x @ w["w"] - 1.0) * (batch["segment_ids"] > 0)
    return scale * jnp.sum(error * weight) / total  # NaN without a label

  value, gradients = jax.value_and_grad(loss)(params)
  return value, total, gradients


def expected_regression(w, rows):
  x = np.concatenate([np.stack([r["tokens"], np.arange(len(r["tokens"]))], -1) for r in rows]) / 50
  weight = np.concatenate([r["loss_mask"] for r in rows]).astype(np.float64)
  error = x @ w - 1.0
  gradient = 2 * (x * (error * weight)[:, None]).sum(0) / weight.sum()
  return (error**2 * weight).sum() / weight.sum(), weight.sum(), gradient


W = np.array([0.7, -0.3])
PARAMS = {"w": W.astype(np.float32)}


@pytest.fixture(scope="module")
def executor():
  return Executor(regression, cap=CAP, compiler_options=COMPILE_ONCE)


def check(result, rows):
  loss, weight, gradient = expected_regression(W, rows)
  np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
  assert float(result.weight) == weight
  np.testing.assert_allclose(result.gradients["w"], gradient, rtol=1e-5, atol=1e-6)


def test_any_loss_and_gradients_summed_over_groups_of_several_degrees(executor):
  rows = sequences(LENGTHS)
  flexible = plan()
  degrees = {g.degree for groups in flexible.micro_batches for g in groups}
  assert len(degrees) >= 3 and len(flexible.micro_batches) >= 2
  check(executor(flexible, PARAMS, rows), rows)


def test_one_compilation_for_each_signature(executor):
  traces = []

  def counted(mesh, params, batch):
    traces.append((mesh.shape["seq"], batch["tokens"].shape))
    return regression(mesh, params, batch)

  compiled = []

  def listen(event, duration, **kwargs):
    if event.endswith("backend_compile_duration"):
      compiled.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    run = Executor(counted, cap=CAP, compiler_options=COMPILE_ONCE)
    first = plan()
    expected = {(g.ranks, run.padded(first, g)) for groups in first.micro_batches for g in groups}
    run(first, PARAMS, sequences(LENGTHS))
    assert {(s.ranks, s.tokens) for s in run.signatures} == expected
    assert run.compilations == len(expected) == len(traces)
    before = len(compiled)
    assert before >= len(expected)
    # The same shapes, other tokens: nothing is traced or compiled.
    run(first, {"w": -PARAMS["w"]}, sequences(LENGTHS, seed=1))
    # Lengths that differ by less than the padding, too.
    near = Plan(8, (51, *LENGTHS[1:]), COSTS, first.micro_batches)
    run(near, PARAMS, sequences(near.lengths))
    assert len(traces) == len(expected) and len(compiled) == before
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_sum_of_groups_depends_on_their_weights():
  """Negative control: groups that count alike, or twice, do not give the batch's gradient."""
  rows = sequences(LENGTHS)
  _, _, gradient = expected_regression(W, rows)
  for wrong in (lambda weight: jnp.ones_like(weight), lambda weight: weight + 5):

    def unfair(mesh, params, batch, wrong=wrong):
      loss, weight, gradients = regression(mesh, params, batch)
      return loss, wrong(weight), gradients

    run = Executor(unfair, cap=CAP, compiler_options=COMPILE_ONCE)
    got = run(plan(), PARAMS, rows).gradients["w"]
    assert np.max(np.abs(got - gradient) / np.abs(gradient)) > 1e-2


def test_idle_devices_and_extras(executor):
  groups = ((Group((2, 3), (0,)),), (Group((7,), (1,)), Group((0,), (2,))))
  rows = sequences((30, 9, 4), seed=2)
  rows[1]["loss_mask"][:] = False
  partial = Plan(8, (30, 9, 4), COSTS, groups)
  result = executor(partial, PARAMS, rows, extras=(np.float32(3.0),))
  loss, weight, gradient = expected_regression(W, rows)
  np.testing.assert_allclose(result.loss, 3 * loss, rtol=1e-5)
  np.testing.assert_allclose(result.gradients["w"], 3 * gradient, rtol=1e-5, atol=1e-6)
  assert float(result.weight) == weight


def test_gradients_lie_where_they_are_wanted():
  mesh = make_mesh(fsdp=2, data=4)
  split = jax.NamedSharding(mesh, jax.P("fsdp"))
  run = Executor(
    regression, cap=CAP, mesh=mesh, shardings={"w": split}, compiler_options=COMPILE_ONCE
  )
  rows = sequences((30, 9), seed=3)
  params = {"w": jax.device_put(PARAMS["w"], split)}  # split over the trainer's mesh
  result = run(plan((30, 9)), params, rows)
  assert result.gradients["w"].sharding == split
  check(result, rows)


def language_model(sequence=None, layout="unrolled"):
  config = tiny_llama(
    vocab_size=tiny.VOCAB, dim=16, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=4,
    hidden_dim=32,
  )  # fmt: skip
  task = LanguageModel(Decoder(config, layout=layout, sequence=sequence))
  return task, nn.unbox(jax.jit(task.init)(jax.random.key(0)))


def single_device(task, params, rows):
  batch = pack(rows, sum(len(r["tokens"]) for r in rows))
  grad = jax.jit(
    lambda p, b: jax.value_and_grad(task.loss, has_aux=True)(p, {}, b, None),
    compiler_options=COMPILE_ONCE,
  )
  (loss, metrics), gradients = grad(params, batch)
  return float(loss), float(metrics["weight"]), gradients


def close(got, expected):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.sqrt(np.mean((x - y) ** 2)) <= 1e-5 * np.sqrt(np.mean(y**2)), (x, y)


def test_language_model_equals_one_device():
  """A decoder's loss and gradients, and what they become with one group's weight wrong."""
  lengths = (50, 20, 9, 5, 2)
  rows = sequences(lengths, seed=4)
  task, params = language_model()
  loss, weight, gradients = single_device(task, params, rows)
  groups = (Group((0, 1, 2, 3), (0,)), Group((4, 5), (1, 3)), Group((7,), (2, 4)))
  run = Executor(task_gradients(task), cap=CAP, compiler_options=COMPILE_ONCE)
  result = run(Plan(8, lengths, COSTS, (groups,)), params, rows)
  np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
  assert float(result.weight) == weight
  close(result.gradients, gradients)
  other = [dict(rows[0], loss_mask=np.ones(50, bool)), *rows[1:]]
  with pytest.raises(AssertionError):
    close(run(Plan(8, lengths, COSTS, (groups,)), params, other).gradients, gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
  "sequence",
  [
    SequenceConfig(attention="ulysses"),
    SequenceConfig(attention="ring", layout="zigzag"),
    SequenceConfig(attention="allgather"),
  ],
  ids=lambda s: f"{s.attention}-{s.layout}",
)
def test_sequence_parallel_layers_equal_one_device(sequence):
  """With the layers' own collectives, and every micro-batch of a real plan."""
  rows = sequences(LENGTHS, seed=5)
  task, params = language_model(sequence, "scanned")
  loss, weight, gradients = single_device(task, params, rows)
  run = Executor(
    task_gradients(task), cap=CAP, layout=sequence.layout, bounds=[CAP],
    compiler_options=COMPILE_ONCE,
  )  # fmt: skip
  result = run(plan(method="milp"), params, rows)
  np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
  assert float(result.weight) == weight
  close(result.gradients, gradients)


# Groups within a process, over both, and a micro-batch in which the second process idles.
APART = Plan(
  8, (50, 20, 9, 60, 7), COSTS,
  (
    (Group((2, 3, 4, 5), (0,)), Group((6, 7), (1,)), Group((0,), (2,))),
    (Group(tuple(range(8)), (3,)),),
    (Group((1,), (4,)),),
  ),
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_of_four_devices(executor):
  ends = processes.run(2, devices=4, variables={"script": __file__})
  rows = sequences(APART.lengths)
  for end in ends:
    assert end.code == 0, end.err
    loss, weight, *gradient = map(float, end.out.splitlines()[-1].split())
    found = Result(np.float32(loss), np.float32(weight), {"w": np.float32(gradient)})
    check(found, rows)
    np.testing.assert_allclose(
      found.gradients["w"], executor(APART, PARAMS, rows).gradients["w"], rtol=1e-6
    )


def test_token_bounds_waste_at_most_an_eighth():
  for cap in (1, 5, 16, 100, 1000, 12609):
    bounds = token_bounds(cap)
    assert bounds[-1] == cap and list(bounds) == sorted(set(bounds))
    for tokens in range(1, cap + 1):
      padded = min(b for b in bounds if b >= tokens)
      assert padded - tokens <= tokens / 8
  assert all(b % 32 == 0 for b in token_bounds(1000, 32)) and token_bounds(1000, 32)[-1] == 1024
  assert len(token_bounds(2**20)) < 8 * 20


def test_pack():
  rows = [
    {"tokens": np.array([5, 6]), "loss_mask": np.array([True, False])},
    {"tokens": np.array([7]), "loss_mask": np.array([True])},
  ]
  batch = pack(rows, 5)
  assert {name: x.tolist() for name, x in batch.items()} == {
    "tokens": [[5, 6, 7, 0, 0]],
    "loss_mask": [[True, False, True, False, False]],
    "segment_ids": [[1, 1, 2, 0, 0]],
    "positions": [[0, 1, 0, 0, 0]],
  }


def test_errors_before_anything_runs(executor):
  rows = sequences((9, 4))
  with pytest.raises(UserError, match=r"plan is for 4 devices.*mesh has 8"):
    executor(Planner(devices=4, model=COSTS, method="greedy").plan([9, 4]), PARAMS, rows)
  with pytest.raises(UserError, match="sequence 1 has 4 tokens, planned were 5"):
    executor(plan((9, 5)), PARAMS, rows)
  with pytest.raises(UserError, match="2 sequences for a plan of 3"):
    executor(plan((9, 4, 1)), PARAMS, rows)
  without = [rows[0], {"tokens": rows[1]["tokens"]}]
  with pytest.raises(UserError, match=r"sequence 1 has arrays.*sequence 0: tokens, loss_mask"):
    executor(plan((9, 4)), PARAMS, without)
  shorter = [dict(rows[0], loss_mask=np.ones(8, bool)), rows[1]]
  with pytest.raises(UserError, match=r"sequence 0 has arrays.*each of its 9 tokens"):
    executor(plan((9, 4)), PARAMS, shorter)
  with pytest.raises(UserError, match=r"layout='zigzga'.*did you mean"):
    Executor(regression, cap=CAP, layout="zigzga")
  small = Executor(regression, cap=4)
  with pytest.raises(UserError, match="room for 4; give it the cap"):
    small(plan((60,)), PARAMS, sequences((60,)))

  class NoWeight:
    def loss(self, params, frozen, batch, key):
      return jnp.sum(params["w"]), {}

  with pytest.raises(UserError, match=r"NoWeight.loss reports no metric 'weight'"):
    Executor(task_gradients(NoWeight()), cap=CAP)(plan((9, 4)), PARAMS, rows)


def test_measured_steps_are_of_every_degree_that_holds_them(executor):
  lengths = [(17,), (30,), (8, 8, 30)]
  found = measure(
    executor, PARAMS, cap=CAP, lengths=lengths, exchange_mib=(0.01, 0.04), repeats=1,
    sequence=lambda n: sequences([n])[0],
  )  # fmt: skip
  assert [(s.lengths, s.degree) for s in found.steps] == [
    (inside, d) for inside in lengths for d in (1, 2, 4, 8) if sum(inside) <= CAP * d
  ]
  assert all(s.ms > 0 for s in found.steps) and all(x.ms > 0 for x in found.exchanges)
  assert [x.degree for x in found.exchanges] == [2, 2, 4, 4, 8, 8]
  costs = found.fit(cap=CAP, bytes_per_token=1024.0)
  assert len(found.errors(costs)) == len(found.steps) and costs.cap == CAP
  assert Planner(devices=8, model=costs, method="greedy").plan(list(LENGTHS)).time > 0
  with pytest.raises(UserError, match="no list of lengths fits on 8 devices"):
    measure(executor, PARAMS, cap=CAP, lengths=[(200,)])


def test_exchange_bytes_of_a_decoder():
  config = tiny_llama(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
  # forward and backward: q and the output of 4 heads, k and v of 2
  assert exchange_bytes(config) == 3 * 2 * (2 * 4 + 2 * 2) * 8 * 2
  full = tiny_llama(dim=32, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8)
  assert exchange_bytes(full) == 16 * 3 * 32  # the paper's 16 l h


def main():
  """One of two processes."""
  from jaxdec.parallel.distributed import initialize

  initialize()
  assert jax.process_count() == 2
  run = Executor(regression, cap=CAP)
  result = jax.device_get(run(APART, PARAMS, sequences(APART.lengths)))
  print(result.loss, result.weight, *result.gradients["w"])


if __name__ == "__main__":
  main()
