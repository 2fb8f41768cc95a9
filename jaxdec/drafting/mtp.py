# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction modules (DeepSeek-V3, arXiv 2412.19437, section 2.2) as drafters.

Module k = 1..K, one decoder block and its own final norm, extends the representation of slot t by
one token further, causally over the slots:

  h^k_t = Block_k(M_k [RMS(h^{k-1}_t) ; RMS(E[x_{t+k}])])      h^0 = h, the target's post-norm state
  draft logits = W RMS(h^k_t)                                  for x_{t+1+k}; E and W the target's

``Mtp`` is one module that drafts deeper by reading its own output, as servers run the released
models, which come with one; only its first step is trained. ``MtpModules`` are K modules, one a
depth, all trained. Both are trained with cross-entropy on the text. Released weights may have
``M``'s columns in the other order, embedding first.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxdec.drafting.base import Context, Params, Target
from jaxdec.drafting.dynamic_tree import take_nodes
from jaxdec.drafting.eagle import FeatureDrafter, FeatureLayers, LayerDrafter, following
from jaxdec.drafting.objectives import Objective
from jaxdec.drafting.trained import embed
from jaxdec.errors import UserError
from jaxdec.mixers.base import gather_nodes
from jaxdec.mixers.norms import Dense, RMSNorm


