# SPDX-License-Identifier: Apache-2.0
"""One frozen dataclass a command: its options, their defaults and their help.

Standard library and tyro's markers only: a wrong option is answered before JAX is imported.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Sampling:
  """The sampling law, shared by every command that decodes."""

  temperature: float = 0.0
  """0 is greedy."""
  top_k: int | None = None
  """Keep the k likeliest tokens."""
  top_p: float | None = None
  """Keep the smallest set of tokens of at least this probability."""
  min_p: float | None = None
  """Drop tokens less likely than this fraction of the likeliest."""
  seed: int = 0
  """Row i draws from fold_in(seed, i)."""


@dataclasses.dataclass(frozen=True)
class Demo:
  """The whole story on this machine: distill draft heads for a small model, decode with them."""

  output: str = "demo_results"
  """Results go into the next numbered folder below this one."""
  minutes: float = 7.0
  """Time for everything; training gets what decoding leaves of it."""
  prompts: int = 8
  """Prompts cut from test-split files."""
  max_new_tokens: int = 128
  """Tokens per prompt."""
  repeats: int = 3
  """Timed passes per drafter."""
  steps: int | None = None
  """Training steps of each drafter, instead of as many as the time allows."""
  seed: int = 0
  """Seed of training and sampling."""


@dataclasses.dataclass(frozen=True)
class Generate(Sampling):
  """Continue prompts with a model and a drafter; the text is the same with any drafter."""

  model: str = "tiny"
  """Folder in Hugging Face layout, or 'tiny' for the model that comes with the package."""
  prompt: Texts = ()
  """Text to continue; repeat the option for more prompts."""
  prompts: str | None = None
  """JSONL file with one {"prompt": ...} a line, instead of --prompt."""
  drafter: str | None = None
  """Drafter name, or the folder of a distilled run; nothing for plain decoding."""
  max_new_tokens: int = 128
  """Upper limit on new tokens per prompt."""
  stop: Texts = ()
  """String that ends the text, besides the model's own end tokens; may be repeated."""
  dtype: Dtype = "float32"
  """Weights and activations; 'auto' keeps what the files hold."""
  stream: bool = False
  """Print tokens while they are decoded."""
  stats: bool = True
  """Print what the decoding cost, on standard error."""


@dataclasses.dataclass(frozen=True)
class Distill:
  """Train a drafter for a model, which stays as it is."""

  model: str = "tiny"
  """Folder in Hugging Face layout, or 'tiny'."""
  drafter: str = "hydra"
  """Any drafter that is trained, such as medusa, hydra, eagle3 (a wrong name lists all)."""
  data: str = "python_stdlib"
  """python_stdlib, a folder (or file) of .txt, .py, .md or .jsonl, a JSONL file whose lines are
  {"messages": [...]}, what `jaxdec regenerate` wrote, or a mixture such as
  '0.7*answers + 0.3*python_stdlib'."""
  work_dir: str | None = None
  """Folder of the run, by default a new one below runs/; one that holds this run is resumed."""
  steps: int = 1000
  """Optimizer steps."""
  num_heads: int = 4
  """Draft depths that are trained."""
  tree_nodes: int = 16
  """Nodes of the draft tree that is chosen afterwards, root included."""
  objective: str | None = None
  """soft (the model's distributions), hard (the text), or another term; by default the method's
  own, and soft for medusa and hydra."""
  options: tuple[str, ...] = ()
  """Other settings of the drafter, NAME=VALUE each, such as num_blocks=2 depth_decay=0.9."""
  own_heads: bool = False
  """An LM head of its own for each depth (medusa, hydra) instead of the target's."""
  joint: Literal["kl", "hard"] | None = None
  """Medusa-2: after the heads (in WORK_DIR-heads) the model learns too, for --steps more; kl holds
  it to what it says now, hard to the text. Writes a new model, WORK_DIR/target."""
  batch_size: int = 8
  """Sequences per step."""
  seq_len: int = 256
  """Tokens per sequence."""
  learning_rate: float = 1e-3
  """Peak learning rate."""
  dtype: Dtype = "float32"
  """Activations of target and drafter."""
  mesh: str = "data=1"
  """Devices per axis, such as data=2,fsdp=2,tensor=2."""
  checkpoint_every: int = 500
  """Steps between checkpoints."""
  log_every: int | None = None
  """Steps between reports; by default about twenty reports a run."""
  tensorboard: bool = False
  """Also write TensorBoard events."""
  acceptance_every: int | None = None
  """Steps between measurements of real tokens per step, by decoding held-out prompts."""
  teacher: Literal["online", "streamed", "cached"] = "online"
  """The model runs in the training step, ahead of it, or once for all epochs, kept on disk."""
  teacher_dtype: Literal["float32", "bfloat16"] = "float32"
  """Of streamed and cached states."""
  seed: int = 0
  """Seed of initial parameters and data order."""


