"""Compare what was measured with what was calculated: bytes, seconds, kernel launches and memory.

Figures of different parts are never combined, because they may come from different GPUs. Knows the keys of
the results and of `gpu_calculated.json`; knows nothing about how figures are measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PRECISIONS
from benchmarks.gpu.results import Document
from benchmarks.tables import counted, table
from llama import ROOT

CALCULATED = ROOT / "benchmarks" / "results" / "gpu_calculated.json"
"""What the run on fake CUDA tensors counted, for the 70B."""

# The smallest and the largest ratio of the measured to the calculated figure that is accepted.
_WEIGHTS = (0.99, 1.01)
_LAUNCHES = (0.9, 1.25)  # cuBLAS may divide a product among kernels, and add one that sums their results
_SECONDS = (0.0, 1.5)  # the calculation knows only bytes, and no kernel reaches the bandwidth of a copy
_MIXED = (0.0, 1.25)
_MEMORY = (0.95, 1.05)
_AT_MOST = (0.0, 1.0)  # what is reserved must not be exceeded

_OUTSIDE_OF_GRAPHS = 2  # launches of `Runner.decode` that advance the positions; they were not counted


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison."""

    part: str
    name: str
    unit: str
    calculated: float
    measured: float
    bounds: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.measured / self.calculated if self.calculated else inf

    @property
    def ok(self) -> bool:
        return self.bounds[0] <= self.ratio <= self.bounds[1]


def verdict(parts: dict[str, Document], calculated: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return all comparisons, and the reasons why some could not be made."""
    # Nothing is calculated for the small model.
    measured = {name: parts[name] for name in PRECISIONS if name in parts and not parts[name].get("small")}
    document, reasons = _read(calculated) if measured else ({}, [])
    rows = list[Row]()
    for name, part in measured.items():
        case = _case(document, name, part)
        if document and not case:
            reasons.append(f"launches and bytes of {name} were not compared: {calculated.name} has none")
        rows += _rows_of_precision(name, part.get("measured", {}), case, document.get("rows"))
    served = parts.get("serving", {}).get("measured", {}).get("serving", {})
    if "planned" in served:
        rows.append(Row("serving", "all memory", "GB", served["planned"], served["used"], _MEMORY))
    return [{**asdict(row), "ratio": row.ratio, "ok": row.ok} for row in rows], reasons


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the counted figures, or none and the reason."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        reason = f"there is no {path.name}"
    except ValueError as error:
        reason = f"{path.name} is invalid ({error})"
    else:
        if isinstance(document, dict) and document.get("cases"):
            return document, []
        reason = f"{path.name} has no cases"
    return {}, [f"launches and bytes of a step were not compared: {reason}"]


def _case(document: dict[str, Any], precision: str, part: Document) -> dict[str, Any]:
    """Return what was counted for a precision, for the GPU that is most similar to the measured one."""
    capability = part.get("device", {}).get("capability", "")
    cards = ("A100", "H100") if capability.startswith("8.") else ("H100",)
    found = (document.get("cases", {}).get(f"{card}-{PRECISIONS[precision]}-bfloat16") for card in cards)
    return next(filter(None, found), {})


def _rows_of_precision(
    part: str, measured: dict[str, Any], case: dict[str, Any], counted_rows: int | None
) -> Iterator[Row]:
    """Yield the comparisons of one part. `case` has the counts for steps of `counted_rows` requests."""
    if weights := measured.get("weights"):
        yield Row(part, "weights", "GB", weights["bytes_calculated"], weights["bytes"], _WEIGHTS)
    for requests, row in measured.get("launches", {}).items():
        sizes = sorted(int(size) for size in case.get("decode_launches", {}) if int(size) >= int(requests))
        if sizes:
            launches = case["decode_launches"][str(sizes[0])] + _OUTSIDE_OF_GRAPHS
            name = f"launches of a step, {counted(requests, 'request')}"
            yield Row(part, name, "", launches, row["launches"], _LAUNCHES)
    traffic = case.get("traffic", {}).get("full context", {})
    yield from _seconds(part, measured, traffic, counted_rows)
    if graphs := measured.get("graphs"):
        name = f"memory of {graphs['graphs']} graphs"
        yield Row(part, name, "GB", graphs["bytes_calculated"], graphs["bytes"], _AT_MOST)
    if memory := measured.get("memory"):
        reserve = memory["reserve_calculated"]["total"]
        planned = memory["weights_calculated"] + memory["cache_calculated"] + reserve
        yield Row(part, "memory besides weights and cache", "GB", reserve, memory["reserve_used"], _AT_MOST)
        yield Row(part, "all memory", "GB", planned, memory["used"], _MEMORY)


def _seconds(
    part: str, measured: dict[str, Any], traffic: dict[str, int], counted_rows: int | None
) -> Iterator[Row]:
    """Compare the duration of steps with the time that moving their bytes takes.

    For steps of `counted_rows` requests, all counted bytes are moved. For other numbers of requests, only the
    weights and the cached tokens count.
    """
    bandwidth, weights = measured.get("copy_bandwidth"), measured.get("weights")
    if not bandwidth or not weights:
        return

    def seconds(requests: int, tokens: int) -> float:
        fixed = weights["bytes"] - weights["bytes_of_embedding"]
        if traffic and requests == counted_rows:
            fixed = sum(traffic.values()) - traffic["cache"]
        return float((fixed + tokens * weights["bytes_per_cached_token"]) / bandwidth)

    for requests, row in measured.get("decode", {}).items():
        calculated = seconds(int(requests), int(requests) * row["prompt_tokens"])
        name = f"decode step, {counted(requests, 'request')}"
        yield Row(part, name, "ms", calculated, row["seconds"], _SECONDS)
    if mixed := measured.get("mixed_lengths"):
        requests = mixed["requests"]
        calculated = seconds(requests, mixed["long"] + (requests - 1) * mixed["short"])
        name = f"step of mixed lengths, {requests} requests"
        yield Row(part, name, "ms", calculated, mixed["seconds_mixed"], _SECONDS)
        name = "step of mixed lengths, compared with equal ones"
        yield Row(part, name, "ms", mixed["seconds_equal"], mixed["seconds_mixed"], _MIXED)


_SCALE = {"GB": 1e-9, "ms": 1e3, "": 1.0}


def verdict_table(rows: list[dict[str, Any]]) -> str:
    """Return the comparisons as a Markdown table."""

    def shown(row: dict[str, Any], key: str) -> str:
        number = row[key] * _SCALE[row["unit"]]
        return f"{number:.2f} {row['unit']}" if row["unit"] else f"{number:,.0f}"

    return table(
        ("part", "figure", "calculated", "measured", "ratio", "accepted", "verdict"),
        (
            (
                row["part"],
                row["name"],
                shown(row, "calculated"),
                shown(row, "measured"),
                f"{row['ratio']:.2f}",
                f"{row['bounds'][0]:g} to {row['bounds'][1]:g}",
                "ok" if row["ok"] else "**not ok**",
            )
            for row in rows
        ),
    )
