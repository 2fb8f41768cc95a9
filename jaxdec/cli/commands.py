# SPDX-License-Identifier: Apache-2.0
"""One function a command: call the library, print. What is heavy is imported where it is used."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxdec.cli import configs
from jaxdec.cli.checks import mesh_axes, texts
from jaxdec.errors import UserError


def _console(stderr: bool = False):
  from rich.console import Console

  return Console(stderr=stderr, highlight=False)


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _load(model: str, dtype: str = "float32", mesh: Any = None):
  from jaxdec import lm

  dtype = None if dtype == "auto" else dtype
  if mesh is None and model == "tiny":
    return lm.tiny(dtype)
  return lm.load(lm.TINY if model == "tiny" else model, dtype, mesh)


def _sampler(config: configs.Sampling):
  from jaxdec.decoding import Sampler

  return Sampler(config.temperature, config.top_k, config.top_p, config.min_p)


def _prompt_ids(lm: Any, path: str | None, count: int, split: str = "test") -> list[list[int]]:
  """Prompts of a file, or cut from files of a split of the standard library."""
  if path is not None:
    return [list(lm.tokenizer.encode(text)) for text in texts((), path)[:count]]
  from jaxdec.data import cut_prompts, open_source

  cut = cut_prompts(
    open_source("python_stdlib", split), lm.tokenizer, count, min_tokens=64, max_tokens=64
  )
  return [list(prompt.tokens) for prompt in cut]


def doctor(config: configs.Doctor) -> int:
  from jaxdec import doctor as lib

  findings = lib.examine()
  if config.json:
    print(json.dumps([dataclasses.asdict(f) for f in findings], indent=2))
    return int(any(f.status == "fail" for f in findings))
  return lib.report(findings, _console().print)


def plot(config: configs.Plot) -> int:
  from jaxdec.report.plots import curves

  path = Path(config.output)
  number = 1
  while path.exists():
    number += 1
    path = Path(config.output).with_stem(f"{Path(config.output).stem}-{number}")
  path.parent.mkdir(parents=True, exist_ok=True)
  print(f"wrote {curves(config.runs, path)}")
  return 0


def generate(config: configs.Generate) -> int:
  prompts = texts(config.prompt, config.prompts)
  lm = _load(config.model, config.dtype)
  options: dict[str, Any] = dict(
    max_new_tokens=config.max_new_tokens, drafter=config.drafter, seed=config.seed,
    temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
  )  # fmt: skip
  if config.stop:
    options["stop"] = list(config.stop)
  if config.stream:
    if len(prompts) > 1:
      raise UserError(f"--stream prints one text at a time, got {len(prompts)} prompts")

    def show(piece: Any) -> None:
      print(piece.text or "", end="", flush=True)

    print(prompts[0], end="")
    out = lm.generate(prompts, stream=show, **options)
    print()
  else:
    out = lm.generate(prompts, **options)
    for prompt, text in zip(prompts, out.text):
      print(prompt + text)
  if config.stats:
    stats = out.stats
    _say(
      f"{stats.new_tokens} tokens, {stats.target_passes} target passes, "
      f"{stats.tokens_per_step:.2f} tokens per step, {stats.tokens_per_second:.0f} tokens/s "
      f"(compilation apart: {stats.compile_seconds:.1f} s)"
    )
  return 0


def bench(config: configs.Bench) -> int:
  from jaxdec import bench as lib
  from jaxdec.report import numbered

  lm = _load(config.model, config.dtype)
  names = [name.strip() for name in config.drafters.split(",") if name.strip()]
  arms = [_arm(lm, name) for name in names if name not in ("none", "auto")]
  prompts = _prompt_ids(lm, config.prompts, config.num_prompts)
  settings = lib.BenchConfig(
    max_new_tokens=config.max_new_tokens, temperatures=config.temperatures, repeats=config.repeats,
    batch_size=config.batch_size, seed=config.seed,
  )  # fmt: skip
  console = _console()
  with console.status("starting") as status:
    if "auto" in names or config.explain:
      tuned = _tuned(lm, config, prompts, {arm.name: (arm.drafter, arm.params) for arm in arms},
                     status.update)  # fmt: skip
      if config.explain:
        console.print(tuned.explain(), markup=False)
      if "auto" in names:
        arms.append(lib.Arm("auto", tuned.drafter, tuned.params))
    rows = lib.run(lm.model, lm.params, arms, prompts, settings, tick=status.update)
  console.print(lib.table(rows).rich())
  folder = numbered(config.output)
  lib.write(rows, folder, title=f"{config.model}, batch {config.batch_size}",
                     command=_command(), config=dataclasses.asdict(config))  # fmt: skip
  print(f"wrote table.md, results.json and plot.png into {folder}")
  return 0 if all(row["all_identical"] for row in rows) else 1


def _tuned(lm: Any, config: configs.Bench, prompts: list, others: dict, tick: Any):
  """What the tuner chooses on the prompts of a file, or on others than the bench's own."""
  from jaxdec.decoding import Sampler
  from jaxdec.tuner import tune

  if config.prompts is None:
    prompts = _prompt_ids(lm, None, config.batch_size, split="validation")
  sampler = Sampler(temperature=config.temperatures[0])
  return tune(
    lm.model, lm.params, prompts[: config.batch_size], sampler=sampler, candidates=others, tick=tick
  )


