# SPDX-License-Identifier: Apache-2.0
"""A plan as tables for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxdec.parallel.plan.collectives import Collective
from jaxdec.report import Column, Table

_GIB = 2**30


def size(value: float | None) -> str:
  """Bytes with a unit a reader can compare."""
  if value is None:
    return "–"
  for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if abs(value) >= scale:
      return f"{value / scale:.2f} {unit}"
  return f"{int(value)} B"


def seconds(value: float) -> str:
  """A duration with a unit."""
  for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
    if value >= scale:
      return f"{value / scale:.3g} {unit}"
  return "0" if value == 0 else f"{value * 1e9:.3g} ns"


def grouped(found: Sequence[Collective]) -> list[dict[str, Any]]:
  """Collectives of the same kind, payload, axes and origin as one row, largest traffic first."""
  rows: dict[tuple, dict[str, Any]] = {}
  for c in found:
    payload = " ".join(map(str, c.payload))
    key = (c.kind, payload, c.axes, c.phase, c.layer, c.asynchronous, c.overlapped)
    row = rows.setdefault(
      key,
      {
        "kind": c.kind, "payload": payload, "axes": "*".join(c.axes), "devices": c.group,
        "count": 0, "bytes": c.bytes, "total_bytes": 0, "phase": c.phase, "layer": c.layer,
        "op": c.op, "asynchronous": c.asynchronous, "overlapped": c.overlapped,
      },
    )  # fmt: skip
    row["count"] += c.count
    row["total_bytes"] += c.total
  return sorted(rows.values(), key=lambda row: -row["total_bytes"])


def memory_table(plan: Any) -> Table:
  m = plan.memory
  rows = [{"what": name, "bytes": size(value)} for name, value in m.parts.items()]
  if m.arguments is not None:
    padding = m.arguments - sum(m.parts.values())
    rows.append({"what": "padding of arguments", "bytes": size(padding)})
    rows.append({"what": "outputs not in place", "bytes": size(m.outputs - m.aliased)})
    rows.append({"what": "activations and temporaries", "bytes": size(m.temporaries)})
    rows.append({"what": "program", "bytes": size(m.code)})
  rows.append({"what": "needed", "bytes": size(m.peak)})
  rows.append({"what": f"HBM of {plan.topology.generation.name}", "bytes": size(m.limit)})
  columns = (Column("what", "memory of a device", align="left"), Column("bytes", ""))
  return Table(columns, rows)


def _short(text: str) -> str:
  return text if len(text) < 22 else f"…{text[-20:]}"


def collectives_table(plan: Any, rows: int | None = None) -> Table:
  found = [
    {
      **row, "bytes": size(row["bytes"]), "total": size(row["total_bytes"]),
      "async": "overlapped" if row["overlapped"] else "yes" if row["asynchronous"] else "no",
    }
    for row in grouped(plan.collectives)
  ]  # fmt: skip
  columns = (
    Column("kind", "collective", align="left", terminal="collective"),
    Column("count", "runs", terminal="runs"),
    Column("bytes", "sent each", terminal=""),
    Column("total", "sent in all", terminal="in all"),
    Column("axes", "axis", align="left", terminal="axis"),
    Column("devices", "W", terminal="W"),
    Column("async", "async", align="left", terminal="async"),
    Column("phase", "pass", align="left", terminal="pass"),
    Column("layer", "layer", align="left", shorten=_short, terminal="layer"),
    Column("payload", "payload", align="left", terminal=""),
  )
  notes = []
  if rows is not None and len(found) > rows:
    rest = sum(row["total_bytes"] for row in found[rows:])
    notes.append(f"and {len(found) - rows} smaller ones, {size(rest)} in all (--json lists them)")
    found = found[:rows]
  return Table(columns, found, notes=notes)


def roofline_table(plan: Any) -> Table:
  r = plan.roofline
  rows = [
    {"what": "matrix products", "time": seconds(r.compute)},
    {"what": "HBM traffic", "time": seconds(r.memory)},
    *(
      {"what": f"collectives over {axes}", "time": seconds(value)}
      for axes, value in sorted(r.links.items(), key=lambda x: -x[1])
    ),
    {"what": "collectives not overlapped", "time": seconds(r.exposed)},
    {"what": "step at least", "time": seconds(r.step)},
  ]
  return Table((Column("what", "time of a step", align="left"), Column("time", "")), rows)


def tables(plan: Any, rows: int | None = None) -> list[Table]:
  """All tables that there is something to say in; ``rows``: limit of collectives."""
  found = [memory_table(plan)]
  if plan.roofline is not None:
    found += [collectives_table(plan, rows)] if plan.collectives else []
    found.append(roofline_table(plan))
  return found


def summary(plan: Any) -> list[str]:
  """The plan in a few sentences."""
  t = plan.topology
  cores = f" ({t.num_devices} devices: two a chip)" if t.generation.cores > 1 else ""
  mesh = " ".join(f"{name}={n}" for name, n in plan.mesh.items() if n > 1) or "one device"
  lines = [
    f"{plan.step} step on {t.name}: {t.chips} chips{cores}, mesh {mesh}; "
    f"{plan.parameters / 1e6:,.1f}M parameters, {plan.tokens:,} tokens a step",
    plan.memory.verdict,
  ]
  if plan.roofline is not None:
    r = plan.roofline
    lines.append(
      f"at most {r.tokens_per_second:,.0f} tokens/s and {r.mfu:.1%} MFU; bound by {r.bound} "
      f"({plan.costs.flops / 1e12:.3g} TFLOP compiled, "
      f"{r.model_flops / r.devices / 1e12:.3g} TFLOP of the model, a device)"
    )
  if plan.cost is not None:
    lines.append(
      f"at {plan.price:g} a chip-hour: {plan.price * t.chips:,.2f} an hour, at least "
      f"{plan.cost:,.2f} for 1B tokens"
    )
  lines.append(f"compiled in {plan.seconds:.1f} s")
  lines += plan.notes
  return lines


def to_json(plan: Any) -> dict[str, Any]:
  """Everything, as plain data."""
  t, r = plan.topology, plan.roofline
  out: dict[str, Any] = {
    "topology": t.name, "chips": t.chips, "devices": t.num_devices, "mesh": plan.mesh,
    "step": plan.step, "parameters": plan.parameters, "tokens": plan.tokens,
    "memory": {
      **dataclasses.asdict(plan.memory), "fits": plan.memory.fits, "spare": plan.memory.spare
    },
    "plan_seconds": plan.seconds, "notes": list(plan.notes),
  }  # fmt: skip
  if r is not None:
    out["costs"] = dataclasses.asdict(plan.costs)
    out["collectives"] = grouped(plan.collectives)
    out["roofline"] = {
      **dataclasses.asdict(r), "tokens_per_second": r.tokens_per_second, "mfu": r.mfu,
      "bound": r.bound,
    }  # fmt: skip
  if plan.cost is not None:
    out["price"] = {"chip_hour": plan.price, "per_billion_tokens": plan.cost}
  return out
