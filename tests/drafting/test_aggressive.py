# SPDX-License-Identifier: Apache-2.0
"""Aggressive decoding against the paper's loop in Python, and on a model that copies."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import generate
from jaxdec.drafting import Aggressive, get
from jaxdec.errors import UserError
from tests.decoding.targets import target
from tests.drafting.spelled import context_of


def reference(source, emitted, config):
  """What the paper drafts after ``emitted``, at most ``num_drafts`` tokens."""
  if len(emitted) == 1 and source[:1] == emitted:
    return source[1 : 1 + config.num_drafts]
  for i in range(1, min(config.ngram_max, len(emitted)) + 1):
    last = emitted[-i:]
    ends = [e for e in range(i, len(source) + 1) if source[e - i : e] == last]
    if len(ends) == 1:
      return source[ends[0] : ends[0] + config.num_drafts]
  return []


def started(config, texts, prompts, width):
  prompt = SimpleNamespace(lengths=jnp.asarray(prompts, jnp.int32))
  state = config.start(None, (), prompt, None, None)
  return state, context_of(texts, width)


@pytest.mark.parametrize("config", [
  Aggressive(num_drafts=4),
  Aggressive(num_drafts=16, ngram_max=1),
  Aggressive(num_drafts=7, source=(2, -3)),
  Aggressive(num_drafts=7, source=(-6, None), ngram_max=4),
])  # fmt: skip
def test_drafts_equal_the_reference(config):
  rng = np.random.default_rng(0)
  texts, prompts = [], []
  for _ in range(150):
    prompts.append(int(rng.integers(1, 14)))
    texts.append(rng.integers(0, 4, prompts[-1] + int(rng.integers(1, 6))).tolist())
  state, context = started(config, texts, prompts, 24)
  tree, _ = jax.jit(lambda s, c: config.propose(None, s, c, None))(state, context)
  has = config.has_draft(None, state, context)
  drafted = 0
  for b, (text, n) in enumerate(zip(texts, prompts)):
    want = reference(text[:n][slice(*config.source)], text[n:], config)
    assert tree.tokens[b, 1:][tree.valid[b, 1:]].tolist() == want, (text, n)
    assert bool(has[b]) == bool(want)
    drafted += bool(want)
  assert 15 < drafted < 135


def test_a_copy_takes_a_pass_for_each_block():
  """A target that counts upwards copies its prompt: a whole source a pass, or a block of it."""
  model, params = target(vocab=13)
  count = successor(params)
  prompts = [list(range(13)), [*range(4, 13), *range(4)]]
  want = [(np.arange(27) + p[0]) % 13 for p in prompts]
  for drafts, passes in ((32, 2), (4, 6)):
    # 26 tokens behind the first: sources of 13 tokens, the last token's draft ends with the source.
    out = generate(
      model, count, prompts, max_new_tokens=27, stop=None, drafter=Aggressive(num_drafts=drafts)
    )
    assert [list(x) for x in want] == out.tokens
    assert out.stats.row_steps == (passes, passes)


def successor(params):
  """The target's parameters, so that token t + 1 follows token t: all blocks add nothing."""
  params = {
    name: jax.tree.map(jnp.zeros_like, value) if name.startswith("layers") else value
    for name, value in params.items()
  }
  vocab, dim = params["embed"].shape
  params["embed"] = jnp.eye(vocab, dim)
  params["head"] = {"kernel": jnp.roll(jnp.eye(dim, vocab), 1, axis=1) * 9}
  return params


def test_options():
  assert get("aggressive").num_nodes == 33
  assert get("aggressive", source=[1, None]).source == (1, None)
  with pytest.raises(UserError, match="num_drafts >= 1"):
    Aggressive(num_drafts=0)
