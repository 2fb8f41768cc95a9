# SPDX-License-Identifier: Apache-2.0
"""DFlash (arXiv 2602.06036): a block of drafts in one pass, denoised against the target's features.

With c = RMS(W_fc [f_1; ...; f_n]) from n layer outputs of the target, the block that begins at the
anchor a (the root) reads ``[x_a, MASK, ..., MASK]`` at positions a, a + 1, ...; in every layer

  q = W_q RMS(x);   K, V = W_k, W_v of [c_0, ..., c_{a-1}; RMS(x)]        (q and k normed, rotated)
  x <- x + Attn(q, K, V);   x <- x + MLP(RMS(x))

without a causal mask inside the block, then the target's own (frozen) LM head on RMS(x). The
context ends before the anchor, whose features don't exist yet. Only its keys and values are cached.

Two conventions for K drafts. ``same_position``, as published: block of K + 1, the mask in slot j
guesses its own token ``x_{a+j}``, and slot 0 nothing. ``from_anchor`` (DSpark, arXiv 2607.05147):
block of K, slot i guesses the next token ``x_{a+1+i}``.

Training draws up to ``num_anchors`` anchors a row without replacement among those whose own token
and next may be learned; labels end with the run of tokens that may. Evaluation takes all anchors,
evenly spaced ones where there are more. With ``weighting="dpace"`` (and ``depth_decay=1``) it is
D-PACE (arXiv 2605.18810); its weighted sum we divide by the sum of the weights, as all others.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.base import Context, Params, Target
from jaxdec.drafting.hydra import draft_attention
from jaxdec.drafting.trained import Example, TrainedDrafter, embed, label_weights
from jaxdec.errors import UserError
from jaxdec.mixers import AttentionConfig, NormConfig
from jaxdec.mixers.attention import MASKED, Attention, KVState, heads_first
from jaxdec.mixers.base import gather_nodes, write_rows
from jaxdec.mixers.norms import Dense, RMSNorm
from jaxdec.models.config import DecoderConfig, LayerConfig, MLPConfig
from jaxdec.models.decoder import Block


class BlockLayer(Block):
  """A decoder layer whose queries see a context of other states and all of their own block."""

  def context(self, c: Float[Array, "B T D"], positions: Int[Array, "B T"]):
    """Keys and values of the context, ``[B,K,T,H]`` each; it isn't normed by this layer."""
    _, k, v = self.mixer._project(c, positions)
    return heads_first(k), heads_first(v)

  def blocks(self, x: Float[Array, "B A C D"], positions, context, seen: Bool[Array, "B A T"]):
    """Many blocks over one context, each up to its own place in it."""
    b, a, c, d = x.shape
    y = self.mixer_norm(x).reshape(b, a * c, d)
    q, k, v = (z.reshape(b, a, c, -1, z.shape[-1]) for z in self.mixer._project(y, positions))
    out = block_attention(q, k, v, *context, seen, self.config.mixer.scale)
    return self._finish(x, self.mixer._output(out.reshape(b, a * c, -1), y).reshape(x.shape))

  def draft(self, x: Float[Array, "B C D"], positions, state: KVState):
    """One block over the cached context."""
    y = self.mixer_norm(x)
    q, k, v = self.mixer._project(y, positions)
    everything = jnp.ones((x.shape[0], x.shape[1], x.shape[1]), bool)
    return self._finish(
      x, self.mixer._output(self.mixer._attend_cache(q, k, v, state, everything), y)
    )


def block_attention(
  q: Float[Array, "B A C N H"],
  k: Float[Array, "B A C K H"],
  v: Float[Array, "B A C K H"],
  context_k: Float[Array, "B K T H"],
  context_v: Float[Array, "B K T H"],
  seen: Bool[Array, "B A T"],
  scale: float | None = None,
) -> Float[Array, "B A C N H"]:
  """Softmax attention of A blocks of C queries: each over what it sees of the context, and itself.

  ``seen[b, a, t]``: whether block a sees context slot t.
  """
  b, a, c, n, h = q.shape
  q = q.reshape(b, a, c, k.shape[3], -1, h) * (h**-0.5 if scale is None else scale)
  f32 = dict(preferred_element_type=jnp.float32)
  far = jnp.einsum("backgh,bkth->bkgact", q, context_k, **f32)
  far = jnp.where(seen[:, None, None, :, None], far, MASKED)
  near = jnp.einsum("backgh,baskh->bkgacs", q, k, **f32)
  probs = jax.nn.softmax(jnp.concatenate([far, near], axis=-1), axis=-1).astype(v.dtype)
  t = context_k.shape[2]
  out = jnp.einsum("bkgact,bkth->backgh", probs[..., :t], context_v, **f32)
  out = out + jnp.einsum("bkgacs,baskh->backgh", probs[..., t:], v, **f32)
  return out.reshape(b, a, c, n, h)


