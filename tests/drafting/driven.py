# SPDX-License-Identifier: Apache-2.0
"""A drafter against a law of the next token written in Python: every node from its own text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.decoding.sampling import Sampler, request_keys
from jaxdec.decoding.verify import Match
from jaxdec.drafting import Accepted, Context, Prompt, Target, TargetOutput, Tree
from tests.decoding.targets import target

Text = tuple[int, ...]


class Pass(NamedTuple):
  """What was drafted after ``texts``, how many tokens each row emitted, and the state after."""

  tree: Tree
  texts: list[Text]
  counts: np.ndarray
  state: object


def node_texts(tree: Tree, row: int) -> list[Text]:
  """The tokens behind the root along the path to every node, its own included."""
  parent, tokens = np.asarray(tree.parent[row]), np.asarray(tree.tokens[row])
  out: list[Text] = [()]
  for i in range(1, len(tokens)):
    out.append((*out[parent[i]], int(tokens[i])))
  return out


def drive(
  drafter, law: Callable[[Text], int], prompts: Sequence[Text], passes: int, vocab: int, **config
) -> Iterator[Pass]:
  """Greedy decoding of some passes; the texts' last tokens are the roots."""
  texts = [(*p, law(tuple(p))) for p in prompts]
  history = np.zeros((len(texts), 256), np.int32)
  lengths = jnp.asarray([len(p) for p in prompts])
  model, _ = target(vocab=vocab, **config)
  who = Target(model, {}, None)
  for row, text in zip(history, texts):
    row[: len(text)] = text

  @jax.jit
  def propose(state, context):
    return drafter.propose(None, state, context, jax.random.key(0))

  @jax.jit
  def observe(state, tree, logits, context):
    verdict = Match()(tree, logits, context.sampler, context.keys, context.length)
    accepted = Accepted(verdict.path, verdict.count, jnp.zeros_like(verdict.count), verdict.tokens)
    state = drafter.observe(
      None, state, tree, accepted, TargetOutput(logits, logits=logits), context
    )
    return state, verdict

  @jax.jit
  def start(history, roots):
    state = drafter.init_state(len(texts), history.shape[1])
    return drafter.start(None, state, Prompt(history, lengths, roots), None, who)

  state = start(jnp.asarray(history), jnp.asarray([t[-1] for t in texts]))
  for _ in range(passes):
    context = Context(
      root=jnp.asarray([t[-1] for t in texts]),
      length=jnp.asarray([len(t) - 1 for t in texts]),
      history=jnp.asarray(history),
      target=who,
      sampler=Sampler(),
      keys=request_keys(0, len(texts)),
    )
    tree, state = propose(state, context)
    predicted = [
      [law((*text, *behind)) for behind in node_texts(tree, b)] for b, text in enumerate(texts)
    ]
    state, verdict = observe(state, tree, jax.nn.one_hot(jnp.asarray(predicted), vocab), context)
    counts = np.asarray(verdict.count)
    yield Pass(tree, list(texts), counts, state)
    for b, count in enumerate(counts):
      new = np.asarray(verdict.tokens[b, :count]).tolist()
      for token in new:  # whatever was drafted
        assert token == law(texts[b])
        texts[b] = (*texts[b], token)
      history[b, : len(texts[b])] = texts[b]
