# SPDX-License-Identifier: Apache-2.0
"""Answers written by the target itself, as training data for its drafters.

A drafter guesses what its target will say, so it learns best from what the target says: prompts
(plain, or conversations whose assistant turns are written anew, one after the other) go through
``jaxdec.decoding.generate`` in batches. A drafter makes that faster and changes nothing.

The output is JSONL, a file for each part of the prompts. A batch is appended as whole lines and
forced to the disk before the next one begins, and which prompts form a batch is a function of the
settings alone; so a run that was killed cuts off its last unfinished batch and goes on, and ends
with the bytes of one that was not. (An array_record file is finished by its footer: killed, it
would lose all it holds.) Several processes share the work without talking: process p of P makes the
files p, p + P, ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdec.data.chat import ChatTemplate, Conversation, parse_conversation, read_lines
from jaxdec.data.regenerated import (
  HEAD,
  is_regenerated,
  read_head,
  shard_name,
  shard_rows,
  tokenizer_hash,
)
from jaxdec.errors import UserError

_FORMAT = "jaxdec-regenerated-1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegenerateConfig:
  """Who is asked what, and where the answers go.

  Attributes:
    data: a JSONL file of ``{"messages": [...]}`` or ``{"prompt": "..."}`` lines; or another data
      source (``jaxdec.data.open_source``), from whose training split ``num_prompts`` prompts of
      ``prompt_tokens`` tokens are cut.
    output: folder; one that holds the same run is continued.
    num_prompts: of a JSONL file: the first so many; None: all of them.
    max_new_tokens: of each answer. A conversation ends where the model's limit leaves no room for
      one more; a prompt without room for one is left out.
    temperature, top_k, top_p, min_p, seed: the sampling law. An answer depends on the seed, the
      prompt's number and the turn.
    batch_size: prompts decoded together. shards: files.
    drafter: what ``LM.drafter`` takes; not part of the run's identity.
    process_id, num_processes: which of the files this process makes.
  """

  data: str
  output: str
  num_prompts: int | None = None
  prompt_tokens: int = 64
  max_new_tokens: int = 512
  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  seed: int = 0
  batch_size: int = 8
  shards: int = 1
  drafter: Any = None
  process_id: int = 0
  num_processes: int = 1

  def __post_init__(self):
    for name in ("max_new_tokens", "batch_size", "shards", "num_processes", "prompt_tokens"):
      if getattr(self, name) < 1:
        raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
    if self.num_prompts is not None and self.num_prompts < 1:
      raise UserError(f"num_prompts must be at least 1, got {self.num_prompts}")
    if not 0 <= self.process_id < self.num_processes:
      raise UserError(f"process_id must be in 0..{self.num_processes - 1}, got {self.process_id}")
    if self.num_processes > self.shards:
      raise UserError(
        f"{self.num_processes} processes need as many files at least, got shards={self.shards}"
      )


@dataclasses.dataclass(frozen=True)
class Regenerated:
  """What this process did: prompts found done, prompts done now, how many of these had no room for
  an answer, tokens written now, their mean number per target pass, and seconds."""

  found: int
  rows: int
  left_out: int
  tokens: int
  tokens_per_step: float
  seconds: float


@dataclasses.dataclass
class _Row:
  """A prompt on its way: what is yet to be asked, and the documents so far."""

  index: int
  prompt: list[int] | None = None  # a plain prompt's ids
  conversation: Conversation | None = None
  messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  ahead: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  documents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  turn: int = 0

  def ask(self, lm: Any, template: ChatTemplate | None) -> list[int] | None:
    """Ids of the next prompt; None: nothing is left to ask."""
    if self.conversation is None:
      return self.prompt if self.turn == 0 else None
    while self.ahead and not (_writes(self.ahead[0]) and _asks(self.messages)):
      self.messages.append(self.ahead.pop(0))
    if not _asks(self.messages):
      return None
    self.ahead = self.ahead[1:]
    text = template.render(dataclasses.replace(self.conversation, messages=self.messages), ask=True)
    return list(lm.tokenizer.backend.encode(text, add_special_tokens=False).ids)

  def hear(self, lm: Any, asked: list[int], answer: list[int]) -> None:
    """Adds an answer; it continues the last document if that is how its prompt begins."""
    last = self.documents[-1] if self.documents else None
    if last is None or asked[: len(last["tokens"])] != last["tokens"]:
      last = {"tokens": [], "answers": []}
      self.documents.append(last)
    last["tokens"] = [*asked, *answer]
    last["answers"].append([len(asked), len(last["tokens"])])
    self.turn += 1
    self.messages.append({"role": "assistant", "content": lm.tokenizer.decode(answer)})

  def line(self, lm: Any) -> str:
    record: dict[str, Any] = {"index": self.index, "documents": self.documents}
    if self.conversation is not None:
      record["messages"] = self.messages
    elif self.documents:
      record |= {"prompt": lm.tokenizer.decode(self.prompt), "answer": self.messages[-1]["content"]}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _writes(message: dict[str, Any]) -> bool:
  """Whether the target writes this message anew; a call of a tool stays as its result expects."""
  return message["role"] == "assistant" and not message.get("tool_calls")


def _asks(messages: list[dict[str, Any]]) -> bool:
  """Whether they end with what an assistant answers."""
  return bool(messages) and messages[-1]["role"] in ("user", "tool")


def regenerate(
  lm: Any, config: RegenerateConfig, say: Callable[[str], None] = print
) -> Regenerated:
  """Writes this process's files, or what is missing of them.

  Args:
    lm: the target, a ``jaxdec.lm.LM`` with a tokenizer.
    say: called with a line of text after every batch.

  Raises:
    UserError: a mistake in the prompts, a folder of another run, or one another process works on.
  """
  begin = time.perf_counter()
  rows, digest, template = _prompts(lm, config)
  folder = Path(config.output)
  _open(folder, _head(lm, config, len(rows), digest, template))
  drafter = lm.drafter(config.drafter) if config.drafter is not None else (None, None)
  found = done = left_out = tokens = passes = 0
  for shard in range(config.process_id, config.shards, config.num_processes):
    mine = [rows[i] for i in shard_rows(len(rows), shard, config.shards)]
    path = folder / shard_name(shard, config.shards)
    with _claimed(path) as file:
      batches = _batches(mine, config.batch_size, lm, template)
      start = _resume(file, batches)
      found += sum(map(len, batches[:start]))
      for i, batch in enumerate(batches[start:], start + 1):
        before = time.perf_counter()
        wrote, steps = _answer(lm, batch, config, drafter, template)
        file.write("".join(row.line(lm) for row in batch).encode())
        file.flush()
        os.fsync(file.fileno())
        done, tokens, passes = done + len(batch), tokens + wrote, passes + steps
        left_out += sum(not row.documents for row in batch)
        rate = wrote / (time.perf_counter() - before)
        say(f"{path.name}: batch {i} of {len(batches)}, {wrote} tokens, {rate:.0f} tokens/s")
  return Regenerated(
    found, done, left_out, tokens, tokens / max(passes, 1), time.perf_counter() - begin
  )


def _prompts(lm: Any, config: RegenerateConfig) -> tuple[list[_Row], str, ChatTemplate | None]:
  """The rows, a hash of them, and the template where there are conversations."""
  if lm.tokenizer is None:
    raise UserError("regenerate needs the model's tokenizer.json")
  if Path(config.data).suffix == ".jsonl":
    rows = _from_file(lm, config)
  else:
    rows = _from_source(lm, config)
  if not rows:
    raise UserError(f"{config.data} holds no prompt")
  template = None
  if any(row.conversation is not None for row in rows):
    template = ChatTemplate.of(lm.tokenizer)
  asked = [row.prompt or [*row.ahead, row.conversation.tools] for row in rows]
  return rows, hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16], template


def _from_file(lm: Any, config: RegenerateConfig) -> list[_Row]:
  rows: list[_Row] = []
  for number, record in read_lines(config.data):
    if len(rows) == config.num_prompts:
      break
    where, index = f"{config.data}, line {number}", len(rows)
    if "messages" in record:
      conversation = parse_conversation(record, where, str(index))
      row = _Row(index, conversation=conversation, ahead=list(conversation.messages))
      if not any(_asks([message]) for message in row.ahead):
        raise UserError(f"{where}: no message has the role 'user'; nothing to answer")
      rows.append(row)
    elif isinstance(record.get("prompt"), str) and record["prompt"]:
      rows.append(_Row(index, prompt=list(lm.tokenizer.encode(record["prompt"]))))
    else:
      raise UserError(f'{where}: expected {{"messages": [...]}} or {{"prompt": "..."}}')
  return rows


def _from_source(lm: Any, config: RegenerateConfig) -> list[_Row]:
  from jaxdec.data import cut_prompts, open_source

  if config.num_prompts is None:
    raise UserError(f"say how many prompts to cut from {config.data!r}: num_prompts=...")
  length = config.prompt_tokens
  cut = cut_prompts(
    open_source(config.data, "train"), lm.tokenizer, config.num_prompts,
    min_tokens=length, max_tokens=length, seed=config.seed,
  )  # fmt: skip
  first = [] if lm.tokenizer.bos_id is None else [lm.tokenizer.bos_id]
  return [_Row(i, prompt=[*first, *prompt.tokens]) for i, prompt in enumerate(cut)]


def _head(lm, config: RegenerateConfig, rows: int, digest: str, template) -> dict[str, Any]:
  """What identifies a run. The drafter does not: it changes no token."""
  from jaxdec.drafting.checkpoint import fingerprint

  names = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "batch_size", "shards",
  )  # fmt: skip
  text = None if template is None else template.source
  return {
    "format": _FORMAT,
    "rows": rows,
    "prompts": digest,
    "target": fingerprint(lm.model, lm.params),
    "tokenizer": tokenizer_hash(lm.tokenizer),
    "template": text and hashlib.sha256(text.encode()).hexdigest()[:16],
    **{name: getattr(config, name) for name in names},
  }


def _open(folder: Path, head: dict[str, Any]) -> None:
  """Makes the folder, or finds the same run in it."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"output {str(folder)!r} is a file; give a folder")
  if not is_regenerated(folder):
    if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
      raise UserError(f"output {str(folder)!r} holds something else; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{HEAD}.{os.getpid()}"
    partial.write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    with contextlib.suppress(FileExistsError):  # another process was first
      os.link(partial, folder / HEAD)
    partial.unlink()
  old = read_head(folder)
  for key in sorted({*old, *head}):
    if old.get(key) != head.get(key):
      raise UserError(
        f"output {str(folder)!r} holds another run: {key} is {old.get(key)!r} there and "
        f"{head.get(key)!r} here; give a new folder, or the same settings to go on"
      )


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[Any]:
  """The open file, this process's alone as long as the block lasts."""
  with open(path, "a+b") as file:
    try:
      import fcntl

      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
      pass
    except BlockingIOError as error:
      raise UserError(f"{path} is being written by another process; wait for it") from error
    except OSError:
      pass  # a file system without locks
    yield file


def _batches(rows: list[_Row], size: int, lm: Any, template) -> list[list[_Row]]:
  """Rows of like lengths together, the longest first: what doesn't fit fails at once."""

  def length(row: _Row) -> int:
    if row.prompt is not None:
      return len(row.prompt)
    return sum(len(str(m.get("content") or "")) for m in row.conversation.messages) // 3

  order = sorted(rows, key=lambda row: (-length(row), row.index))
  return [order[i : i + size] for i in range(0, len(order), size)]


def _resume(file: Any, batches: list[list[_Row]]) -> int:
  """How many batches the file holds whole; what follows them is cut off."""
  file.seek(0)
  keep = 0
  for i, batch in enumerate(batches):
    for row in batch:
      line = file.readline()
      try:
        index = json.loads(line)["index"] if line.endswith(b"\n") else None
      except (ValueError, KeyError, TypeError):
        index = None
      if index != row.index:
        file.truncate(keep)
        file.seek(keep)
        return i
    keep = file.tell()
  file.truncate(keep)
  return len(batches)


def _answer(lm, batch: list[_Row], config: RegenerateConfig, drafter, template) -> tuple[int, int]:
  """Asks until nothing is left to ask; the number of tokens written and of passes it took."""
  from jaxdec.decoding import Sampler, generate

  sampler = Sampler(config.temperature, config.top_k, config.top_p, config.min_p)
  limit = lm.config.max_length - config.max_new_tokens
  tokens = passes = 0
  live = list(batch)
  while live:
    asked = [(row, row.ask(lm, template)) for row in live]
    asked = [(row, ids) for row, ids in asked if ids is not None and len(ids) <= limit]
    if not asked:
      break
    seeds = [_seed(config.seed, row.index, row.turn) for row, _ in asked]
    fill = config.batch_size - len(asked)  # one compiled batch size; the copies are dropped
    out = generate(
      lm.model,
      lm.params,
      [ids for _, ids in asked] + [asked[-1][1]] * fill,
      max_new_tokens=config.max_new_tokens,
      sampler=sampler,
      drafter=drafter[0],
      drafter_params=drafter[1],
      seed=seeds + seeds[-1:] * fill,
    )
    for (row, ids), answer in zip(asked, out.tokens):
      row.hear(lm, ids, answer)
      tokens += len(answer)
    passes += sum(out.stats.row_steps[: len(asked)]) + len(asked)
    live = [row for row, _ in asked]
  return tokens, passes


def _seed(*entropy: int) -> int:
  return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
