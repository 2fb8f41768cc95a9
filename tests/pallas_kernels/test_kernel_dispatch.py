# SPDX-License-Identifier: Apache-2.0
"""The choice of an implementation, on a made-up op whose backends say what they were given."""

from __future__ import annotations

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import Unsupported
from pallas_kernels._checks import divides, shapes
from pallas_kernels._dispatch import Op, current_target, require_tpu
from pallas_kernels._tpu import GENERATIONS, chip


@dataclasses.dataclass(frozen=True)
class Blocks:
  size: int = 8


@pytest.fixture
def op(monkeypatch):
  def module(name, function):
    full = f"made_up.{name}"
    monkeypatch.setitem(sys.modules, full, types.SimpleNamespace(twice=function))

  def tpu(x, *, config):
    require_tpu("twice")
    return "mosaic_tpu", config

  def refuse(x, *, config):
    raise Unsupported("twice: mosaic_gpu is not implemented yet; use implementation='xla'.")

  monkeypatch.setitem(sys.modules, "made_up", types.ModuleType("made_up"))
  module("reference", lambda x, *, config: ("reference", config))
  module("xla", lambda x, *, config: ("xla", config))
  module("mosaic_tpu", tpu)
  module("mosaic_gpu", refuse)
  return Op("twice", "made_up", {"mosaic_tpu": Blocks})


def test_auto_follows_the_platform_and_ends_in_xla(op):
  assert op(1)[0] == "xla"
  with pallas_kernels.target("tpu"):
    assert op(1)[0] == "mosaic_tpu"
  with pallas_kernels.target("gpu"):
    assert op(1)[0] == "xla"
  assert op(1)[0] == "xla"


def test_auto_follows_the_default_device(op, monkeypatch):
  with jax.default_device(jax.devices("cpu")[0]):
    assert current_target().platform == "cpu"
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert op(1)[0] == "mosaic_tpu"
  with jax.default_device(jax.devices("cpu")[0]):
    assert op(1)[0] == "xla"


def test_a_name_fails_loudly(op):
  with pytest.raises(Unsupported, match="runs on TPUs and this program is traced for 'cpu'"):
    op(1, implementation="mosaic_tpu")
  with pytest.raises(NotImplementedError, match="not implemented yet"):
    op(1, implementation="mosaic_gpu")
  with pytest.raises(ValueError, match=r"unknown implementation 'mosaic' \(did you mean"):
    op(1, implementation="mosaic")


def test_a_sequence_takes_the_first_that_can(op):
  assert op(1, implementation=("mosaic_gpu", "mosaic_tpu", "reference"))[0] == "reference"
  with pytest.raises(ExceptionGroup) as group:
    op(1, implementation=["mosaic_gpu", "mosaic_tpu"])
  assert [type(e) for e in group.value.exceptions] == [Unsupported, Unsupported]
  with pytest.raises(ValueError, match="xyz"):
    op(1, implementation=["xla", "xyz"])


def test_a_config_chooses_its_implementation(op):
  with pallas_kernels.target("tpu"):
    assert op(1, config=Blocks(4)) == ("mosaic_tpu", Blocks(4))
  with pytest.raises(Unsupported):  # its implementation can't run here
    op(1, config=Blocks(4))
  with pytest.raises(ValueError, match=r"Blocks \(mosaic_tpu\)"):
    op(1, implementation="xla", config=Blocks(4))
  with pytest.raises(ValueError, match=r"config builtins\.int is for none"):
    op(1, config=3)


def test_target_is_checked_and_restored():
  with pytest.raises(ValueError, match="got 'tpus'"), pallas_kernels.target("tpus"):
    pass
  with pytest.raises(RuntimeError), pallas_kernels.target("tpu", interpret=True):
    assert require_tpu("x") is True
    raise RuntimeError
  assert current_target().platform == "cpu"


def test_chips_are_described():
  for name in GENERATIONS:
    one = chip(name)
    assert 0.5e9 < one.clock_hz < 4e9 and one.vmem_bytes >= 16 * 2**20
  with pallas_kernels.target("tpu", generation="v6e"):
    assert chip().name == "v6e"
  with pytest.raises(ValueError, match="'v9'"):
    chip("v9")


def test_shapes_bind_letters():
  q, k = jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 5, 2, 8))
  sizes = shapes("op", q=(q, "B T N H"), k=(k, "B S K H"), bias=None, g=(jnp.zeros((1, 3)), "#B T"))
  assert sizes == {"B": 2, "T": 3, "N": 4, "H": 8, "S": 5, "K": 2}
  with pytest.raises(ValueError, match=r"k has shape \(2, 5, 2, 8\).*3 in axis 1; q has T=3"):
    shapes("op", q=(q, "B T N H"), k=(k, "B T K H"))
  with pytest.raises(ValueError, match="expected 3 axes"):
    shapes("op", q=(q, "B T N"))


def test_heads_must_divide():
  assert divides("op", {"q": 8, "k": 2}) == 8
  with pytest.raises(ValueError, match=r"k has 3 heads.*\[1, 2, 4, 8\]"):
    divides("op", {"q": 8, "k": 3})
