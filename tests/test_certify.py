# SPDX-License-Identifier: Apache-2.0
"""The certificate says yes to what is lossless, and no to everything that is not."""

from __future__ import annotations

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec import certify as lib
from jaxdec.decoding import Match, Sampler, TypicalLossy
from jaxdec.drafting import Drafter, chain
from jaxdec.errors import UserError
from jaxdec.models import Decoder, tiny_llama
from jaxdec.report import plain

VOCABULARY = 12
PROMPTS = [[1, 2, 3, 1, 2], [4, 5, 6, 7, 8, 9, 4, 5, 6], [3, 3, 3]]


@pytest.fixture(scope="module")
def target():
  config = tiny_llama(
    vocab_size=VOCABULARY, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    hidden_dim=32, max_length=256,
  )  # fmt: skip
  model = Decoder(config)
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
  # A fresh model's law is nearly uniform: sharpen it to an entropy of one to two nats.
  params["embed"] = jax.tree.map(lambda x: 20.0 * x, params["embed"])
  return model, params


def _law(seed, size=VOCABULARY):
  return np.random.default_rng(seed).dirichlet(np.ones(size))


def test_chi_square_accepts_the_law_and_refuses_another():
  p_values = []
  for seed in range(40):
    rng = np.random.default_rng(100 + seed)
    laws = {c: _law(c) for c in range(5)}
    counts = {c: rng.multinomial(300, law) for c, law in laws.items()}
    p_values.append(lib.chi_square(counts, laws).p_value)
    shifted = {c: 0.7 * law + 0.3 * np.roll(law, 1) for c, law in laws.items()}
    assert lib.chi_square(counts, shifted).p_value < 1e-4
  # p-values of a right law are uniform: none tiny, half of them below one half (4 sigma)
  assert min(p_values) > 1e-4
  assert 0.18 < np.mean(np.array(p_values) < 0.5) < 0.82


def test_chi_square_of_impossible_tokens_and_of_certain_ones():
  law = np.array([0.5, 0.5, 0.0])
  assert lib.chi_square({0: np.array([50, 49, 1])}, {0: law}).p_value == 0.0
  certain = lib.chi_square({0: np.array([100, 0, 0])}, {0: np.array([1.0, 0, 0])})
  assert (certain.degrees, certain.p_value, certain.contexts) == (0, 1.0, 0)


def test_merge_pools_small_cells_and_loses_nothing():
  expected = np.array([50.0, 0.1, 3.0, 0.2, 6.0, 0.0])
  observed = np.array([49.0, 1.0, 2.0, 0.0, 7.0, 0.0])
  got, want = lib._merge(observed, expected)
  assert got.sum() == observed.sum() and want.sum() == pytest.approx(expected.sum())
  assert want.min() >= lib.MIN_EXPECTED and len(want) == 2  # 3.3 pooled is too few: takes the 6


def test_prefix_counts():
  counts = lib.prefix_counts([(1, 2), (1, 3), (0, 2), (1, 2)], 4, least=2)
  assert set(counts) == {(), (1,)}
  assert counts[()].tolist() == [1, 3, 0, 0] and counts[(1,)].tolist() == [0, 0, 2, 1]


def test_exact_laws_are_the_targets(target):
  model, params = target
  sampler = Sampler(temperature=0.7, top_k=5)
  laws = lib.exact_laws(model, params, [1, 2, 3], [(), (4,), (4, 5)], sampler, batch=2)
  for prefix, law in laws.items():
    logits = model.apply({"params": params}, jnp.asarray([[1, 2, 3, *prefix]])).logits[0, -1]
    np.testing.assert_allclose(law, np.exp(sampler.log_probs(logits)), atol=1e-6)
    assert (law > 0).sum() == 5


CONFIG = lib.CertifyConfig(max_new_tokens=16, draws=1024, depth=3, batch_size=256)


