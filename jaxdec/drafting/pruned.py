# SPDX-License-Identifier: Apache-2.0
"""A layer-pruned copy of the target as its draft model, healed with self-data distillation
(arXiv 2410.09982).

Of all runs of n consecutive layers the most redundant one is taken out, the one whose input and
output point the same way:

  l* = argmin_l  mean over texts of  arccos(cos(h^l_T, h^{l+n}_T)) / pi

(h^l: the stream entering layer l, T: the last token of a text). The copy is then fine-tuned with
plain cross-entropy (``jaxdec.training.tasks.heal``) on *self-data*: the reference answers in the
unpruned target's own words, wherever these say the same; so it learns back what the target does and
unlearns nothing for the sake of another author's style. The secondary accounts word the choice
between answer and rewrite differently; ours: a rewrite is kept iff its extracted final answer
equals the reference's.

``prune`` gives a decoder like any other: ``DraftModel(model=pruned)`` drafts with it. With few
layers kept it is too slow a drafter for what it accepts; with two to eight it is a better start for
a thin one than random weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdec.errors import UserError
from jaxdec.models.decoder import Decoder, stack_layers, unstack_layers

Params = Any

REWRITE = (
  "{context}Question: {question}\nReference answer: {answer}\n"
  "Rewrite the reference answer in your own words, keeping its final result.\nAnswer: "
)


def angular_distances(
  model: Decoder, params: Params, batches: Iterable[Mapping[str, Array]], span: int
) -> np.ndarray:
  """Mean angular distance across each run of ``span`` layers, ``[L - span + 1]``, in [0, 1].

  Args:
    batches: ``tokens`` (and ``segment_ids``, ``positions`` where packed), ``[B, T]``; each
      document counts with its last token.

  Raises:
    UserError: ``span`` isn't in 1..L-1.
  """
  num_layers = model.config.num_layers
  check_span(num_layers, span)

  @jax.jit
  def one(params, batch):
    tokens = batch["tokens"]
    segments = batch.get("segment_ids")
    segments = jnp.ones_like(tokens) if segments is None else segments
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    last = (segments > 0) & (following != segments)
    everywhere = tuple(range(num_layers + 1))
    stream = model.apply(
      {"params": params}, tokens, batch.get("positions"), segments, capture=everywhere, logits=False
    ).features
    distance = [_angle(a, b) for a, b in zip(stream, stream[span:])]
    return jnp.stack([jnp.sum(d * last) for d in distance]), jnp.sum(last)

  total, count = 0.0, 0
  for batch in batches:
    sums, texts = jax.device_get(one(params, dict(batch)))
    total, count = total + np.asarray(sums, np.float64), count + int(texts)
  return total / max(count, 1)


def _angle(a: Float[Array, "... D"], b: Float[Array, "... D"]) -> Float[Array, "..."]:
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-12)
  return jnp.arccos(jnp.clip(cosine, -1.0, 1.0)) / jnp.pi


def check_span(num_layers: int, span: int) -> None:
  """Raises UserError unless ``span`` layers can be taken out and one is left."""
  if not 1 <= span < num_layers:
    raise UserError(f"span must lie in 1..{num_layers - 1}, so that a layer is left, got {span}")


def prune(model: Decoder, params: Params, start: int, span: int) -> tuple[Decoder, Params]:
  """The decoder without layers ``start .. start + span - 1``, in the same layout.

  Raises:
    UserError: there are no such layers, or none would be left.
  """
  config = model.config
  check_span(config.num_layers, span)
  if not 0 <= start <= config.num_layers - span:
    raise UserError(
      f"start must lie in 0..{config.num_layers - span} for {span} layers, got {start}"
    )
  kept = [i for i in range(config.num_layers) if not start <= i < start + span]
  pruned = dataclasses.replace(config, layers=tuple(config.layers[i] for i in kept))
  scanned = model.layout == "scanned"
  params = nn.unbox(params)
  flat = unstack_layers(params, config) if scanned else params
  rest = {name: x for name, x in flat.items() if not name.startswith("layers_")}
  flat = {**rest, **{f"layers_{new}": flat[f"layers_{old}"] for new, old in enumerate(kept)}}
  return model.clone(config=pruned), stack_layers(flat, pruned) if scanned else flat


def prune_most_redundant(
  model: Decoder, params: Params, batches: Iterable[Mapping[str, Array]], span: int
) -> tuple[Decoder, Params, int]:
  """``prune`` at ``l* = argmin angular_distances``; also returns ``l*``."""
  start = int(np.argmin(angular_distances(model, params, batches, span)))
  return *prune(model, params, start, span), start


@dataclasses.dataclass(frozen=True)
class Task:
  """One sample of a fine-tuning set; ``context`` comes before the question."""

  question: str
  answer: str
  context: str = ""


@dataclasses.dataclass(frozen=True)
class SelfData:
  """What the copy learns for a task: the rewrite, or the reference where that was refused."""

  task: Task
  answer: str
  rewritten: bool


def rewrite(
  tasks: Sequence[Task],
  write: Callable[[list[str]], list[str]],
  extract: Callable[[str], Any] | None = None,
  *,
  template: str = REWRITE,
  batch_size: int = 8,
) -> list[SelfData]:
  """Self-data: each reference answer as the target would put it.

  Args:
    write: the unpruned target: prompts to answers, such as
      ``lambda prompts: lm.generate(prompts, max_new_tokens=256).text``.
    extract: the final answer of a text (None where there is none to be found): a rewrite is kept
      iff its final answer is the reference's. None: every rewrite that is not empty is kept.
    template: of the prompt, with the fields ``context``, ``question`` and ``answer``.
  """
  data: list[SelfData] = []
  for i in range(0, len(tasks), batch_size):
    batch = tasks[i : i + batch_size]
    texts = write([template.format(**dataclasses.asdict(task)) for task in batch])
    for task, text in zip(batch, texts, strict=True):
      text = text.strip()
      keep = bool(text)
      if keep and extract is not None:
        found = extract(text)
        keep = found is not None and found == extract(task.answer)
      data.append(SelfData(task, text if keep else task.answer, keep))
  return data


def save_conversations(path: str | os.PathLike, data: Iterable[SelfData]) -> None:
  """Writes self-data as the JSONL of conversations that training reads: loss on answers only."""
  with open(path, "w", encoding="utf-8") as file:
    for item in data:
      question = item.task.context + item.task.question
      messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": item.answer},
      ]
      file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def slerp(a: Params, b: Params, share: float) -> Params:
  """Two healed copies merged tensor by tensor along the arc between them; ``share`` of ``b``.

  ``sin((1 - s) w) / sin(w) a + sin(s w) / sin(w) b``, w the angle between the tensors; straight
  where they are (nearly) parallel.
  """

  def merge(x, y):
    shape, (x, y) = x.shape, (jnp.ravel(v).astype(jnp.float32) for v in (x, y))
    norms = jnp.maximum(jnp.linalg.norm(x) * jnp.linalg.norm(y), 1e-12)
    angle = jnp.arccos(jnp.clip(x @ y / norms, -1.0, 1.0))
    straight = jnp.sin(angle) < 1e-4
    safe = jnp.where(straight, 1.0, angle)
    left = jnp.where(straight, 1 - share, jnp.sin((1 - share) * safe) / jnp.sin(safe))
    right = jnp.where(straight, share, jnp.sin(share * safe) / jnp.sin(safe))
    return (left * x + right * y).reshape(shape)

  return jax.tree.map(lambda x, y: merge(x, y).astype(x.dtype), a, b)
