# SPDX-License-Identifier: Apache-2.0
"""The mixer contract as checks: what every sequence mixer, and every decoder of them, must satisfy.

  subject = Subject.of_mixer(MyMixer(config, dim=16), dim=16)
  for check in CHECKS:
    check(subject)

States are opaque, so two of them count as equal when they have the same length and give the same
outputs on one more stretch of tokens. The checks raise ``AssertionError``. They share a few shapes,
because compilation is most of their cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdec.mixers.base import Topology
from pallas_kernels.testing import COMPILE_ONCE

BATCH, LENGTH, NODES, CAPACITY, STRETCH = 3, 11, 7, 32, 4


@dataclasses.dataclass(frozen=True)
class Subject:
  """Something with the four calls, as functions of parameters.

  Attributes:
    params: first argument of the four functions.
    call, init_state, extend, verify, commit: as in ``jaxdec.mixers.base``; arrays in, arrays out.
    inputs: ``inputs(key, batch, length)``, random inputs.
    tolerance: largest error allowed, relative to the largest reference value.
    leak: largest gradient allowed to cross a segment boundary, relative to the largest inside. More
      than 0 only where a gradient is a difference of sums, equal across a boundary up to rounding.
  """

  params: Any
  call: Callable
  init_state: Callable
  extend: Callable
  verify: Callable
  commit: Callable
  inputs: Callable
  tolerance: float = 2e-5
  leak: float = 0.0

  @classmethod
  def of_mixer(
    cls, mixer: nn.Module, dim: int, *, tolerance: float = 2e-5, leak: float = 0.0, seed: int = 0
  ):
    """A Flax mixer on random inputs, every parameter (zero-initialised ones too) made random."""

    def inputs(key, batch, length):
      return jax.random.normal(key, (batch, length, dim), mixer.dtype)

    x = inputs(jax.random.key(seed), 1, 2)
    params = randomize(nn.unbox(mixer.init(jax.random.key(seed), x, _positions(1, 2))), seed)

    def method(name):
      plain = lambda params, *args: mixer.apply(params, *args, method=name)  # noqa: E731
      compiled = jax.jit(plain, compiler_options=COMPILE_ONCE)
      traced = lambda args: any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))  # noqa: E731
      return lambda *args: (plain if traced(args) else compiled)(*args)

    return cls(
      params=params,
      call=method("__call__"),
      extend=method("extend"),
      verify=method("verify"),
      commit=method("commit"),
      inputs=inputs,
      tolerance=tolerance,
      leak=leak,
      init_state=lambda batch, capacity: mixer.init_state(batch, capacity, mixer.dtype),
    )


def randomize(params: Any, seed: int) -> Any:
  """Adds noise to vectors (biases and norm scales start at 0 or 1, where they hide mistakes)."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noisy = [
    p + 0.3 * jax.random.normal(key, p.shape, p.dtype) if p.ndim == 1 else p
    for key, p in zip(keys, leaves)
  ]
  return jax.tree.unflatten(tree, noisy)


def assert_close(actual: Any, expected: Any, tolerance: float, what: str) -> None:
  """Leaf by leaf, ``max |actual - expected| <= tolerance * max |expected|``, all finite."""
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
    assert np.isfinite(a).all(), f"{what}: not finite"
    bound = tolerance * max(np.abs(e).max(initial=0.0), 1e-30)
    error = np.abs(a - e).max(initial=0.0)
    assert error <= bound, f"{what}: error {error:.2e} exceeds {bound:.2e}"


def _positions(batch: int, length: int) -> jax.Array:
  return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def _rows(x: jax.Array, start: np.ndarray, length: int) -> jax.Array:
  """``x[b, start[b] : start[b] + length]``."""
  return jnp.stack([x[b, s : s + length] for b, s in enumerate(start)])


def _ragged(subject: Subject, x: jax.Array, lengths: tuple[int, ...]) -> tuple[list, Any]:
  """Prefill of rows of different lengths in padded stretches: outputs per stretch, final state."""
  state, outputs = subject.init_state(x.shape[0], CAPACITY), []
  stretches = -(-max(lengths) // STRETCH)
  junk = subject.inputs(jax.random.key(99), x.shape[0], stretches * STRETCH)
  x = jnp.concatenate([x, junk], 1)[:, : stretches * STRETCH]
  real = np.arange(x.shape[1])[None] < np.asarray(lengths)[:, None]
  x = jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, junk)
  positions = jnp.where(real, _positions(*x.shape[:2]), -1)
  for i in range(stretches):
    part = slice(i * STRETCH, (i + 1) * STRETCH)
    y, state = subject.extend(subject.params, x[:, part], state, positions[:, part])
    outputs.append(y)
  return outputs, state


