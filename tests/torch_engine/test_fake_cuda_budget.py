"""The launches, bytes and memory of the 70B stay within the committed report, which is calculated with 80 layers.

If a change needs more on purpose, or less, write a new report with `make gpu-calculated`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_cuda.cases import CASES, Case
from fake_cuda.measure import Figures, figures_of
from fake_cuda.report import JSON, LABEL, LAYERS, MARKDOWN, as_markdown

REPORT = json.loads(JSON.read_text("utf-8"))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries with their paths."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, f"{path} / {name}" if path else name)
    else:
        yield path, tree


def with_all_layers(one: Figures, two: Figures) -> dict[str, Any]:
    """Return the figures of all layers: what a phase needs on top of the rest stays the same from two layers on,
    and everything else grows by the same amount with each layer."""
    first, second = dict(leaves(one.as_json())), dict(leaves(two.as_json()))
    same = ("over", "at", "graphs", "flash_attention")
    return {
        path: value
        if path.rpartition(" / ")[2] in same
        else first.get(path, 0) + (LAYERS - 1) * (value - first.get(path, 0))
        for path, value in second.items()
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_engine_needs_what_the_report_says(case: Case) -> None:
    needed = with_all_layers(figures_of(case, 1), figures_of(case, 2))
    stored = dict(leaves(REPORT["cases"][str(case)]))
    changed = [
        f"{path}: {stored.get(path, 0)} -> {value}"
        for path, value in needed.items()
        if stored.get(path, 0) != value
    ]
    gone = [
        f"{path}: {stored[path]} -> 0"
        for path in stored
        if path.startswith(("decode /", "prefill /")) and path not in needed
    ]
    assert not changed + gone, "\n".join(
        [
            f"{case} with {LAYERS} layers has changed. If that is intended, run `make gpu-calculated`:",
            *changed,
            *gone,
        ]
    )


def test_the_tables_show_the_report() -> None:
    assert MARKDOWN.read_text("utf-8") == as_markdown(REPORT)
    assert REPORT["label"] == LABEL
    assert LABEL in MARKDOWN.read_text("utf-8")
