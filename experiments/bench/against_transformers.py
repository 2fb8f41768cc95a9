# SPDX-License-Identifier: Apache-2.0
"""Autoregressive decoding against transformers: tokens/s on the same weights and cores.

Command:   python experiments/bench/against_transformers.py   (needs the `compare` extra)
Expected:  on 2 cores, float32, batch 1, greedy: at least 2.0x on the embedded model and 1.0x on a
           134M-parameter Llama shape.

The embedded model reads prompts cut from test-split files; the large shape has random weights and
random prompts. Both decode greedily with a cache; transformers runs its own ``generate`` with its
default attention (SDPA) and two threads. A time is that of the whole call, prefill included.
Compilation and the first call of either side are left out; the arms alternate, so that a change of
the machine's load meets both; medians. Tokens are compared too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import jaxdec
from jaxdec.data import cut_prompts, open_source
from jaxdec.lm import TINY
from jaxdec.models import Decoder, DecoderConfig, tiny_llama
from jaxdec.report import Column, Table, describe, plain, versions

RESULTS = Path(__file__).parent / "results"
SHAPES = {
  "embedded": None,  # the model as it ships
  # 134.1M parameters: 12 blocks of 7.08M and two tables of 24.6M.
  "llama_134m": lambda: tiny_llama(
    vocab_size=32_000, dim=768, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64,
    hidden_dim=2048, tie_embeddings=False,
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """prompt_tokens, new_tokens: of every call. repeats: timed calls per arm. threads: of torch."""

  prompt_tokens: int = 64
  new_tokens: int = 128
  repeats: int = 5
  threads: int = 2


def make_prompts(lm: jaxdec.LM, config: Config) -> np.ndarray:
  """Token ids ``[repeats + 1, 1, prompt_tokens]``: real text where the model has a tokenizer."""
  size = config.prompt_tokens
  if lm.tokenizer is None:
    rng = np.random.default_rng(0)
    return rng.integers(0, lm.config.vocab_size, (config.repeats + 1, 1, size))
  prompts = cut_prompts(
    open_source("python_stdlib", "test"), lm.tokenizer, config.repeats + 1, min_tokens=size,
    max_tokens=size,
  )  # fmt: skip
  return np.asarray([[prompt.tokens] for prompt in prompts])


def make_folder(config: DecoderConfig, folder: Path) -> None:
  """Random weights in Hugging Face layout."""
  init = jax.jit(lambda key: Decoder(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"])
  params = nn.unbox(init(jax.random.key(0)))
  jaxdec.save(jaxdec.LM(Decoder(config), params), folder)


def measure(name: str, config: Config) -> dict:
  """One row: both arms on one shape."""
  import torch
  import transformers

  torch.set_num_threads(config.threads)
  with tempfile.TemporaryDirectory() as folder:
    path = TINY
    if SHAPES[name] is not None:
      path = Path(folder) / "model"
      make_folder(SHAPES[name](), path)
    ours = jaxdec.load(path, dtype="float32", need_tokenizer=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
  count = sum(x.size for x in jax.tree.leaves(ours.params))
  prompts = make_prompts(ours, config)

  def run_ours(prompt):
    return ours.generate(prompt.tolist(), max_new_tokens=config.new_tokens, stop=None).tokens[0]

  def run_theirs(prompt):
    ids = torch.from_numpy(prompt.astype(np.int64))
    with torch.inference_mode():
      out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
        pad_token_id=0, max_new_tokens=config.new_tokens,
      )  # fmt: skip
    return out[0, prompt.shape[1] :].tolist()

  arms = {"ours": run_ours, "theirs": run_theirs}
  seconds: dict[str, list[float]] = {arm: [] for arm in arms}
  agreed = 0
  for i, prompt in enumerate(prompts):  # the first prompt warms up
    tokens = {}
    for arm in arms if i % 2 else reversed(arms):
      start = time.perf_counter()
      tokens[arm] = arms[arm](prompt)
      elapsed = time.perf_counter() - start
      if i:
        seconds[arm].append(elapsed)
    agreed += bool(i) and tokens["ours"] == tokens["theirs"]
  rates = {arm: config.new_tokens / statistics.median(times) for arm, times in seconds.items()}
  return {
    "shape": name, "parameters": count, "ours": rates["ours"], "transformers": rates["theirs"],
    "ratio": rates["ours"] / rates["theirs"], "identical": f"{agreed} of {config.repeats}",
    "seconds": seconds,
  }  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
  parser.add_argument("--output", type=Path, default=RESULTS)
  for field in dataclasses.fields(Config):
    parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
  arguments = vars(parser.parse_args())
  shapes, output = arguments.pop("shapes"), arguments.pop("output")
  config = Config(**arguments)
  rows = [measure(name, config) for name in shapes]
  table = Table(
    [
      Column("shape", "shape", align="left"),
      Column("parameters", "parameters", ",d"),
      Column("ours", "jaxdec tokens/s", ".0f"),
      Column("transformers", "transformers tokens/s", ".0f"),
      Column("ratio", "ratio", ".2f"),
      Column("identical", "same tokens"),
    ],
    rows,
  )
  print(table.markdown())
  output.mkdir(parents=True, exist_ok=True)
  record = {
    "command": " ".join(["python", "experiments/bench/against_transformers.py", *sys.argv[1:]]),
    "config": dataclasses.asdict(config), "rows": rows, "machine": describe(),
    "versions": versions(("jax", "jaxlib", "flax", "numpy", "torch", "transformers")),
  }  # fmt: skip
  path = output / "against_transformers.json"
  path.write_text(json.dumps(plain(record), indent=2) + "\n", encoding="utf-8")
  (output / "against_transformers.md").write_text(table.markdown() + "\n", encoding="utf-8")
  print(f"wrote {path}")


if __name__ == "__main__":
  main()