class MtpLayers(FeatureLayers):
  """One module: norms, ``M``, a block, a final norm."""

  input_norm: bool = True

  def setup(self):
    super().setup()
    self.state_norm, self.embed_norm, self.final_norm = (RMSNorm(self.norm) for _ in range(3))
    self.project = Dense(self.dim, (None, "embed"), dtype=self.dtype)

  def fuse(self, features, embedded):
    read = [self.state_norm(features), self.embed_norm(embedded)]
    return self.project(jnp.concatenate(read, axis=-1))

  def readout(self, x):
    return self.final_norm(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mtp(FeatureDrafter):
  """One module, applied again and again. ``rollouts``: depths trained (more than 1 is ours)."""

  name: ClassVar[str] = "mtp"

  noise: float = 0.0
  objective: Objective = "hard"

  @property
  def network(self) -> MtpLayers:
    return MtpLayers(**self._shape)

  def predicted(self, params, states):
    # What is fed on is the block's output; the target's state is a normed one.
    return self._apply(params, states, method="readout")


@struct.dataclass
class ModuleState:
  """Per module: its output when it read the root, and its cache.

  Module k reads token p at slot p - k, next to ``h^{k-1}`` of that slot, which module k - 1 made of
  the token before: a delay line. All modules have read every token up to the root.
  """

  last: tuple[Float[Array, "B D"], ...]
  caches: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MtpModules(LayerDrafter):
  """K = ``num_heads`` modules of one layer, one a depth. The target's head reads ``states``."""

  name: ClassVar[str] = "mtp_modules"

  def __post_init__(self):
    super().__post_init__()
    if self.num_layers != 1:
      raise UserError(f"a module has one layer; got num_layers={self.num_layers}, set num_heads")

  @property
  def network(self) -> MtpLayers:
    return MtpLayers(**self._shape)

  def _apply(self, params, depth, *args, method):
    return self.network.apply({"params": params[f"module_{depth}"]}, *args, method=method)

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    keys = jax.random.split(rng, self.num_heads)
    return {
      f"module_{k}": super(MtpModules, self).init_boxed(r, target) for k, r in enumerate(keys, 1)
    }

  def head(self, params, target, depth, states):
    return self._unembed(target, states)

  def teacher_forced(self, params, target, output, batch, rng=None):
    h = jax.lax.stop_gradient(output.hidden).astype(self.dtype)
    tokens = jax.lax.stop_gradient(embed(target, batch["tokens"], self.dtype))
    states = []
    for k in range(1, self.num_heads + 1):
      # ``rollout`` shifts by one token itself; slots without a token come last and are cut off.
      args = h, tokens, batch["positions"], batch["segment_ids"], 1
      h = self._apply(params, k, *args, method="rollout")[0]
      tokens = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1), (0, 0)))
      states.append(self._apply(params, k, h, method="readout")[:, : -1 - k])
    return states

  # Inference.

  def init_state(self, batch: int, capacity: int) -> ModuleState:
    last = tuple(jnp.zeros((batch, self.dim), self.dtype) for _ in range(self.num_heads))
    return ModuleState(last, self._caches(batch, capacity, self.num_heads))

  def _read(self, params, state, hidden, tokens, count, target):
    """Reads the first ``count [B]`` of new ``tokens [B,P]``; ``hidden``: states before them."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    position = state.caches[0].length + 1  # of the first token
    embedded = embed(target, tokens, self.dtype)
    below, last, caches = hidden.astype(self.dtype), [], []
    for k, cache in enumerate(state.caches, 1):
      # Near the start of the text the slots p - k of the first tokens don't exist.
      skip = jnp.maximum(k - position, 0)[:, None]
      own = jnp.where(index < count[:, None] - skip, cache.length[:, None] + index, -1)
      inputs = (_moved(x, index + skip) for x in (below, embedded))
      out, (cache,) = self._apply(params, k, *inputs, (cache,), own, method="read")
      out = _moved(out, index - skip)
      previous = state.last[k - 1]
      newest = _moved(out, count[:, None] - 1)[:, 0]
      last.append(jnp.where(count[:, None] > 0, newest, previous))
      caches.append(cache)
      below = jnp.concatenate([previous[:, None], out[:, :-1]], axis=1)
    return ModuleState(tuple(last), tuple(caches))

  def start(self, params, state, prompt, output, target):
    return self._read(params, state, output.hidden, following(prompt), prompt.lengths, target)

  def observe(self, params, state, tree, accepted, output, context):
    hidden = gather_nodes(output.hidden, accepted.path)
    return self._read(params, state, hidden, accepted.tokens, accepted.count, context.target)

  def first(self, params, state, context: Context):
    x = [y[:, None] for y in state.last[: self.max_depth]]
    b = x[0].shape[0]
    logits = self._logits(params, context, 1, x[0])[:, 0]
    return logits, (x, [self._no_keys(b)] * self.max_depth, jnp.zeros((b, 1, 0), bool), ())

  def _logits(self, params, context, depth, x):
    return self.head(params, context.target, depth, self._apply(params, depth, x, method="readout"))

  def step(self, params, state, context: Context):
    root = state.caches[0].length[:, None]  # its position

    def feed(carry, level, tokens, parents):
      # ``x[k-1]``: module k's outputs at the parents. A token at depth ``level`` is read by the
      # modules k > level: the others' slots come after the root, where the target hasn't been.
      x, drafted, ancestors, levels = carry
      b, n = tokens.shape
      itself = jnp.broadcast_to(jnp.eye(n, dtype=bool), (b, n, n))
      seen = jnp.concatenate([take_nodes(ancestors, parents), itself], axis=-1)
      levels = (*levels, *[level] * n)
      embedded = embed(context.target, tokens, self.dtype)
      outputs, keys = list(x), list(drafted)
      for k in range(level + 1, self.max_depth + 1):
        exists = root + jnp.asarray(levels) - k >= 0
        among = seen & (exists[:, None] | (jnp.arange(len(levels)) >= len(levels) - n))
        positions = jnp.broadcast_to(root + level - k, (b, n))
        below = take_nodes(x[k - 2], parents)
        caches, pairs = (state.caches[k - 1],), (drafted[k - 1],)
        outputs[k - 1], (keys[k - 1],) = self._apply(
          params, k, below, embedded, positions, caches, pairs, among, method="draft"
        )
      depth = level + 1
      logits = self._logits(params, context, depth, outputs[level])
      return logits, (outputs, keys, seen, levels)

    return feed


def _moved(x: Float[Array, "B P D"], index) -> Array:
  """Rows of ``x`` by number, the nearest where there is none."""
  index = jnp.clip(index, 0, x.shape[1] - 1)
  return jnp.take_along_axis(
    x, jnp.broadcast_to(index, (x.shape[0], index.shape[1]))[..., None], axis=1
  )
