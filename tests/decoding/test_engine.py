# SPDX-License-Identifier: Apache-2.0
"""The engine gives every request what it gets alone, whatever else is going on."""

from __future__ import annotations

import functools
import random

import pytest

from jaxdec.decoding import Sampler, compilations, generate
from jaxdec.decoding.engine import Engine, EngineRequest, QueueFull
from jaxdec.drafting.jacobi import Jacobi
from jaxdec.drafting.prompt_lookup import PromptLookup
from jaxdec.drafting.token_recycling import TokenRecycling
from jaxdec.errors import UserError
from tests.decoding.targets import Letters, target

SIZES = dict(slots=3, capacity=64, chunk=8, budget=16 + 16, passes=3)
GREEDY, PLAIN = Sampler(), Sampler(temperature=1.0)


def requests(n=9, sampler=None, seed=0, common=0):
  """Random prompts of length 1 to 30; the first ``common`` tokens are the same in all."""
  rng = random.Random(seed)
  text = [rng.randrange(13) for _ in range(200)]
  return [
    EngineRequest(
      text[:common] + [rng.randrange(13) for _ in range(rng.choice([1, 7, 8, 9, 30 - common]))],
      max_new_tokens=rng.choice([1, 2, 11, 20]),
      sampler=sampler or (GREEDY, PLAIN, Sampler(temperature=0.8, top_k=4))[i % 3],
      seed=100 + i,
      stop=None,
    )
    for i in range(n)
  ]


@functools.cache
def alone(kind, prompt, new, sampler, seed, stop):
  model, params = target(kind)
  out = generate(
    model, params, [list(prompt)], max_new_tokens=20, sampler=sampler, seed=[seed], stop=stop
  )
  return out.tokens[0][:new]


def expected(kind, r: EngineRequest):
  """A budget only cuts the text, so that one length serves all tests."""
  return alone(kind, tuple(r.prompt), r.max_new_tokens, r.sampler, r.seed, r.stop)


def serve(engine, todo, *, arrival, cancel=()):
  """Results by request; request i is admitted at step ``arrival[i]``, some are cancelled."""
  ids, results, events = {}, {}, {}
  for step in range(1000):
    for i, when in enumerate(arrival):
      if when == step:
        r = todo[i]
        ids[i] = engine.admit(
          r.prompt, max_new_tokens=r.max_new_tokens, sampler=r.sampler, seed=r.seed, stop=r.stop
        )
    for i, when in cancel:
      if when == step and ids[i] not in engine.results:
        engine.cancel(ids[i])
    for event in engine.step():
      events.setdefault(event.id, []).extend(event.tokens)
    if len(ids) == len(todo) and engine.idle:
      break
  for i, id in ids.items():
    results[i] = engine.results.pop(id)
    if results[i].reason != "cancelled":
      assert results[i].tokens == events[id]
  return results


