# SPDX-License-Identifier: Apache-2.0
"""The contrast's limits, and decoding from it against two stateless passes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, compilations, generate
from jaxdec.decoding.lossy import generate_contrastive
from jaxdec.decoding.lossy.contrastive import contrast
from jaxdec.decoding.sampling import request_keys
from jaxdec.errors import UserError
from jaxdec.models import Decoder
from tests.decoding.targets import target

PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5], [7, 8, 9, 10] * 3]
WEAK = [[3], [7, 7, 5, 2] * 3, [10, 1]]  # of other lengths
GREEDY, PLAIN = Sampler(), Sampler(temperature=1.0)
NEW = 11


def run(kind="attention", prompts=PROMPTS, **options):
  model, params = target(kind, eos=(0,))
  defaults = dict(max_new_tokens=NEW, weak_prompts=WEAK, seed=3, sampler=PLAIN)
  return generate_contrastive(model, params, prompts, **{**defaults, **options}).tokens


@pytest.mark.parametrize(
  "kind, sampler, spread",
  [
    ("attention", PLAIN, 0.15),
    ("hybrid", GREEDY, None),
    pytest.param("recurrent", PLAIN, None, marks=pytest.mark.slow),
  ],
)
def test_equals_two_stateless_passes(kind, sampler, spread):
  """With other parameters and other prompts in the weak pass."""
  model, params = target(kind, eos=(0,))
  _, weak_params = target(kind, eos=(0,), seed=1)
  tokens = run(kind, sampler=sampler, weak_params=weak_params, beta=0.7, alpha=0.2, spread=spread)
  forward = jax.jit(lambda p, t: model.apply({"params": p}, t).logits)
  keys = request_keys(3, 3)
  acted = []
  for i, (prompt, lame) in enumerate(zip(PROMPTS, WEAK)):
    padded = lambda text: jnp.asarray([text + [0] * (32 - len(text))])  # noqa: E731
    s = np.asarray(forward(params, padded(prompt + tokens[i]))[0, len(prompt) - 1 :])
    w = np.asarray(forward(weak_params, padded(lame + tokens[i]))[0, len(lame) - 1 :])
    for t, token in enumerate(tokens[i]):
      p = np.exp(s[t] - s[t].max())
      z = np.where(p >= 0.2, 1.7 * s[t] - 0.7 * w[t], -np.inf)
      acted.append(spread is None or np.std(p / p.sum()) < spread)
      z = z if acted[-1] else s[t]
      drawn = sampler.draw(jnp.asarray(z)[None], keys[i : i + 1], jnp.asarray([len(prompt) + t]))
      assert int(drawn[0]) == token
    assert len(tokens[i]) == NEW or tokens[i][-1] == 0
  assert any(acted) and (spread is None or not all(acted))


@pytest.mark.parametrize("kind", ["attention", pytest.param("linear", marks=pytest.mark.slow)])
def test_limits(kind):
  model, params = target(kind, eos=(0,))

  def plain(sampler):
    return generate(model, params, PROMPTS, max_new_tokens=NEW, seed=3, sampler=sampler).tokens

  sampled, greedy = plain(PLAIN), plain(GREEDY)
  assert run(kind, beta=0.0, alpha=0.0) == sampled
  assert run(kind, beta=0.0, alpha=0.1) == plain(Sampler(temperature=1.0, min_p=0.1))
  assert run(kind, beta=0.8, alpha=1.0) == greedy  # only the best token is left
  assert run(kind, spread=0.0) == sampled  # never uncertain enough
  assert run(kind, weak_prompts=PROMPTS, alpha=0.0) == sampled  # the two passes agree
  assert run(kind, beta=0.0, sampler=GREEDY) == greedy
  assert run(kind, sampler=GREEDY, beta=2.0) != greedy  # the negative control
  assert run(kind, alpha=0.0) != sampled


def test_contrast():
  key = jax.random.split(jax.random.key(0), 2)
  s, w = (3 * jax.random.normal(k, (5, 9)) for k in key)
  z = contrast(s, w, 0.5, 0.3)
  p = jax.nn.softmax(s)
  kept = p >= 0.3 * p.max(-1, keepdims=True)
  np.testing.assert_array_equal(jnp.isfinite(z), kept)
  np.testing.assert_allclose(z[kept], (1.5 * s - 0.5 * w)[kept], rtol=1e-5)
  np.testing.assert_allclose(
    jax.nn.softmax(contrast(s, s, 5.0, 0.0)), p, rtol=1e-4
  )  # a weak pass as good as the strong one changes nothing
  sure = np.std(p, axis=-1)
  middle = float(np.median(sure))
  z = contrast(s, w, 0.5, 0.3, middle)
  np.testing.assert_array_equal(z[sure >= middle], s[sure >= middle])
  assert not np.any(np.all(z[sure < middle] == s[sure < middle], axis=-1))


def test_rows_do_not_see_their_neighbours_and_nothing_compiles_twice():
  together = run(seed=[4, 5, 6])
  assert [
    run(prompts=[p], weak_prompts=[w], seed=s)[0] for p, w, s in zip(PROMPTS, WEAK, [4, 5, 6])
  ] == together
  before = compilations()
  run(beta=1.0, alpha=0.3, spread=0.1, stop=None)
  assert compilations() == before


def test_mistakes_are_named_before_compiling():
  config = target()[0].config
  other = Decoder(dataclasses.replace(config, vocab_size=17))
  deeper = Decoder(dataclasses.replace(config, layers=config.layers * 2))
  for options, message in [
    ({"beta": -0.1}, "beta"),
    ({"alpha": 1.5}, "alpha"),
    ({"spread": -1.0}, "spread"),
    ({"weak_prompts": None}, "equals the strong one"),
    ({"weak_prompts": WEAK[:2]}, "one prompt for each"),
    ({"weak_model": deeper}, "weak_params"),
    ({"weak_model": other, "weak_params": {}}, "same tokenizer"),
  ]:
    before = compilations()
    with pytest.raises(UserError, match=message):
      run(**options)
    assert compilations() == before
