# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction with masked inputs ("Your LLM Knows the Future", arXiv 2507.11851).

K mask embeddings behind slot t, at positions t+1 .. t+K, run through the target, whose dense layers
have a low-rank addition at masks only (gated LoRA); other positions stay what they are:

  y = W x + 1[x is a mask] (alpha / r) B A x
  z_j = the final state at mask j                    base law of x_{t+1+j}: W_lm z_j
  law of y_j = W_lm MLP([E[y_{j-1}] ; z_j])          sampler head; y_0 is the root x_{t+1}

The MLP is two blocks of Linear, SiLU, LayerNorm (2D -> D -> D). Learned are the masks, A, B and the
MLP, on

  -log p_base(x) - log p_sampler(x) + mean_D (sg(z) - z_j)^2

the last term pulling z_j to the state z that the target itself has where it predicts the same token
(latent consistency). ``quadratic`` decoding hangs K masks behind every node, so K fresh drafts are
there whatever was accepted; ``linear`` hangs them behind the last draft alone, and after a draft
that failed one step has nothing to verify.

Decided here: masks of a group see earlier masks; alpha = r by default; A starts with variance
1 / fan-in, B at zero; the addition goes to the dense layers inside blocks, not to the LM head; the
term of the base law is left out where no mask is, since nothing learned acts there; means over D
and slots.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdec.drafting.base import Context, Params, Target
from jaxdec.drafting.objectives import Objective, Term
from jaxdec.drafting.probes import ProbeDrafter, Probes, unrolled
from jaxdec.drafting.static_tree import StaticTree
from jaxdec.drafting.trained import embed
from jaxdec.errors import UserError
from jaxdec.mixers.base import Topology
from jaxdec.mixers.norms import Dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedMTP(ProbeDrafter):
  """Masks with gated LoRA and a sampler head.

  Attributes:
    num_heads: K, masks behind a slot. rank: r. alpha: None: r.
    decoding: ``quadratic`` or ``linear``, see above; ``linear`` drafts chains.
  """

  name: ClassVar[str] = "masked_mtp"
  sequential: ClassVar[bool] = True

  num_heads: int = 8
  rank: int = 128
  alpha: float | None = None
  decoding: Literal["quadratic", "linear"] = "quadratic"
  objective: Objective = (Term("hard"), Term("base"), Term("mse"))

  def __post_init__(self):
    if self.decoding not in ("quadratic", "linear"):
      raise UserError(f"decoding must be 'quadratic' or 'linear', got {self.decoding!r}")
    if self.rank < 1:
      raise UserError(f"rank must be at least 1, got {self.rank}")
    if self.decoding == "linear" and self.shape != StaticTree.chain(self.shape.max_depth):
      raise UserError("linear decoding drafts a chain; use decoding='quadratic' for trees")
    super().__post_init__()

  @property
  def takes_trees(self) -> bool:
    return self.decoding == "quadratic"

  def init_boxed(self, rng: jax.Array, target: Target) -> Params:
    keys = iter(jax.random.split(rng, 4))
    table = embed(target, jnp.arange(self.vocab_size)[None], "float32")[0]
    masks = jnp.mean(table, axis=0) + 0.02 * jax.random.normal(
      next(keys), (self.num_heads, self.dim)
    )
    lora, lora_rng = {}, next(keys)
    for i, (path, (rows, columns)) in enumerate(sorted(dense_layers(target).items())):
      a = jax.random.normal(jax.random.fold_in(lora_rng, i), (rows, self.rank)) * rows**-0.5
      leaf = lora
      for name in path:
        leaf = leaf.setdefault(name, {})
      leaf["a"] = nn.LogicallyPartitioned(a, ("embed", None))
      leaf["b"] = nn.LogicallyPartitioned(jnp.zeros((self.rank, columns)), (None, "embed"))
    sampler = {}
    for i, rows in enumerate((2 * self.dim, self.dim)):
      kernel = jax.random.normal(next(keys), (rows, self.dim)) * rows**-0.5
      sampler[f"block_{i}"] = {
        "kernel": nn.LogicallyPartitioned(kernel, ("embed", None)),
        "bias": nn.LogicallyPartitioned(jnp.zeros(self.dim), (None,)),
        "scale": nn.LogicallyPartitioned(jnp.ones(self.dim), (None,)),
        "shift": nn.LogicallyPartitioned(jnp.zeros(self.dim), (None,)),
      }
    masks = nn.LogicallyPartitioned(masks, (None, "embed"))
    return {"masks": masks, "lora": lora, "sampler": sampler}

  # The pass.

  def rows(self, params, layer, x, probes: Probes, before):
    return None if layer else params["masks"][probes.offset - 1]

  def around(self, params, nodes):
    alpha = self.rank if self.alpha is None else self.alpha
    return gated_lora(params["lora"], nodes, alpha / self.rank)

  def probes(self, tree):
    return super().probes(tree) if self.decoding == "quadratic" else self.behind_last(tree)

  # The sampler head.

  def head(self, params, target, depth, states):
    z, before = states
    x = jnp.concatenate([before, z], axis=-1)
    sampler = jax.tree.map(lambda p: p.astype(z.dtype), params["sampler"])
    for block in (sampler["block_0"], sampler["block_1"]):
      x = jax.nn.silu(x @ block["kernel"] + block["bias"])
      x = jax.nn.standardize(x, axis=-1, epsilon=1e-5) * block["scale"] + block["shift"]
    return target.model.apply({"params": target.params}, x, method="unembed")

  def states(self, hidden, depth, target, batch, slots):
    at = jnp.minimum(slots + depth, batch["tokens"].shape[1] - 1)
    fed = jnp.take_along_axis(batch["tokens"], at, axis=1)
    return hidden[depth, 0], jax.lax.stop_gradient(embed(target, fed, self.dtype))

  def first(self, params, state, context: Context):
    z = state.hidden[:, :, 0]
    root = embed(context.target, context.root[:, None], self.dtype)
    return self.head(params, context.target, 1, (z[:, :1], root))[:, 0], z

  def step(self, params, state, context: Context):
    def feed(z, level, tokens, parents):
      fed = embed(context.target, tokens, self.dtype)
      here = jnp.broadcast_to(z[:, level : level + 1], fed.shape)
      return self.head(params, context.target, level + 1, (here, fed)), z

    return feed

  # Training.

  def predicted(self, params, states):
    return states[0]

  def _slots(self, params, target, example):
    slots, best = super()._slots(params, target, example)
    base = target.model.apply({"params": target.params}, example.states[0], method="unembed")
    return slots.replace(base=base), best