class BlockModel(nn.Module):
  """Parameters of the drafter, and its three ways: context, blocks in training, one block."""

  layer: LayerConfig
  num_layers: int
  dim: int
  norm: NormConfig
  dtype: jnp.dtype

  def setup(self):
    self.fuse = Dense(self.dim, (None, "embed"), dtype=self.dtype)
    self.context_norm, self.out_norm = RMSNorm(self.norm), RMSNorm(self.norm)
    self.layers = [
      BlockLayer(self.layer, self.dim, self.norm, self.dtype) for _ in range(self.num_layers)
    ]

  def context(self, features: Float[Array, "B T E"], positions: Int[Array, "B T"]):
    """Every layer's keys and values of the context."""
    c = self.context_norm(self.fuse(features))
    return [layer.context(c, positions) for layer in self.layers]

  def blocks(self, x: Float[Array, "B A C D"], positions: Int[Array, "B A C"], context, seen):
    positions = positions.reshape(x.shape[0], -1)
    for layer, kv in zip(self.layers, context):
      x = layer.blocks(x, positions, kv, seen)
    return self.out_norm(x)

  def draft(self, x: Float[Array, "B C D"], positions: Int[Array, "B C"], states):
    for layer, state in zip(self.layers, states):
      x = layer.draft(x, positions, state)
    return self.out_norm(x)

  def __call__(self, features, x, positions, seen):
    """Touches every parameter (for ``init``)."""
    return self.blocks(x, positions, self.context(features, positions[:, 0]), seen)