@dataclasses.dataclass(frozen=True)
class Regenerate(Sampling):
  """Let a model answer prompts: training data for its drafters (distill --data OUTPUT)."""

  model: str = "tiny"
  """Folder in Hugging Face layout, or 'tiny'."""
  data: str = "python_stdlib"
  """JSONL file of {"messages": [...]} or {"prompt": "..."} lines, whose assistant turns are written
  anew; or a data source to cut prompts from (see --num-prompts)."""
  output: str = "regenerated"
  """Folder of the answers; one that holds the same run is continued."""
  num_prompts: int | None = None
  """Prompts to answer: the first of a JSONL file (all by default), or cut from a data source."""
  prompt_tokens: int = 64
  """Tokens of a prompt that is cut from a data source."""
  max_new_tokens: int = 512
  """Upper limit on the tokens of an answer."""
  batch_size: int = 8
  """Prompts decoded together."""
  shards: int = 1
  """Files, which several processes can share."""
  drafter: str | None = None
  """Drafter name or folder: faster, the same answers."""
  dtype: Dtype = "float32"
  """Weights and activations; 'auto' keeps what the files hold."""
  process_id: int = 0
  """This process's number, where several share the files; each needs its own accelerator."""
  num_processes: int = 1
  """How many processes share the files."""


@dataclasses.dataclass(frozen=True)
class Convert:
  """Rewrite a draft head in another layout: ours, or one that servers read."""

  output: tyro.conf.Positional[str]
  """Folder to write."""
  drafter: str
  """Folder of a distilled run, or of a draft head in any of the layouts."""
  to: str = "speculators"
  """jaxdec, speculators, medusa, medusa_original, eagle, eagle3 or dflash."""
  model: str = "tiny"
  """Folder of the model it drafts for, in Hugging Face layout, or 'tiny'."""
  verifier: str | None = None
  """Name or path of that model to write down, for layouts that hold it; by default --model."""
  dtype: Literal["float32", "bfloat16", "float16"] = "float32"
  """Stored type of the parameters."""


@dataclasses.dataclass(frozen=True)
class Datastore:
  """Index text, so that drafts are retrieved from it (generate --drafter OUTPUT)."""

  output: tyro.conf.Positional[str]
  """Folder to write."""
  data: str = "python_stdlib"
  """python_stdlib, a folder (or file) of .txt, .py, .md or .jsonl, conversations, or what
  `jaxdec regenerate` wrote."""
  split: Literal["train", "validation", "test", "all"] | None = None
  """Part of the data; by default train of python_stdlib and all of anything else."""
  model: str = "tiny"
  """Folder whose tokenizer is used, or 'tiny'; the datastore serves models with that tokenizer."""
  max_tokens: int = 10_000_000
  """Tokens indexed at most, the first documents; 8 bytes each, on disk and on the device."""


@dataclasses.dataclass(frozen=True)
class Train:
  """Train the language model of a configuration file, or resume what its folder holds."""

  config: tyro.conf.Positional[str]
  """Python file with get_config(), such as experiments/lasp2/config.py, or file.py:preset."""
  work_dir: str | None = None
  """Folder of the run, by default the configuration's or a new one below runs/; one that holds this
  run is resumed."""
  steps: int | None = None
  """Optimizer steps, instead of the configuration's."""
  mesh: str | None = None
  """Devices per axis, such as fsdp=8,seq=4, instead of the configuration's."""
  data: str | None = None
  """python_stdlib, tfds:NAME, or a folder (or file) of text, instead of the configuration's."""
  seed: int | None = None
  """Seed of initial parameters and data order, instead of the configuration's."""
  profile: str | None = None
  """Steps to profile, such as 100:105, into the run's folder."""
  coordinator: str | None = None
  """host:port of process 0, for several processes outside Cloud TPU and SLURM."""
  num_processes: int | None = None
  """Number of processes, with --coordinator."""
  process_id: int | None = None
  """This process's number, with --coordinator."""


