# SPDX-License-Identifier: Apache-2.0
"""Writes the programs that ``test_plan_hlo.py`` reads: one small training step a TPU generation.

  python tests/parallel/hlo/make.py        (needs libtpu: pip install 'jaxdec[aot]')

Attributes that the reader has no use for (schedules, layouts of kernels) are left out.
"""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdec.parallel import make_mesh
from jaxdec.parallel.plan import parse

HERE = pathlib.Path(__file__).parent
LAYERS, WIDTH, LENGTH = 6, 512, 512


def program(mesh):
  """A scan over layers: weights over fsdp, tokens over seq, one state gathered a layer."""
  seq = mesh.shape["seq"]

  def exchange(k, v):
    state = jax.lax.all_gather(jnp.einsum("btd,bte->bde", k, v), "seq").sum(0)
    edge = jax.lax.ppermute(k[:, -4:], "seq", [(i, i + 1) for i in range(seq - 1)])
    return jnp.einsum("btd,bde->bte", k.at[:, :4].add(edge), state)

  def layer(x, w):
    tokens = P(("data", "fsdp"), "seq")
    y = jax.shard_map(
      exchange, mesh=mesh, in_specs=(tokens, tokens), out_specs=tokens, check_vma=False
    )(x @ w[0], x @ w[1])
    return x + jax.nn.relu(y), None

  def step(w, x):
    def loss(w):
      y, _ = jax.lax.scan(layer, x, w)
      return jnp.mean(jnp.square(y.astype(jnp.float32)))

    value, gradients = jax.value_and_grad(loss)(w)
    return w - 0.1 * gradients, value

  weights = NamedSharding(mesh, P(None, None, "fsdp"))
  w = jax.ShapeDtypeStruct((LAYERS, 2, WIDTH, WIDTH), jnp.bfloat16, sharding=weights)
  x = jax.ShapeDtypeStruct(
    (2 * mesh.shape["data"] * mesh.shape["fsdp"], LENGTH * seq, WIDTH), jnp.bfloat16,
    sharding=NamedSharding(mesh, P(("data", "fsdp"), "seq")),
  )  # fmt: skip
  out = (weights, NamedSharding(mesh, P()))
  return jax.jit(step, donate_argnums=0, out_shardings=out).trace(w, x)


def shorten(text: str) -> str:
  """Without tables of source lines, layouts, and most of the back end's notes."""
  head, _, rest = text.partition("\n\nFileNames\n")
  rest = rest[re.search(r"\n\n\n|\n\n(?=%|ENTRY)", rest).start() :]
  text = head + rest
  text = re.sub(r"(?<=\])\{[\d,]*:?(?:T\([^{}]*?)?(S\(\d\))?\}", keep_space, text)
  text = re.sub(r", backend_config=(\{.*\})", keep_fusion, text)
  text = re.sub(r" stack_frame_id=\d+|, use_global_device_ids=true|, arg_\w+=.*", "", text)
  lines = text.splitlines()
  kept = re.compile(r"(all|reduce|collective|call)-\w+(-start)?\(| while\(|kind=kCustom")
  lines = [x if kept.search(x) else re.sub(r", metadata=\{[^}]*\}", "", x) for x in lines]
  return "\n".join(lines) + "\n"


def keep_space(layout):
  return "{" + layout[1] + "}" if layout[1] else ""


def keep_fusion(config):
  kept = re.search(r'"async_collective_fusion_config":\{[^}]*\}', config[1])
  return ", backend_config={" + kept[0] + "}" if kept else ""


def main():
  for name, sizes in {"v5e:4x4": (4, 4), "v6e:4x4": (4, 4), "tpu7x:2x2x1": (2, 4)}.items():
    topology = parse(name)
    mesh = make_mesh(fsdp=sizes[0], seq=sizes[1], devices=topology.devices())
    text = program(mesh).lower(lowering_platforms=("tpu",)).compile().as_text()
    path = HERE / f"{topology.generation.name}.txt"
    path.write_text(shorten(text))
    print(f"wrote {path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
  main()
