# SPDX-License-Identifier: Apache-2.0
"""Runs a plan: one program per kind of group, all groups side by side, one sum of gradients.

Every group computes on its own sub-mesh, with the length of its sequences split over ``seq``. Its
sequences lie one behind the other in one row, padded to one of a few sizes, so that few programs
serve all batches. Each device keeps ``weight / degree`` times the gradient of its group, added up
over the micro-batches without any communication; one reduction over all devices then gives

    sum_g weight_g gradient_g / sum_g weight_g

the gradient of the mean over all tokens of the batch, as a single device would compute it.

Communication: what the program of a group does within the group; parameters are gathered onto every
device once a step, and gradients are reduced over all devices once a step (all-reduce of their
bytes in at least float32, or reduce-scatter where they are to lie split). Of several processes each
calls the executor with the same plan and sequences, and runs the groups that it has devices of.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdec.errors import UserError
from jaxdec.parallel import rules as rules_lib
from jaxdec.parallel.flexsp.packing import pack, token_bounds
from jaxdec.parallel.flexsp.plan import Group, Plan
from jaxdec.parallel.mesh import AXES, make_mesh
from jaxdec.parallel.sequence.config import LAYOUTS, Layout, check_choice
from jaxdec.training.task import Task

LossAndGradients = Callable[..., tuple[jax.Array, jax.Array, Any]]


class Result(NamedTuple):
  """Loss (mean over all weight), total weight, and gradients like the parameters."""

  loss: jax.Array
  weight: jax.Array
  gradients: Any


class Signature(NamedTuple):
  """What a compiled program serves: devices, tokens of the row, and the kinds of all arrays."""

  ranks: tuple[int, ...]
  tokens: int
  kinds: tuple[Hashable, ...]


def task_gradients(task: Task) -> LossAndGradients:
  """Loss, weight and gradients of a trainer's task.

  The executor's ``extras`` are then ``(task.frozen, key)``; a task without frozen arrays and
  randomness needs none.
  """

  def loss_and_gradients(mesh, params, batch, frozen=None, key=None):
    del mesh
    grad = jax.value_and_grad(task.loss, has_aux=True)
    (loss, metrics), gradients = grad(params, {} if frozen is None else frozen, batch, key)
    if "weight" not in metrics:
      raise UserError(
        f"{type(task).__name__}.loss reports no metric 'weight' (labelled tokens), without which "
        "groups of different size cannot be averaged"
      )
    return loss, metrics["weight"], gradients

  return loss_and_gradients


class Executor:
  """Computes loss and gradients of whole batches by their plans.

  Args:
    loss_and_gradients: ``(mesh, params, batch, *extras) -> (loss, weight, gradients)``, traced once
      for each program, under the mesh of the group: ``loss`` is the mean over ``weight`` items of
      the batch, ``gradients`` are its derivatives. See ``task_gradients``.
    cap: tokens of a device, as in the plan's cost model; the largest size a group is padded to.
    mesh: the devices; rank r of a plan is ``mesh.devices.flat[r]``. By default all devices.
    rules: where batches and intermediate values lie on a group's mesh.
    layout: order of the tokens in the shards of a group, see ``SequenceConfig``.
    bounds: sizes to pad tokens of a device to, ascending; by default ``token_bounds(cap)``.
    multiple: of the default sizes, see ``token_bounds``.
    shardings: where gradients lie (a tree of shardings on ``mesh``, like the parameters); by
      default on every device.
    compiler_options: of every program.
  """

  def __init__(
    self,
    loss_and_gradients: LossAndGradients,
    *,
    cap: int,
    mesh: Mesh | None = None,
    rules: rules_lib.Rules = rules_lib.DEFAULT,
    layout: Layout = "contiguous",
    bounds: Sequence[int] | None = None,
    multiple: int = 1,
    shardings: Any = None,
    compiler_options: Mapping[str, Any] | None = None,
  ):
    check_choice("layout", layout, LAYOUTS)
    if layout == "zigzag" and multiple % 2:
      multiple *= 2  # a shard is two runs
    self.mesh = make_mesh(data=-1) if mesh is None else mesh
    self.cap = cap
    self.bounds = token_bounds(cap, multiple) if bounds is None else tuple(sorted(bounds))
    self._function, self._rules, self._layout = loss_and_gradients, rules, layout
    self._options = dict(compiler_options or {})
    self._devices = list(self.mesh.devices.flat)
    self._mine = [d.process_index == jax.process_index() for d in self._devices]
    self._programs: dict[Signature, Any] = {}
    # One row of every leaf on each device.
    self._rows = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
    self._everywhere = NamedSharding(self.mesh, PartitionSpec())
    self._add = jax.jit(lambda x, y: jax.tree.map(jnp.add, x, y), donate_argnums=0)
    self._finish = jax.jit(
      _mean,
      out_shardings=Result(
        self._everywhere,
        self._everywhere,
        self._everywhere if shardings is None else shardings,
      ),
    )

  @property
  def compilations(self) -> int:
    """Programs compiled for groups so far."""
    return len(self._programs)

  @property
  def signatures(self) -> tuple[Signature, ...]:
    """What they serve."""
    return tuple(self._programs)

  def padded(self, plan: Plan, group: Group) -> int:
    """Tokens of the row that a group computes."""
    tokens = -(-sum(plan.lengths[s] for s in group.sequences) // group.degree)
    index = bisect.bisect_left(self.bounds, tokens)
    if index == len(self.bounds):
      raise UserError(
        f"a group of {group.degree} devices has {tokens} tokens for each, and the executor has "
        f"room for {self.bounds[-1]}; give it the cap of the plan's cost model"
      )
    return self.bounds[index] * group.degree

  def __call__(
    self,
    plan: Plan,
    params: Any,
    sequences: Sequence[Mapping[str, np.ndarray]],
    extras: tuple = (),
  ) -> Result:
    """One pass over a batch.

    Args:
      params: anywhere; copied to all devices of ``mesh`` where they aren't there.
      sequences: for each sequence of the plan, arrays ``[length, ...]``, among them ``tokens``.
      extras: further arguments of ``loss_and_gradients``, arrays.

    Raises:
      UserError: a plan for other devices or sequences; sequences with different arrays.
    """
    self._check(plan, sequences)
    placed = jax.device_put((params, *extras), self._everywhere)
    leaves, tree = jax.tree.flatten(placed)
    copies = [{s.device: s.data for s in leaf.addressable_shards} for leaf in leaves]
    total = None
    for groups in plan.micro_batches:
      parts: list[Any] = [None] * len(self._devices)
      for group in groups:
        if any(self._mine[r] for r in group.ranks):
          self._run(plan, group, sequences, leaves, copies, tree, parts)
      part = self._gather(parts, placed[0])
      total = part if total is None else self._add(total, part)
    return self._finish(total, placed[0])

  def _check(self, plan, sequences):
    if plan.devices != len(self._devices):
      raise UserError(
        f"the plan is for {plan.devices} devices, the executor's mesh has {len(self._devices)}"
      )
    sizes = tuple(len(s["tokens"]) for s in sequences)
    if sizes != plan.lengths:
      where = next((i for i, (a, b) in enumerate(zip(sizes, plan.lengths)) if a != b), None)
      detail = (
        f"{len(sizes)} sequences for a plan of {len(plan.lengths)}"
        if where is None
        else f"sequence {where} has {sizes[where]} tokens, planned were {plan.lengths[where]}"
      )
      raise UserError(f"{detail}; run a plan with the sequences it was made for")
    first = {name: np.shape(x)[1:] for name, x in sequences[0].items()}
    for i, (sequence, size) in enumerate(zip(sequences, sizes)):
      shapes = {name: np.shape(x) for name, x in sequence.items()}
      if shapes != {name: (size, *rest) for name, rest in first.items()}:
        raise UserError(
          f"sequence {i} has arrays of shapes {shapes}; expected one item for each of its {size} "
          f"tokens, and the arrays of sequence 0: {', '.join(first)}"
        )

  def _run(self, plan, group, sequences, leaves, copies, tree, parts):
    """Starts one group; puts what each of its devices holds afterwards into ``parts``."""
    mesh = self._sub_mesh(group.ranks)
    on = [self._devices[r] for r in group.ranks]
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.unflatten(
      tree,
      [
        jax.make_array_from_single_device_arrays(
          leaf.shape, everywhere, [copy[d] for d in on if d in copy]
        )
        for leaf, copy in zip(leaves, copies)
      ],
    )
    batch = self._place(plan, group, sequences, mesh)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), (leaves, list(batch.values())))
    kinds = (tree, tuple(batch), *jax.tree.leaves(kinds))
    signature = Signature(group.ranks, self.padded(plan, group), kinds)
    if signature not in self._programs:
      with self._context(mesh):
        self._programs[signature] = self._compile(mesh, arguments, batch)
    out = self._programs[signature](arguments, batch)
    held, structure = jax.tree.flatten(out)
    shards = [{s.device: s.data for s in leaf.addressable_shards} for leaf in held]
    for rank, device in zip(group.ranks, on):
      if self._mine[rank]:
        parts[rank] = jax.tree.unflatten(structure, [shard[device] for shard in shards])

  def _sub_mesh(self, ranks) -> Mesh:
    # Not make_mesh: it keeps `seq` within a slice, and a long sequence may need more than one.
    grid = np.array([self._devices[r] for r in ranks]).reshape(1, 1, 1, -1)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

  def _place(self, plan, group, sequences, mesh) -> dict[str, jax.Array]:
    batch = pack([sequences[s] for s in group.sequences], self.padded(plan, group))
    if self._layout == "zigzag" and group.degree > 1:
      from jaxdec.parallel.sequence.layout import zigzag_batch

      batch = dict(zigzag_batch(batch, group.degree))
    sharding = rules_lib.batch_sharding(mesh, self._rules)
    return {
      name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])
      for name, x in batch.items()
    }

  @contextlib.contextmanager
  def _context(self, mesh) -> Iterator[None]:
    with jax.set_mesh(mesh), nn.logical_axis_rules(self._rules.flax()):
      yield

  def _compile(self, mesh, arguments, batch):
    degree = mesh.size

    def program(arguments, batch):
      params, *extras = arguments
      loss, weight, gradients = self._function(mesh, params, batch, *extras)
      share = jnp.asarray(weight, jnp.float32) / degree

      def row(x, dtype):
        # A group without a label has no mean, and no say.
        x = jnp.where(share > 0, x.astype(dtype) * share.astype(dtype), 0)
        return jnp.broadcast_to(x[None], (degree, *x.shape))

      gradients = jax.tree.map(lambda g, p: row(g, _wide(p)), gradients, params)
      return jnp.broadcast_to(share[None], (degree,)), row(loss, jnp.result_type(float)), gradients

    rows = NamedSharding(mesh, PartitionSpec(AXES))
    jitted = jax.jit(program, out_shardings=rows, compiler_options=self._options)
    return jitted.lower(arguments, batch).compile()

  def _gather(self, parts, params):
    """What every device holds as rows of arrays ``[N, ...]``; no data moves."""
    for rank, device in enumerate(self._devices):
      if parts[rank] is None and self._mine[rank]:
        # Idle in this micro-batch.
        zeros = np.zeros(1, np.float32), np.zeros(1, jnp.result_type(float))
        rows = jax.tree.map(lambda p: np.zeros((1, *p.shape), _wide(p)), params)
        parts[rank] = jax.device_put((*zeros, rows), device)
    mine = [part for part in parts if part is not None]

    def assemble(*rows):
      shape = (len(self._devices), *rows[0].shape[1:])
      return jax.make_array_from_single_device_arrays(shape, self._rows, list(rows))

    return jax.tree.map(assemble, *mine)


def _wide(x: jax.Array) -> Any:
  """The dtype that sums over groups are kept in."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _mean(total: Any, params: Any) -> Result:
  """Sums of all devices' rows over the sum of their weights."""
  weight, loss, gradients = jax.tree.map(lambda x: jnp.sum(x, axis=0), total)
  scale = 1.0 / jnp.maximum(weight, 1e-9)
  gradients = jax.tree.map(
    lambda g, p: (g * scale.astype(g.dtype)).astype(p.dtype), gradients, params
  )
  return Result(loss * scale.astype(loss.dtype), weight, gradients)