@pytest.mark.parametrize("kind", ["attention", "linear", "hybrid"])
def test_requests_get_the_tokens_they_get_alone(kind):
  model, params = target(kind)
  engine = Engine(model, params, **SIZES)
  todo = requests()
  want = [expected(kind, r) for r in todo]
  everything_at_once = serve(engine, todo, arrival=[0] * 9)
  assert [everything_at_once[i].tokens for i in range(9)] == want
  rng = random.Random(1)
  order = rng.sample(range(9), 9)
  staggered = serve(engine, [todo[i] for i in order], arrival=[2 * i for i in range(9)])
  assert [staggered[order.index(i)].tokens for i in range(9)] == want
  # Cancelled while it waits, is read or decodes: the others don't notice.
  cancelled = serve(engine, todo, arrival=[0] * 9, cancel=[(1, 0), (3, 1), (4, 3), (0, 2), (8, 9)])
  assert any(r.reason == "cancelled" for r in cancelled.values())
  for i, result in cancelled.items():
    if result.reason == "cancelled":
      assert result.tokens == want[i][: len(result.tokens)]
    else:
      assert result.tokens == want[i] and result.reason == "length"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_sixty_four_requests_with_staggered_arrival(kind):
  model, params = target(kind)
  # Chunks of 5 end elsewhere than those of 8, and than generate's.
  engine = Engine(model, params, **{**SIZES, "slots": 8, "passes": 5, "chunk": 5})
  todo = requests(64, seed=7)
  cancel = [(i, i // 2 + 3) for i in range(5, 64, 9)]
  results = serve(engine, todo, arrival=[i // 2 for i in range(64)], cancel=cancel)
  for i, r in enumerate(todo):
    want = expected(kind, r)
    assert results[i].tokens == want[: len(results[i].tokens)]
    assert results[i].reason == "cancelled" or results[i].tokens == want
  assert sum(r.reason == "length" for r in results.values()) >= 57


@pytest.mark.parametrize(
  "drafter",
  [
    TokenRecycling(learn_prompt=True),  # a table that rows share; reads the whole prompt's states
    PromptLookup(),  # steps without drafts
    Jacobi(),  # a state of each row
  ],
  ids=lambda d: d.name,
)
def test_speculation_changes_the_passes_only(drafter):
  model, params = target("attention")
  budget = 3 * drafter.num_nodes + 8
  engine = Engine(model, params, **{**SIZES, "budget": budget}, drafter=drafter)
  todo = requests(seed=2)
  todo[4] = EngineRequest([1, 2, 3, 4] * 11, 20, PLAIN, 4, None)  # fills its slot to the end
  assert len(todo[4].prompt) + todo[4].max_new_tokens == SIZES["capacity"]
  results = serve(engine, todo, arrival=[i // 2 for i in range(9)])
  for i, r in enumerate(todo):
    assert results[i].tokens == expected("attention", r)
    assert results[i].passes <= len(results[i].tokens) - 1
  assert sum(r.passes for r in results.values()) < sum(len(r.tokens) - 1 for r in results.values())


def test_nothing_is_compiled_as_requests_come_and_go():
  model, params = target("attention")
  engine = Engine(model, params, **SIZES)
  serve(engine, requests(6, common=20), arrival=[0, 0, 0, 2, 4, 9])  # one of everything
  before = compilations()
  rng = random.Random(5)
  ids = []
  for step in range(400):
    if rng.random() < 0.4 and not engine.full:
      (r,) = requests(1, sampler=rng.choice([GREEDY, PLAIN]), seed=step, common=rng.choice([0, 20]))
      stop = rng.choice([None, 3])
      ids.append(
        engine.admit(r.prompt, max_new_tokens=r.max_new_tokens, sampler=r.sampler, stop=stop)
      )
    if ids and rng.random() < 0.1 and ids[-1] not in engine.results:
      engine.cancel(ids[-1])
    engine.step()
  assert compilations() == before
  assert {r.reason for r in engine.results.values()} == {"length", "stop", "cancelled"}


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_prompts_that_begin_alike_share_what_was_read(kind):
  model, params = target(kind)
  todo = requests(6, seed=3, common=20)
  # The sixth continues the whole text of the first, as a chat does.
  first = expected(kind, todo[0])
  todo[5] = EngineRequest([*todo[0].prompt, *first, 5, 6], 11, PLAIN, 9, None)
  arrival = [0, 1, 2, 30, 31, 60]
  results = serve(Engine(model, params, **SIZES), todo, arrival=arrival)
  plain = serve(Engine(model, params, **SIZES, reuse=False), todo, arrival=arrival)
  for i, r in enumerate(todo):
    assert results[i].tokens == plain[i].tokens == expected(kind, r)
    assert plain[i].reused == 0
  if kind == "attention":
    assert all(results[i].reused >= 20 for i in range(1, 6))
  else:  # a recurrent state is that of its whole text only
    assert {results[i].reused for i in range(1, 5)} == {0}


def test_a_recurrent_state_is_continued_where_its_text_is():
  model, params = target("hybrid")
  engine = Engine(model, params, **SIZES)
  one = requests(1, sampler=GREEDY, seed=4)[0]
  (result,) = engine.run([EngineRequest([1, 2, 3, 4] * 5, 11, GREEDY, 0, None)])
  text = [*[1, 2, 3, 4] * 5, *result.tokens]
  again = EngineRequest([*text, 7, 8], 11, GREEDY, 0, None)
  (result,) = engine.run([again])
  assert result.reused == len(text) - 1 and result.tokens == expected("hybrid", again)
  (result,) = engine.run([one])
  assert result.reused == 0 and result.tokens == expected("hybrid", one)


def test_stop_strings_text_and_ids():
  model, params = target("attention")
  engine = Engine(model, params, **SIZES, tokenizer=Letters())
  free = generate(
    model, params, ["abc"], max_new_tokens=20, sampler=PLAIN, seed=[1], tokenizer=Letters()
  )
  string, stop_id = free.text[0][7:9], free.tokens[0][4]
  for stop in (string, stop_id):
    want = generate(
      model, params, ["abc"], max_new_tokens=20, sampler=PLAIN, seed=[1], tokenizer=Letters(),
      stop=stop,
    )  # fmt: skip
    (result,) = engine.run([EngineRequest("abc", 20, PLAIN, 1, stop)])
    assert (result.tokens, result.text, result.reason) == (want.tokens[0], want.text[0], "stop")
  # The slot that a string stopped is as good as any other.
  todo = requests(4)
  assert [r.tokens for _, r in sorted(serve(engine, todo, arrival=[0] * 4).items())] == [
    expected("attention", r) for r in todo
  ]


def test_mistakes_are_refused_and_touch_nobody():
  model, params = target("attention")
  engine = Engine(model, params, **SIZES, queue=2)
  todo = requests(3)
  bad = [
    ({"prompt": []}, "is empty"),
    ({"prompt": [99]}, "token id 99"),
    ({"prompt": [1] * 60, "max_new_tokens": 5}, "65, over the engine's capacity of 64"),
    ({"prompt": [1] * 160}, "over the model's limit of 160"),
    ({"max_new_tokens": 0}, "at least 1"),
    ({"sampler": 0.7}, "must be a Sampler"),
    ({"seed": [1]}, "seed must be an integer"),
    ({"stop": list(range(9))}, "9 stop ids"),
    ({"stop": "x"}, "need a tokenizer"),
  ]
  good = {"prompt": [1, 2], "max_new_tokens": 5}
  for wrong, message in bad:
    with pytest.raises(UserError, match=message):
      engine.admit(**{**good, **wrong})
  assert engine.idle
  mixed = [todo[0], EngineRequest([99], 5), todo[1], EngineRequest([1] * 60, 50), todo[2]]
  results = {r.id: r for r in engine.run(mixed)}
  assert [results[i].reason for i in range(5)] == [
    "length",
    "refused",
    "length",
    "refused",
    "length",
  ]
  assert "token id 99" in results[1].error
  assert [results[i].tokens for i in (0, 2, 4)] == [expected("attention", r) for r in todo]
  (kept,) = (r for r in engine.run([todo[1]]))
  assert kept.tokens == expected("attention", todo[1]) and not engine.results
  for id in [engine.admit([1], max_new_tokens=9) for _ in range(2)]:
    engine.cancel(id)
  assert [r.reason for r in engine.run([])] == ["cancelled"] * 2
  for _ in range(2):
    engine.admit([1], max_new_tokens=1)
  with pytest.raises(QueueFull, match="holds 2 requests"):
    engine.admit([1], max_new_tokens=1)
  with pytest.raises(UserError, match="request 77 is not running"):
    engine.cancel(77)
  with pytest.raises(UserError, match="budget=10"):
    Engine(model, params, **{**SIZES, "budget": 10})
  with pytest.raises(UserError, match="over the model's limit"):
    Engine(model, params, capacity=1000)
