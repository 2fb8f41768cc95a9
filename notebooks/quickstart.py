# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # jaxdec in ten minutes
#
# A language model writes one token per pass. A *draft head* is a small network on top of it that
# guesses the next few tokens; the model then checks all guesses in **one** pass and keeps those
# that it would have written itself. The text is the same, token for token, in fewer passes.
#
# This notebook does the whole story on a plain CPU: load a small model of Python code, distill a
# Hydra head for it on the standard library of this interpreter, decode with it, and plot.

# %% [markdown]
# ## Install
#
# On Colab, JAX is there already, built for the machine's accelerator. The cell below keeps it: it
# pins the installed `jax` and `jaxlib` while it installs the rest. Set `JAXDEC_SOURCE` to the
# address (`git+https://...`) or folder of the repository where jaxdec is not installed yet.

# %%
# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile

if importlib.util.find_spec("jaxdec") is None:
  pins = [
    f"{name}=={importlib.metadata.version(name)}"
    for name in ("jax", "jaxlib")
    if importlib.util.find_spec(name) is not None
  ]
  constraints = os.path.join(tempfile.mkdtemp(), "constraints.txt")
  with open(constraints, "w") as file:
    file.write("\n".join(pins) + "\n")
  source = os.environ.get("JAXDEC_SOURCE", "..")
  subprocess.run(
    [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints, source],
    check=True,
  )

# %% [markdown]
# ## Settings
#
# `JAXDEC_FAST=1` runs every cell with very little training, as the test suite does.

# %%
FAST = os.environ.get("JAXDEC_FAST") == "1"
STEPS = 4 if FAST else 400  # of distillation
BATCH_SIZE, SEQ_LEN = (2, 64) if FAST else (8, 256)
NUM_PROMPTS = 2 if FAST else 6
NEW_TOKENS = 24 if FAST else 128
TEMPERATURES = (0.0,) if FAST else (0.0, 1.0)

# %% [markdown]
# ## Load
#
# The model comes with the package, in Hugging Face layout. `jaxdec.load("folder")` loads any other
# model of the Llama, Mistral, Qwen, Gemma and Phi-3 families in the same way.

# %%
import jaxdec

lm = jaxdec.tiny()
print(f"{lm.config.num_layers} layers, width {lm.config.dim}, {lm.config.vocab_size} tokens")

out = lm.generate(["def fib(n):"], max_new_tokens=NEW_TOKENS)
print("def fib(n):" + out.text[0])

# %% [markdown]
# ## Distill
#
# A Hydra head drafts four tokens, each knowing the drafts before it. It learns from the training
# split; the frozen model runs in the same compiled step. Afterwards its accuracy is measured on the
# validation split, and from that follows which tree of 16 guesses pays best.

# %%
from jaxdec.distillation import DistillConfig, distill
from jaxdec.training import OptimizerConfig, TrainerConfig

run = tempfile.mkdtemp(prefix="jaxdec_quickstart_")
job = DistillConfig(
  drafter="hydra",
  options={"share_head": True},
  data="python_stdlib",
  batch_size=BATCH_SIZE,
  seq_len=SEQ_LEN,
  num_nodes=16,
  trainer=TrainerConfig(
    work_dir=run,
    steps=STEPS,
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=STEPS // 10),
  ),
)
hydra = distill(lm.model, lm.params, lm.tokenizer, job)
print(f"a tree of {hydra.drafter.num_nodes} nodes, saved in {run}")

# %% [markdown]
# ## Decode
#
# Prompts are cut from files of the test split, which neither the model nor the head has seen. All
# ways of decoding take turns on the same prompts, and their texts are compared with plain decoding.

# %%
from jaxdec import bench, drafting
from jaxdec.data import cut_prompts, open_source

prompts = cut_prompts(open_source("python_stdlib", "test"), lm.tokenizer, NUM_PROMPTS)
rows = bench.run(
  lm.model,
  lm.params,
  [
    bench.Arm("prompt lookup", drafting.get("prompt_lookup")),
    bench.Arm("hydra", hydra.drafter, hydra.params),
  ],
  [prompt.tokens for prompt in prompts],
  bench.BenchConfig(max_new_tokens=NEW_TOKENS, temperatures=TEMPERATURES, repeats=1 if FAST else 3),
)
print(bench.table(rows).markdown())
assert all(row["all_identical"] for row in rows)

# %% [markdown]
# The folder of the run is a drafter's name, too. At any temperature the text is the one that plain
# decoding writes from the same seed.

# %%
plain = lm.generate(["class Stack:"], max_new_tokens=NEW_TOKENS, temperature=0.8, seed=1)
fast = lm.generate(
  ["class Stack:"],
  max_new_tokens=NEW_TOKENS,
  temperature=0.8,
  seed=1,
  drafter=run,
)
assert fast.tokens == plain.tokens
print(f"{fast.stats.tokens_per_step:.2f} tokens per pass, the same text:")
print("class Stack:" + fast.text[0])

# %% [markdown]
# ## Plot

# %%
from IPython.display import Image, display

from jaxdec.report import plots

display(Image(filename=plots.curves([run], os.path.join(run, "training.png"))))
display(Image(filename=plots.benchmark(rows, os.path.join(run, "decoding.png"))))
