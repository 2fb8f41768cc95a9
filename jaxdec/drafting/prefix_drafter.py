# SPDX-License-Identifier: Apache-2.0
"""Feature drafters that read an image as a few vectors: where these go, in training and in use.

The prompt holds a span of n image positions (``jaxdec.models.Prefix``), which the target reads as
embeddings. A drafter's slot t is fed token t + 1, so its image slots are those whose next token is
an image position. The m vectors a compressor makes of the span enter the layers' input stream
directly, in place of ``W_fc [e ; f]``, at the slots of the span's *last* m positions; its other
slots are gone: they cost no keys. Positions are not packed, rotary embeddings see the text where it
is.

In training the slots stay where they are and those that are gone are a segment of their own. In use
the cache holds what is left, side by side; ``offset`` is how many positions it is short of.

A batch with images has ``IMAGE_VALUES [B,N,D]``, ``IMAGE_START [B]`` and ``IMAGE_COUNT [B]``, one
image a row, and one document a row. Image positions are never labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxdec.drafting.base import Params, Target
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.drafting.eagle import Eagle, EagleLayers, FeatureState, following
from jaxdec.drafting.prefix import Compressed
from jaxdec.drafting.trained import embed
from jaxdec.mixers.base import gather_nodes
from jaxdec.models.prefill import Prefix

IMAGE_VALUES, IMAGE_START, IMAGE_COUNT = "image_values", "image_start", "image_count"


def prefix_of(batch: Mapping[str, Array]) -> Prefix | None:
  """The images of a batch; None: it has none."""
  if IMAGE_VALUES not in batch:
    return None
  return Prefix(batch[IMAGE_VALUES], batch[IMAGE_START], batch[IMAGE_COUNT])


@struct.dataclass
class Fed:
  """What slots are fed besides features, by token.

  Attributes:
    embedded: token embeddings.
    image: a vector of the image seen last; zeros before one.
    given, where: compressed vectors, and the tokens in whose place they are.
  """

  embedded: Float[Array, "B T D"]
  image: Float[Array, "#B #T D"]
  given: Float[Array, "B T D"]
  where: Bool[Array, "B T"]

  def flat(self) -> Float[Array, "B T 3D+1"]:
    """One array, which the layers shift and gather as they do embeddings."""
    e = self.embedded
    image = jnp.broadcast_to(self.image.astype(e.dtype), e.shape)
    flag = self.where[..., None].astype(e.dtype)
    return jnp.concatenate([e, image, self.given.astype(e.dtype), flag], axis=-1)


def text(embedded: Float[Array, "B T D"], image: Float[Array, "B D"] | None = None):
  """``Fed.flat`` of tokens that are text, after an image or not."""
  zeros = jnp.zeros_like(embedded[:, :1] if image is None else image[:, None])
  where = jnp.zeros(embedded.shape[:2], bool)
  image = zeros if image is None else image[:, None]
  return Fed(embedded, image, jnp.zeros_like(embedded), where).flat()


class PrefixLayers(EagleLayers):
  """EAGLE's layers where compressed vectors may stand in for ``W_fc [e ; f]``."""

  def fuse(self, features, fed):
    d = self.dim
    embedded, image, given = fed[..., :d], fed[..., d : 2 * d], fed[..., 2 * d : 3 * d]
    fused = super().fuse(self.seeing(features, image), embedded)
    return jnp.where(fed[..., 3 * d :] > 0, given, fused)

  def seeing(self, features, image):
    """Features, with the image seen last."""
    return features

  def compress(self, x, count, question, rng=None) -> tuple[Compressed, Float[Array, "B D"]]:
    """What takes the image's place, and the vector of it that later text gets."""
    raise NotImplementedError

  def __call__(self, features, embedded, positions, segment_ids):
    """Touches every parameter (for ``init``)."""
    count = jnp.full(features.shape[:1], features.shape[1], jnp.int32)
    out = self.compress(features, count, features[:, 0])
    return out, super().__call__(features, text(embedded), positions, segment_ids)


