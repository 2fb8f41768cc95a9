# SPDX-License-Identifier: Apache-2.0
"""Online, streamed and cached states of the target: the same training, to the bit in float32."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "drafting"))
from toy_target import VOCAB, init, randomized, target

from jaxdec.data import Corpus
from jaxdec.data.mixture import Mixture, make_batches
from jaxdec.drafting.kinds import KINDS
from jaxdec.errors import UserError
from jaxdec.parallel import make_mesh
from jaxdec.parallel.sequence import SequenceConfig
from jaxdec.training import MeshConfig, OptimizerConfig, Trainer, TrainerConfig
from jaxdec.training.tasks.distill import FEATURES, HIDDEN, Distill
from jaxdec.training.teachers import Cache, Cached, States, Streamed, row_keys

SHAPE = {"batch_size": 2, "seq_len": 16}


@functools.cache
def corpus():
  rng = np.random.default_rng(0)
  ids = [rng.integers(0, VOCAB, n) for n in rng.integers(4, 40, 12)]
  return Corpus.from_token_lists(ids, labels=[rng.integers(0, 4, len(x)) > 0 for x in ids])


def batches(seed=0, source=None, **options):
  return make_batches(source or corpus(), seed=seed, random_cuts=False, **SHAPE, **options)


@functools.cache
def task(kind="eagle3", seed=0):
  t = target(seed=seed)
  return Distill(KINDS[kind].for_target(t.model.config, num_heads=1), t.model, t.params)


@functools.cache
def states(kind="eagle3", dtype="float32"):
  return States(task(kind), make_mesh(), dtype)


def filled(folder, count=40, quiet=lambda text: None, kind="eagle3", dtype="float32", **options):
  cache = Cache(folder, states(kind, dtype), SHAPE["seq_len"])
  cache.fill(lambda: itertools.islice(batches(**options), count), quiet)
  return cache


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def trained(data, steps):
  config = TrainerConfig(
    steps=steps, progress=False, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
  )
  return Trainer(task("medusa"), config, data=data).train()


def test_cached_streamed_and_online_train_the_same_bits(tmp_path):
  """Over several epochs: rows are read again in other batches than they were written in."""
  steps = 2 * batches().dataset.batches_in_epoch() + 1
  expected = trained(batches(), steps)
  cached = Cached(batches(), filled(tmp_path / "cache", kind="medusa"))
  streamed = Streamed(batches(), states("medusa"))
  for data in (cached, streamed):
    result = trained(data, steps)
    jax.tree.map(np.testing.assert_array_equal, expected.params, result.params)
    assert float(expected.metrics["loss"]) == float(result.metrics["loss"])
  streamed.close()


@pytest.mark.slow
def test_loss_and_gradients_from_captured_states_are_the_same_bits(tmp_path):
  cached = Cached(batches(), filled(tmp_path / "cache"))
  params = randomized(init(task().drafter, target()))

  @jax.jit
  def step(params, frozen, batch):
    return jax.value_and_grad(lambda p: task().loss(p, frozen, batch, None)[0])(params)

  for online, stored in itertools.islice(zip(batches(), cached), 14):
    assert FEATURES in stored and FEATURES not in online
    results = [step(params, task().frozen, dict(batch)) for batch in (online, stored)]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_states_are_the_targets(tmp_path):
  batch = next(Cached(batches(), filled(tmp_path / "c")))
  t = task()
  _, output = jax.jit(t.teacher)(t.frozen, next(batches()))
  np.testing.assert_array_equal(batch[HIDDEN], output.hidden)
  for i, feature in enumerate(output.features):
    np.testing.assert_array_equal(batch[FEATURES][:, :, i], feature)
  same({k: v for k, v in batch.items() if not k.startswith("teacher")}, next(batches()))


def test_bfloat16_halves_the_rows_and_rounds(tmp_path):
  full, half = filled(tmp_path / "f"), filled(tmp_path / "h", dtype="bfloat16")
  assert full.row_bytes == 2 * half.row_bytes == 16 * 4 * 32 * 4
  a, b = next(Cached(batches(), full)), next(Cached(batches(), half))
  assert b[HIDDEN].dtype.name == "bfloat16"
  np.testing.assert_array_equal(a[HIDDEN].astype(b[HIDDEN].dtype), b[HIDDEN])


def test_the_cache_is_found_by_content(tmp_path):
  """Other seeds, mixtures and batch sizes read the rows they share, and add what they don't."""
  cache = filled(tmp_path / "c")
  rows = len(cache)
  assert rows == len({k for b in batches(num_epochs=1) for k in row_keys(b)})
  said = []
  filled(tmp_path / "c", quiet=said.append, seed=5)
  assert said == []
  mixed = Mixture((corpus(), Corpus.from_token_lists([np.arange(16) % 7] * 2)), (1, 1))
  more = filled(tmp_path / "c", quiet=said.append, source=mixed)
  assert len(more) == rows + 1 and "1 rows of 16 tokens" in said[0]
  stream = make_batches(corpus(), random_cuts=False, batch_size=3, seq_len=16)
  assert Cached(stream, more).__next__()[HIDDEN].shape == (3, 16, 32)


