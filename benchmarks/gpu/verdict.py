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

from benchmarks.gpu.child_process import Document
from benchmarks.tables import table
from llama import ROOT

CALCULATED = ROOT / "benchmarks" / "results" / "gpu_calculated.json"
"""What the run on fake CUDA tensors counted, for the 70B."""
PRECISIONS = ("fp8", "nf4", "int8", "bf16")

# The smallest and the largest ratio of the measured to the calculated figure that is accepted.
_WEIGHTS = (0.99, 1.01)
_LAUNCHES = (0.9, 1.25)  # cuBLAS may divide a product among kernels, and add one that sums their results
_SECONDS = (0.0, 1.5)  # the calculation knows only bytes, and no kernel reaches the bandwidth of a copy
_MIXED = (0.0, 1.25)
_MEMORY = (0.95, 1.05)
_AT_MOST = (0.0, 1.0)  # what is reserved must not be exceeded


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
    measured = {
        name: parts[name].get("measured", {})
        for name in PRECISIONS
        if name in parts and not parts[name].get("small")  # nothing is calculated for the small model
    }
    counted, reasons = _read(calculated) if measured else ({}, [])
    rows = list[Row]()
    for name, figures in measured.items():
        rows += _rows_of_precision(name, figures, counted.get(name, {}))
    rows += _rows_of_serving(parts.get("serving", {}).get("measured", {}))
    return [{**asdict(row), "ratio": row.ratio, "ok": row.ok} for row in rows], reasons


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the counted figures by precision, or none and the reason."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        precisions = document["precisions"]
    except OSError:
        return {}, [f"launches and bytes of a step were not compared: there is no {path.name}"]
    except (ValueError, KeyError, TypeError) as error:
        return {}, [f"launches and bytes of a step were not compared: {path.name} is invalid ({error!r})"]
    return precisions, []


def _rows_of_precision(part: str, measured: dict[str, Any], counted: dict[str, Any]) -> Iterator[Row]:
    if weights := measured.get("weights"):
        yield Row(part, "weights", "GB", weights["bytes_calculated"], weights["bytes"], _WEIGHTS)
    yield from _launches(part, measured, counted)
    yield from _decode(part, measured, counted)
    if mixed := measured.get("mixed_lengths"):
        name = f"step of mixed lengths, {mixed['requests']} requests"
        yield Row(part, name, "ms", mixed["seconds_equal"], mixed["seconds_mixed"], _MIXED)
    if graphs := measured.get("graphs"):
        name = f"memory of {graphs['graphs']} graphs"
        yield Row(part, name, "GB", graphs["bytes_calculated"], graphs["bytes"], _AT_MOST)
    if memory := measured.get("memory"):
        reserve = memory["reserve_calculated"]["total"]
        planned = memory["weights_calculated"] + memory["cache_calculated"] + reserve
        yield Row(part, "memory beside weights and cache", "GB", reserve, memory["reserve_used"], _AT_MOST)
        yield Row(part, "all memory", "GB", planned, memory["used"], _MEMORY)


def _launches(part: str, measured: dict[str, Any], counted: dict[str, Any]) -> Iterator[Row]:
    for height, row in measured.get("launches", {}).items():
        if calculated := counted.get("decode", {}).get(height, {}).get("launches"):
            name = f"launches of a step, {height} requests"
            yield Row(part, name, "", calculated, row["launches"], _LAUNCHES)


def _decode(part: str, measured: dict[str, Any], counted: dict[str, Any]) -> Iterator[Row]:
    """Compare with the time of moving the bytes of a step: those that were counted, or else the weights and the
    cached tokens."""
    bandwidth, weights = measured.get("copy_bandwidth"), measured.get("weights")
    if not bandwidth or not weights:
        return
    for height, row in measured.get("decode", {}).items():
        tokens = int(height) * row["prompt_tokens"] * weights["bytes_per_cached_token"]
        read = weights["bytes"] - weights["bytes_of_embedding"] + tokens
        size = counted.get("decode", {}).get(height, {}).get("bytes", read)
        yield Row(part, f"decode step, {height} requests", "ms", size / bandwidth, row["seconds"], _SECONDS)


def _rows_of_serving(measured: dict[str, Any]) -> Iterator[Row]:
    served = measured.get("serving", {})
    if "planned" in served:
        yield Row("serving", "all memory", "GB", served["planned"], served["used"], _MEMORY)


_SCALE = {"GB": 1e-9, "ms": 1e3, "": 1.0}


def verdict_table(rows: list[dict[str, Any]]) -> str:
    """Return the comparisons as a table, which is readable in a terminal too."""

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