@struct.dataclass
class PrefixState(FeatureState):
  """Also ``offset``: positions the caches have no slot for; ``image``: see ``Fed``."""

  offset: Int[Array, "B"] = None
  image: Float[Array, "B D"] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixDrafter(Eagle):
  """Base: ``network`` is a ``PrefixLayers``. Without an image all of it is what it is on text."""

  def _source(self, prefix: Prefix, features: Float[Array, "B T D"]) -> Float[Array, "B N D"]:
    """What the compressor reads: the image's embeddings."""
    return prefix.values.astype(self.dtype)

  def _place(
    self, params, prefix: Prefix | None, embedded, features, question, rng=None
  ) -> tuple[Array, Bool[Array, "B T"], Float[Array, "B D"]]:
    """``Fed.flat`` of tokens 0..T-1, which of them are gone, and the image's vector.

    ``question [B,T]``: tokens that ask about the image.
    """
    b, t, d = embedded.shape
    if prefix is None:
      return text(embedded), jnp.zeros((b, t), bool), jnp.zeros((b, d), embedded.dtype)
    index = jnp.arange(t)
    end = prefix.start + prefix.count
    inside = (index >= prefix.start[:, None]) & (index < end[:, None])
    asked = (question & ~inside)[..., None]
    mean = jnp.sum(jnp.where(asked, embedded, 0), 1) / jnp.maximum(jnp.sum(asked, 1), 1)
    source = self._source(prefix, features)
    out, image = self._apply(
      params, source, prefix.count, mean.astype(self.dtype), rng, method="compress"
    )
    # Token 0 is fed to no slot.
    room = prefix.count - (prefix.start == 0)
    left = jnp.clip(out.count, 0, room)
    rank = index - (end - left)[:, None]
    kept = inside & (rank >= 0)
    slot = jnp.clip(rank, 0, out.values.shape[1] - 1)[..., None]
    given = jnp.take_along_axis(out.values, slot, axis=1)
    image = jnp.where((prefix.count > 0)[:, None], image, 0)
    after = (index >= end[:, None])[..., None]
    fed = Fed(embedded, jnp.where(after, image[:, None], 0), given, kept)
    return fed.flat(), inside & ~kept, image

  # Training.

  def examples(self, params, target, output, batch, rng=None):
    prefix = prefix_of(batch)
    if prefix is not None:
      inside = prefix.embeddings(jnp.arange(batch["tokens"].shape[1])[None])[1]
      batch = {**batch, "loss_mask": jnp.where(inside, 0, batch["loss_mask"])}
    return super().examples(params, target, output, batch, rng)

  def _inputs(self, params, target, output, batch, rng):
    """Features, what is fed by token, and segments of slots."""
    features = jax.lax.stop_gradient(self._features(output))
    compress = None
    if rng is not None:
      rng, compress = jax.random.split(rng)
      features = self._noisy(features, batch["segment_ids"], rng) if self.noise else features
    embedded = jax.lax.stop_gradient(embed(target, batch["tokens"], self.dtype))
    question = (batch["loss_mask"] == 0) & (batch["segment_ids"] > 0)
    fed, gone, _ = self._place(params, prefix_of(batch), embedded, features, question, compress)
    gone = jnp.pad(gone[:, 1:], ((0, 0), (0, 1)))
    return features, fed, jnp.where(gone, -1, batch["segment_ids"])

  def teacher_forced(self, params, target, output, batch, rng=None):
    features, fed, segments = self._inputs(params, target, output, batch, rng)
    steps = self.num_heads if rng is None else min(self.rollouts, self.num_heads)
    states = self._apply(
      params, features, fed, batch["positions"], segments, steps, method="rollout"
    )
    return [x[:, : -1 - k] for k, x in enumerate(states, 1)]

  # Inference.

  def init_state(self, batch: int, capacity: int) -> PrefixState:
    base = super().init_state(batch, capacity)
    return PrefixState(
      base.last, base.caches, jnp.zeros(batch, jnp.int32), jnp.zeros((batch, self.dim), self.dtype)
    )

  def _next(self, state) -> Int[Array, "B"]:
    """Position of the next slot."""
    return state.caches[0].length + state.offset

  def _advance(self, params, state, features, fed, positions):
    """Reads slots at ``positions`` (-1: padding, which comes last) into the caches."""
    x, caches = self._apply(params, features, fed, state.caches, positions, method="read")
    count = jnp.sum(positions >= 0, axis=1)
    last = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return state.replace(last=jnp.where(count[:, None] > 0, last, state.last), caches=caches)

  def start(self, params: Params, state, prompt, output, target: Target):
    features, t = self._features(output), prompt.tokens.shape[1]
    index = jnp.arange(t, dtype=jnp.int32)
    begin = self._next(state)
    positions = jnp.where(index < prompt.lengths[:, None], begin[:, None] + index, -1)
    following_tokens = embed(target, following(prompt), self.dtype)
    if prompt.prefix is None:
      fed = text(following_tokens, state.image)
      return self._advance(params, state, features, fed, positions)
    first = embed(target, prompt.tokens[:, :1], self.dtype)
    embedded = jnp.concatenate([first, following_tokens], axis=1)  # tokens 0..T
    question = jnp.arange(t + 1) < prompt.lengths[:, None]
    fed, gone, image = self._place(params, prompt.prefix, embedded, features, question)
    keep = (positions >= 0) & ~gone[:, 1:]
    order = jnp.argsort(~keep, axis=1, stable=True)
    features, fed = (jnp.take_along_axis(x, order[..., None], 1) for x in (features, fed[:, 1:]))
    positions = jnp.take_along_axis(jnp.where(keep, positions, -1), order, axis=1)
    short = prompt.lengths - jnp.sum(keep, axis=1, dtype=jnp.int32)
    state = state.replace(offset=state.offset + short, image=image)
    return self._advance(params, state, features, fed, positions)

  def observe(self, params, state, tree, accepted, output, context):
    features = gather_nodes(self._features(output), accepted.path)
    index = jnp.arange(features.shape[1], dtype=jnp.int32)
    count = accepted.count[:, None]
    positions = jnp.where(index < count, self._next(state)[:, None] + index, -1)
    fed = text(embed(context.target, accepted.tokens, self.dtype), state.image)
    return self._advance(params, state, features, fed, positions)

  def step(self, params, state, context):
    def feed(carry, level, tokens, parents):
      x, drafted, ancestors = carry
      b, n = tokens.shape
      itself = jnp.broadcast_to(jnp.eye(n, dtype=bool), (b, n, n))
      seen = jnp.concatenate([take_nodes(ancestors, parents), itself], axis=-1)
      positions = jnp.broadcast_to(self._next(state)[:, None] - 1 + level, (b, n))
      fed = text(embed(context.target, tokens, self.dtype), state.image)
      x = take_nodes(x, parents)
      x, drafted = self._apply(
        params, x, fed, positions, state.caches, drafted, seen, method="draft"
      )
      return self.head(params, context.target, level + 1, x), (x, drafted, seen)

    return feed
