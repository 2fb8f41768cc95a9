# SPDX-License-Identifier: Apache-2.0
"""What recurrent layers communicate, counted in programs: how often, how much, and what waits."""

from __future__ import annotations

import collections
import math
import re

import jax
import jax.numpy as jnp
import pytest
from linear_cases import EXCHANGES, WIDTH, B, H, K, N, T, inputs, many_devices

from jaxdec.parallel.sequence import payload_elements
from pallas_kernels.testing import COMPILE_ONCE

OPERATIONS = ("all-gather", "reduce-scatter", "collective-permute", "all-reduce", "all-to-all")
STATE = payload_elements(B, N, H, WIDTH)


def arrays(kind, length=T, documents=False):
  """Abstract float32 arrays of a longer or shorter sequence; no initial state."""
  shapes = {n: x.shape for n, x in inputs(kind, jnp.float32).items() if n != "initial_state"}
  resized = {n: s if n in "AD" else (s[0], length, *s[2:]) for n, s in shapes.items()}
  found = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in resized.items()}
  ids = jax.ShapeDtypeStruct((B, length), jnp.int32) if documents else None
  return found, ids


def lowered(layer, kind, gradient, **options):
  """Forward alone, or forward and backward of a loss of the outputs."""
  given, ids = arrays(kind, **options)

  def forward(given, ids):
    return layer(given, ids)[0]

  def loss(given, ids):
    return jnp.sum(jnp.square(forward(given, ids)))

  return jax.jit(jax.grad(loss) if gradient else forward).lower(given, ids)


def collectives(text: str) -> dict[str, list[int]]:
  """Elements per result of each collective of a lowered program, by the name it has in HLO.

  Sums over axes of one device (of gradients of replicated arrays) move nothing and don't count.
  """
  found = collections.defaultdict(list)
  for op in OPERATIONS:
    pattern = rf'"?stablehlo\.{op.replace("-", "_")}"?\(.*?\) -> tensor<([0-9x]*)x?[a-z]+[0-9]*>'
    for match in re.finditer(pattern, text, re.DOTALL):
      groups = re.search(r"replica_groups = dense<.*?> : tensor<(\d+)x(\d+)xi64>", match[0])
      if op == "all-reduce" and groups and groups[2] == "1":
        continue
      found[op].append(math.prod(int(n) for n in match[1].split("x") if n))
  return dict(found)


def payload(kind, documents=False):
  decay = {"scalar": (N,), "channel": (N, H), "none": ()}.get(kind, ())
  heads = K if kind == "none" else N
  return payload_elements(
    B, heads, H, WIDTH, decay=decay, dense="delta" in kind, documents=documents
  )


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", ["none", "scalar", "channel", "gated delta"])
def test_gather_is_one_collective_each_way(kind, documents):
  """One all-gather of maps, whose size does not depend on how many tokens there are."""
  layer, p = many_devices(8, check_vma=True), payload(kind, documents)
  for length in (T, 4 * T):
    options = dict(length=length, documents=documents)
    forward = collectives(lowered(layer, kind, False, **options).as_text())
    both = collectives(lowered(layer, kind, True, **options).as_text())
    assert forward == {"all-gather": [8 * p]}
    assert both == {"all-gather": [8 * p, 8 * p]}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("kind", ["scalar", "gated delta"])
