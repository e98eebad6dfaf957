"""Run a peer in a child process that answers one list of requests after the other."""

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

_TIMEOUT = 600.0  # seconds: no peer needs this long to load or to answer


@dataclass(frozen=True, slots=True)
class Spec:
    """How to start a peer."""

    name: str
    module: str
    """The name of a module in `benchmarks.peers`."""
    model: str
    variables: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable


class CannotDo(Exception):
    """The peer does not support the requests, or its process has ended; the message has the reason."""


class PeerProcess:
    """A context manager that starts a peer, waits until it has loaded, and ends it."""

    def __init__(self, spec: Spec, log: Path) -> None:
        """The output of the peer is appended to the file `log`."""
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
        with self._timeout():
            self._process.communicate()  # closes its input, which makes it exit

    def run(self, requests: Sequence[Request]) -> Times:
        """Answer all requests and return the times of their tokens. Raises CannotDo."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended, and `_answer` raises CannotDo
            self._process.stdin.write(to_line(requests))
            self._process.stdin.flush()
        answer: Times | dict[str, str] = self._answer()
        if isinstance(answer, dict):
            raise CannotDo(answer["cannot"])
        return answer

    @property
    def resident_memory(self) -> int:
        """The resident memory of the process, in bytes, without its child processes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def _kill(self) -> None:
        """Kill the process, and the servers that it started."""
        with suppress(psutil.NoSuchProcess):
            peer = psutil.Process(self._process.pid)
            for process in [*peer.children(recursive=True), peer]:
                process.kill()

    @contextmanager
    def _timeout(self) -> Iterator[None]:
        """Kill the peer if the body takes too long."""
        timer = Timer(_TIMEOUT, self._kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _answer(self) -> Any:
        """Read and decode one line. Raises CannotDo."""
        assert self._process.stdout is not None
        with self._timeout():
            line = self._process.stdout.readline()
        if not line:
            raise CannotDo(f"the process ended or did not answer within {_TIMEOUT:.0f} s; see {self._log}")
        return json.loads(line)
