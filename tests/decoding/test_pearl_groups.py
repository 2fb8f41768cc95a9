# SPDX-License-Identifier: Apache-2.0
"""PEARL on two groups of devices: the tokens, and the rounds, of one device."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdec.decoding import Sampler, compilations, generate
from jaxdec.decoding.pearl import generate_pearl
from jaxdec.drafting import DraftModel, Pearl
from jaxdec.errors import UserError
from tests.decoding.targets import Letters, target

PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5], [7, 8, 9, 10] * 5]  # ragged, one of length 1
SAMPLED = Sampler(temperature=1.0)
GAMMA = 3
OPTIONS = dict(max_new_tokens=21, stop=None, seed=2, sampler=SAMPLED)


def near(kind: str):
  """A draft model that often agrees with the target: the target with weights disturbed."""
  model, params = target(kind)
  noise = target(kind, seed=1)[1]
  return model, jax.tree.map(lambda x, y: 0.8 * x + 0.2 * y, params, noise)


def needs(count: int):
  return pytest.mark.skipif(jax.device_count() < count, reason=f"needs {count} devices")


@needs(2)
@pytest.mark.parametrize("kind", ["attention", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_two_groups_emit_what_one_device_does_round_by_round(kind):
  model, params = target(kind)
  draft, draft_params = near(kind)
  options = dict(drafter=Pearl(model=draft, num_drafts=GAMMA), **OPTIONS)
  one = generate(model, params, PROMPTS, drafter_params=draft_params, **options)
  assert one.tokens == generate(model, params, PROMPTS, **OPTIONS).tokens
  assert 1 < one.stats.tokens_per_step < GAMMA

  there = jax.device_put(draft_params, jax.devices()[1])
  two = generate_pearl(model, params, PROMPTS, drafter_params=there, **options)
  assert two.tokens == one.tokens
  assert two.stats.row_steps == one.stats.row_steps
  assert two.stats.accepted_by_depth == one.stats.accepted_by_depth
  if kind != "attention":
    return

  # Stops, budgets and how often the host looks are data: nothing is compiled for them.
  before = compilations()
  stop, text = one.tokens[0][6], Letters().decode(one.tokens[0][4:7])
  for change in (
    {"stop": stop},
    {"stop": text, "tokenizer": Letters()},
    {"max_new_tokens": 1},
    {"max_new_tokens": 5, "interval": 1},
  ):
    got = generate_pearl(model, params, PROMPTS, drafter_params=there, **{**options, **change})
    change.pop("interval", None)
    want = generate(model, params, PROMPTS, **{**OPTIONS, **change})
    assert (got.tokens, got.text) == (want.tokens, want.text)
  assert compilations() == before


@needs(3)
@pytest.mark.slow
def test_a_group_may_be_several_devices():
  model, params = target("attention")
  draft, draft_params = near("attention")
  mesh = Mesh(jax.devices()[:2], ("replica",))
  params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  there = jax.device_put(draft_params, jax.devices()[2])
  drafter = Pearl(model=draft, num_drafts=GAMMA)
  got = generate_pearl(model, params, PROMPTS, drafter=drafter, drafter_params=there, **OPTIONS)
  assert got.tokens == generate(*target("attention"), PROMPTS, **OPTIONS).tokens


def test_mistakes_are_named():
  model, params = target("attention")
  options = dict(drafter_params=params, **OPTIONS)
  with pytest.raises(UserError, match=r"both on .*jax.device_put"):
    generate_pearl(model, params, PROMPTS, drafter=Pearl(model=model), **options)
  with pytest.raises(UserError, match="Pearl drafter, got DraftModel"):
    generate_pearl(model, params, PROMPTS, drafter=DraftModel(model=model), **options)
  with pytest.raises(UserError, match="interval"):
    generate_pearl(model, params, PROMPTS, drafter=Pearl(model=model), interval=0, **options)