def test_scan_is_a_logarithm_of_permutes(kind, ranks):
  layer = many_devices(ranks, check_vma=False, exchange="scan")
  rounds = math.ceil(math.log2(ranks))
  one_way = [payload(kind)] * (rounds - 1) + [STATE]
  for length in (T, 4 * T):
    forward = collectives(lowered(layer, kind, False, length=length).as_text())
    both = collectives(lowered(layer, kind, True, length=length).as_text())
    assert forward == {"collective-permute": one_way}
    assert both == {"collective-permute": one_way * 2}


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("kind", ["scalar", "gated delta"])
def test_chain_is_a_permute_a_rank_and_slice(kind, slices):
  layer = many_devices(4, check_vma=False, exchange="chain", slices=slices)
  one_way = [STATE // slices] * (4 + slices - 2)
  for length in (T, 4 * T):
    both = collectives(lowered(layer, kind, True, length=length).as_text())
    assert both == {"collective-permute": one_way * 2}


def test_zigzag_gathers_two_maps_in_one_collective():
  layer = many_devices(4, check_vma=True, layout="zigzag")
  inside = collectives(lowered(layer, "scalar", True).as_text())
  assert inside == {"all-gather": [4 * 2 * payload("scalar")] * 2}


def test_both_directions_without_decay_are_one_sum():
  layer = many_devices(4, check_vma=True, causal=False)
  state = payload_elements(B, K, H, WIDTH)
  assert collectives(lowered(layer, "none", False).as_text()) == {"all-reduce": [state]}
  assert collectives(lowered(layer, "none", True).as_text()) == {"all-reduce": [state] * 2}


def test_selective_scan():
  layer = many_devices(4, check_vma=True)
  both = collectives(lowered(layer, "mamba", True).as_text())
  # Besides: gradients of A and D, which all ranks hold.
  assert both["all-gather"] == [4 * payload_elements(B, 8, H, 1, decay=(8, H))] * 2


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("kind", ["scalar", "gated delta", "mamba"])
def test_one_rank_has_none(kind, exchange):
  layer = many_devices(1, check_vma=False, exchange=exchange)
  assert collectives(lowered(layer, kind, True).as_text()) == {}


def compiled(program) -> collections.Counter:
  text = program.compile(COMPILE_ONCE).as_text()
  return collections.Counter(
    match[1] for match in re.finditer(rf" ({'|'.join(OPERATIONS)})(?:-start)?\(", text)
  )


@pytest.mark.parametrize("kind", ["scalar", pytest.param("gated delta", marks=pytest.mark.slow)])
def test_a_rematerialised_layer_communicates_twice(kind):
  """Keeping "sequence_state" keeps the second forward pass from a collective of its own."""
  layer = many_devices(4, check_vma=True)
  policy = jax.checkpoint_policies.save_only_these_names("sequence_state")
  once = jax.checkpoint(layer, policy=policy)
  again = jax.checkpoint(layer)
  assert compiled(lowered(once, kind, True)).total() == 2
  assert compiled(lowered(again, kind, True)).total() == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["channel", "delta"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_compiled_programs_have_what_lowered_ones_have(kind, exchange):
  layer = many_devices(8, check_vma=True, exchange=exchange)
  program = lowered(layer, kind, True, documents=True)
  assert compiled(program) == {n: len(x) for n, x in collectives(program.as_text()).items()}


def waiting(jaxpr, dependent: set[int], found: collections.Counter) -> set[int]:
  """Positions of outputs that depend on a collective; counts loops and multiply-adds that do."""
  marked = {v for i, v in enumerate(jaxpr.invars) if i in dependent}
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    given = {i for i, v in enumerate(eqn.invars) if not hasattr(v, "val") and v in marked}
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    if name in ("all_gather", "all_gather_invariant", "ppermute", "reduce_scatter", "psum_scatter"):
      marked.update(eqn.outvars)
    elif name in ("scan", "while"):
      if given:
        found[f"{name} of {eqn.params.get('length')}"] += 1
        marked.update(eqn.outvars)
    elif inner is not None:
      out = waiting(getattr(inner, "jaxpr", inner), given, found)
      marked.update(v for i, v in enumerate(eqn.outvars) if i in out)
    elif given:
      marked.update(eqn.outvars)
      if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        size = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        found["multiply-adds"] += size * math.prod(eqn.outvars[0].aval.shape)
  return {i for i, v in enumerate(jaxpr.outvars) if not hasattr(v, "val") and v in marked}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_work_inside_chunks_waits_for_no_collective(exchange):
  """Of the forward pass only the correction does: one product of queries and states.

  With a loss whose gradient depends on no output, no loop of the backward pass does either.
  """
  layer = many_devices(4, check_vma=True, exchange=exchange)
  given, _ = arrays("scalar")

  def loss(given):
    return jnp.sum(layer(given)[0])

  forward, backward = collections.Counter(), collections.Counter()
  waiting(jax.make_jaxpr(lambda x: layer(x)[0])(given).jaxpr, set(), forward)
  waiting(jax.make_jaxpr(jax.grad(loss))(given).jaxpr, set(), backward)
  assert forward == {"multiply-adds": B * (T // 4) * N * H * WIDTH}
  assert set(backward) == {"multiply-adds"}


def test_delta_rules_wait_only_for_the_correction_and_the_fold():
  layer = many_devices(4, check_vma=True)
  given, _ = arrays("gated delta")
  found = collections.Counter()
  waiting(jax.make_jaxpr(lambda x: layer(x)[0])(given).jaxpr, set(), found)
  assert found == {"multiply-adds": B * (T // 4) * N * H * WIDTH, "scan of 4": 1}