def test_a_write_that_was_cut_off_goes_on(tmp_path, monkeypatch):
  import jaxdec.training.teachers as module

  monkeypatch.setattr(module, "_SHARD_BYTES", 3 * 16 * 4 * 32 * 4)
  calls = []

  class Dying:
    def __getattr__(self, name):
      return getattr(states(), name)

    def __call__(self, batch):
      calls.append(1)
      if len(calls) == 4:
        raise KeyboardInterrupt
      return states()(batch)

  cache = Cache(tmp_path / "c", Dying(), 16)
  with pytest.raises(KeyboardInterrupt):
    cache.fill(lambda: itertools.islice(batches(), 40), lambda text: None)
  kept = len(list((tmp_path / "c").glob("*.array_record")))
  assert kept >= 1
  (tmp_path / "c" / "states-00099.tmp").write_bytes(b"half")
  whole = filled(tmp_path / "c")
  assert len(list((tmp_path / "c").glob("*.array_record"))) > kept
  fresh = filled(tmp_path / "fresh")
  for a, b in zip(*(itertools.islice(Cached(batches(), c), 12) for c in (whole, fresh))):
    same(a, b)


def test_the_size_is_said_before_and_refused_without_room(tmp_path, monkeypatch):
  said = []
  cache = filled(tmp_path / "c", quiet=said.append)
  size = len(cache) * 16 * 4 * 32 * 4
  assert f"{size / 1e3:.1f} kB before compression" in said[0] and "are free" in said[0]
  on_disk = sum(p.stat().st_size for p in (tmp_path / "c").glob("states-*"))
  assert f"{on_disk / 1e3:.1f} kB on disk" in said[1]
  usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(UserError, match="too little; store bfloat16"):
    filled(tmp_path / "d")
  assert [p.name for p in (tmp_path / "d").iterdir()] == ["teacher.json"]


def test_what_is_wrong_with_a_cache_is_named(tmp_path):
  cache = filled(tmp_path / "c")
  for other, complaint in (
    (States(task(seed=1), make_mesh()), "target is"),
    (states(dtype="bfloat16"), "dtype is 'float32' there and 'bfloat16' here"),
    (states("medusa"), "capture is"),
  ):
    with pytest.raises(UserError, match=complaint):
      Cache(tmp_path / "c", other, 16)
  with pytest.raises(UserError, match="seq_len is 16 there and 32 here"):
    Cache(tmp_path / "c", states(), 32)
  with pytest.raises(UserError, match="lacks a row"):
    cache.read({name: np.full((1, 16), 3, np.int32) for name in next(batches())})
  (tmp_path / "x").mkdir()
  (tmp_path / "x" / "y").write_text("z")
  with pytest.raises(UserError, match="holds something else"):
    Cache(tmp_path / "x", states(), 16)
  (path,) = (tmp_path / "c").glob("*.array_record")
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match=r"damaged|holds"):
    Cache(tmp_path / "c", states(), 16)
  with pytest.raises(UserError, match="teacher_dtype must be one of"):
    States(task(), make_mesh(), "int8")


@pytest.mark.slow
def test_sequences_split_over_devices(tmp_path):
  """States of a split target: those of one device, and streamed as online on the same mesh."""
  t = target()
  model = t.model.clone(sequence=SequenceConfig())
  split = Distill(task("medusa").drafter, model, t.params)
  mesh = make_mesh(seq=2)
  config = TrainerConfig(
    steps=3, progress=False, mesh=MeshConfig(seq=2),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
  )  # fmt: skip
  for a, b in itertools.islice(
    zip(Streamed(batches(), States(split, mesh)), Streamed(batches(), states("medusa"))), 3
  ):
    np.testing.assert_allclose(a[HIDDEN], b[HIDDEN], atol=1e-5)
  runs = [
    Trainer(split, config, data=data).train()
    for data in (batches(), Streamed(batches(), States(split, mesh)))
  ]
  jax.tree.map(np.testing.assert_array_equal, *(r.params for r in runs))


class Slow:
  """Counts how far ahead the producer is."""

  def __init__(self):
    self.made = 0

  def __call__(self, batch):
    self.made += 1
    return dict(batch)


def test_the_stream_is_bounded_and_its_position_is_the_readers():
  slow = Slow()
  stream = Streamed(batches(), slow, ahead=2)
  assert threading.active_count() >= 1 and slow.made == 0
  first = next(stream)
  deadline = time.time() + 5
  while slow.made < 4 and time.time() < deadline:
    time.sleep(0.01)
  time.sleep(0.15)
  assert slow.made == 4  # one read, two waiting, one in the producer's hands
  plain = batches()
  same(first, next(plain))
  assert json.dumps(stream.get_state()) == json.dumps(plain.get_state())
  state = stream.get_state()
  expected = [next(plain) for _ in range(3)]
  for a, b in zip(expected, [next(stream) for _ in range(3)]):
    same(a, b)
  stream.set_state(state)
  for a, b in zip(expected, [next(stream) for _ in range(3)]):
    same(a, b)
  stream.close()
  same(next(plain), next(stream))  # it can go on after a close
  stream.close()


def test_the_streams_end_and_errors_reach_the_reader():
  stream = Streamed(batches(num_epochs=1), Slow())
  assert len(list(stream)) == batches().dataset.batches_in_epoch()
  with pytest.raises(UserError, match="at least 1"):
    Streamed(batches(), Slow(), ahead=0)

  def broken(batch):
    raise ValueError("no states")

  with pytest.raises(ValueError, match="no states"):
    next(Streamed(batches(), broken))


def test_a_dropped_stream_takes_its_thread_along():
  before = threading.active_count()
  stream = Streamed(batches(), Slow())
  next(stream)
  assert threading.active_count() == before + 1
  del stream
  deadline = time.time() + 5
  while threading.active_count() > before and time.time() < deadline:
    time.sleep(0.02)
  assert threading.active_count() == before