@dataclasses.dataclass(frozen=True)
class Bench:
  """Decode the same prompts with several drafters, side by side with plain decoding."""

  model: str = "tiny"
  """Folder in Hugging Face layout, or 'tiny'."""
  drafters: str = "prompt_lookup,token_recycling"
  """Names or folders, separated by commas; autoregressive decoding is always the first arm. 'auto':
  what the tuner chooses."""
  explain: bool = False
  """Print what the tuner measures and chooses here, and why."""
  prompts: str | None = None
  """JSONL file with one {"prompt": ...} a line; test-split files of python_stdlib if not given."""
  num_prompts: int = 8
  """Prompts to use."""
  max_new_tokens: int = 128
  """Tokens per prompt."""
  temperatures: tuple[float, ...] = (0.0, 1.0)
  """One block of the table for each."""
  repeats: int = 3
  """Timed passes per arm, alternating; medians are reported."""
  batch_size: int = 1
  """Prompts decoded together."""
  dtype: Dtype = "float32"
  """Weights and activations."""
  output: str = "bench_results"
  """Results go into the next numbered folder below this one."""
  seed: int = 0
  """Seed of sampling."""


@dataclasses.dataclass(frozen=True)
class Verify(Sampling):
  """The losslessness certificate of a target, a drafter and a sampler."""

  model: str = "tiny"
  """Folder in Hugging Face layout, or 'tiny'."""
  drafter: str = "prompt_lookup"
  """Drafter name, or the folder of a distilled run."""
  temperature: float = 1.0
  """Temperature of the sampled checks; greedy decoding is always checked too."""
  prompts: str | None = None
  """JSONL file with one {"prompt": ...} a line; test-split files of python_stdlib if not given."""
  num_prompts: int = 8
  """Prompts for the equality checks."""
  max_new_tokens: int = 64
  """Tokens per prompt in the equality checks."""
  draws: int = 4096
  """Independent generations for the distribution test."""
  dtype: Dtype = "float32"
  """bfloat16 adds the gap report; equality is demanded in float32."""
  output: str = "verify_results"
  """The certificate goes into the next numbered folder below this one."""


@dataclasses.dataclass(frozen=True)
class Doctor:
  """Versions, devices, usable kernels, memory, and a compilation; works on any machine."""

  json: bool = False
  """Print the findings as JSON."""


@dataclasses.dataclass(frozen=True)
class Plot:
  """Plot the metrics of one or more runs into one picture."""

  runs: tyro.conf.Positional[tuple[str, ...]] = ()
  """Run folders."""
  output: str = "runs.png"
  """Picture to write; an existing file is kept and a number is added to the name."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run will need on a TPU slice: memory, collectives, time; compiled without a TPU."""

  config: tyro.conf.Positional[str]
  """Python file with get_config(), such as experiments/plan/config.py:2m."""
  topology: str
  """Slice in chips, such as v5p:4x4x8, v5e:16x16, or v5e:16x16*2 for two slices."""
  step: Literal["train", "decode"] = "train"
  """The trainer's step, or one new token of every sequence."""
  mesh: str | None = None
  """Devices per axis, such as fsdp=8,seq=16, instead of the configuration's."""
  batch_size: int | None = None
  """Sequences in all, instead of the configuration's."""
  seq_len: int | None = None
  """Tokens per sequence, instead of the configuration's."""
  cache_length: int | None = None
  """Positions of the cache of --step decode; by default the sequence length."""
  price: float | None = None
  """Price of a chip-hour, in any currency."""
  json: bool = False
  """Print everything as JSON."""


COMMANDS: dict[str, type] = {
  "demo": Demo,
  "generate": Generate,
  "train": Train,
  "plan": Plan,
  "distill": Distill,
  "regenerate": Regenerate,
  "convert": Convert,
  "datastore": Datastore,
  "bench": Bench,
  "verify": Verify,
  "plot": Plot,
  "doctor": Doctor,
}
