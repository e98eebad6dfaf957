"""Turn the results of `make bench-gpu` into Markdown.

`python -m benchmarks.gpu.report benchmarks/results/gpu.json` writes the `.md` file next to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import results as document
from benchmarks.gpu.child_process import Document
from benchmarks.gpu.report_figures import precision_sections, serving_section
from benchmarks.gpu.verdict import PRECISIONS, verdict_table
from benchmarks.tables import table


def markdown(results: Document) -> str:
    """Return the whole report."""
    parts = results["parts"]
    measured = {name: parts[name].get("measured", {}) for name in PRECISIONS if name in parts}
    sections = [
        "# GPU benchmark results",
        *_setting(parts),
        *_verdict(results),
        *_failures(parts),
        *_checks(parts),
        *precision_sections(measured),
        *serving_section(parts.get("serving", {}).get("measured", {})),
    ]
    return "\n\n".join(sections) + "\n"


def _setting(parts: dict[str, Document]) -> Iterator[str]:
    yield (
        "`make bench-gpu` measured a random Llama 2 70B, and small models for the checks. Each part ran in a "
        "process of its own."
    )
    yield table(
        ("part", "device", "driver", "torch", "commit", "date", "seconds"),
        (
            (
                name,
                str(part.get("device", {}).get("name", "unknown")),
                str(part.get("driver") or "unknown"),
                str(part.get("torch", "unknown")),
                str(part.get("commit")),
                str(part.get("date")),
                f"{part.get('seconds', 0):.0f}",
            )
            for name, part in parts.items()
        ),
    )
    for key, by_value in document.differences(parts).items():
        listed = "; ".join(f"{value}: {', '.join(names)}" for value, names in by_value.items())
        yield f"**Not all parts were measured with the same {key}** ({listed}). Do not compare their figures."


def _verdict(results: Document) -> Iterator[str]:
    yield "## Calculated and measured figures"
    yield (
        "The calculated time of a decode step is the time of moving its bytes at the measured bandwidth of a "
        "large copy. For 32 requests, all bytes were counted in a run on fake CUDA tensors "
        "(`gpu_calculated.md`); for other numbers, only weights and cached tokens count. A step of mixed "
        "lengths is also compared with the measured step of equal requests that have as many tokens. The "
        "memory is that of `llama/model/precision_plan.py` and `llama/model/gpu_reserve.py`."
    )
    yield verdict_table(results["verdict"]) if results["verdict"] else "Nothing was compared."
    for reason in results["not_compared"]:
        yield f"**{reason[:1].upper()}{reason[1:]}.**"


def _failures(parts: dict[str, Document]) -> Iterator[str]:
    failed = list(document.failures(parts))
    if failed:
        yield "## Failures"
        yield "\n".join(f"- {_cell(line)}" for line in failed)
    skipped = [
        f"- {name}: {measurement}: {_cell(reason)}"
        for name, part in parts.items()
        for measurement, reason in part.get("skipped", {}).items()
    ]
    if skipped:
        yield "## Left out"
        yield "\n".join(skipped)


def _checks(parts: dict[str, Document]) -> Iterator[str]:
    rows = [
        (name, check, _cell(_summary(result)))
        for name in ("checks", "memory-errors")
        for check, result in parts.get(name, {}).get("measured", {}).items()
    ]
    if rows:
        yield "## Checks that passed"
        yield table(("part", "check", "result"), rows)


def _summary(result: Any) -> str:
    """Return the figures of a check on one line, or the error message that it expected."""
    if not isinstance(result, dict):
        return str(result)
    return ", ".join(
        f"{name.replace('_', ' ')} {format(value, '.2g') if isinstance(value, float) else value}"
        for name, value in result.items()
        if not isinstance(value, dict)
    )


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    source.with_suffix(".md").write_text(
        markdown(json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8"
    )
