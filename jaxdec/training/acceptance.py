# SPDX-License-Identifier: Apache-2.0
"""What a drafter in training is worth: its prompts are decoded with the tree it would get now.

Teacher-forced accuracies flatter a drafter (earlier drafts are never wrong there); tokens per step
of real decoding are what counts. So both are reported, from the same parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxdec.data.corpus import Corpus
from jaxdec.data.mixture import Mixture
from jaxdec.decoding import Sampler, generate
from jaxdec.drafting.base import Params
from jaxdec.drafting.static_tree import StaticTree, expected_tokens
from jaxdec.errors import UserError
from jaxdec.models import Decoder, unstack_layers
from jaxdec.parallel.distributed import to_host
from jaxdec.training.task import Batch
from jaxdec.training.tasks.distill import Distill, best_tree, measure_accuracy


class Acceptance:
  """Called with a drafter's parameters, says what it is worth (``Trainer(inspect=...)``).

  Args:
    task: target and drafter. prompts: token ids. batches: gives the held-out batches of the
      accuracies. num_nodes: of the static tree, as ``finish`` chooses it. max_new_tokens: decoded
      for each prompt. sampler: greedy by default.

  Nothing of the run is touched: no batch is taken, no random number drawn.
  """

  def __init__(
    self,
    task: Distill,
    prompts: list[list[int]],
    batches: Callable[[], Iterable[Batch]],
    *,
    num_nodes: int = 16,
    max_new_tokens: int = 64,
    sampler: Sampler = Sampler(),  # noqa: B008
  ):
    limit = task.model.config.max_length - max_new_tokens
    if limit < 1:
      raise UserError(
        f"acceptance_tokens is {max_new_tokens}, and the target reads "
        f"{task.model.config.max_length} at most; ask for fewer"
      )
    self._task, self._batches, self._num_nodes = task, batches, num_nodes
    self._prompts = [prompt[:limit] for prompt in prompts]
    self._options = {"max_new_tokens": max_new_tokens, "sampler": sampler}
    self._target: tuple[Any, Params] | None = None

  def target(self) -> tuple[Any, Params]:
    """The target as it decodes: layers unrolled, on one device."""
    if self._target is None:
      model, params = self._task.model, to_host(nn.unbox(self._task.frozen["target"]))
      if model.layout != "unrolled":
        params = unstack_layers(params, model.config)
      self._target = (Decoder(model.config, dtype=model.dtype), _on_one_device(params))
    return self._target

  def __call__(self, params: Params) -> Mapping[str, Any]:
    """Returns:

    ``top1_by_depth`` and ``simulated_tokens_per_step`` (from the accuracies: with its tree, were
    its nodes accepted independently); ``accepted_by_depth`` and ``tokens_per_step`` of real
    decoding with that tree.
    """
    drafter = self._task.drafter
    accuracy = measure_accuracy(self._task, params, self._batches())
    tree = best_tree(drafter, accuracy, self._num_nodes)
    drafter = drafter if tree is None else dataclasses.replace(drafter, tree=tree)
    model, target_params = self.target()
    stats = generate(
      model,
      target_params,
      self._prompts,
      drafter=drafter,
      drafter_params=_on_one_device(to_host(params)),
      **self._options,
    ).stats
    # Of a tree that grows as it drafts, the chain of first guesses is simulated.
    chain = 1 + float(np.sum(np.cumprod(accuracy[:, 0])))
    static = isinstance(drafter.tree, StaticTree)
    return {
      "top1_by_depth": accuracy[:, 0],
      "simulated_tokens_per_step": expected_tokens(drafter.tree, accuracy) if static else chain,
      "accepted_by_depth": np.asarray(stats.accepted_by_depth),
      "tokens_per_step": stats.tokens_per_step,
    }


def _on_one_device(params: Params) -> Params:
  """Where several devices hold the parameters, a copy on one of this process's."""

  def one(leaf):
    if isinstance(leaf, jax.Array) and len(leaf.devices()) > 1:
      leaf = np.asarray(leaf)
    return leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf, jax.local_devices()[0])

  return jax.tree.map(one, params)


def held_out_prompts(
  source: Corpus | Mixture, count: int, *, max_tokens: int = 64
) -> list[list[int]]:
  """The beginnings of documents: up to the first answer where answers are marked, else
  ``max_tokens`` tokens at most. A mixture gives of each corpus in turn.

  Raises:
    UserError: there is no document with a beginning.
  """
  corpora = source.corpora if isinstance(source, Mixture) else (source,)
  prompts: list[list[int]] = []
  for i in range(max(map(len, corpora), default=0)):
    for corpus in corpora:
      if i < len(corpus) and len(prompts) < count:
        begin = _beginning(corpus, i, max_tokens)
        prompts += [begin] if begin else []
  if not prompts:
    raise UserError("the validation split holds no document to prompt with; give more data")
  return prompts


def _beginning(corpus: Corpus, i: int, max_tokens: int) -> list[int]:
  tokens = corpus[i]
  length = min(max_tokens, len(tokens) - 1)
  if corpus.labels is not None:
    labels = corpus.labels[corpus.offsets[i] : corpus.offsets[i + 1]]
    length = int(np.argmax(labels)) if labels.any() else 0
  return [int(t) for t in tokens[:length]]