@struct.dataclass
class DFlashState:
  """Each layer's keys and values of the context: what the target has read, the root excluded.

  ``block``: states of the block, while a step drafts from it.
  """

  layers: tuple[KVState, ...]
  block: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DFlash(TrainedDrafter):
  """DFlash.

  Attributes:
    num_heads: K, the drafts of a block.
    labels: ``same_position`` or ``from_anchor``; see the module.
    capture_layers: layer inputs read (0-based: input i + 1 is the output of layer i).
    num_layers, attention, hidden_dim, eps: shape of the drafter.
    num_anchors: blocks a row trains on in a step. anchor_group: blocks computed at a time, which
      bounds the memory of training; None: all.
    mask_token: token whose embedding stands for what isn't known yet; None: a learned embedding.
    depth_decay: ``exp(-1 / gamma)``; gamma is 7 for blocks of 16 in the released trainers, else 4.
  """

  name: ClassVar[str] = "dflash"
  needs_prompt_hidden: ClassVar[bool] = True
  share_head: ClassVar[bool] = True

  num_heads: int = 7
  labels: Literal["same_position", "from_anchor"] = "same_position"
  capture_layers: tuple[int, ...]
  num_layers: int
  attention: AttentionConfig
  hidden_dim: int
  eps: float = 1e-6
  num_anchors: int = 512
  anchor_group: int | None = None
  mask_token: int | None = None
  depth_decay: float = math.exp(-1 / 4)
  normalize: Literal["depth", "global"] = "global"

  def __post_init__(self):
    if self.labels not in ("same_position", "from_anchor"):
      raise UserError(f"labels must be 'same_position' or 'from_anchor', got {self.labels!r}")
    if self.vocabulary is not None or self.loss_fraction != 1:
      raise UserError(
        f"{self.name} reads the target's own LM head at sampled anchors: leave vocabulary and "
        "loss_fraction as they are, and set num_anchors instead"
      )
    if self.attention.window is not None or self.attention.logit_cap is not None:
      raise UserError(f"attention of {self.name} takes neither a window nor a logit_cap")
    if min(self.num_layers, self.num_anchors, self.anchor_group or 1) < 1:
      raise UserError(
        "num_layers, num_anchors and anchor_group must be at least 1, got "
        f"{self.num_layers}, {self.num_anchors} and {self.anchor_group}"
      )
    super().__post_init__()

  @classmethod
  def for_target(cls, config: DecoderConfig, **options) -> DFlash:
    options.setdefault("capture_layers", context_layers(config.num_layers))
    options.setdefault("num_layers", min(5, max(1, config.num_layers // 3)))
    options.setdefault("attention", dataclasses.replace(draft_attention(config), qk_norm=True))
    options.setdefault("hidden_dim", config.layers[0].mlp.hidden_dim)
    options.setdefault("eps", config.norm.eps)
    return super().for_target(config, **options)

  @property
  def capture(self) -> tuple[int, ...]:
    return self.capture_layers

  @property
  def block_size(self) -> int:
    """Slots of a block, the anchor's included."""
    return self.num_heads + (self.labels == "same_position")

  @property
  def _model(self) -> BlockModel:
    layer = LayerConfig(self.attention, MLPConfig(self.hidden_dim))
    return BlockModel(layer, self.num_layers, self.dim, NormConfig(self.eps), jnp.dtype(self.dtype))

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    model_rng, mask_rng = jax.random.split(rng)
    x = jnp.zeros((1, 1, 2, self.dim), self.dtype)
    features = jnp.zeros((1, 2, len(self.capture) * self.dim), self.dtype)
    positions, seen = jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1, 2), bool)
    params = {"model": self._model.init(model_rng, features, x, positions, seen)["params"]}
    if self.mask_token is None:
      mask = 0.02 * jax.random.normal(mask_rng, (self.dim,))
      params["mask"] = nn.LogicallyPartitioned(mask, ("embed",))
    return params

  def _apply(self, params, *args, method):
    return self._model.apply({"params": params["model"]}, *args, method=method)

  def _fused(self, output):
    return jnp.concatenate(output.features, axis=-1).astype(self.dtype)

  def _inputs(self, params, target, anchors: Int[Array, "B A"]) -> Float[Array, "B A C D"]:
    """Embeddings ``[anchor, MASK, ...]`` of blocks."""
    first = jax.lax.stop_gradient(embed(target, anchors, self.dtype))[:, :, None]
    if self.mask_token is None:
      mask = params["mask"].astype(self.dtype)
    else:
      token = jnp.full((1, 1), self.mask_token, jnp.int32)
      mask = jax.lax.stop_gradient(embed(target, token, self.dtype))[0, 0]
    shape = (*anchors.shape, self.block_size - 1, self.dim)
    return jnp.concatenate([first, jnp.broadcast_to(mask, shape)], axis=2)

  def _drafting(self, block: Float[Array, "... C D"]) -> Float[Array, "... K D"]:
    """The slots of a block that guess, in order of depth."""
    return block[..., self.block_size - self.num_heads :, :]

  def head(self, params, target, depth, states):
    return target.model.apply({"params": target.params}, states, method="unembed")

  # Training. Slot t = a - 1 is the last that the block with anchor a sees.

  def examples(self, params, target, output, batch, rng=None):
    tokens = batch["tokens"]
    if tokens.shape[1] < self.num_heads + 2:
      raise UserError(
        f"sequences of {tokens.shape[1]} tokens are too short to train {self.num_heads} draft "
        f"depths; use at least {self.num_heads + 2}"
      )
    slots, weights = self.anchors(batch, rng)
    hidden = self._drafting(self._blocks(params, target, output, batch, slots))
    for k, states in enumerate(self._states(params, hidden, batch, slots), 1):
      yield Example(
        k,
        states,
        take_slots(tokens, slots + 1 + k),
        None if output.logits is None else take_slots(output.logits, slots + k),
        take_slots(output.hidden, slots + k),
        weights[k - 1],
      )

  def anchors(
    self, batch, rng: jax.Array | None
  ) -> tuple[Int[Array, "B A"], list[Float[Array, "B A"]]]:
    """The slots before the anchors, and per depth whether they count.

    A row with too few anchors is filled up with some that count at no depth.
    """
    room = batch["tokens"].shape[1] - 2
    weights = [label_weights(batch, k, prefix=True) for k in range(1, self.num_heads + 1)]
    weights = [jnp.pad(w, ((0, 0), (0, room - w.shape[1]))) for w in weights]
    count = min(self.num_anchors, room)
    if count == room:
      slots = jnp.broadcast_to(jnp.arange(room), weights[0].shape)
    elif rng is None:
      slots = jnp.round(jnp.linspace(0, room - 1, count)).astype(jnp.int32)
      slots = jnp.broadcast_to(slots, (weights[0].shape[0], count))
    else:
      order = jax.random.uniform(rng, weights[0].shape) + weights[0]
      slots = jax.lax.top_k(order, count)[1]
    return slots, [jnp.take_along_axis(w, slots, axis=1) for w in weights]

  def _blocks(self, params, target, output, batch, slots) -> Float[Array, "B A C D"]:
    positions, segments = batch["positions"], batch["segment_ids"]
    context = self._apply(
      params, jax.lax.stop_gradient(self._fused(output)), positions, method="context"
    )

    def run(slots):
      anchors = take_slots(batch["tokens"], slots + 1)
      at = take_slots(positions, slots + 1)[..., None] + jnp.arange(self.block_size)
      seen = jnp.arange(positions.shape[1]) <= slots[..., None]
      seen = seen & (take_slots(segments, slots)[..., None] == segments[:, None])
      x = self._inputs(params, target, anchors)
      return self._apply(params, x, at, context, seen, method="blocks")

    b, count = slots.shape
    group = min(self.anchor_group or count, count)
    groups = -(-count // group)
    if groups == 1:
      return run(slots)
    padded = jnp.pad(slots, ((0, 0), (0, groups * group - count)))
    padded = jnp.moveaxis(padded.reshape(b, groups, group), 1, 0)
    out = jnp.moveaxis(jax.lax.map(jax.checkpoint(run), padded), 0, 1)
    return out.reshape(b, groups * group, *out.shape[3:])[:, :count]

  def _states(self, params, hidden: Float[Array, "B A K D"], batch, slots):
    """What ``head`` reads, per depth."""
    return [hidden[:, :, k] for k in range(self.num_heads)]

  # Inference.

  def init_state(self, batch: int, capacity: int) -> DFlashState:
    attention = Attention(self.attention, self.dim, parent=None)
    return DFlashState(
      tuple(
        attention.init_state(batch, capacity, jnp.dtype(self.dtype)) for _ in range(self.num_layers)
      )
    )

  def _read(self, params, state, features, count):
    """Adds the first ``count [B]`` of the new features to the context."""
    length = state.layers[0].length
    positions = length[:, None] + jnp.arange(features.shape[1], dtype=jnp.int32)
    context = self._apply(params, features, positions, method="context")
    return DFlashState(
      tuple(
        KVState(
          write_rows(old.k, k, length, axis=2), write_rows(old.v, v, length, axis=2), length + count
        )
        for old, (k, v) in zip(state.layers, context)
      )
    )

  def start(self, params, state, prompt, output, target):
    return self._read(params, state, self._fused(output), prompt.lengths)

  def observe(self, params, state, tree, accepted, output, context):
    features = gather_nodes(self._fused(output), accepted.path)
    return self._read(params, state, features, accepted.count)

  def _block(self, params, state, context: Context) -> Float[Array, "B K D"]:
    """The drafting slots of the block that begins at the root."""
    if state.block is not None:
      return state.block
    x = self._inputs(params, context.target, context.root[:, None])[:, 0]
    positions = context.length[:, None] + jnp.arange(self.block_size, dtype=jnp.int32)
    return self._drafting(self._apply(params, x, positions, state.layers, method="draft"))

  def first(self, params, state, context: Context):
    block = self._block(params, state, context)[:, : self.max_depth]
    logits = self.head(params, context.target, 1, block)  # one product for all depths
    return logits[:, 0], logits

  def step(self, params, state, context: Context):
    # A slot's guess doesn't depend on the path: the next slot's logits serve the whole level.
    return lambda logits, level, tokens, parents: (logits[:, level, None], logits)


def take_slots(x: Float[Array, "B T ..."], slots: Int[Array, "B A"]) -> Array:
  """``x [B,T,...] -> [B,A,...]``; slots beyond the end give the last one (they have no weight)."""
  return gather_nodes(x, jnp.minimum(slots, x.shape[1] - 1))


def context_layers(num_layers: int, count: int = 5) -> tuple[int, ...]:
  """Inputs of the layers after ``round(1 + i (L - 4) / (n - 1))``, the released choice; all of them
  spread from the first to the last output where L is too small for n distinct ones."""
  if num_layers - 4 >= count - 1:
    return tuple(round(1 + i * (num_layers - 4) / (count - 1)) + 1 for i in range(count))
  outputs = np.linspace(1, num_layers, min(count, num_layers))
  return tuple(sorted({int(x + 0.5) for x in outputs}))
