# SPDX-License-Identifier: Apache-2.0
"""The tuner: its choice follows from what it measured, and the text doesn't depend on it."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxdec import bench, tuner
from jaxdec.decoding import generate
from jaxdec.drafting.prompt_lookup import PromptLookup
from jaxdec.drafting.suffix import Suffix
from jaxdec.errors import UserError
from jaxdec.lm import LM
from tests.decoding.targets import Scripted, script, target

PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [5, 6, 7]]
WIDTHS = (3, 5)


def planted(monkeypatch, seconds):
  """Steps take what ``seconds`` says, a row of the bench what its passes then come to."""

  def step(self, drafter):
    return seconds[1 if drafter is None else drafter.num_nodes]

  run = bench.run

  def timed(model, params, arms, prompts, settings, **options):
    rows = run(model, params, arms, prompts, settings, **options)
    for row in rows:
      row["seconds"] = row["target_passes"] * seconds[row["nodes"]]
    for row in rows:
      row["speedup"] = rows[0]["seconds"] / row["seconds"]
    return rows

  monkeypatch.setattr(tuner._Clock, "step", step)
  monkeypatch.setattr(tuner.bench, "run", timed)


def tuned(**options):
  model, params = target()
  return tuner.tune(
    model, params, PROMPTS, widths=WIDTHS, repeats=1, max_new_tokens=24,
    sources={"suffix": Suffix(num_drafts=4)}, **options,
  )  # fmt: skip


def known():
  """A drafter that is always right, and one that never is."""
  model, params = target()
  text = script(PROMPTS, generate(model, params, PROMPTS, max_new_tokens=30, stop=None))
  return {"right": (Scripted("chain", 4), text), "wrong": (Scripted("wrong", 4), text)}


def test_takes_the_fastest_where_drafts_are_cheap(monkeypatch):
  planted(monkeypatch, {1: 1.0, 3: 1.1, 5: 1.2})
  found = tuned(candidates=known())
  assert found.name == "right" and found.drafter is not None
  assert found.rows[0]["drafter"] == bench.BASELINE
  assert "chosen: right" in found.explain() and "5 nodes 1.20" in found.explain()


def test_does_not_draft_where_drafts_are_dear(monkeypatch):
  planted(monkeypatch, {1: 1.0, 3: 40.0, 5: 50.0})
  found = tuned(candidates=known())
  assert found.drafter is None and found.name == bench.BASELINE
  assert "plain decoding, because nothing is" in found.explain()


def test_measures_for_real():
  """Idle nodes are never accepted, and the choice changes no token."""
  model, params = target()
  plain = generate(model, params, PROMPTS, max_new_tokens=20, stop=None)
  idle = generate(model, params, PROMPTS, max_new_tokens=20, stop=None, drafter=tuner.Idle(3))
  assert idle.tokens == plain.tokens and idle.stats.tokens_per_step == 1
  found = tuned()
  assert set(found.seconds) == {1, *WIDTHS} and min(found.seconds.values()) > 0
  assert all(row["all_identical"] for row in found.rows)
  out = generate(
    model, params, PROMPTS, max_new_tokens=20, stop=None, drafter=found.drafter,
    drafter_params=found.params,
  )  # fmt: skip
  assert out.tokens == plain.tokens


def test_adaptive_of_measured_seconds():
  source = Suffix(num_drafts=4)
  made = tuner.adaptive(source, {1: 0.01, 3: 0.011, 5: 0.02}, drafting=0.001)
  assert (made.widths, made.seconds) == (WIDTHS, (1.0, 1.2, 2.1))
  assert made.every == 5  # a tenth of a step, in every fifth: two per cent
  assert tuner.adaptive(source, {1: 0.01, 3: 0.011, 5: 0.02}, drafting=0.0).every == 1


def test_default_sources_fit_their_width():
  for source in tuner.default_sources(16).values():
    assert source.num_nodes == 16


def test_auto_measures_once_and_changes_no_token(monkeypatch):
  lm = LM(*target())
  calls = []

  def tune(model, params, prompts, **options):
    calls.append((len(prompts), options["sampler"].temperature))
    return tuner.Tuned("lookup", PromptLookup(), None, {}, {}, [])

  monkeypatch.setattr(tuner, "tune", tune)
  for temperature in (0.0, 0.0, 1.0):
    options = {"max_new_tokens": 20, "stop": None, "temperature": temperature}
    fast = lm.generate(PROMPTS, drafter="auto", **options)
    assert fast.tokens == lm.generate(PROMPTS, **options).tokens
    assert len(fast.stats.accepted_by_depth) == PromptLookup().num_drafts
  assert calls == [(2, 0.0), (2, 1.0)]


def test_mistakes_are_explained():
  model, params = target()
  with pytest.raises(UserError, match="at least one prompt"):
    tuner.tune(model, params, [])
  with pytest.raises(UserError, match=r"must rise from at least 2, got \(1, 4\)"):
    tuner.tune(model, params, PROMPTS, widths=(1, 4))
  lm = LM(model, params)
  with pytest.raises(UserError, match="for rule 'match', got rule='ratio'"):
    lm.generate(PROMPTS, drafter="auto", rule="ratio")
  with pytest.raises(UserError, match="chosen for given prompts"):
    lm.drafter("auto")


def test_sources_alone_are_the_same_drafts():
  """What is timed of a source is all that it does."""
  model, params = target()
  source = PromptLookup(num_drafts=4)
  out = generate(
    model, params, PROMPTS, max_new_tokens=20, stop=None, drafter=tuner._Always(source)
  )
  assert out.stats.tokens_per_step == 1
  assert out.tokens == generate(model, params, PROMPTS, max_new_tokens=20, stop=None).tokens
  assert hash(tuner._Always(source)) == hash(tuner._Always(PromptLookup(num_drafts=4)))
  assert jnp.asarray(out.lengths).tolist() == [20, 20]