@contextlib.contextmanager
def gated_lora(lora: Params, nodes: int, scale: float):
  """Inside, dense layers of blocks add ``scale B A x`` to their rows from number ``nodes`` on.

  Rows before it are not touched at all, so they stay what they are, bit for bit.
  """

  def add(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    pair = _pair(lora, context)
    if pair is None or args[0].ndim != 3:
      return y
    x = args[0][:, nodes:]
    low = x @ pair["a"].astype(x.dtype)
    more = (scale * (low @ pair["b"].astype(x.dtype))).astype(y.dtype)
    return jnp.concatenate([y[:, :nodes], y[:, nodes:] + more], axis=1)

  with nn.intercept_methods(add):
    yield


def _pair(lora: Params, context) -> Mapping[str, Array] | None:
  if not isinstance(context.module, Dense) or context.method_name != "__call__":
    return None
  for name in context.module.path:
    if name not in lora:
      return None
    lora = lora[name]
  return lora


def dense_layers(target: Target) -> dict[tuple[str, ...], tuple[int, int]]:
  """Paths, input and output widths of the dense layers inside the target's blocks."""
  model, params = unrolled(target)
  found = {}

  def record(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    if isinstance(context.module, Dense) and context.method_name == "__call__":
      path = context.module.path
      if path[0].startswith("layers_") and args[0].ndim == 3:
        found[path] = (args[0].shape[-1], y.shape[-1])
    return y

  def read(params):
    one = jnp.zeros((1, 1), jnp.int32)
    node = Topology(one, jnp.ones((1, 1, 1), bool))
    state = model.init_state(1, 1)
    return model.apply({"params": params}, one, state, node, method="verify").hidden

  with nn.intercept_methods(record):
    jax.eval_shape(read, params)
  return found
