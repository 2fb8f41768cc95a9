# SPDX-License-Identifier: Apache-2.0
"""Where the target's states come from while a drafter is distilled.

* ``online``: the target runs inside the training step (``Distill.teacher``); nothing here.
* ``streamed``: a program of its own runs ahead in a thread, a bounded number of batches.
* ``cached``: the same program wrote the states of every row to disk once; epochs read them.

All three are iterators of the same batches with the same positions; the latter two add the entries
``teacher_hidden`` and ``teacher_features``, from which the step takes logits by the LM head. In
float32 storage (or the target's own type) the numbers are those of ``online``.

The cache is addressed by content: a row is found by the hash of its tokens, segments and positions,
so order, batch size and mixture don't matter, and rows that a later run needs are simply added.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxdec.errors import UserError
from jaxdec.parallel import rules as rules_lib
from jaxdec.parallel.batches import place_batch
from jaxdec.training.metrics import human
from jaxdec.training.run_folder import to_json
from jaxdec.training.tasks.distill import FEATURES, HIDDEN, Distill

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SHARD_BYTES = 1 << 28
_ROW = ("tokens", "segment_ids", "positions")
Batch = Mapping[str, np.ndarray]


class States:
  """The target's states of a batch, as arrays on the host: the program behind both iterators.

  Args:
    task: whose target and ``capture``. mesh: the run's devices. dtype: of the stored states.
  """

  def __init__(
    self,
    task: Distill,
    mesh: Mesh,
    dtype: str = "float32",
    rules: rules_lib.Rules = rules_lib.DEFAULT,
  ):
    if jax.process_count() > 1:
      raise UserError(
        f"cached and streamed teacher states are made on one process, not "
        f"{jax.process_count()}; use teacher='online'"
      )
    if dtype not in DTYPES:
      raise UserError(f"teacher_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    self.task, self.mesh, self.rules, self.dtype = task, mesh, rules, DTYPES[dtype]
    self.width = 1 + len(task.drafter.capture)
    self.dim = task.model.config.dim
    self._frozen: Any = None
    self._step = jax.jit(self._states)

  def _states(self, frozen: Any, batch: Batch):
    _, output = self.task.teacher(frozen, batch)
    features = jnp.stack(output.features, axis=2) if output.features else None
    return output.hidden, features

  def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
    """The batch with the states added."""
    rows = {name: batch[name] for name in _ROW}
    with contextlib.ExitStack() as stack:
      stack.enter_context(jax.set_mesh(self.mesh))
      stack.enter_context(nn.logical_axis_rules(self.rules.flax()))
      if self._frozen is None:
        self._frozen = rules_lib.place(self.task.frozen, self.rules, self.mesh)
      hidden, features = jax.device_get(
        self._step(self._frozen, place_batch(rows, self.mesh, self.rules))
      )
    out = {**batch, HIDDEN: np.asarray(hidden).astype(self.dtype)}
    if features is not None:
      out[FEATURES] = np.asarray(features).astype(self.dtype)
    return out

  def release(self) -> None:
    """Lets go of the parameters on the mesh."""
    self._frozen = None


class Streamed:
  """Batches of ``data`` with their states, computed ahead in a thread.

  Its position is that of the last batch it gave, however far ahead the thread is.

  Args:
    data: iterator with ``get_state`` and ``set_state``. ahead: batches that may wait.
  """

  def __init__(self, data: Any, states: Callable[[Batch], Batch], ahead: int = 2):
    if ahead < 1:
      raise UserError(f"the number of batches ahead must be at least 1, got {ahead}")
    self._data, self._states, self._ahead = data, states, ahead
    self._position = data.get_state()
    self._thread: threading.Thread | None = None

  def __iter__(self) -> Streamed:
    return self

  def __next__(self) -> Batch:
    if self._thread is None:
      self._start()
    kind, value, position = self._ready.get()
    if kind != "batch":
      self.close()
      raise value
    self._position = position
    return value

  def get_state(self) -> Any:
    return self._position

  def set_state(self, state: Any) -> None:
    self.close()
    self._data.set_state(state)
    self._position = state

  def _start(self) -> None:
    self._ready: queue.Queue = queue.Queue(maxsize=self._ahead)
    self._stop = threading.Event()
    # No reference to self: an iterator that is dropped takes its thread along.
    args = (self._data, self._states, self._ready, self._stop)
    self._thread = threading.Thread(target=_produce, args=args, name="teacher", daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Ends the thread; the iterator can go on from where it stood."""
    if self._thread is None:
      return
    self._stop.set()
    with contextlib.suppress(queue.Empty):
      while True:
        self._ready.get_nowait()
    self._thread.join()
    self._thread = None
    self._data.set_state(self._position)

  def __del__(self):
    if getattr(self, "_thread", None) is not None:
      self._stop.set()