def _future(subject: Subject, state: Any) -> jax.Array:
  """Outputs of one more stretch: what a state means."""
  x = subject.inputs(jax.random.key(77), state.length.shape[0], STRETCH)
  positions = state.length[:, None] + jnp.arange(STRETCH, dtype=jnp.int32)[None]
  return subject.extend(subject.params, x, state, positions)[0]


def assert_same_state(subject: Subject, actual: Any, expected: Any, what: str) -> None:
  np.testing.assert_array_equal(actual.length, expected.length, err_msg=what)
  assert_close(_future(subject, actual), _future(subject, expected), subject.tolerance, what)


def random_trees(seed: int) -> tuple[np.ndarray, Topology]:
  """Parents ``[B,M]`` (a random tree, a chain, a star) and their topology."""
  rng = np.random.default_rng(seed)
  parent = np.zeros((BATCH, NODES), np.int32)
  for i in range(1, NODES):
    parent[:, i] = [rng.integers(max(0, i - 3), i), i - 1, 0]
  depth = np.zeros((BATCH, NODES), np.int32)
  ancestors = np.broadcast_to(np.eye(NODES, dtype=bool), (BATCH, NODES, NODES)).copy()
  for b in range(BATCH):
    for i in range(1, NODES):
      depth[b, i] = depth[b, parent[b, i]] + 1
      ancestors[b, i] |= ancestors[b, parent[b, i]]
  return parent, Topology(jnp.asarray(depth), jnp.asarray(ancestors))


def _paths(topology: Topology, node: int) -> tuple[jax.Array, jax.Array]:
  """Root-to-node paths ``[B,M]``, padded by repeating the node, and their lengths."""
  path = np.full((BATCH, NODES), node, np.int32)
  for b in range(BATCH):
    on_path = np.flatnonzero(np.asarray(topology.ancestors[b, node]))
    path[b, : len(on_path)] = on_path  # parents come first, so ids are in order of depth
  return jnp.asarray(path), topology.depth[:, node] + 1


def _tree_case(subject: Subject, seed: int = 3):
  """State with rows of lengths 6, 0 and 3; nodes; topology."""
  x = subject.inputs(jax.random.key(seed), BATCH, LENGTH)
  _, state = _ragged(subject, x, (6, 0, 3))
  nodes = subject.inputs(jax.random.key(seed + 1), BATCH, NODES)
  return state, nodes, random_trees(seed)[1]


def _along_paths(subject, state, nodes, path, count):
  """The accepted nodes of each row as ordinary tokens."""
  x = jnp.stack([nodes[b][path[b]] for b in range(BATCH)])
  step = jnp.arange(NODES, dtype=jnp.int32)[None]
  positions = jnp.where(step < count[:, None], state.length[:, None] + step, -1)
  return subject.extend(subject.params, x, state, positions)


def check_extend_equals_call(subject: Subject) -> None:
  """Any chunking of ``extend``, down to single tokens, gives the outputs of ``call``."""
  x = subject.inputs(jax.random.key(0), BATCH, LENGTH)
  positions = _positions(BATCH, LENGTH)
  expected = subject.call(subject.params, x, positions, None)
  for sizes in ((LENGTH,), (4, 7), (7, 1, 1, 1, 1), (1,) * LENGTH):
    state, outputs, start = subject.init_state(BATCH, CAPACITY), [], 0
    for size in sizes:
      part = slice(start, start + size)
      y, state = subject.extend(subject.params, x[:, part], state, positions[:, part])
      outputs.append(y)
      start += size
    assert_close(jnp.concatenate(outputs, 1), expected, subject.tolerance, f"chunks {sizes}")
    np.testing.assert_array_equal(state.length, LENGTH)


