# SPDX-License-Identifier: Apache-2.0
"""The training step of EAGLE-3, seven test-time steps: speed and memory, beside SpecJAX.

Command:  python experiments/eagle3_step/run.py --specjax /path/to/a/checkout
Needs:    pip install jaxdec; for the other side a checkout of github.com/tails-mpt/SpecJAX and what
          it imports (transformers, optax). Without --specjax only this library is measured.
Expected: results/results.json and results/table.md beside this file; see README.md.

Each measurement is a process of its own, and the systems take turns. Both get the same target and
the same draft head, weight for weight, so their losses must agree: that is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
STEPS = 7

# Name: vocabulary, draft vocabulary, D, heads, key/value heads, head size, MLP width, layers.
SHAPES = {
  "small": (4096, 4096, 256, 4, 2, 64, 768, 8),
  "wide": (32_000, 8_000, 512, 8, 4, 64, 1536, 8),
}


def target_and_drafter(shape: str, dtype: str):
  """The model, its parameters, the drafter and its parameters, all random, the same every time."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxdec.drafting import DraftVocabulary, Eagle3, Target
  from jaxdec.models import Decoder, tiny_llama

  vocab, draft, dim, heads, kv, size, hidden, layers = SHAPES[shape]
  config = tiny_llama(
    vocab_size=vocab, dim=dim, num_layers=layers, num_heads=heads, num_kv_heads=kv, head_dim=size,
    hidden_dim=hidden, tie_embeddings=False,
  )  # fmt: skip
  model = Decoder(config, dtype=jnp.dtype(dtype))
  make = jax.jit(lambda rng: nn.unbox(model.init(rng, jnp.zeros((1, 4), jnp.int32))["params"]))
  params = jax.tree.map(lambda x: x.astype(dtype), make(jax.random.key(0)))
  kept = None
  if draft < vocab:
    kept = DraftVocabulary(np.arange(draft) * (vocab // draft), vocab)
  drafter = Eagle3.for_target(config, num_heads=STEPS, vocabulary=kept, dtype=dtype)
  ours = jax.jit(lambda rng: drafter.init_params(rng, Target(model, params, None)))
  return model, params, drafter, ours(jax.random.key(1))


def tokens(shape: str, batch: int, length: int):
  import numpy as np

  return np.random.default_rng(0).integers(0, SHAPES[shape][0], (batch, length), np.int32)


def jaxdec_step(shape: str, batch: int, length: int, dtype: str, specjax: None):
  """``(step, arguments, read)``: loss and gradients; ``read`` gives the losses by depth."""
  import jax
  import jax.numpy as jnp

  from jaxdec.training.tasks.distill import Distill

  model, target, drafter, params = target_and_drafter(shape, dtype)
  task = Distill(drafter, model, target)
  text = jnp.asarray(tokens(shape, batch, length))
  ones = jnp.ones_like(text)
  data = {
    "tokens": text, "segment_ids": ones, "loss_mask": ones.astype(jnp.float32),
    "positions": jnp.broadcast_to(jnp.arange(length), text.shape),
  }  # fmt: skip

  def step(params, frozen, data):
    return jax.value_and_grad(task.loss, has_aux=True)(params, frozen, data, None)

  return jax.jit(step), (params, task.frozen, data), lambda out: out[0][1]["depth_loss"]


def specjax_step(shape: str, batch: int, length: int, dtype: str, specjax: str):
  """The same of SpecJAX, with the same weights under its names."""
  sys.path.insert(0, specjax)
  import jax.numpy as jnp
  import numpy as np
  from specjax.models.draft.eagle3 import Eagle3Config
  from specjax.models.target.llama import LlamaConfig, llama_forward
  from specjax.train import make_train_step_ttt
  from specjax.training.vocab import build_t2d_map

  vocab, draft, dim, heads, kv, size, hidden, layers = SHAPES[shape]
  _, params, drafter, head = target_and_drafter(shape, dtype)
  theta, eps = drafter.attention.rope.theta, drafter.eps
  config = LlamaConfig(
    vocab_size=vocab, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
    num_key_value_heads=kv, head_dim=size, intermediate_size=hidden, rope_theta=theta,
    rms_norm_eps=eps,
  )  # fmt: skip
  draft_config = Eagle3Config(
    hidden_size=dim, intermediate_size=hidden, num_heads=heads, num_kv_heads=kv, head_dim=size,
    vocab_size=vocab, draft_vocab_size=draft, rope_theta=theta, rms_norm_eps=eps,
  )  # fmt: skip

  def flat(prefix, tree, names):
    """Kernels ``[in, out]`` become weights ``[out, in]``."""
    out = {}
    for theirs, path in names.items():
      x = tree
      for key in path.split("."):
        x = x[key]
      kernel = path.endswith("kernel")
      x = x.T.astype(dtype) if kernel else x
      out[f"{prefix}{theirs}.weight"] = jnp.asarray(x)
    return out

  attention = {f"self_attn.{x}_proj": f"{{}}.{x}.kernel" for x in "qkvo"}
  mlp = {f"mlp.{x}_proj": f"mlp.{x}.kernel" for x in ("gate", "up", "down")}
  weights = {
    "model.embed_tokens.weight": params["embed"],
    "model.norm.weight": params["final_norm"]["scale"],
    "lm_head.weight": params["head"]["kernel"].T,
  }
  block = {k: v.format("mixer") for k, v in attention.items()} | mlp
  block |= {
    "input_layernorm": "mixer_norm.scale", "post_attention_layernorm": "mlp_norm.scale",
  }  # fmt: skip
  for i in range(layers):
    weights |= flat(f"model.layers.{i}.", params[f"layers_{i}"], block)
  names = {f"midlayer.{k}": v.format("attention") for k, v in attention.items()}
  names |= {f"midlayer.{k}": v for k, v in mlp.items()}
  names |= {
    "fc": "fuse.kernel", "midlayer.input_layernorm": "embed_norm.scale",
    "midlayer.hidden_norm": "state_norm.scale",
    "midlayer.post_attention_layernorm": "mlp_norm.scale",
    "norm": "out_norm.scale", "lm_head": "lm_head.kernel",
  }  # fmt: skip
  ids = np.arange(vocab) if drafter.vocabulary is None else drafter.vocabulary.ids
  text = tokens(shape, batch, length)
  data = {"input_ids": text, "attention_mask": np.ones_like(text)}
  step = make_train_step_ttt(llama_forward, config, draft_config, STEPS)
  arguments = (
    flat("", head, names), weights, jnp.asarray(ids, jnp.int32), build_t2d_map(ids, vocab, draft),
    data,
  )  # fmt: skip
  return step, arguments, lambda out: out[1]


def measure(system: str, repeats: int, **options) -> dict:
  """One system in this process: compile, run, report."""
  import jax
  import numpy as np

  make = {"jaxdec": jaxdec_step, "specjax": specjax_step}[system]
  step, arguments, read = make(**options)
  arguments = jax.block_until_ready(jax.tree.map(jax.numpy.asarray, arguments))
  start = time.perf_counter()
  compiled = step.lower(*arguments).compile()
  compile_seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  losses = np.asarray(jax.device_get(read(compiled(*arguments))), float).round(5).tolist()
  seconds, cpu_seconds = [], []
  for _ in range(repeats):
    start = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(*arguments))
    seconds.append(time.perf_counter() - start[0])
    cpu_seconds.append(time.process_time() - start[1])
  return {
    "system": system,
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
    "compile_seconds": compile_seconds,
    "temporary_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
    "rss_bytes_compiled": before * 1024,
    "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "losses": losses,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--specjax", help="folder of a checkout of SpecJAX")
  parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
  parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--length", type=int, default=2048)
  parser.add_argument("--repeats", type=int, default=3, help="timed steps of a process")
  parser.add_argument("--rounds", type=int, default=3, help="processes of each system, in turn")
  parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    result = measure(
      args.one, args.repeats, shape=args.shapes[0], batch=args.batch, length=args.length,
      dtype=args.dtypes[0], specjax=args.specjax,
    )  # fmt: skip
    print("RESULT " + json.dumps(result))
    return
  rows = []
  systems = ("jaxdec", "specjax") if args.specjax else ("jaxdec",)
  for shape in args.shapes:
    for dtype in args.dtypes:
      runs = {system: [] for system in systems}
      for _ in range(args.rounds):
        for system in systems:
          runs[system].append(_process(system, shape, dtype, args))
      rows += [_summary(shape, dtype, args, runs[system]) for system in systems]
      _check_losses(rows[-len(systems) :])
      print(json.dumps(rows[-len(systems) :], indent=1))
  _write(rows, args)


def _process(system: str, shape: str, dtype: str, args) -> dict:
  command = [
    sys.executable, __file__, "--one", system, "--shapes", shape, "--dtypes", dtype,
    "--batch", str(args.batch), "--length", str(args.length), "--repeats", str(args.repeats),
    *(("--specjax", args.specjax) if args.specjax else ()),
  ]  # fmt: skip
  out = subprocess.run(command, capture_output=True, text=True, env=os.environ)
  lines = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
  if not lines:
    raise SystemExit(f"{system} failed:\n{out.stdout[-2000:]}{out.stderr[-4000:]}")
  return json.loads(lines[0].removeprefix("RESULT "))


def _summary(shape: str, dtype: str, args, runs: list[dict]) -> dict:
  best = [min(r["seconds"]) for r in runs]
  last = runs[-1]
  return {
    "shape": shape,
    "dtype": dtype,
    "system": last["system"],
    "tokens_per_s": args.batch * args.length / statistics.median(best),
    "tokens_per_s_range": [args.batch * args.length / x for x in (max(best), min(best))],
    "cpu_s_per_step": statistics.median(min(r["cpu_seconds"]) for r in runs),
    "memory_mb": sum(last[f"{k}_bytes"] for k in ("temporary", "argument", "output")) / 1e6,
    **{f"{k}_mb": last[f"{k}_bytes"] / 1e6 for k in ("temporary", "argument", "output", "rss")},
    "compile_s": last["compile_seconds"],
    "losses": last["losses"],
  }


def _check_losses(rows: list[dict]) -> None:
  """Both have computed the same thing (SpecJAX counts one slot more a depth, and divides by all).

  A draft vocabulary changes what is divided by, not the ratio of depths.
  """
  if len(rows) < 2:
    return
  ours, theirs = ([x / r["losses"][0] for x in r["losses"]] for r in rows)
  worst = max(abs(a / b - 1) for a, b in zip(ours, theirs))
  rows[1]["loss_ratio_error"] = worst
  if worst > 0.05:
    raise SystemExit(f"the losses differ: {rows[0]['losses']} and {rows[1]['losses']}")


def _write(rows: list[dict], args) -> None:
  import jaxdec
  from jaxdec.report import machine

  lines = [
    "| shape | type | system | tokens/s | range | CPU seconds a step | step's memory, MB | "
    "of it temporary | largest process, MB |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for r in rows:
    low, high = r["tokens_per_s_range"]
    lines.append(
      f"| {r['shape']} | {r['dtype']} | {r['system']} | {r['tokens_per_s']:,.0f} | {low:,.0f} to "
      f"{high:,.0f} | {r['cpu_s_per_step']:.2f} | {r['memory_mb']:,.0f} | "
      f"{r['temporary_mb']:,.0f} | {r['rss_mb']:,.0f} |"
    )
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "table.md").write_text("\n".join(lines) + "\n")
  facts = {
    "machine": machine.describe(),
    "jaxdec": jaxdec.__version__,
    "batch": args.batch,
    "length": args.length,
    "steps": STEPS,
    "rows": rows,
  }
  (args.out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
  main()
