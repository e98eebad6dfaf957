"""The results of the GPU benchmark: those of one part, and the file with those of all parts.

The figures of a part are saved after each measurement. Every part has the device, the versions and the commit
that it was measured with, because a later run may measure other parts elsewhere. Knows names, exceptions and
JSON; knows nothing about what is measured.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report import write_json

Document = dict[str, Any]
"""The results of a part: facts about the device, and `measured`, `failed` and `skipped`, by measurement."""

PROCESS = "the process"
"""The name of a failure that belongs to no measurement."""
_SAME = ("device", "driver", "torch", "commit", "small")
"""The keys of a part that must be the same for its figures to be compared with those of another part."""
_LINES = 15

_Result = TypeVar("_Result")


class Skipped(Exception):
    """The device cannot do what is measured. The message has the reason."""


class CheckFailed(Exception):
    """A result is wrong. The message says which, what was expected and what was computed."""


class Measurements:
    """The results of a part, and the file with those so far. A failed measurement does not stop the rest."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """`facts` describe the device and the versions of the software."""
        self._path = path
        self.document: Document = {
            **facts,
            **{key: {} for key in ("measured", "failed", "skipped", "seconds_by_measurement")},
        }
        self._save()

    def take(self, name: str, measure: Callable[[], _Result]) -> _Result | None:
        """Record what `measure` returns, which JSON must be able to represent.

        Return it, or None if `measure` raises an exception, which is recorded as in `recording_failures`.
        """
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        result = None
        with self.recording_failures(name):
            result = self.document["measured"][name] = measure()
        self.document["seconds_by_measurement"][name] = time.perf_counter() - started
        self._save()
        return result

    @contextmanager
    def recording_failures(self, name: str) -> Iterator[None]:
        """Record an exception of the `with` block instead of raising it.

        Skipped is recorded as skipped, and any other exception as a failure: the message of CheckFailed, or
        the last lines of the traceback.
        """
        try:
            yield
        except Skipped as reason:
            self.document["skipped"][name] = str(reason)
        except CheckFailed as error:
            self.document["failed"][name] = str(error)
        except Exception:
            self.document["failed"][name] = f"Traceback:\n{last_lines(traceback.format_exc())}"
        self._save()

    def _save(self) -> None:
        write_json(self._path, self.document)


def last_lines(text: str) -> str:
    """Return the last lines of a traceback or of a program's output, which usually name the reason."""
    return "\n".join(text.splitlines()[-_LINES:])


def load(path: Path) -> Document:
    """Return the results so far, or empty ones. Raises ValueError if the file has something else."""
    if not path.exists():
        return {"parts": {}}
    with suppress(ValueError):
        results = json.loads(path.read_text(encoding="utf-8"))
        parts = results.get("parts") if isinstance(results, dict) else None
        if isinstance(parts, dict) and all(isinstance(part, dict) for part in parts.values()):
            return dict(results)
    raise ValueError(f"{path} has no results of this program; delete it or choose other --results")


def differences(parts: dict[str, Document]) -> dict[str, dict[str, list[str]]]:
    """Return each key of _SAME whose value is not the same for all parts, with the parts by value."""
    found: dict[str, dict[str, list[str]]] = {}
    for key in _SAME:
        by_value: dict[str, list[str]] = {}
        for name, part in parts.items():
            value = part.get("device", {}).get("name") if key == "device" else part.get(key)
            by_value.setdefault(str(value), []).append(name)
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
