# SPDX-License-Identifier: Apache-2.0
"""The programs that can be planned: a recipe's train step, and a decoding step of its model."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdec.errors import UserError
from jaxdec.parallel import rules as rules_lib
from jaxdec.training.trainer import Trainer

if TYPE_CHECKING:
  from jaxdec.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Program:
  """A lowered step. ``parts``: its abstract arguments by what they are; tokens and FLOPs of all."""

  lowered: jax.stages.Lowered
  parts: dict[str, Any]
  tokens: int
  model_flops: float


def train_program(recipe: Recipe, mesh: Mesh) -> Program:
  """The trainer's own step."""
  trainer = Trainer(recipe.task(), recipe.trainer, mesh=mesh)
  batch = recipe.batch()
  lowered = trainer.lower(batch, platform="tpu")
  tokens = recipe.batch_size * recipe.seq_len
  split = NamedSharding(mesh, trainer.rules.spec(("batch", "length"), mesh))
  placed = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for name, x in batch.items()
  }
  parts = {
    "parameters": trainer.abstract.params,
    "optimizer": trainer.abstract.optimizer,
    "batch": placed,
  }
  if jax.tree.leaves(trainer.abstract_frozen):
    parts["teacher"] = trainer.abstract_frozen
  flops = trainer.task.flops_per_token(trainer.abstract.params, recipe.seq_len) * tokens
  return Program(lowered, parts, tokens, flops)


def decode_program(recipe: Recipe, mesh: Mesh, batch_size: int, cache_length: int) -> Program:
  """One more token of every sequence; every device decodes its own, with all parameters.

  Parameters lie by the rules (over ``fsdp`` they are gathered in every step), in the compute type.

  Raises:
    UserError: the mesh splits sequences (a decoding step has one position) or matrices (the cache's
      kernels work on whole heads), or the batch doesn't divide.
  """
  for axis, why in (("seq", "has one position to compute"), ("tensor", "computes whole heads")):
    if mesh.shape[axis] > 1:
      raise UserError(
        f"a decoding step {why}, and the mesh has {axis}={mesh.shape[axis]}; use data or fsdp"
      )
  rules = rules_lib.DEFAULT
  model = dataclasses.replace(recipe, layout="unrolled", remat="none", sequence=None).decoder()
  boxed = jax.eval_shape(
    lambda key: model.init(key, jnp.zeros((1, 8), jnp.int32))["params"], jax.random.key(0)
  )
  params = _placed(nn.unbox(boxed), rules_lib.shardings(boxed, rules, mesh), model.dtype)
  state = jax.eval_shape(lambda: model.init_state(batch_size, cache_length))

  rows = rules.spec(("batch",), mesh, shape=(batch_size,), where="batch")
  split = NamedSharding(mesh, rows)
  state = _placed(state, jax.tree.map(lambda _: split, state))  # batch comes first everywhere
  tokens = jax.ShapeDtypeStruct((batch_size, 1), np.int32, sharding=split)

  def step(params, state, tokens):
    out = model.apply({"params": params}, tokens, state, state.length[:, None], method=model.extend)
    return out.state, jnp.argmax(out.logits[:, -1], axis=-1)

  # XLA cannot partition a Pallas kernel, so the step runs on each device's rows.
  own = jax.shard_map(
    step, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=(rows, rows), check_vma=False
  )
  traced = jax.jit(own, donate_argnums=1).trace(params, state, tokens)
  lowered = traced.lower(lowering_platforms=("tpu",))
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
  if not recipe.model.tie_embeddings:
    count -= recipe.model.vocab_size * recipe.model.dim
  attention = sum(
    4.0 * m.num_heads * m.head_dim * min(cache_length, m.window or cache_length)
    for m in (layer.mixer for layer in recipe.model.layers)
    if hasattr(m, "window")
  )
  parts = {"parameters": params, "state": state, "batch": tokens}
  return Program(lowered, parts, batch_size, (2.0 * count + attention) * batch_size)


def _placed(tree: Any, shardings: Any, dtype: Any = None) -> Any:
  """Abstract arrays with shardings; floats as ``dtype``, the type that a served model has."""

  def one(x, sharding):
    kind = dtype if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    return jax.ShapeDtypeStruct(x.shape, kind, sharding=sharding)

  return jax.tree.map(one, tree, shardings)