def _arm(lm: Any, name: str):
  from jaxdec.bench import Arm

  drafter, params = lm.drafter(name)
  return Arm(Path(name).name, drafter, params, warm_start=drafter.name == "token_recycling")


def verify(config: configs.Verify) -> int:
  from jaxdec import certify as lib
  from jaxdec.report import numbered, plain

  lm = _load(config.model, config.dtype)
  drafter, params = lm.drafter(config.drafter)
  prompts = _prompt_ids(lm, config.prompts, config.num_prompts)
  settings = lib.CertifyConfig(
    sampler=_sampler(config), max_new_tokens=config.max_new_tokens, draws=config.draws,
    seed=config.seed,
  )  # fmt: skip
  console = _console()
  with console.status("starting") as status:
    out = lib.certify(lm.model, lm.params, drafter, params, prompts, settings, tick=status.update)
  for line in lib.summary(out):
    console.print(line, markup=False)
  folder = numbered(config.output)
  content = {"model": config.model, "drafter": config.drafter, "command": _command(), **out}
  text = json.dumps(plain(content), indent=2, allow_nan=False) + "\n"
  (folder / "certificate.json").write_text(text, encoding="utf-8")
  print(f"wrote {folder / 'certificate.json'}")
  return 0 if out["lossless"] else 1


def demo(config: configs.Demo) -> int:
  from jaxdec import demo as lib

  settings = lib.DemoConfig(**dataclasses.asdict(config))
  return lib.run(settings, _console(), command=_command())


def distill(config: configs.Distill) -> int:
  from jaxdec.cli.distilling import run
  from jaxdec.parallel import make_mesh
  from jaxdec.parallel.distributed import fail_fast, initialize

  axes = mesh_axes(config.mesh)
  initialize()
  with fail_fast():
    return run(config, axes, _load(config.model, config.dtype, make_mesh(**axes)))


def regenerate(config: configs.Regenerate) -> int:
  from jaxdec.regenerate import RegenerateConfig
  from jaxdec.regenerate import regenerate as run

  fields = dataclasses.asdict(config)
  model, dtype = fields.pop("model"), fields.pop("dtype")
  settings = RegenerateConfig(**fields)
  done = run(_load(model, dtype), settings)
  print(
    f"{done.found + done.rows} prompts answered ({done.found} of them before, {done.left_out} too "
    f"long), {done.tokens_per_step:.2f} tokens per step; train on them with\n"
    f"  jaxdec distill --model {model} --data {config.output}"
  )
  return 0


def convert(config: configs.Convert) -> int:
  from jaxdec.drafting import Target
  from jaxdec.drafting.checkpoint import save_drafter
  from jaxdec.io import folders
  from jaxdec.io.drafters import write_drafter

  lm = _load(config.model)
  drafter, params = lm.drafter(config.drafter)
  if config.to == "jaxdec":
    folders.check_target(config.output, False)
    save_drafter(config.output, drafter, params, Target(lm.model, lm.params, None))
  else:
    write_drafter(
      config.output, drafter, params, layout=config.to, target=lm.config,
      verifier=config.verifier or config.model, dtype=config.dtype,
    )  # fmt: skip
  print(f"wrote the {drafter.name} drafter in {config.drafter} as {config.to} to {config.output}")
  return 0


def datastore(config: configs.Datastore) -> int:
  from jaxdec import lm
  from jaxdec.data.mixture import load_source
  from jaxdec.io.datastore import build_datastore, save_datastore
  from jaxdec.io.tokenizers import load_tokenizer

  tokenizer = load_tokenizer(lm.TINY if config.model == "tiny" else Path(config.model).expanduser())
  split = config.split or ("train" if config.data == "python_stdlib" else "all")
  corpus = load_source(config.data, split, tokenizer)
  documents, left = [], config.max_tokens
  for number in range(len(corpus)):
    if left <= 0:
      break
    documents.append(corpus[number][:left])
    left -= len(documents[-1])
  params = build_datastore(documents)
  extra = {"data": config.data, "split": split, "documents": len(documents)}
  save_datastore(config.output, params, tokenizer, extra)
  cut = "" if left > 0 else f" (cut at --max-tokens {config.max_tokens:,})"
  print(
    f"indexed {len(params['order']):,} tokens of {len(documents):,} documents{cut}; draft from "
    f"them with\n  jaxdec generate --model {config.model} --drafter {config.output} --prompt ..."
  )
  return 0


def plan(config: configs.Plan) -> int:
  from jaxdec.cli.planning import run

  return run(config, _console())


def train(config: configs.Train) -> int:
  from jaxdec.cli.training import run

  return run(config)


def _command() -> str:
  import shlex

  return shlex.join(["jaxdec", *sys.argv[1:]])