def check_ragged_extend(subject: Subject) -> None:
  """Rows of different lengths, padded with -1, behave as each would alone."""
  x = subject.inputs(jax.random.key(1), BATCH, LENGTH)
  lengths = np.array([10, 7, 2])
  expected = subject.call(subject.params, x, _positions(*x.shape[:2]), None)
  outputs, state = _ragged(subject, x, tuple(lengths))
  outputs = jnp.concatenate(outputs, 1)
  for b, n in enumerate(lengths):
    assert_close(outputs[b, :n], expected[b, :n], subject.tolerance, f"row {b}")
  np.testing.assert_array_equal(state.length, lengths)
  # The tokens that follow each row's own length, 1 of them for the longest row.
  count = np.minimum(STRETCH, LENGTH - lengths)
  following = _rows(jnp.concatenate([x, x], 1), lengths, STRETCH)
  step = np.arange(STRETCH)[None]
  positions = jnp.asarray(np.where(step < count[:, None], lengths[:, None] + step, -1), jnp.int32)
  y, state = subject.extend(subject.params, following, state, positions)
  for b, n in enumerate(lengths):
    assert_close(y[b, : count[b]], expected[b, n : n + count[b]], subject.tolerance, f"row {b}")
  np.testing.assert_array_equal(state.length, lengths + count)


def check_segments(subject: Subject) -> None:
  """Packed documents give the outputs they give alone, and no gradient crosses a boundary."""
  cut = 5
  x = subject.inputs(jax.random.key(2), BATCH, LENGTH)
  inner = jnp.concatenate([jnp.arange(cut), jnp.arange(LENGTH - cut)]).astype(jnp.int32)
  positions = jnp.broadcast_to(inner, (BATCH, LENGTH))
  segments = jnp.broadcast_to(1 + (jnp.arange(LENGTH) >= cut), (BATCH, LENGTH)).astype(jnp.int32)
  packed = subject.call(subject.params, x, positions, segments)
  first = subject.call(subject.params, x, _positions(BATCH, LENGTH), None)
  # The second document moved to the front; what follows it there is invisible to it.
  second = subject.call(subject.params, jnp.roll(x, -cut, 1), _positions(BATCH, LENGTH), None)
  assert_close(packed[:, :cut], first[:, :cut], subject.tolerance, "first document")
  assert_close(packed[:, cut:], second[:, : LENGTH - cut], subject.tolerance, "second document")
  assert np.abs(packed[:, cut:] - first[:, cut:]).max() > 1e-3, "segment ids had no effect"
  if jnp.issubdtype(x.dtype, jnp.floating):
    last = lambda x: subject.call(subject.params, x, positions, segments)[:, cut:].sum()  # noqa: E731
    leak = np.abs(jax.jit(jax.grad(last), compiler_options=COMPILE_ONCE)(x))
    bound = max(1e-20, subject.leak * leak.max())
    assert leak[:, :cut].max() < bound, "a gradient crossed a segment boundary"


def check_verify_equals_paths(subject: Subject) -> None:
  """Every node's output is the one its root-to-node path gives alone; the state stays as it was."""
  state, nodes, topology = _tree_case(subject)
  before = _future(subject, state)
  out, _ = subject.verify(subject.params, nodes, state, topology)
  for node in range(NODES):
    path, count = _paths(topology, node)
    y, _ = _along_paths(subject, state, nodes, path, count)
    expected = jnp.stack([y[b, count[b] - 1] for b in range(BATCH)])
    assert_close(out[:, node], expected, subject.tolerance, f"node {node}")
  np.testing.assert_array_equal(_future(subject, state), before)


def check_commit_equals_extend(subject: Subject) -> None:
  """Keeping a path equals reading its tokens, for every node; ``count`` may cut it anywhere."""
  state, nodes, topology = _tree_case(subject)
  _, pending = subject.verify(subject.params, nodes, state, topology)
  for node in range(NODES):
    path, count = _paths(topology, node)
    # Row r is finished (count 0) in some rounds and cut short in others.
    cut = np.asarray(count) - np.array([node % 2, node % 3, node % 4])
    count = jnp.asarray(np.maximum(cut, 0), jnp.int32)
    committed = subject.commit(subject.params, state, pending, path, count)
    _, extended = _along_paths(subject, state, nodes, path, count)
    assert_same_state(subject, committed, extended, f"node {node}, counts {count}")