def _produce(data: Any, states: Callable, ready: queue.Queue, stop: threading.Event) -> None:
  def put(item) -> None:
    while not stop.is_set():
      with contextlib.suppress(queue.Full):
        return ready.put(item, timeout=0.1)

  try:
    while not stop.is_set():
      batch = states(next(data))
      put(("batch", batch, data.get_state()))
  except BaseException as error:  # the reader raises it
    put(("error", error, None))


class Cache:
  """The states of rows on disk: array_record files, and beside each the keys of its rows.

  Args:
    folder: new, or of the same target, capture and type.

  Raises:
    UserError: the folder holds something else.
  """

  def __init__(self, folder: str | os.PathLike, states: States, seq_len: int):
    self.path, self._states, self._length = Path(folder), states, seq_len
    self._places: dict[bytes, tuple[int, int]] = {}
    self._readers: list[Any] = []
    self._open()
    for path in sorted(self.path.glob("states-*.array_record")):
      self._add(path)

  def _open(self) -> None:
    head = {
      "target": self._states.task.config["target"],
      "capture": to_json(self._states.task.drafter.capture),
      "dtype": self._states.dtype.name,
      "seq_len": self._length,
    }
    head = json.loads(json.dumps(head))
    stored = self.path / "teacher.json"
    if stored.is_file():
      old = json.loads(stored.read_text(encoding="utf-8"))
      wrong = [key for key in head if old.get(key) != head[key]]
      if wrong:
        raise UserError(
          f"teacher states in {str(self.path)!r} are of another run: {wrong[0]} is "
          f"{old.get(wrong[0])!r} there and {head[wrong[0]]!r} here; give a new folder"
        )
      return
    if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
      raise UserError(f"{str(self.path)!r} holds something else; give a new folder")
    self.path.mkdir(parents=True, exist_ok=True)
    partial = stored.with_suffix(".tmp")
    partial.write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, stored)

  def _add(self, path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    shard = len(self._readers)
    keys = np.load(path.with_suffix(".npy"), allow_pickle=False)
    try:
      # Rows are read at random: nothing is fetched in advance.
      reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
      count = reader.num_records()
    except Exception as error:  # the package raises bare RuntimeError
      raise UserError(f"{path} is damaged ({error}); delete it and run again") from error
    if count != len(keys):
      raise UserError(f"{path} holds {count} of {len(keys)} rows; delete it and run again")
    self._readers.append(reader)
    self._places |= {key.tobytes(): (shard, i) for i, key in enumerate(keys)}

  def __len__(self) -> int:
    return len(self._places)

  @property
  def row_bytes(self) -> int:
    """Of one row, before compression."""
    return self._length * self._states.width * self._states.dim * self._states.dtype.itemsize

  def fill(
    self, batches: Callable[[], Iterable[Batch]], say: Callable[[str], None] = print
  ) -> None:
    """Writes what is missing of the rows of ``batches()``, which is read twice.

    Says what it will take, and refuses before the first byte where the disk has no room for it.
    """
    missing = {key for batch in batches() for key in row_keys(batch)} - self._places.keys()
    if not missing:
      return
    size = len(missing) * self.row_bytes
    free = shutil.disk_usage(self.path).free
    text = (
      f"teacher states of {len(missing)} rows of {self._length} tokens take {human(size, 'B')} "
      f"before compression; {human(free, 'B')} are free in {str(self.path)!r}"
    )
    if size > free:
      raise UserError(
        f"{text}: too little; store bfloat16, train on fewer rows, or use teacher='online'"
      )
    say(text)
    rows: list[tuple[bytes, bytes]] = []
    for batch in batches():
      keys = row_keys(batch)
      if missing.isdisjoint(keys):
        continue
      full = self._states(batch)  # the very batches of training: the same shapes, the same bits
      for i, key in enumerate(keys):
        if key in missing:
          missing.remove(key)
          rows.append((key, self._pack({n: full[n][i] for n in (HIDDEN, FEATURES) if n in full})))
      if sum(len(record) for _, record in rows) >= _SHARD_BYTES:
        rows = self._write(rows)
    self._write(rows)
    self._states.release()
    disk = sum(p.stat().st_size for p in self.path.glob("states-*"))
    say(f"wrote them: {human(disk, 'B')} on disk")

  def _write(self, rows: list[tuple[bytes, bytes]]) -> list:
    from array_record.python.array_record_module import ArrayRecordWriter

    if not rows:
      return []
    path = self.path / f"states-{len(self._readers):05d}.array_record"
    partial = path.with_suffix(".tmp")
    writer = ArrayRecordWriter(str(partial), "group_size:1,zstd:1")
    for _, record in rows:
      writer.write(record)
    writer.close()
    np.save(path.with_suffix(".npy"), np.frombuffer(b"".join(k for k, _ in rows), "V16"))
    os.replace(partial, path)  # last: a file that is there is whole
    self._add(path)
    return []

  def _pack(self, states: Mapping[str, np.ndarray]) -> bytes:
    """Bytes of like significance together: signs and exponents repeat, which compresses."""
    whole = [states[HIDDEN][:, None], *([states[FEATURES]] if FEATURES in states else [])]
    values = np.ascontiguousarray(np.concatenate(whole, axis=1))
    return values.view(np.uint8).reshape(-1, self._states.dtype.itemsize).T.tobytes()

  def _unpack(self, record: bytes) -> np.ndarray:
    planes = np.frombuffer(record, np.uint8).reshape(self._states.dtype.itemsize, -1)
    values = np.ascontiguousarray(planes.T).view(self._states.dtype)
    return values.reshape(self._length, self._states.width, self._states.dim)

  def read(self, batch: Batch) -> dict[str, np.ndarray]:
    """The batch with its states."""
    rows = []
    for key in row_keys(batch):
      if key not in self._places:
        raise UserError(
          f"{str(self.path)!r} lacks a row of the training data; delete the folder and run again"
        )
      shard, i = self._places[key]
      rows.append(self._unpack(self._readers[shard].read([i])[0]))
    values = np.stack(rows)
    out = {**batch, HIDDEN: values[:, :, 0]}
    if self._states.width > 1:
      out[FEATURES] = values[:, :, 1:]
    return out


class Cached:
  """Batches of ``data`` with their states from a filled cache; its position is the data's."""

  def __init__(self, data: Any, cache: Cache):
    self._data, self._cache = data, cache
    self.get_state, self.set_state = data.get_state, data.set_state

  def __iter__(self) -> Cached:
    return self

  def __next__(self) -> Batch:
    return self._cache.read(next(self._data))


def row_keys(batch: Batch) -> list[bytes]:
  """What each row's states depend on, hashed."""
  columns = [np.ascontiguousarray(batch[name], np.int32) for name in _ROW]
  return [
    hashlib.blake2b(b"".join(c[i].tobytes() for c in columns), digest_size=16).digest()
    for i in range(len(columns[0]))
  ]
