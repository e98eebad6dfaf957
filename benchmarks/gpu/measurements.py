"""Saves the figures of a part after each measurement, and goes on after one that fails.

Knows names, exceptions and a JSON file; knows nothing about what is measured.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report import write_json

_Result = TypeVar("_Result")
_LINES = 15


class Skipped(Exception):
    """The device cannot do what is measured. The message has the reason."""


class CheckFailed(Exception):
    """A result is wrong. The message says which, what was expected and what was computed."""


class Measurements:
    """The figures of a part, and the file that has those so far."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """`facts` describe the device and the versions of the software."""
        self._path = path
        self.document: dict[str, Any] = {
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
            result = measure()
            self.document["measured"][name] = result
        self.document["seconds_by_measurement"][name] = time.perf_counter() - started
        self._save()
        return result

    @contextmanager
    def recording_failures(self, name: str) -> Iterator[None]:
        """Go on after the body if it raises an exception.

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
            self.document["failed"][name] = "\n".join(
                ["Traceback:", *traceback.format_exc().splitlines()[-_LINES:]]
            )
        self._save()

    def _save(self) -> None:
        write_json(self._path, self.document)
