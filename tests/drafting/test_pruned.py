# SPDX-License-Identifier: Apache-2.0
"""Layer-pruned copies as draft models, and what heals them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_target import VOCAB, batch_of, random_batch, target
from universal import SAMPLERS, plain

from jaxdec.data.chat import read_conversations
from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import DraftModel
from jaxdec.drafting.base import Target
from jaxdec.drafting.pruned import (
  Task,
  angular_distances,
  prune,
  prune_most_redundant,
  rewrite,
  save_conversations,
  slerp,
)
from jaxdec.errors import UserError
from jaxdec.models import stack_layers
from jaxdec.training.tasks.heal import Heal
from tests.decoding.targets import target as any_target

PROMPTS = tuple(
  tuple(int(x) for x in np.random.default_rng(3).integers(0, VOCAB, n)) for n in (5, 11, 2)
)


@functools.cache
def with_idle_layers() -> Target:
  """Five layers of which 2 and 3 add nothing to the stream."""
  t = target(layers=5)
  params = dict(t.params)
  for i in (2, 3):
    layer = jax.tree.map(lambda x: x, params[f"layers_{i}"])
    layer["mixer"]["o"] = jax.tree.map(jnp.zeros_like, layer["mixer"]["o"])
    layer["mlp"]["down"] = jax.tree.map(jnp.zeros_like, layer["mlp"]["down"])
    params[f"layers_{i}"] = layer
  return Target(t.model, params, None)


def scanned(t: Target) -> Target:
  return Target(t.model.clone(layout="scanned"), stack_layers(t.params, t.model.config), None)


@pytest.mark.parametrize("layout", [lambda t: t, scanned], ids=["unrolled", "scanned"])
def test_redundant_layers_are_found_and_not_missed(layout):
  """Taking the idle layers out changes no logit."""
  t, batch = layout(with_idle_layers()), random_batch(0)
  distances = angular_distances(t.model, t.params, [batch], 2)
  assert distances.shape == (4,)
  assert distances[2] < 1e-3 < 0.02 < np.delete(distances, 2).min()
  model, params, start = prune_most_redundant(t.model, t.params, [batch], 2)
  assert (start, model.config.num_layers, model.layout) == (2, 3, t.model.layout)
  before, after = (
    jax.jit(m.apply)({"params": p}, batch["tokens"]).logits
    for m, p in ((t.model, t.params), (model, params))
  )
  np.testing.assert_allclose(after, before, atol=1e-5)


def test_distance_is_the_angle_at_the_last_token_of_each_document():
  t = target()
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, VOCAB, 9), rng.integers(0, VOCAB, 11)
  packed = batch_of([np.concatenate([a, b, [0, 0]])], [[1] * 9 + [2] * 11 + [0] * 2])
  ours = angular_distances(t.model, t.params, [packed], 1)
  total = np.zeros(3)
  for text in (a, b):
    out = t.model.apply({"params": t.params}, jnp.asarray([text]), capture=(0, 1, 2, 3))
    x = [np.asarray(f[0, -1], np.float64) for f in out.features]
    for i in range(3):
      cosine = x[i] @ x[i + 1] / np.linalg.norm(x[i]) / np.linalg.norm(x[i + 1])
      total[i] += np.arccos(cosine) / np.pi
  np.testing.assert_allclose(ours, total / 2, atol=1e-4)


def test_pruned_layers_of_a_hybrid_keep_their_kinds():
  model, params = any_target("recurrent")  # GLA, delta rule, windowed attention
  pruned, rest = prune(model, params, 0, 1)
  assert pruned.config.layers == model.config.layers[1:]
  assert sorted(rest) == sorted(k for k in params if k != "layers_2")
  jax.tree.map(np.testing.assert_array_equal, rest["layers_0"], params["layers_1"])
  assert pruned.apply({"params": rest}, jnp.zeros((1, 4), jnp.int32)).logits.shape == (1, 4, 13)


@pytest.mark.parametrize("sampler", ["greedy", "sampled"])
def test_lossless(sampler):
  t = target()
  model, params = prune(t.model, t.params, 1, 1)
  out = generate(
    t.model, t.params, [list(p) for p in PROMPTS], max_new_tokens=21, sampler=SAMPLERS[sampler],
    drafter=DraftModel(model=model, num_drafts=3), drafter_params=params, stop=None, seed=5,
  )  # fmt: skip
  assert out.tokens == plain(sampler, PROMPTS, 21)


def test_rewrites_are_kept_if_their_answer_is_right():
  tasks = [Task(f"q{i}", f"because #### {i}", context="c ") for i in range(5)]
  asked = []

  def write(prompts):
    asked.append(len(prompts))
    assert all("because" in p and p.startswith("c Question: q") for p in prompts)
    number = {p: next(i for i in range(5) if f"q{i}" in p) for p in prompts}
    answers = {0: " so #### 0 ", 1: "so #### 7", 2: "no result", 3: "", 4: "well #### 4"}
    return [answers[number[p]] for p in prompts]

  def extract(text):
    return text.split("#### ")[1].strip() if "#### " in text else None

  data = rewrite(tasks, write, extract, batch_size=2)
  assert asked == [2, 2, 1]
  assert [d.answer for d in data] == [
    "so #### 0", "because #### 1", "because #### 2", "because #### 3", "well #### 4",
  ]  # fmt: skip
  assert [d.rewritten for d in data] == [True, False, False, False, True]
  # Without a check only an empty rewrite is refused.
  assert [d.rewritten for d in rewrite(tasks, write)] == [True, True, True, False, True]


def test_self_data_is_read_back_as_conversations(tmp_path):
  data = rewrite([Task("q?", "a", "c: ")], lambda prompts: ["b"])
  save_conversations(tmp_path / "data.jsonl", data)
  (conversation,) = read_conversations(tmp_path / "data.jsonl")
  said = [(m["role"], m["content"]) for m in conversation.messages]
  assert said == [("user", "c: q?"), ("assistant", "b")]


def test_healing_begins_with_the_weights_given():
  t = scanned(target())
  model, params = prune(t.model, t.params, 1, 1)
  task = Heal(model, weights=params)
  boxed = jax.eval_shape(task.init, jax.random.key(0))
  assert any(isinstance(x, nn.Partitioned) for x in jax.tree.leaves(
    boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
  ))  # fmt: skip
  ours = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
  jax.tree.map(np.testing.assert_array_equal, ours, params)
  assert task.config["task"] == "heal"


def test_slerp():
  a, b = {"w": jnp.asarray([[1.0, 0.0]])}, {"w": jnp.asarray([[0.0, 1.0]])}
  np.testing.assert_allclose(slerp(a, b, 0.5)["w"], [[0.5**0.5] * 2], rtol=1e-6)
  np.testing.assert_allclose(slerp(a, b, 0.0)["w"], a["w"], atol=1e-7)
  twice = {"w": 2 * a["w"]}
  np.testing.assert_allclose(slerp(a, twice, 0.25)["w"], 1.25 * a["w"], rtol=1e-6)


def test_mistakes_are_explained():
  t = target()
  with pytest.raises(UserError, match=r"span must lie in 1\.\.2"):
    prune(t.model, t.params, 0, 3)
  with pytest.raises(UserError, match=r"start must lie in 0\.\.1 for 2 layers"):
    prune(t.model, t.params, 2, 2)
  with pytest.raises(UserError, match="span must lie"):
    angular_distances(t.model, t.params, [], 0)


def written_by(factor, rows, length=33, seed=0):
  """Texts of an author: ``next = factor * token + 1 mod V``, a random token one time in ten."""
  rng = np.random.default_rng(seed)
  text = rng.integers(0, VOCAB, (rows, length))
  for t in range(1, length):
    usual = (factor * text[:, t - 1] + 1) % VOCAB
    text[:, t] = np.where(rng.random(rows) < 0.9, usual, text[:, t])
  return batch_of(text)


def fine_tuned(model, params, batch, steps):
  task, optimizer = Heal(model, weights=params), optax.adam(3e-3)

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: task.loss(p, {}, batch, None)[0])(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  return params


@pytest.mark.slow
def test_self_data_heals_best():
  """More is accepted than without healing or after healing on another author's text; and the
  target's text is the likelier one under the pruned model to begin with."""
  model = target(layers=4).model
  params = fine_tuned(model, target(layers=4).params, written_by(3, 64), 200)
  pruned, cut = prune(model, params, 1, 2)
  rng = np.random.default_rng(0)
  prompts = [[int(x) for x in rng.integers(0, VOCAB, 3)] for _ in range(64)]
  run = functools.partial(generate, sampler=Sampler(1.0), stop=None, max_new_tokens=30)
  own = run(model, params, prompts, seed=1).tokens
  own = batch_of(np.concatenate([np.asarray(prompts), np.asarray(own)], axis=1))
  theirs = written_by(5, 64, seed=1)
  loss = jax.jit(lambda batch: Heal(pruned, weights=cut).loss(cut, {}, batch, None)[0])
  assert float(loss(own)) < float(loss(theirs))

  def tokens_per_step(weights):
    drafter = DraftModel(model=pruned, num_drafts=3)
    out = run(model, params, prompts[:16], seed=9, drafter=drafter, drafter_params=weights)
    return out.stats.tokens_per_step

  healed, corpus, raw = (
    tokens_per_step(w)
    for w in (fine_tuned(pruned, cut, own, 60), fine_tuned(pruned, cut, theirs, 60), cut)
  )
  assert healed > max(corpus, raw), (healed, corpus, raw)
