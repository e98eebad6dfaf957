"""The launches, bytes and memory of the 70B equal those of the committed report, which is calculated with 80 layers.

If a change is intended, write a new report with `make gpu-calculated`.
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
    """Calculate the figures of all layers from those of one and of two.

    The temporary memory of a phase does not grow from two layers on. Everything else grows by the same amount with
    each layer.
    """
    first, second = dict(leaves(one.as_json())), dict(leaves(two.as_json()))
    same = ("temporary", "peak_operator", "graphs", "flash_attention")
    return {
        path: value
        if path.rpartition(" / ")[2] in same
        else first.get(path, 0) + (LAYERS - 1) * (value - first.get(path, 0))
        for path, value in second.items()
    }


def changes(needed: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Describe each figure that differs. An operator that is not launched is not stored."""
    counted = [path for path in stored if path.startswith(("decode / ", "prefill / "))]
    return [
        f"{path}: {stored.get(path, 0)} -> {needed.get(path, 0)}"
        for path in dict.fromkeys([*needed, *counted])
        if needed.get(path, 0) != stored.get(path, 0)
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_engine_needs_what_the_report_says(case: Case) -> None:
    one, two = figures_of(case, 1), figures_of(case, 2)
    stored = REPORT["cases"][str(case)]
    changed = changes(with_all_layers(one, two), dict(leaves(stored)))
    advice = f"{case} with {LAYERS} layers has changed. If that is intended, run `make gpu-calculated`:"
    assert not changed, "\n".join([advice, *changed])
    assert stored["launches_per_layer"]["decode"] == sum(two.decode.values()) - sum(one.decode.values())


def test_a_message_names_what_has_changed() -> None:
    stored = {
        "decode / add.Tensor": 160,
        "decode / mm.default": 321,
        "traffic / full context / writes": 9,
        "card": 1,
    }
    needed = {"decode / add.Tensor": 240, "prefill / sort.default": 4, "traffic / full context / writes": 9}
    assert changes(needed, stored) == [
        "decode / add.Tensor: 160 -> 240",
        "prefill / sort.default: 0 -> 4",
        "decode / mm.default: 321 -> 0",
    ]


def test_the_tables_show_the_report() -> None:
    assert MARKDOWN.read_text("utf-8") == as_markdown(REPORT)
    assert REPORT["label"] == LABEL
    assert LABEL in MARKDOWN.read_text("utf-8")
