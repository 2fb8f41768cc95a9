# SPDX-License-Identifier: Apache-2.0
"""The tri-gram table against a dictionary; the tree against enumeration and against PUCT search."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdec.decoding import Sampler, generate
from jaxdec.drafting import Aded, get
from jaxdec.drafting.aded import Trigrams, _slots, add_trigram, empty_table, lookup, trigram_table
from jaxdec.drafting.base import Accepted, Prompt
from jaxdec.errors import UserError
from tests.decoding.targets import target
from tests.drafting.spelled import context_of, estimates, spelled


def contents(table: Trigrams) -> dict:
  """``{(u, v): {w: weight}}`` of everything in the table."""
  keys, successors, weight = map(np.asarray, (table.keys, table.successors, table.weight))
  return {
    tuple(key): {int(w): float(x) for w, x in zip(row, values) if w >= 0}
    for key, row, values in zip(keys.tolist(), successors, weight)
    if key[0] >= 0
  }


def random_table(seed, alphabet=4, slots=256, successors=3) -> tuple[Trigrams, dict]:
  """Every context over the alphabet but some, with distinct weights."""
  rng = np.random.default_rng(seed)
  table, want = empty_table(slots, successors), {}
  add = jax.jit(add_trigram)
  for u, v in itertools.product(range(alphabet), repeat=2):
    if rng.random() > 0.15:
      for w in rng.choice(alphabet, successors, replace=False):
        want.setdefault((u, v), {})[int(w)] = gain = float(np.float32(rng.uniform(0.1, 1.0)))
        table = add(table, jnp.asarray([u, v, int(w)], jnp.int32), gain, 3.0)
  assert contents(table) == want
  return table, want


def test_weights_follow_what_is_emitted():
  """Prompt and three steps of a ragged batch, against a dictionary; one row finishes early."""
  drafter = Aded(slots=512, add=0.4, cap=1.0)
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 3, n).tolist() for n in (2, 9, 14)]
  roots, width = [1, 2, 0], 30
  want: dict = {}

  def emit(text):
    u, v, w = text[-3:]
    row = want.setdefault((u, v), {})
    row[w] = min(row.get(w, 0.0) + 0.4, 1.0)

  for text, root in zip(texts, roots):
    for end in range(3, len(text) + 1):
      emit(text[:end])
    text.append(root)
    emit(text)
  context = context_of(texts, width)
  prompt = Prompt(context.history[:, :15], context.length, context.root)
  state = jax.jit(lambda p: drafter.start(None, (), p, None, None))(prompt)
  observe = jax.jit(lambda s, a, c: drafter.observe(None, s, None, a, None, c))
  for counts in ((1, 3, 5), (0, 2, 1), (0, 1, 4)):
    context = context_of(texts, width)
    tokens = rng.integers(0, 3, (3, 5))
    state = observe(state, Accepted(None, jnp.asarray(counts), None, jnp.asarray(tokens)), context)
    for text, row, count in zip(texts, tokens.tolist(), counts):
      for token in row[:count]:
        text.append(token)
        emit(text)
  got = contents(state)
  assert set(got) == set(want)
  for key, row in want.items():
    assert got[key] == pytest.approx(row)
  assert max(x for row in want.values() for x in row.values()) == 1.0  # the cap was reached


def test_what_is_full_gives_way():
  """A fourth successor replaces the lightest; a context without a free slot the lightest of its
  slots; the rest stays."""
  table = empty_table(64, 3)
  for w, add in ((1, 0.5), (2, 0.2), (3, 0.9), (4, 0.3)):
    table = add_trigram(table, jnp.asarray([7, 8, w]), jnp.float32(add), 3.0)
  assert contents(table) == {(7, 8): pytest.approx({1: 0.5, 4: 0.3, 3: 0.9})}
  slots = 4  # every context may live anywhere, and the fifth needs room
  table = empty_table(slots, 2)
  for u, add in ((1, 0.5), (2, 0.2), (3, 0.9), (4, 0.3), (5, 0.1)):
    table = add_trigram(table, jnp.asarray([u, 0, 6]), jnp.float32(add), 3.0)
  assert {key: row[6] for key, row in contents(table).items()} == pytest.approx(
    {(1, 0): 0.5, (3, 0): 0.9, (4, 0): 0.3, (5, 0): 0.1}
  )
  same = add_trigram(table, jnp.asarray([9, 9, 9]), jnp.float32(0.0), 3.0)
  assert contents(same) == contents(table)


def enumerate_values(table: dict, u, v, depth) -> dict:
  """The value of every prefix that the table can continue."""
  out, level = {}, {(): ((u, v), 1.0)}
  for _ in range(depth):
    below = {}
    for prefix, ((a, b), value) in level.items():
      row = table.get((a, b), {})
      for w, x in row.items():
        below[(*prefix, w)] = ((b, w), value * x / sum(row.values()))
    out |= {p: value for p, (_, value) in below.items()}
    level = below
  return out


@pytest.mark.parametrize(("size", "depth"), [(8, 4), (2, 3), (30, 3)])
def test_the_tree_is_the_most_probable_prefixes(size, depth):
  drafter = Aded(size=size, depth=depth, slots=256, successors=3)
  table, known = random_table(1)
  texts = [[a, b] for a in range(4) for b in range(4)] + [[2]]
  context = context_of(texts, 5)
  # A text of one token has no context: what is read before it is any token.
  context = context.replace(length=jnp.maximum(context.length, 1))
  tree, _ = jax.jit(lambda c: drafter.propose(None, table, c, None))(context)
  listed = drafter.candidates(None, table, context, None)
  cut = 0
  for row, text in enumerate(texts[:-1]):
    values = enumerate_values(known, *text, depth)
    best = sorted(values, key=lambda p: -values[p])[: size - 1]
    assert spelled(tree, row) == set(best)
    got = estimates(listed, row)
    assert {p: got[p] for p in best} == pytest.approx({p: values[p] for p in best}, rel=1e-5)
    cut += len(values) > size - 1
  assert cut > 8 and not all(spelled(tree, row) for row in range(16))


def puct(table: dict, u, v, rng, visits=150, depth=3, c1=32.0, c2=8.0) -> dict:
  """Visits of every prefix in the paper's tree search, with the value of the token really taken.

  A node without children gets all of them and goes to the last; its rollout is a sample; the value
  of a visit is 1 plus the probabilities along the sample.
  """
  count, quality, children = {(): 0}, {(): 0.0}, {}
  context = lambda p: (u, v, *p)[-2:]  # noqa: E731

  def chances(prefix):
    row = table.get(tuple(context(prefix)), {})
    return {w: x / sum(row.values()) for w, x in row.items()}

  for _ in range(visits):
    path = [()]
    while path[-1] in children and children[path[-1]] and len(path[-1]) < depth:
      here = path[-1]
      explore = c1 + math.log((count[here] + c2 + 1) / c2)

      def bound(child, here=here, explore=explore):
        if not count[child]:
          return math.inf
        prior = chances(here)[child[-1]] * math.sqrt(count[here]) / (1 + count[child])
        return quality[child] / count[child] + explore * prior

      path.append(max(children[here], key=bound))
    here = path[-1]
    if len(here) < depth and here not in children:
      children[here] = [(*here, w) for w in chances(here)]
      for child in children[here]:
        count[child], quality[child] = 0, 0.0
      if children[here]:
        path.append(children[here][-1])
    end, value = path[-1], 1.0
    while len(end) < depth and chances(end):
      row = chances(end)
      w = int(rng.choice(list(row), p=np.asarray(list(row.values())) / sum(row.values())))
      value += row[w]
      end = (*end, w)
    for node in path:
      count[node] += 1
      quality[node] += value
  return count


def test_best_first_keeps_what_puct_visits_most():
  """The search it stands for spends its visits on the prefixes that are the most probable ones."""
  _, known = random_table(1)
  shared = total = 0
  for u, v in known:
    visits = puct(known, u, v, np.random.default_rng(0))
    assert visits[()] == 150
    inner = {p: n for p, n in visits.items() if p}
    assert sum(n for p, n in inner.items() if len(p) == 1) == 150
    values = enumerate_values(known, u, v, 3)
    assert max((p for p in inner if len(p) == 1), key=inner.get) == max(values, key=values.get)
    best = set(sorted(values, key=lambda p: -values[p])[:7])
    most = set(sorted(inner, key=lambda p: -inner[p])[:7])
    shared, total = shared + len(best & most), total + len(best)
    random = set(sorted(values)[:7])
    assert len(random & most) < 7  # not because there is nothing else to take
  assert shared > 0.8 * total


def test_a_corpus_becomes_relative_frequencies():
  rng = np.random.default_rng(2)
  documents = [rng.integers(0, 3, n) for n in (40, 2, 0, 25)]
  counts: dict = {}
  for d in documents:
    for u, v, w in zip(d, d[1:], d[2:]):
      row = counts.setdefault((int(u), int(v)), {})
      row[int(w)] = row.get(int(w), 0) + 1
  table = trigram_table(documents, slots=128, successors=3)
  want = {k: {w: n / sum(row.values()) for w, n in row.items()} for k, row in counts.items()}
  assert contents(table) == {k: pytest.approx(row) for k, row in want.items()}
  for (u, v), row in want.items():
    found, weight = lookup(table, jnp.int32(u), jnp.int32(v))
    assert {int(w): float(x) for w, x in zip(found, weight) if x > 0} == pytest.approx(row)
  few = contents(trigram_table(documents, slots=5, successors=2))
  assert len(few) == 5 and all(set(few[k]) <= set(want[k]) and len(few[k]) <= 2 for k in few)
  for (u, v), row in few.items():
    assert len(set(_slots(np.asarray([u]), np.asarray([v]), 5)[0].tolist())) == 4
    assert max(row.values()) == pytest.approx(max(want[u, v].values()))
  with pytest.raises(UserError, match="three tokens in a row"):
    trigram_table([np.arange(2)])


def test_a_second_call_is_faster_and_a_corpus_helps_the_first():
  model, params = target()
  prompts = [[1, 2, 3, 4], [9]]
  options = dict(max_new_tokens=40, sampler=Sampler(temperature=1.0), stop=None, seed=[2, 3])
  plain = generate(model, params, prompts, **options)
  drafter = Aded(size=8, slots=512)
  options["drafter"] = drafter
  cold = generate(model, params, prompts, **options)
  warm = generate(model, params, prompts, **options, drafter_state=cold.drafter_state)
  taught = trigram_table(map(np.asarray, plain.tokens), slots=512)
  primed = generate(model, params, prompts, **options, drafter_params=taught)
  assert cold.tokens == warm.tokens == primed.tokens == plain.tokens
  assert warm.stats.tokens_per_step > cold.stats.tokens_per_step > 1.0
  assert primed.stats.tokens_per_step > cold.stats.tokens_per_step
  with pytest.raises(UserError, match="512 slots of 12 successors, this drafter 64 of 12"):
    generate(
      model, params, prompts, **options | {"drafter": Aded(slots=64)},
      drafter_state=cold.drafter_state,
    )  # fmt: skip


def test_bad_options_are_named():
  assert get("aded", size=32) == Aded(size=32)
  for options in ({"size": 1}, {"depth": 0}, {"slots": 3}, {"add": 4.0}):
    with pytest.raises(UserError, match="aded needs"):
      Aded(**options)
