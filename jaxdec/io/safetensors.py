# SPDX-License-Identifier: Apache-2.0
"""The safetensors format, read lazily and written without copies.

Layout: an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape,
data_offsets}}``, then the raw bytes. Reading maps the file, so a slice of a tensor touches only its
own pages; the header alone tells which tensors a truncated file has lost. bfloat16 and float8 come
from ml_dtypes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from jaxdec.errors import UserError

_NUMPY = {
  "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32",
  "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
  "BOOL": "bool"}  # fmt: skip
_ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_MAX_HEADER = 100_000_000


def _dtype(code: str) -> np.dtype:
  if code in _NUMPY:
    return np.dtype(_NUMPY[code])
  import ml_dtypes

  return np.dtype(getattr(ml_dtypes, _ML_DTYPES[code]))


def _code(dtype: np.dtype) -> str:
  names = {v: k for k, v in (_NUMPY | _ML_DTYPES).items()}
  if dtype.name not in names:
    raise UserError(f"safetensors can't hold dtype {dtype.name}; convert the tensor first.")
  return names[dtype.name]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file: ``start`` and ``stop`` are byte offsets in the file."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  stop: int


class File:
  """A safetensors file, its header read and checked, its data mapped on demand.

  Attributes:
    entries: name -> Entry. truncated: names whose bytes are not all there.

  Raises:
    UserError: not a safetensors file.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = Path(path)
    size = self.path.stat().st_size
    with open(self.path, "rb") as file:
      head = file.read(8)
      length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER + 1
      if length > _MAX_HEADER:
        raise UserError(
          f"{self.path} is not a safetensors file ({size} bytes, no valid header); "
          "download or copy it again."
        )
      raw = file.read(length)
    if len(raw) < length:
      raise UserError(
        f"{self.path} is truncated: its header needs {length + 8} bytes and the file has "
        f"{size}; download or copy it again."
      )
    try:
      header = json.loads(raw)
      self.metadata = header.pop("__metadata__", {})
      self.entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      if isinstance(error, UserError):
        raise
      raise UserError(
        f"{self.path} is not a safetensors file (unreadable header: {error}); download "
        "or copy it again."
      ) from None
    self.truncated = [name for name, e in self.entries.items() if e.stop > size]
    self._map = None

  def _entry(self, name: str, value: dict, base: int) -> Entry:
    if value["dtype"] not in _NUMPY and value["dtype"] not in _ML_DTYPES:
      raise UserError(
        f"{self.path}: tensor {name!r} has dtype {value['dtype']}, which is not supported."
      )
    dtype, shape = _dtype(value["dtype"]), tuple(value["shape"])
    start, stop = value["data_offsets"]
    if stop - start != math.prod(shape) * dtype.itemsize:
      raise UserError(
        f"{self.path}: tensor {name!r} of shape {shape} and dtype {dtype.name} has "
        f"{stop - start} bytes; the file is damaged."
      )
    return Entry(dtype, shape, base + start, base + stop)

  def view(self, name: str) -> np.ndarray:
    """The tensor as a read-only view of the mapped file; copy what must outlive the file."""
    e = self.entries[name]
    if e.start == e.stop:
      return np.zeros(e.shape, e.dtype)
    if self._map is None:
      self._map = np.memmap(self.path, np.uint8, "r")
    return self._map[e.start : e.stop].view(e.dtype).reshape(e.shape)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor to write; ``make()`` is called when its turn comes, so one is in memory at a time."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write(path: str | os.PathLike, tensors: Iterable[Tensor], metadata: dict[str, str]) -> None:
  """Writes one file and flushes it to disk. ``metadata``: strings kept in the header."""
  # Wide types first keeps every tensor aligned to its own item size.
  tensors = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))
  header: dict = {"__metadata__": metadata}
  offset = 0
  for t in tensors:
    header[t.name] = {
      "dtype": _code(t.dtype),
      "shape": list(t.shape),
      "data_offsets": [offset, offset + t.size],
    }
    offset += t.size
  raw = json.dumps(header, separators=(",", ":")).encode()
  raw += b" " * (-len(raw) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(raw)))
    file.write(raw)
    for t in tensors:
      array = np.ascontiguousarray(t.make())
      if array.shape != t.shape or array.dtype != t.dtype:
        raise ValueError(
          f"tensor {t.name!r} was announced as {t.shape} {t.dtype}, got {array.shape} {array.dtype}"
        )
      file.write(array.view(np.uint8).data if array.size else b"")
    file.flush()
    os.fsync(file.fileno())