@dataclasses.dataclass(frozen=True)
class Constant(Drafter):
  """Drafts the same token twice."""

  token: int = 0
  name = "constant"

  @property
  def num_nodes(self):
    return 3

  def propose(self, params, state, context, rng):
    drafts = jnp.full((context.root.shape[0], 2), self.token, jnp.int32)
    return chain(context.root, drafts), state


def test_lossless(target):
  out = lib.certify(*target, Constant(), {}, PROMPTS, CONFIG)
  assert out["lossless"] and out["reasons"] == []
  assert out["greedy"]["identical"] == out["sampled"]["identical"] == 3
  assert out["distribution"]["accepted"] and out["control"]["rejected"]
  assert out["distribution"]["contexts"] > 5
  assert out["greedy"]["gaps"]["positions"] == 48
  json.dumps(plain(out), allow_nan=False)
  text = lib.summary(out)
  assert text[0] == "greedy: 3 of 3 outputs identical to plain decoding"
  assert text[-1] == "verdict (float32, rule match): lossless"


def test_a_rule_that_keeps_any_possible_draft_is_refused_by_the_distribution(target):
  """The negative control of the whole certificate: a real, biased acceptance rule."""
  config = dataclasses.replace(CONFIG, rule=TypicalLossy(epsilon=0.0, sample_next=True))
  out = lib.certify(*target, Constant(), {}, PROMPTS, config)
  assert not out["lossless"]
  assert out["distribution"]["p_value"] < 1e-10
  assert any(reason.startswith("distribution: p =") for reason in out["reasons"])


def test_tampered_tokens_are_found(target, monkeypatch):
  real = lib.generate

  def tampering(*args, drafter=None, **options):
    out = real(*args, drafter=drafter, **options)
    if drafter is not None:
      tokens = [[*t[:-1], (t[-1] + 1) % VOCABULARY] for t in out.tokens]
      out = dataclasses.replace(out, tokens=tokens)
    return out

  monkeypatch.setattr(lib, "generate", tampering)
  config = dataclasses.replace(CONFIG, sampler=Sampler())
  out = lib.certify(*target, Constant(), {}, PROMPTS, config)
  assert not out["lossless"] and "distribution" not in out
  assert "3 of 3 outputs differ" in out["reasons"][0]
  assert "below the best score" in out["reasons"][1]
  assert [d["position"] for d in out["greedy"]["differences"]] == [15, 15, 15]


def test_no_power_is_said():
  certain = {(): np.array([100, 0, 0])}
  law = {(): np.array([1.0, 0.0, 0.0])}
  test = dataclasses.asdict(lib.chi_square(certain, law))
  out = {
    "distribution": {**test, "accepted": True},
    "control": {**test, "rejected": False, "law": "temperature 1.3"},
  }
  (reason,) = lib._reasons(out, Match(), low=False)
  assert "no power" in reason


def test_bfloat16_is_judged_by_gaps(target):
  model, params = target
  low = Decoder(model.config, dtype=jnp.bfloat16)
  decode = functools.partial(
    lib.generate, low, params, stop=None, drafter=Constant(), drafter_params={}, rule=Match()
  )
  part = lib.equality(low, params, decode, PROMPTS[:2], CONFIG.sampler, CONFIG, pathwise=True)
  gaps = part["gaps"]
  assert 1e-3 < gaps["allowed"] < 1 and gaps["largest"] <= gaps["allowed"]
  assert gaps["positions"] == 32 and gaps["beyond_allowed"] == 0
  # a difference is no reason in low precision, a gap beyond rounding is
  part["identical"] = 0
  assert lib._reasons({"sampled": part}, Match(), low=True) == []
  gaps["beyond_allowed"] = 1
  assert len(lib._reasons({"sampled": part}, Match(), low=True)) == 1


def test_mistakes(target):
  with pytest.raises(UserError, match="at least one prompt"):
    lib.certify(*target, Constant(), {}, [])
  with pytest.raises(UserError, match="at least 100 draws"):
    lib.certify(*target, None, {}, PROMPTS, lib.CertifyConfig(draws=5))
