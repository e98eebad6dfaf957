"""Runs one part in a process of its own. All GPU memory is free for it, and its failure ends nothing else.

Knows processes and JSON files; knows nothing about what a part measures.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.process import kill_tree, time_limit
from llama import ROOT

Document = dict[str, Any]
"""What a part writes: `measured`, `failed` and `skipped`, each by the name of a measurement, and facts about
the device."""

PROCESS = "the process"
"""The name of a failure that belongs to no measurement."""
_LINES = 15


def run_child(command: Sequence[str], written: Path, seconds: float) -> Document:
    """Run a program that writes its results to the file `written`, for at most this many seconds.

    Return what it has written, even if it failed later. A failure of the process is added to `failed`, with
    the last lines of its output.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            with time_limit(process.pid, seconds) as expired:
                code = process.wait()
        except BaseException:  # also Ctrl-C
            kill_tree(process.pid)
            process.wait()
            raise
        document, fault = _read(written)
        if expired():
            fault = f"it was ended after {seconds:g} s"
        elif code:
            fault = f"it ended with signal {-code}" if code < 0 else f"it ended with exit code {code}"
        if fault:
            failed = document.setdefault("failed", {})
            failed[PROCESS] = "\n".join([fault, *_last_lines(log)])
    document["seconds"] = time.monotonic() - started
    return document


def _read(path: Path) -> tuple[Document, str]:
    """Return the document in a file and "", or an empty document and the reason."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}, "it wrote no results"
    except ValueError as error:
        return {}, f"its results are not valid JSON ({error})"
    return (document, "") if isinstance(document, dict) else ({}, "its results are not a JSON object")


def _last_lines(log: IO[bytes]) -> list[str]:
    log.seek(0)
    return log.read().decode(errors="replace").splitlines()[-_LINES:]
