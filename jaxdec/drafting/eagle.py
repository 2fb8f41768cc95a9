# SPDX-License-Identifier: Apache-2.0
"""EAGLE-1 (arXiv 2401.15077), and what all drafters share that continue the target's features.

At slot t, with the target's post-norm state f_t and the token that follows it:

  u_t = W_fc [E[x_{t+1}] ; f_t] + b        E frozen
  f^_{t+1} = Layer(u)_t                    one decoder layer without its input norm
  draft logits = W_lm f^_{t+1}             for x_{t+2}; W_lm is the target's head, frozen

The next draft feeds ``f^`` in place of ``f`` with the drafted token. The loss, on true features
only, is ``SmoothL1(f^_{t+1}, f_{t+1}) + 0.1 CE(p_{t+1}, q)``; its input features get noise
``(U[0,1) - 1/2) noise 512 / T``, T the length of the document. EAGLE-2 (arXiv 2406.16858) is the
same drafter with ``tree=DynamicTree(...)``.

Drafts at depth k come from a rollout: step j = 0..k-1 at every slot reads ``x_{t+1+j}`` and step
j-1's feature, and attends to the step-0 keys up to t and to its own slot's keys of steps 1..j.
EAGLE-1 trains step 0 and only measures the others; drafters that train more set ``rollouts``.
Between steps the fed feature is detached (HASS, arXiv 2408.15766), its keys and values are not.

Drafted keys never enter the caches: after verification the accepted slots are read again with true
features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxdec.drafting.base import Context, Params, Target, TargetOutput
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.drafting.hydra import draft_attention
from jaxdec.drafting.objectives import Objective, Term
from jaxdec.drafting.rollout import KeysValues, rollout_attention
from jaxdec.drafting.trained import TrainedDrafter, embed, lm_head_kernel, soft_cap
from jaxdec.errors import UserError
from jaxdec.mixers import Attention, AttentionConfig, NormConfig
from jaxdec.mixers.attention import heads_first
from jaxdec.mixers.base import gather_nodes
from jaxdec.mixers.norms import Dense
from jaxdec.models.config import DecoderConfig, LayerConfig, MLPConfig
from jaxdec.models.decoder import Block


class DraftBlock(Block):
  """A decoder block, with or without its input norm, that also rolls out and drafts."""

  input_norm: bool = True

  def normed(self, x):
    return self.mixer_norm(x) if self.input_norm else x

  def __call__(self, x, positions, segment_ids=None):
    return self._finish(x, self.mixer(self.normed(x), positions, segment_ids))

  def extend(self, x, state, positions):
    mixed, state = self.mixer.extend(self.normed(x), state, positions)
    return self._finish(x, mixed), state

  def roll(self, x, positions, segment_ids, earlier: Sequence[KeysValues]):
    """One more step at every slot; ``earlier``: keys and values of the steps before, step 0 first.

    Returns the output, and ``earlier`` with this step's.
    """
    y = self.normed(x)
    q, k, v = self.mixer._project(y, positions)
    steps = [*earlier, (k, v)]
    out = rollout_attention(q, steps, segment_ids, self.config.mixer)
    return self._finish(x, self.mixer._output(out, y)), steps

  def draft(self, x, positions, state, drafted: KeysValues, ancestors):
    """Reads ``n`` nodes after the ``m`` fed before (``drafted``: theirs, ``[B,K,m,H]`` each)."""
    y = self.normed(x)
    q, k, v = self.mixer._project(y, positions)
    keys, values = (
      jnp.concatenate([old, heads_first(new).astype(old.dtype)], axis=2)
      for old, new in zip(drafted, (k, v))
    )
    out = self.mixer._attend_state(q, keys, values, state, positions, ancestors)
    return self._finish(x, self.mixer._output(out, y)), (keys, values)


class FeatureLayers(nn.Module):
  """Decoder layers over fused features and embeddings, and three ways through them.

  Subclasses define ``fuse``; ``feature`` (what is fed to the next slot, and compared with the
  target's state) and ``readout`` (what the LM head reads) where they are not the output itself.
  """

  attention: AttentionConfig
  hidden_dim: int
  dim: int
  norm: NormConfig
  dtype: jnp.dtype
  num_layers: int = 1
  input_norm: bool = False  # of the first layer

  def setup(self):
    config = LayerConfig(self.attention, MLPConfig(self.hidden_dim))
    self.blocks = [
      DraftBlock(config, self.dim, self.norm, self.dtype, input_norm=i > 0 or self.input_norm)
      for i in range(self.num_layers)
    ]

  def fuse(self, features: Float[Array, "B T D"], embedded: Float[Array, "B T D"]) -> Array:
    """The layers' input ``[B,T,D]``."""
    raise NotImplementedError

  def feature(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The feature that output ``x`` stands for."""
    return x

  def readout(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """What the LM head reads of output ``x``."""
    return x

  def rollout(
    self,
    features: Float[Array, "B T D"],
    embedded: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    steps: int,
  ) -> list[Float[Array, "B T D"]]:
    """Outputs of every slot at every step; the last slots of step j have no token: garbage."""
    t = features.shape[1]

    def shifted(j):
      return jnp.pad(embedded[:, 1 + j :], ((0, 0), (0, min(1 + j, t)), (0, 0)))

    if steps == 1:  # the mixer's own way, which also splits sequences
      x = self.fuse(features, shifted(0))
      for block in self.blocks:
        x = block(x, positions, segment_ids)
      return [x]
    outputs, earlier = [], [()] * self.num_layers
    for j in range(steps):
      x = self.fuse(features, shifted(j))
      for i, block in enumerate(self.blocks):
        x, earlier[i] = block.roll(x, positions + j, segment_ids, earlier[i])
      outputs.append(x)
      features = jax.lax.stop_gradient(self.feature(x))
    return outputs

  def read(self, features, embedded, caches, positions):
    """Reads slots with true features into the caches (position -1: padding)."""
    x, new = self.fuse(features, embedded), []
    for block, cache in zip(self.blocks, caches):
      x, cache = block.extend(x, cache, positions)
      new.append(cache)
    return x, tuple(new)

  def draft(self, x, embedded, positions, caches, drafted: Sequence[KeysValues], ancestors):
    """Feeds ``n`` drafted nodes after the ``m`` fed before; ``x``: their parents' outputs.

    ``ancestors [B,n,m+n]``: which drafted nodes each sees, itself included.
    """
    x, new = self.fuse(self.feature(x), embedded), []
    for block, cache, pair in zip(self.blocks, caches, drafted):
      x, pair = block.draft(x, positions, cache, pair, ancestors)
      new.append(pair)
    return x, tuple(new)

  def __call__(self, features, embedded, positions, segment_ids):
    """Touches every parameter (for ``init``)."""
    x = self.rollout(features, embedded, positions, segment_ids, 1)[0]
    return self.feature(x), self.readout(x)


class EagleLayers(FeatureLayers):
  """``W_fc [e ; f]`` and one layer."""

  fuse_bias: bool = True

  def setup(self):
    super().setup()
    self.fc = Dense(self.dim, (None, "embed"), self.fuse_bias, self.dtype)

  def fuse(self, features, embedded):
    return self.fc(jnp.concatenate([embedded, features], axis=-1))


@struct.dataclass
class FeatureState:
  """The layers' output at the slot before the root, and the caches of slots read so far."""

  last: Float[Array, "B D"]
  caches: tuple[Any, ...]


class SlotReader:
  """How drafters with attention of their own read a text: slot t holds (feature of t, token t + 1),
  and the last slot holds the root.

  A drafter gives ``_features``, what the target's pass gives it ``[B,T,E]``, and ``_apply`` of a
  module with a method ``read``. Its state is a ``FeatureState``.
  """

  attention: AttentionConfig

  def _features(self, output: TargetOutput) -> Float[Array, "B T E"]:
    raise NotImplementedError

  def _caches(self, batch: int, capacity: int, count: int) -> tuple[Any, ...]:
    """Empty caches of ``count`` layers."""
    attention = Attention(self.attention, self.dim, parent=None)
    dtype = jnp.dtype(self.dtype)
    return tuple(attention.init_state(batch, capacity, dtype) for _ in range(count))

  def _no_keys(self, batch: int) -> KeysValues:
    """Keys and values of no drafted node."""
    c = self.attention
    empty = jnp.zeros((batch, c.num_kv_heads, 0, c.head_dim), self.dtype)
    return empty, empty

  def _read(self, params, state, features, next_tokens, count, target):
    """Reads the first ``count [B]`` of new slots: ``features [B,P,E]``, tokens after them."""
    index = jnp.arange(next_tokens.shape[1], dtype=jnp.int32)[None]
    length = state.caches[0].length
    positions = jnp.where(index < count[:, None], length[:, None] + index, -1)
    embedded = embed(target, next_tokens, self.dtype)
    x, caches = self._apply(params, features, embedded, state.caches, positions, method="read")
    last = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return FeatureState(jnp.where(count[:, None] > 0, last, state.last), caches)

  def start(self, params, state, prompt, output, target):
    features = self._features(output)
    return self._read(params, state, features, following(prompt), prompt.lengths, target)

  def observe(self, params, state, tree, accepted, output, context):
    features = gather_nodes(self._features(output), accepted.path)
    return self._read(params, state, features, accepted.tokens, accepted.count, context.target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDrafter(SlotReader, TrainedDrafter):
  """Base of drafters with layers of their own between the target's embeddings and its LM head.

  Attributes:
    attention, hidden_dim, eps: shape of the layers.
    num_layers: how many.
    vocabulary: where given, only these columns of the target's LM head are computed.
  """

  needs_prompt_hidden: ClassVar[bool] = True
  sequential: ClassVar[bool] = True

  attention: AttentionConfig
  hidden_dim: int
  eps: float = 1e-6
  num_layers: int = 1

  @classmethod
  def for_target(cls, config: DecoderConfig, **options) -> LayerDrafter:
    options.setdefault("attention", draft_attention(config))
    options.setdefault("hidden_dim", config.layers[0].mlp.hidden_dim)
    options.setdefault("eps", config.norm.eps)
    return super().for_target(config, **options)

  @property
  def network(self) -> FeatureLayers:
    """The layers; ``_shape`` are their fields."""
    raise NotImplementedError

  @property
  def _shape(self) -> dict[str, Any]:
    return dict(
      attention=self.attention,
      hidden_dim=self.hidden_dim,
      dim=self.dim,
      norm=NormConfig(self.eps),
      dtype=jnp.dtype(self.dtype),
      num_layers=self.num_layers,
    )

  @property
  def share_head(self) -> bool:
    """The whole LM head of the target is in use (a draft vocabulary takes columns of it)."""
    return self.vocabulary is None

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    x, zeros = jnp.zeros((1, 2, self.dim), self.dtype), jnp.zeros((1, 2), jnp.int32)
    return self.network.init(rng, x, x, zeros, zeros)["params"]

  def _unembed(self, target: Target, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    if self.vocabulary is None:
      return target.model.apply({"params": target.params}, x, method="unembed")
    kernel = lm_head_kernel(target)[:, self.draft_ids].astype(x.dtype)
    return soft_cap(jnp.matmul(x, kernel, preferred_element_type=jnp.float32), self.logit_cap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureDrafter(LayerDrafter):
  """Base of drafters that feed their own features on; a subclass gives ``network``.

  ``states`` of the base class are the layers' outputs: ``predicted`` is their ``feature``, and
  ``head`` puts the target's LM head on their ``readout``.

  Attributes:
    num_heads: K, depths measured; at inference any depth works.
    rollouts: depths trained, of these K.
    noise: of the input features in training; see the module's docstring.
  """

  rollouts: int = 1
  noise: float = 0.2
  objective: Objective = (Term("smooth_l1"), Term("soft", 0.1))

  def __post_init__(self):
    super().__post_init__()
    if self.rollouts < 1 or self.num_layers < 1 or self.noise < 0:
      raise UserError(
        f"{self.name} needs rollouts and num_layers of at least 1 and noise of at least 0, got "
        f"{self.rollouts}, {self.num_layers} and {self.noise}"
      )
    if self.attention.window is not None:
      raise UserError(
        f"{self.name} rolls out over the whole text, got attention with "
        f"window={self.attention.window}; use window=None"
      )

  @property
  def depth_limit(self) -> int:
    return 1 << 10  # recurrent: no trained limit

  @property
  def depths_trained(self) -> int:
    return min(self.rollouts, self.num_heads)

  def multiplied(self, params):
    return self.depths_trained * super().multiplied(params)

  def _apply(self, params, *args, method):
    return self.network.apply({"params": params}, *args, method=method)

  def predicted(self, params, states):
    return self._apply(params, states, method="feature")

  def head(self, params, target, depth, states):
    return self._unembed(target, self._apply(params, states, method="readout"))

  # Training.

  def teacher_forced(self, params, target, output, batch, rng=None):
    features = jax.lax.stop_gradient(self._features(output))
    if rng is not None and self.noise:
      features = self._noisy(features, batch["segment_ids"], rng)
    states = self._apply(
      params,
      features,
      jax.lax.stop_gradient(embed(target, batch["tokens"], self.dtype)),
      batch["positions"],
      batch["segment_ids"],
      self.num_heads if rng is None else self.depths_trained,
      method="rollout",
    )
    return [x[:, : -1 - k] for k, x in enumerate(states, 1)]

  def _noisy(self, features, segment_ids, rng):
    alike = segment_ids[:, :, None] == segment_ids[:, None, :]
    scale = self.noise * 512 / jnp.sum(alike, axis=-1, keepdims=True)
    noise = jax.random.uniform(rng, features.shape, minval=-0.5, maxval=0.5)
    return features + (scale * noise).astype(features.dtype)

  def _total(self, values, weights, depths):
    # Deeper ones are there when evaluating only.
    n = self.rollouts
    return super()._total(values[:n], weights[:n], depths[:n])

  # Inference.

  def _features(self, output):
    return output.hidden.astype(self.dtype)

  def init_state(self, batch: int, capacity: int) -> FeatureState:
    last = jnp.zeros((batch, self.dim), self.dtype)
    return FeatureState(last, self._caches(batch, capacity, self.num_layers))

  def first(self, params, state, context: Context):
    x, b = state.last[:, None], state.last.shape[0]
    logits = self.head(params, context.target, 1, x)[:, 0]
    return logits, (x, (self._no_keys(b),) * self.num_layers, jnp.zeros((b, 1, 0), bool))

  def step(self, params, state, context: Context):
    def feed(carry, level, tokens, parents):
      x, drafted, ancestors = carry
      b, n = tokens.shape
      itself = jnp.broadcast_to(jnp.eye(n, dtype=bool), (b, n, n))
      seen = jnp.concatenate([take_nodes(ancestors, parents), itself], axis=-1)
      length = state.caches[0].length
      positions = jnp.broadcast_to(length[:, None] - 1 + level, (b, n))
      embedded = embed(context.target, tokens, self.dtype)
      x = take_nodes(x, parents)
      x, drafted = self._apply(
        params, x, embedded, positions, state.caches, drafted, seen, method="draft"
      )
      return self.head(params, context.target, level + 1, x), (x, drafted, seen)

    return feed


def following(prompt) -> Int[Array, "B T"]:
  """The token after each of the prompt's; after the last one, the root."""
  index = jnp.arange(prompt.tokens.shape[1])[None]
  after = jnp.roll(prompt.tokens, -1, axis=1)
  return jnp.where(index == prompt.lengths[:, None] - 1, prompt.root[:, None], after)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle(FeatureDrafter):
  """EAGLE-1, and with a ``DynamicTree`` EAGLE-2.

  Attributes:
    fuse_bias: ``W_fc`` has a bias (released checkpoints differ).
  """

  name: ClassVar[str] = "eagle"

  fuse_bias: bool = True

  @property
  def network(self) -> EagleLayers:
    return EagleLayers(**self._shape, fuse_bias=self.fuse_bias)
