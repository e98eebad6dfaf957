"""The results of all parts, in one JSON document that is kept between runs.

Every part carries the device, the versions and the commit that it was measured with, because a later run
may measure other parts elsewhere. Knows the JSON document; knows nothing about processes or about what the
figures mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.child_process import PROCESS, Document

SETTING = ("device", "driver", "torch", "commit", "small")
"""The keys of a part that must be the same for its figures to be compared with those of another part."""


def load(path: Path) -> Document:
    """Return the results so far, or empty ones. Raises ValueError if the file has something else."""
    if not path.exists():
        return {"parts": {}}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it or choose other --results"
        ) from error
    if not isinstance(results, dict) or not isinstance(results.get("parts"), dict):
        raise ValueError(f"{path} has no results of this program; delete it or choose other --results")
    return results


def setting(part: Document) -> dict[str, Any]:
    """Return the values of SETTING. The device is its name."""
    return {**{key: part.get(key) for key in SETTING}, "device": part.get("device", {}).get("name")}


def differences(parts: dict[str, Document]) -> dict[str, dict[str, list[str]]]:
    """Return the keys of SETTING in which parts differ. For each, the parts by value."""
    found: dict[str, dict[str, list[str]]] = {}
    for key in SETTING:
        by_value: dict[str, list[str]] = {}
        for name, part in parts.items():
            by_value.setdefault(str(setting(part)[key]), []).append(name)
        if len(by_value) > 1:
            found[key] = by_value
    return found


def failures(parts: dict[str, Document]) -> Iterator[str]:
    """Yield one line for each failed measurement: the part, the measurement and the reason."""
    for name, part in parts.items():
        for measurement, text in part.get("failed", {}).items():
            yield f"{name}: {measurement}: {_reason(measurement, text)}"


def _reason(measurement: str, text: str) -> str:
    """Return the most important line of a failure's text."""
    lines = text.splitlines() or [""]
    if measurement == PROCESS:  # how the process ended, and the last line of its output
        return ": ".join(dict.fromkeys((lines[0], lines[-1])))
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]
