# SPDX-License-Identifier: Apache-2.0
"""Next-token language modelling of a ``Decoder``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdec.models import Decoder, flops
from jaxdec.models.block_ffn import SparsityLosses, router_logits
from jaxdec.training.task import Task
from jaxdec.training.tasks.chunked import by_chunks
from jaxdec.training.tasks.layer_skip import LayerSkip


def next_token_targets(
  batch: dict[str, Any],
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
  """Labels and weights of the positions that predict them.

  ``label[t] = tokens[t+1]``; its weight is ``loss_mask[t+1]``, and 0 where position t+1 is padding,
  belongs to another segment than t, or does not exist. Absent ``segment_ids``: one segment. Absent
  ``loss_mask``: every token counts. A batch that does not lie in the order of its tokens brings its
  own ``labels`` and ``label_mask``.
  """
  if "labels" in batch:
    return batch["labels"], batch["label_mask"].astype(jnp.float32)
  tokens = batch["tokens"]

  def shift(x):
    return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)

  mask = shift(batch.get("loss_mask", jnp.ones(tokens.shape, jnp.float32)).astype(jnp.float32))
  segments = batch.get("segment_ids")
  if segments is not None:
    following = shift(segments)
    mask = mask * ((following == segments) & (following != 0))
  return shift(tokens), mask


def token_losses(
  logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Cross-entropy ``logsumexp(z) - z[label]`` per position, and the logsumexp; float32.

  The label's logit is picked by comparison rather than by gather: the backward pass of a gather is
  a scatter over ``[B, T, V]``, which does not fuse.
  """
  logits = logits.astype(jnp.float32)
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  hit = labels[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)
  return normalizer - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1), normalizer


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel(Task):
  """Cross-entropy on the next token, in float32, averaged over labelled tokens.

  Attributes:
    model: the decoder, in either layout.
    z_loss: weight of ``logsumexp(logits)^2``, which keeps the logits from drifting (PaLM,
      arXiv 2204.02311, section 5); 0 for none.
    token_bytes: bytes each token id stands for, ``[V]``; given, evaluation reports bits per byte.
    sparsity: losses on the routers of BlockFFN layers (``jaxdec.models.block_ffn``). A weight of
      the chunk loss that follows that loss is the task's ``memory``; a batch brings it as
      ``chunk_factor`` (any shape, all entries equal).
    layer_skip: train early exits too, with layer dropout (``tasks.layer_skip``).
    loss_chunk: tokens of a row whose logits exist at a time, on each device; None: of all tokens,
      which takes a third fewer products with the head and ``4 B T V`` bytes.
  """

  model: Decoder
  z_loss: float = 0.0
  token_bytes: np.ndarray | None = None
  loss_chunk: int | None = None
  sparsity: SparsityLosses | None = None
  layer_skip: LayerSkip | None = None

  def init(self, rng):
    whole = self.model.clone(sequence=None)  # eight tokens don't divide over every mesh
    return whole.init(rng, jnp.zeros((1, 8), jnp.int32))["params"]

  @property
  def memory(self):
    schedule = None if self.sparsity is None else self.sparsity.schedule
    return None if schedule is None else schedule.begin()

  def recall(self, memory, batch):
    rows = batch["tokens"].shape[:1]  # one each: a batch may be taken apart by rows
    return {**batch, "chunk_factor": jnp.broadcast_to(memory.now, rows)}

  def remember(self, memory, metrics):
    return self.sparsity.schedule.follow(memory, metrics["chunk_loss"])

  def loss(self, params, frozen, batch, rng):
    del frozen
    skip, layers = self.layer_skip if rng is not None else None, self.model.config.num_layers
    keep, capture = None, ()
    if skip is not None:
      drop_rng, exit_rng = jax.random.split(rng)
      keep = skip.keep(drop_rng, layers, batch["tokens"].shape[0])
      capture = tuple(range(1, layers))
    out, sown = self.model.apply(
      {"params": params}, batch["tokens"], batch.get("positions"), batch.get("segment_ids"),
      logits=self.loss_chunk is None, capture=capture, keep=keep,
      mutable=["intermediates"] if self.sparsity is not None else [],
    )  # fmt: skip
    labels, mask = next_token_targets(batch)
    losses, normalizer, correct = self._of_tokens(params, out.hidden, labels, out.logits)
    weight = jnp.sum(mask)
    mean = 1.0 / jnp.maximum(weight, 1.0)
    cross_entropy = total = jnp.sum(losses * mask) * mean
    metrics = {"accuracy": jnp.sum(correct * mask) * mean, "weight": weight}
    if skip is not None:
      chosen, shares, last = skip.draw(exit_rng, layers)
      streams = jnp.stack(out.features)[chosen]
      # An exit's state after layer l is the input of layer l + 1, through the final norm.
      exits = jnp.stack(
        [jnp.sum(self._of_tokens(params, self._normed(params, x), labels)[0] * mask) * mean
         for x in jnp.unstack(streams)]
      )  # fmt: skip
      metrics["exit_loss"] = jnp.mean(exits)
      total = last * cross_entropy + jnp.sum(shares * exits)
    if self.z_loss:
      metrics["z_loss"] = jnp.sum(jnp.square(normalizer) * mask) * mean
      total = total + self.z_loss * metrics["z_loss"]
    if self.sparsity is not None:
      segments = batch.get("segment_ids", jnp.ones_like(batch["tokens"]))
      factor = batch.get("chunk_factor")
      extra, sparse = self.sparsity(
        router_logits(sown), segments, None if factor is None else jnp.mean(factor)
      )
      metrics |= sparse
      total = total + extra
    if total is not cross_entropy:
      metrics["cross_entropy"] = cross_entropy
    return total, metrics

  def _normed(self, params, stream):
    return self.model.apply({"params": params}, stream, method=lambda m, x: m.final_norm(x))

  def _of_tokens(self, params, hidden, labels, logits=None):
    """Cross-entropy, logsumexp and whether the argmax is right, of every token."""

    def of_tokens(logits, labels):
      return *token_losses(logits, labels), jnp.argmax(logits, axis=-1) == labels

    if self.loss_chunk is not None:
      return by_chunks(of_tokens, self.model, params, hidden, labels, self.loss_chunk)
    if logits is None:
      logits = self.model.apply({"params": params}, hidden, method="unembed")
    return of_tokens(logits, labels)

  def evaluate(self, params, frozen, batch, rng):
    del rng  # all layers, the last one's loss
    metrics = super().evaluate(params, frozen, batch, None)
    if self.token_bytes is not None:
      labels, mask = next_token_targets(batch)
      sizes = jnp.asarray(self.token_bytes, jnp.float32)[labels]
      metrics["bytes_per_token"] = jnp.sum(sizes * mask) / jnp.maximum(metrics["weight"], 1.0)
    return metrics

  def summarize(self, metrics):
    """Adds ``bits_per_byte = cross-entropy / (ln 2 * bytes per token)``."""
    size = metrics.get("bytes_per_token")
    if size:
      nats = float(metrics.get("cross_entropy", metrics["loss"]))  # the loss, less what was added
      bits = nats / (math.log(2.0) * float(size))
      metrics = {**metrics, "bits_per_byte": bits}
    return metrics

  def flops_per_token(self, params, length):
    """Counted from the layers; see ``jaxdec.models.flops``."""
    return flops.per_token(self.model.config, length).training

  @property
  def sequence(self):
    return self.model.sequence

  @property
  def config(self):
    return {
      "task": "language_model",
      "model": self.model.config,
      "layout": self.model.layout,
      "sequence": self.model.sequence,
      "remat": self.model.remat,
      "dtype": jnp.dtype(self.model.dtype).name,
      "param_dtype": jnp.dtype(self.model.param_dtype).name,
      "z_loss": self.z_loss,
      **{
        name: dataclasses.asdict(getattr(self, name))
        for name in ("sparsity", "layer_skip")
        if getattr(self, name) is not None
      },
    }
