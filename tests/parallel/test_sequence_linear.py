# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers over several devices are the op on one device, rank by rank."""

from __future__ import annotations

import functools

import jax
import pytest
from linear_cases import (
  EXCHANGES,
  KINDS,
  assert_equal,
  documents,
  inputs,
  many_devices,
  one_device,
  run,
)


@functools.cache
def expected(kind, packed, **options):
  return run({"one": one_device}, inputs(kind, **options), documents() if packed else None)["one"]


def compare(kind, packed, ranks, layers):
  got = run(layers, inputs(kind), documents() if packed else None)
  for name, results in got.items():
    try:
      assert_equal(results, expected(kind, packed), ranks, 1e-12)
    except AssertionError as error:
      raise AssertionError(f"{name}: {error}") from None


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("kind", ["scalar", "gated delta"])
def test_exchanges_agree_with_one_device(kind):
  """float64, outputs, final state and all gradients, with documents that straddle shards."""
  layers = {x: many_devices(4, check_vma=x == "chain", exchange=x) for x in EXCHANGES}
  compare(kind, True, 4, layers)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_zigzag(kind, ranks):
  layers = {
    f"{x}, check_vma={check}": many_devices(ranks, check_vma=check, exchange=x, layout="zigzag")
    for x, check in zip(EXCHANGES, (True, False, ranks == 2))
  }
  compare(kind, True, ranks, layers)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_exchange_and_number_of_ranks(kind, ranks, packed):
  layers = {
    f"{x}, check_vma={check}": many_devices(ranks, check_vma=check, exchange=x)
    for x, check in zip(EXCHANGES, (packed, not packed, packed))
  }
  compare(kind, packed, ranks, layers)
