"""Saves the results of a run after each measurement, so that they are not lost if the run is killed.

Knows the JSON document and its file; knows nothing about how its figures are measured.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.report import write_json
from benchmarks.targets import Results, evaluate


class ResultsFile:
    """The results of a run, and the file that has the measurements so far."""

    def __init__(self, path: Path, results: Results) -> None:
        self.results = results
        self._path, self._started = path, time.monotonic()
        self.save()

    def add(self, *keys: str, value: Any) -> None:
        """Add one measurement under nested keys, and save. None and an empty dictionary are left out."""
        if value:
            *outer, last = keys
            parent = self.results
            for key in outer:
                parent = parent.setdefault(key, {})
            parent[last] = value
        self.save()

    def save(self) -> None:
        self.results["minutes"] = (time.monotonic() - self._started) / 60
        self.results["targets"] = evaluate(self.results)
        write_json(self._path, self.results)
