"""A peer as a child process that stays up between its turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any, Self

import psutil

from benchmarks.protocol import Request, Times, to_line
from llama import ROOT

_PATIENCE = 600.0  # seconds: no peer takes so long to load, nor for a turn


@dataclass(frozen=True, slots=True)
class Spec:
    """What to start."""

    name: str
    module: str
    """Below `benchmarks.peers`."""
    model: str
    variables: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable


class CannotDo(Exception):
    """The peer has no such thing, or has died; the text says why."""


class PeerProcess:
    """A context manager: loads the peer, and ends it."""

    def __init__(self, spec: Spec, log: Path) -> None:
        """What the peer itself prints is added to `log`."""
        self.spec, self._log = spec, log

    def __enter__(self) -> Self:
        started = time.perf_counter()
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [self.spec.python, "-m", f"benchmarks.peers.{self.spec.module}", self.spec.model],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **self.spec.variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.versions: dict[str, str] = self._answer()
        except BaseException:
            self._kill()
            self._process.communicate()
            raise
        self.seconds_to_load = time.perf_counter() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._patience():
            self._process.communicate()  # its input ends, and then it does

    def run(self, requests: Sequence[Request]) -> Times:
        """Raises CannotDo."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: its answer says so
            self._process.stdin.write(to_line(requests))
            self._process.stdin.flush()
        answer: Times | dict[str, str] = self._answer()
        if isinstance(answer, dict):
            raise CannotDo(answer["cannot"])
        return answer

    @property
    def resident_memory(self) -> int:
        """Bytes, of the process itself."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def _kill(self) -> None:
        """With the servers that it started."""
        with suppress(psutil.NoSuchProcess):
            peer = psutil.Process(self._process.pid)
            for process in [*peer.children(recursive=True), peer]:
                process.kill()

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """Kills a peer that has not done its part in time."""
        timer = Timer(_PATIENCE, self._kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _answer(self) -> Any:
        """Raises CannotDo."""
        assert self._process.stdout is not None
        with self._patience():
            line = self._process.stdout.readline()
        if not line:
            raise CannotDo(f"it has died or did not answer; what it said is in {self._log}")
        return json.loads(line)
