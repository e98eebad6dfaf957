"""Run a peer in a child process that answers one list of requests after the other.

If a peer ends, hangs, raises an error or gives an invalid answer, it and its child processes are killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Self, TypeVar

import psutil
from pydantic import TypeAdapter, ValidationError

from benchmarks.protocol import Request, Times, to_line
from llama import ROOT

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Spec:
    """How to start a peer."""

    name: str
    module: str
    """The module that is run as a program, such as `benchmarks.peers.ours`."""
    model: str
    variables: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable


@dataclass(frozen=True, slots=True)
class Limits:
    """How many seconds a peer may take."""

    load: float = 600.0
    run: float = 120.0
    """For one list of requests. The peer may also take this long to end."""


class CannotDo(Exception):
    """The peer does not support the requests. The message has the reason. The peer still runs."""


class PeerFailed(Exception):
    """The peer ended, hung, failed or gave an invalid answer. It was killed. The message has the reason."""


class PeerProcess:
    """A context manager that starts a peer, waits until it has loaded, and ends it."""

    def __init__(self, spec: Spec, log: Path, limits: Limits | None = None) -> None:
        """The output of the peer is appended to the file `log`."""
        self.spec, self._log, self._limits = spec, log, limits or Limits()

    def __enter__(self) -> Self:
        """Raises PeerFailed."""
        started = time.perf_counter()
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [self.spec.python, "-m", self.spec.module, self.spec.model],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **self.spec.variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.versions = self._exchange(None, self._limits.load, TypeAdapter(dict[str, str]))
        self.seconds_to_load = time.perf_counter() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with time_limit(self._process.pid, self._limits.run), suppress(BrokenPipeError):
            self._process.communicate()  # closes its input, which makes it exit

    def run(self, requests: Sequence[Request]) -> Times:
        """Answer all requests and return the times of their tokens. Raises CannotDo or PeerFailed."""
        times = self._exchange(to_line(requests), self._limits.run, TypeAdapter(Times))
        # A server may send several tokens in one piece. Then there is one time for all of them.
        if len(times) != len(requests) or not all(
            0 < len(mine) <= request.new_tokens for mine, request in zip(times, requests, strict=True)
        ):
            self._kill()
            raise PeerFailed("the times in its answer do not fit the requests")
        return times

    @property
    def resident_memory(self) -> int:
        """The resident memory of the process, in bytes, without its child processes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def _exchange(self, line: str | None, seconds: float, expected: TypeAdapter[_Answer]) -> _Answer:
        """Send a line if there is one, and decode the line of the answer. Raises CannotDo or PeerFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            with time_limit(self._process.pid, seconds) as expired:
                if line is not None:
                    with suppress(BrokenPipeError):  # the process has ended, so there is no answer either
                        self._process.stdin.write(line)
                        self._process.stdin.flush()
                answer = self._process.stdout.readline()
            if not answer:
                raise PeerFailed(f"no answer within {seconds:g} s" if expired() else "its process ended")
            return _decoded(answer, expected)
        except CannotDo:
            raise
        except BaseException:  # also Ctrl-C
            self._kill()
            raise

    def _kill(self) -> None:
        kill_tree(self._process.pid)
        self._process.wait()


def _decoded(answer: str, expected: TypeAdapter[_Answer]) -> _Answer:
    """Raises CannotDo, or PeerFailed if the peer failed or the answer is not the expected one."""
    with suppress(ValidationError):
        refusal = TypeAdapter(dict[str, str]).validate_json(answer)
        if "cannot" in refusal:
            raise CannotDo(refusal["cannot"])
        if "failed" in refusal:
            raise PeerFailed(refusal["failed"])
    try:
        return expected.validate_json(answer)
    except ValidationError as error:
        raise PeerFailed(f"its answer is invalid: {answer[:60].strip()!r}") from error


@contextmanager
def time_limit(pid: int, seconds: float) -> Iterator[Callable[[], bool]]:
    """Kill a process and its child processes if the body takes too long.

    The body gets a function that returns whether this has happened.
    """
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        kill_tree(pid)

    timer = Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield lambda: expired
    finally:
        timer.cancel()


def kill_tree(pid: int) -> None:
    """Kill a process and all its child processes."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for child in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                child.kill()
