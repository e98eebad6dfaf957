"""Turn the results of `make bench-gpu` into Markdown. A figure that was not measured is left out.

`python -m benchmarks.gpu.report benchmarks/results/gpu.json` writes the `.md` file next to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PRECISIONS
from benchmarks.gpu.results import Document, differences, failures
from benchmarks.gpu.verdict import verdict_table
from benchmarks.tables import counted, table

Cells = Callable[[dict[str, Any]], dict[str, str]]
"""Returns the text of each column from the figures of one measurement."""


def markdown(results: Document) -> str:
    """Return the whole report."""
    parts = results["parts"]
    sections = [
        "# GPU benchmark results",
        *_setting(parts),
        *_verdict(results),
        *_failures(parts),
        *_checks(parts),
        *_precisions({name: parts[name].get("measured", {}) for name in PRECISIONS if name in parts}),
        *_serving(parts.get("serving", {}).get("measured", {}).get("serving")),
    ]
    return "\n\n".join(sections) + "\n"


def _setting(parts: dict[str, Document]) -> Iterator[str]:
    yield (
        "`make bench-gpu` measured a random Llama 2 70B, and small models for the checks. Each part ran in a "
        "process of its own."
    )
    rows = (
        (
            name,
            str(part.get("device", {}).get("name", "unknown")),
            *(str(part.get(key) or "unknown") for key in ("driver", "torch", "commit", "date")),
            f"{part.get('seconds', 0):.0f}",
        )
        for name, part in parts.items()
    )
    yield table(("part", "device", "driver", "torch", "commit", "date", "seconds"), rows)
    for key, by_value in differences(parts).items():
        listed = "; ".join(f"{value}: {', '.join(names)}" for value, names in by_value.items())
        yield f"**Not all parts were measured with the same {key}** ({listed}). Do not compare their figures."


def _verdict(results: Document) -> Iterator[str]:
    yield "## Calculated and measured figures"
    yield (
        "The calculated time of a decode step is the time that moving its bytes takes at the measured "
        "bandwidth of a large copy. For 32 requests, all bytes were counted in a run on fake CUDA tensors "
        "(`gpu_calculated.md`); for other numbers, only weights and cached tokens count. A step of mixed "
        "lengths is also compared with the measured step of equally long requests that have as many tokens. "
        "The memory is calculated by `llama/model/precision_plan.py` and `llama/model/gpu_reserve.py`."
    )
    yield verdict_table(results["verdict"]) if results["verdict"] else "Nothing was compared."
    for reason in results["not_compared"]:
        yield f"**{reason[:1].upper()}{reason[1:]}.**"


def _failures(parts: dict[str, Document]) -> Iterator[str]:
    skipped = (
        f"{name}: {measurement}: {reason}"
        for name, part in parts.items()
        for measurement, reason in part.get("skipped", {}).items()
    )
    for title, lines in (("Failures", failures(parts)), ("Left out", skipped)):
        if listed := [f"- {_one_line(line)}" for line in lines]:
            yield f"## {title}"
            yield "\n".join(listed)


def _checks(parts: dict[str, Document]) -> Iterator[str]:
    rows = [
        (name, check, _one_line(_summary(result)))
        for name in ("checks", "memory-errors")
        for check, result in parts.get(name, {}).get("measured", {}).items()
    ]
    if rows:
        yield "## Checks that passed"
        yield table(("part", "check", "result"), rows)


def _summary(result: Any) -> str:
    """Return the figures of a check, or the error message that it expected."""
    if not isinstance(result, dict):
        return str(result)
    return ", ".join(
        f"{name.replace('_', ' ')} {format(value, '.2g') if isinstance(value, float) else value}"
        for name, value in result.items()
        if not isinstance(value, dict)
    )


def _one_line(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _by_requests(cell: Callable[[Any], str]) -> Cells:
    """Return cells with one column per number of requests."""
    return lambda figures: {counted(number, "request"): cell(row) for number, row in figures.items()}


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _sampling(figures: dict[str, Any]) -> dict[str, str]:
    seconds = {name.replace("_", " "): _ms(value) for name, value in figures.items() if name != "requests"}
    return {"requests": str(figures["requests"]), **seconds}


_TABLES: tuple[tuple[str, str, Cells], ...] = (
    (
        "decode",
        "Tokens per second, by number of requests, and the time of a step",
        _by_requests(lambda row: f"{row['tokens_per_second']:,.0f} ({_ms(row['seconds'])} ms)"),
    ),
    (
        "generate_of_transformers",
        "Tokens per second of `generate` of transformers with the same layers",
        _by_requests(lambda speed: "out of memory" if speed is None else f"{speed:,.0f}"),
    ),
    (
        "step_without_graphs",
        "A decode step without CUDA graphs, by number of requests, in ms",
        _by_requests(_ms),
    ),
    (
        "launches",
        "Kernel launches of a decode step, and the sum of the kernels' times",
        _by_requests(lambda row: f"{row['launches']:,} ({_ms(row['seconds_of_kernels'])} ms)"),
    ),
    (
        "mixed_lengths",
        "A decode step of one long request and many short ones",
        lambda figures: {
            "requests": str(figures["requests"]),
            f"one of {figures['long']:,} tokens, the others of {figures['short']}, ms": _ms(
                figures["seconds_mixed"]
            ),
            "equally long ones with as many tokens, ms": _ms(figures["seconds_equal"]),
        },
    ),
    ("sampling", "A decode step by sampling parameters, in ms", _sampling),
    (
        "prompts",
        "Prompt tokens per second, by prompt tokens per step, and the time of such a step",
        lambda figures: {
            f"{chunk} tokens": f"{row['tokens_per_second']:,.0f} ({_ms(row['seconds_per_step'])} ms)"
            for chunk, row in figures.items()
        },
    ),
    (
        "graphs",
        "CUDA graphs",
        lambda figures: {
            "graphs": str(figures["graphs"]),
            "seconds to capture": f"{figures['seconds']:.1f}",
            "memory, GB": _gb(figures["bytes"]),
        },
    ),
    (
        "memory",
        "Memory in GB",
        lambda figures: {
            "requests": str(figures["rows"]),
            "tokens per request": f"{figures['context']:,}",
            "all, measured": _gb(figures["used"]),
            "weights, calculated": _gb(figures["weights_calculated"]),
            "cache, calculated": _gb(figures["cache_calculated"]),
            "other, measured": _gb(figures["reserve_used"]),
            "other, calculated": _gb(figures["reserve_calculated"]["total"]),
        },
    ),
)


def _precisions(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the tables that compare precisions, with one row for each. `measured` has all their figures."""
    for name, title, cells in _TABLES:
        rows = {precision: cells(found[name]) for precision, found in measured.items() if found.get(name)}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        if rows:
            yield f"## {title}"
            yield table(
                ("precision", *columns),
                (
                    (precision, *(row.get(column, "") for column in columns))
                    for precision, row in rows.items()
                ),
            )


def _serving(served: dict[str, Any] | None) -> Iterator[str]:
    if not served:
        return
    yield "## Cog's server with packed weights"
    yield table(
        ("figure", "value"),
        (
            ("precision", served["quantization"]),
            ("weights on the disk, GB", f"{served['bytes_on_disk'] / 1e9:.1f}"),
            ("start to ready, s", f"{served['seconds_to_ready']:.1f}"),
            ("start to the first token, s", f"{served['seconds_to_first_token']:.1f}"),
            ("parts of the setup", served.get("setup", "")),
            ("tokens per second of one request", f"{served['tokens_per_second']:.0f}"),
            ("requests at once", f"{served['requests_at_once']} of {served['context']:,} tokens"),
        ),
    )


if __name__ == "__main__":
    source = Path(sys.argv[1])
    report = markdown(json.loads(source.read_text(encoding="utf-8")))
    source.with_suffix(".md").write_text(report, encoding="utf-8")
