# SPDX-License-Identifier: Apache-2.0
"""The decoder: embedding, blocks, final norm, LM head; its calls mirror the mixer's.

Two parameter layouts, converted exactly by ``stack_layers``/``unstack_layers``: ``unrolled`` (one
subtree per layer) for decoding, where XLA:CPU would copy each layer's weights out of a stacked
array every step, and ``scanned`` (one stacked subtree per position in the repeating layer pattern)
for training, where it keeps compile time independent of depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxdec.mixers import build_mixer
from jaxdec.mixers.base import Packing, Topology
from jaxdec.mixers.norms import Dense, NormConfig, RMSNorm
from jaxdec.models.block_ffn import BlockFFN
from jaxdec.models.config import BlockFFNConfig, Capture, DecoderConfig, LayerConfig, MLPConfig
from jaxdec.models.remat import BLOCK_INPUT, Remat, rematerialised
from jaxdec.parallel.sequence import SequenceConfig

Embeddings = tuple[Float[Array, "B T D"], Bool[Array, "B T"]]
# ``(layer, its input, topology) -> the same two``, with rows of the caller's own after those there.
Insert = Callable[[int, Array, Topology], tuple[Array, Topology]]


@struct.dataclass
class DecoderState:
  """One mixer state per layer."""

  layers: tuple[Any, ...]

  @property
  def length(self) -> Int[Array, "B"]:
    return self.layers[0].length


@struct.dataclass
class DecoderOutput:
  """Attributes:

  logits: next-token logits in float32; None where not asked for.
  hidden: post-final-norm states, what the LM head reads.
  features: what ``capture`` asked for, in its order; see ``Capture``.
  state: after ``extend``. pending: after ``verify``.
  """

  logits: Float[Array, "B T V"] | None
  hidden: Float[Array, "B T D"]
  features: tuple[Float[Array, "B T D"], ...] = ()
  state: DecoderState | None = None
  pending: tuple[Any, ...] | None = None


class MLP(nn.Module):
  """Gated MLP (GLU variants, arXiv 2002.05202)."""

  config: MLPConfig
  dim: int
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    c = self.config

    def dense(features, axes, name):
      return Dense(features, axes, c.use_bias, self.dtype, self.param_dtype, name=name)

    gate, up = (dense(c.hidden_dim, ("embed", "mlp"), name)(x) for name in ("gate", "up"))
    act = jax.nn.silu if c.activation == "silu" else (lambda y: jax.nn.gelu(y, approximate=True))
    return dense(self.dim, ("mlp", "embed"), "down")(act(gate) * up)


class Block(nn.Module):
  """Norm, mixer, residual, norm, MLP, residual; with norms on the branch outputs if configured."""

  config: LayerConfig
  dim: int
  norm: NormConfig = NormConfig()
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  sequence: SequenceConfig | None = None

  def setup(self):
    self.mixer = build_mixer(
      self.config.mixer, self.dim, self.norm, self.dtype, self.param_dtype, sequence=self.sequence
    )
    mlp = BlockFFN if isinstance(self.config.mlp, BlockFFNConfig) else MLP
    self.mlp = mlp(self.config.mlp, self.dim, self.dtype, self.param_dtype)
    self.mixer_norm = RMSNorm(self.norm, self.param_dtype)
    self.mlp_norm = RMSNorm(self.norm, self.param_dtype)
    if self.config.post_norms:
      self.post_mixer_norm = RMSNorm(self.norm, self.param_dtype)
      self.post_mlp_norm = RMSNorm(self.norm, self.param_dtype)

  def normed(self, x):
    """What the mixer reads."""
    return self.mixer_norm(x)

  def _finish(self, x, mixed, *, decoding=True):
    x = x + (self.post_mixer_norm(mixed) if self.config.post_norms else mixed)
    few = decoding and getattr(self.config.mlp, "union", None) is not None
    y = (self.mlp.union if few else self.mlp)(self.mlp_norm(x))
    return x + (self.post_mlp_norm(y) if self.config.post_norms else y)

  def __call__(self, x, positions, segment_ids=None):
    x = checkpoint_name(x, BLOCK_INPUT)
    mixed = self.mixer(self.mixer_norm(x), positions, segment_ids)
    return self._finish(x, mixed, decoding=False)

  def extend(self, x, state, positions):
    mixed, state = self.mixer.extend(self.mixer_norm(x), state, positions)
    return self._finish(x, mixed), state

  def read_packed(self, x, state, packing):
    mixed, state = self.mixer.read_packed(self.mixer_norm(x), state, packing)
    return self._finish(x, mixed), state

  def verify(self, x, state, topology):
    mixed, pending = self.mixer.verify(self.mixer_norm(x), state, topology)
    return self._finish(x, mixed), pending

  def commit(self, state, pending, path, count):
    return self.mixer.commit(state, pending, path, count)


class _Group(nn.Module):
  """One period of the layer pattern, the body of the scan over depth."""

  blocks: tuple[LayerConfig, ...]
  dim: int
  norm: NormConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  sequence: SequenceConfig | None

  @nn.compact
  def __call__(self, x, positions, segment_ids, keep=None):
    inputs = []  # kept for ``capture``: the scan stacks them
    for j, config in enumerate(self.blocks):
      inputs.append(x)
      block = Block(
        config, self.dim, self.norm, self.dtype, self.param_dtype, self.sequence, name=f"block_{j}"
      )
      x = _placed(_kept(block(x, positions, segment_ids), x, None if keep is None else keep[j]))
    return x, jnp.stack(inputs)


def _kept(new, old, keep: Bool[Array, "B"] | None):
  """``new`` for the rows that go through a layer, ``old`` for those that leave it out."""
  return new if keep is None else jnp.where(keep[:, None, None], new, old)


def _placed(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  """Activations lie as the logical rules in context say (if any): batch and length split."""
  return nn.with_logical_constraint(x, ("batch", "length", None))


def pattern(layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
  """The shortest prefix whose repetition is ``layers`` (itself, if nothing repeats)."""
  n = len(layers)
  return next(layers[:p] for p in range(1, n + 1) if n % p == 0 and layers == layers[:p] * (n // p))


class Decoder(nn.Module):
  """A decoder-only language model; see ``DecoderConfig``.

  ``dtype`` is the compute type, ``param_dtype`` the type parameters are made in. Norm statistics,
  softmax, and logits are float32. ``sequence`` says how layers compute where the mesh in context
  splits sequences (``__call__`` only). ``remat`` says what the backward pass keeps of a block, and
  what it computes again; see ``jaxdec.models.remat``.
  """

  config: DecoderConfig
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  layout: Literal["unrolled", "scanned"] = "unrolled"
  remat: Remat = "none"
  sequence: SequenceConfig | None = None

  def setup(self):
    c = self.config
    self.embedding = self.param(
      "embed",
      nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed")),
      (c.vocab_size, c.dim),
      self.param_dtype,
    )
    common = dict(
      dim=c.dim, norm=c.norm, dtype=self.dtype, param_dtype=self.param_dtype, sequence=self.sequence
    )
    if self.layout == "scanned":
      group = rematerialised(_Group, self.remat, scanned=True)
      period = pattern(c.layers)
      self.stack = nn.scan(
        group,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=c.num_layers // len(period),
        in_axes=(nn.broadcast, nn.broadcast, 0),
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(blocks=period, **common)
    else:
      block = rematerialised(Block, self.remat, scanned=False)
      self.layers = [block(layer, **common) for layer in c.layers]
    self.final_norm = RMSNorm(c.norm, self.param_dtype)
    if not c.tie_embeddings:
      self.head = Dense(c.vocab_size, ("embed", "vocab"), False, self.dtype, self.param_dtype)

  def embed(
    self, tokens: Int[Array, "B T"], embeddings: Embeddings | None = None
  ) -> Float[Array, "B T D"]:
    """Token embeddings, scaled as the first block reads them.

    ``embeddings = (values [B,T,D], where [B,T])`` stand for the tokens ``where`` they are True
    (images, learned prompt tokens); they are not scaled.
    """
    x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
    scale = self.config.embed_scale
    # Gemma rounds the scale to the compute type before multiplying.
    x = x if scale is None else x * jnp.asarray(scale, self.dtype)
    if embeddings is None:
      return x
    values, where = embeddings
    return jnp.where(where[..., None], values.astype(self.dtype), x)

  def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """LM head on post-norm states, soft-capped, float32."""
    if self.config.tie_embeddings:
      logits = jnp.einsum(
        "...d,vd->...v",
        hidden,
        self.embedding.astype(self.dtype),
        preferred_element_type=jnp.float32,
      )
    else:
      logits = self.head(hidden)
    logits = logits.astype(jnp.float32)
    cap = self.config.logit_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  def _output(self, x, stream, capture, logits, **kwargs):
    stream, capture = [*stream, x], Capture.of(capture)
    hidden = self.final_norm(x)
    features = tuple(
      stream[i] if capture.norm == "pre" else self._normed(stream[i], hidden, i)
      for i in capture.layers
    )
    return DecoderOutput(self.unembed(hidden) if logits else None, hidden, features, **kwargs)

  def _normed(self, x, hidden, i):
    """The stream at layer i's input as its mixer reads it."""
    if i == self.config.num_layers:
      return hidden
    if self.layout == "unrolled":
      return self.layers[i].normed(x)
    period = len(pattern(self.config.layers))
    block = self.stack.variables["params"][f"block_{i % period}"]["mixer_norm"]
    scale = jax.tree.map(lambda leaf: leaf[i // period], nn.unbox(block))
    return RMSNorm(self.config.norm, self.param_dtype, parent=None).apply({"params": scale}, x)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    capture: Capture | tuple[int, ...] = (),
    logits: bool = True,
    embeddings: Embeddings | None = None,
    keep: Bool[Array, "L B"] | None = None,
  ) -> DecoderOutput:
    """Whole sequences without state (training and scoring).

    ``keep``: which layers each row goes through (layer dropout); None: all.
    """
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x = _placed(self.embed(tokens, embeddings))
    if self.layout == "scanned":
      if keep is not None:
        keep = keep.reshape(-1, len(pattern(self.config.layers)), keep.shape[-1])
      x, inputs = self.stack(x, positions, segment_ids, keep)
      stream = inputs.reshape(-1, *x.shape) if len(capture) else ()
    else:
      stream = []
      for i, layer in enumerate(self.layers):
        stream.append(x)
        new = layer(x, positions, segment_ids)
        x = _placed(_kept(new, x, None if keep is None else keep[i]))
    return self._output(x, stream, capture, logits)

  def init_state(self, batch: int, capacity: int, dtype: jnp.dtype | None = None) -> DecoderState:
    """Empty state for ``capacity`` positions; needs no parameters."""
    c = self.config
    return DecoderState(
      tuple(
        build_mixer(
          layer.mixer, c.dim, c.norm, self.dtype, self.param_dtype, parent=None
        ).init_state(batch, capacity, dtype or self.dtype)
        for layer in c.layers
      )
    )

  def extend(
    self,
    tokens: Int[Array, "B T"],
    state: DecoderState,
    positions: Int[Array, "B T"],
    *,
    capture: Capture | tuple[int, ...] = (),
    logits: bool = True,
    embeddings: Embeddings | None = None,
  ) -> DecoderOutput:
    """Reads T more tokens (position -1: padding); the new state is in the output."""
    x, stream, states = self.embed(tokens, embeddings), [], []
    for layer, layer_state in zip(self.layers, state.layers):
      stream.append(x)
      x, layer_state = layer.extend(x, layer_state, positions)
      states.append(layer_state)
    return self._output(x, stream, capture, logits, state=DecoderState(tuple(states)))

  def read_packed(
    self,
    tokens: Int[Array, "R T"],
    state: DecoderState,
    packing: Packing,
    *,
    capture: Capture | tuple[int, ...] = (),
  ) -> DecoderOutput:
    """Prompts packed in rows; hidden states and features are packed, ``state`` (empty) is not."""
    x, stream, states = self.embed(tokens), [], []
    for layer, layer_state in zip(self.layers, state.layers):
      stream.append(x)
      x, layer_state = layer.read_packed(x, layer_state, packing)
      states.append(layer_state)
    return self._output(x, stream, capture, False, state=DecoderState(tuple(states)))

  def verify(
    self,
    tokens: Int[Array, "B M"],
    state: DecoderState,
    topology: Topology,
    *,
    capture: Capture | tuple[int, ...] = (),
    logits: bool = True,
    embeddings: Embeddings | None = None,
    insert: Insert | None = None,
  ) -> DecoderOutput:
    """Reads M tree nodes against the state without changing it; ``pending`` is in the output.

    ``insert`` may append rows that start at some layer; they come after the M nodes in ``hidden``
    and, from that layer on, in ``pending``, whose commit by path never sees them.
    """
    x, stream, pendings = self.embed(tokens, embeddings), [], []
    for i, (layer, layer_state) in enumerate(zip(self.layers, state.layers)):
      if insert is not None:
        x, topology = insert(i, x, topology)
      stream.append(x)
      x, pending = layer.verify(x, layer_state, topology)
      pendings.append(pending)
    return self._output(x, stream, capture, logits, pending=tuple(pendings))

  def commit(
    self,
    state: DecoderState,
    pending: tuple[Any, ...],
    path: Int[Array, "B P"],
    count: Int[Array, "B"],
  ) -> DecoderState:
    """Keeps the first ``count`` nodes of ``path`` (root first)."""
    return DecoderState(
      tuple(
        layer.commit(s, p, path, count) for layer, s, p in zip(self.layers, state.layers, pending)
      )
    )


def stack_layers(params: dict, config: DecoderConfig) -> dict:
  """Unrolled to scanned layout, exactly."""
  period = len(pattern(config.layers))
  rest = {k: v for k, v in params.items() if not k.startswith("layers_")}
  stack = {
    f"block_{j}": jax.tree.map(
      lambda *x: jnp.stack(x), *[params[f"layers_{i}"] for i in range(j, config.num_layers, period)]
    )
    for j in range(period)
  }
  return {**rest, "stack": stack}


def unstack_layers(params: dict, config: DecoderConfig) -> dict:
  """Scanned to unrolled layout, exactly."""
  period = len(pattern(config.layers))
  rest = {k: v for k, v in params.items() if k != "stack"}
  layers = {
    f"layers_{i}": jax.tree.map(
      lambda x, i=i: x[i // period], params["stack"][f"block_{i % period}"]
    )
    for i in range(config.num_layers)
  }
  return {**rest, **layers}