def check_commit_nothing(subject: Subject) -> None:
  """Count 0 leaves rows exactly as they were, whatever their neighbours keep."""
  state, nodes, topology = _tree_case(subject)
  _, pending = subject.verify(subject.params, nodes, state, topology)
  path, _ = _paths(topology, NODES - 1)
  after = subject.commit(subject.params, state, pending, path, jnp.array([0, 2, 0], jnp.int32))
  np.testing.assert_array_equal(after.length, state.length + jnp.array([0, 2, 0]))
  kept = np.array([0, 2])
  np.testing.assert_array_equal(_future(subject, after)[kept], _future(subject, state)[kept])


def check_strangers_do_not_matter(subject: Subject) -> None:
  """An unused slot, which sees itself only and holds huge inputs, changes nothing else."""
  state, nodes, topology = _tree_case(subject)
  last = NODES - 1
  alone = jnp.eye(NODES, dtype=bool)[last]
  poisoned = topology.replace(
    depth=topology.depth.at[:, last].set(0),
    ancestors=topology.ancestors.at[:, last].set(jnp.broadcast_to(alone, (BATCH, NODES))),
  )
  junk = subject.inputs(jax.random.key(55), BATCH, 1)[:, 0]
  junk = junk * 1e3 if jnp.issubdtype(junk.dtype, jnp.floating) else junk
  out, pending = subject.verify(subject.params, nodes, state, topology)
  dirty, dirty_pending = subject.verify(
    subject.params, nodes.at[:, last].set(junk), state, poisoned
  )
  assert np.isfinite(np.asarray(dirty, np.float32)).all(), "unused slot gave NaN or inf"
  assert_close(dirty[:, :last], out[:, :last], subject.tolerance, "unused slot was seen")
  path, count = _paths(topology, last - 1)
  clean = subject.commit(subject.params, state, pending, path, count)
  after = subject.commit(subject.params, state, dirty_pending, path, count)
  assert_same_state(subject, after, clean, "unused slot was committed")


def check_node_order(subject: Subject) -> None:
  """Renumbering the nodes renumbers the outputs."""
  state, nodes, topology = _tree_case(subject)
  order = np.random.default_rng(0).permutation(NODES)
  moved = Topology(topology.depth[:, order], topology.ancestors[:, order][:, :, order])
  out, _ = subject.verify(subject.params, nodes, state, topology)
  shuffled, _ = subject.verify(subject.params, nodes[:, order], state, moved)
  assert_close(shuffled, out[:, order], subject.tolerance, "renumbered nodes")


def check_gradients(subject: Subject) -> None:
  """A stretch at once and token by token: same gradients of parameters, state and inputs."""
  x = subject.inputs(jax.random.key(6), BATCH, LENGTH)
  _, state = subject.extend(
    subject.params, x[:, :STRETCH], subject.init_state(BATCH, CAPACITY), _positions(BATCH, STRETCH)
  )
  x, t = x[:, STRETCH:], LENGTH - STRETCH
  positions = STRETCH + _positions(BATCH, t)

  def together(params, state, x):
    return subject.extend(params, x, state, positions)[0]

  def one_by_one(params, state, x):
    def step(state, token):
      y, state = subject.extend(params, token[0][:, None], state, token[1][:, None])
      return state, y[:, 0]

    tokens = (jnp.moveaxis(x, 1, 0), positions.T)
    return jnp.moveaxis(jax.lax.scan(step, state, tokens)[1], 0, 1)

  weight = jax.random.normal(jax.random.key(7), together(subject.params, state, x).shape)

  def gradients(function):
    def loss(params, state, x):
      return jnp.sum(function(params, state, x).astype(jnp.float32) * weight)

    gradient = jax.grad(loss, (0, 1, 2), allow_int=True)
    grads = jax.jit(gradient, compiler_options=COMPILE_ONCE)(subject.params, state, x)
    return [g for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0]

  expected = gradients(one_by_one)
  assert any(np.abs(g).max() > 0 for g in expected)
  assert_close(gradients(together), expected, 10 * subject.tolerance, "gradients")


CHECKS = (
  check_extend_equals_call,
  check_ragged_extend,
  check_segments,
  check_verify_equals_paths,
  check_commit_equals_extend,
  check_commit_nothing,
  check_strangers_do_not_matter,
  check_node_order,
  check_gradients,
)
