"""Cog's own server on this machine, without Docker: start it, wait for it, talk to it, end it.

Used by `make predict`, `make serve`, the tests and the benchmarks. Knows processes and HTTP; knows
nothing of models.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import IO, Any, Self

import httpx2

from llama.settings import DEFAULT_CONCURRENCY, ROOT

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_NO_TIMEOUT = httpx2.Timeout(None, connect=10)


class ServerFailed(Exception):
    """The server did not become ready; the text says what its setup said."""


def server_environment(port: int) -> dict[str, str]:
    """What `cog build` bakes into an image, on top of the current environment."""
    baked = {
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_MAX_CONCURRENCY": str(DEFAULT_CONCURRENCY),
        # Events kept for a reader who joins a running stream: more than any answer has.
        "COG_STREAM_HISTORY_CAPACITY": "65536",
        "PYTHONUNBUFFERED": "1",
    }
    # The server starts its worker as `python`, so that must be this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**baked, **os.environ, "PORT": str(port), "PATH": path}


def listening_fault(host: str, port: int) -> str | None:
    """Why a server cannot listen there; None when it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
        except OverflowError:
            return "a port is a number from 0 to 65535"
    return None


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ChildServer(ABC):
    """A server as a child process: a context manager. `output` takes what it prints. On the way out it has
    `grace` seconds to finish what it is answering; None: as long as it takes."""

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        port: int,
        output: IO[bytes] | int | None = subprocess.DEVNULL,
        grace: float | None = 30,
    ) -> None:
        self.port, self._grace = port, grace
        self._command, self._environment, self._output = command, environment, output
        # Not by the environment's proxies, which cannot reach this machine's loopback.
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=_NO_TIMEOUT, trust_env=False)

    @abstractmethod
    def ready(self) -> bool:
        """Whether it answers. Raises httpx2.TransportError while it does not listen, ServerFailed when it
        never will."""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # One system call that is prepared before the fork, so threads do not matter.
            preexec_fn=_dying_with_parent(),  # noqa: PLW1509
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        try:
            if self.process.poll() is None:
                self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=self._grace)
        finally:  # another Ctrl-C ends the wait
            # Workers are processes of their own in the same group: nothing is left behind.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_until_ready(self, timeout: float = 600) -> None:
        """Raises ServerFailed with the setup's own words, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"the server ended with exit code {self.process.returncode}")
            with suppress(httpx2.TransportError):
                if self.ready():
                    return
            time.sleep(0.05)
        raise ServerFailed(f"the server was not ready after {timeout:.0f} s")


class CogServer(ChildServer):
    """Cog's server, by default on a free port. `.cog/openapi_schema.json` must have been written."""

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        output: IO[bytes] | int | None = subprocess.DEVNULL,
        host: str = "127.0.0.1",
        port: int | None = None,
        grace: float | None = 30,
    ) -> None:
        port = free_port() if port is None else port
        environment = {**server_environment(port), **(environment or {})}
        command = [sys.executable, "-m", "cog.server.http", "--host", host]
        super().__init__(command, environment, port, output, grace)

    def health(self) -> dict[str, Any]:
        """The body of `/health-check`; its HTTP status is always 200."""
        body = self.client.get("/health-check").json()
        assert isinstance(body, dict)
        return body

    def ready(self) -> bool:
        health = self.health()
        if health["status"] in ("SETUP_FAILED", "DEFUNCT"):
            raise ServerFailed(str(health.get("setup", {}).get("logs", "")).strip() or health["status"])
        return bool(health["status"] == "READY")

    def stream(self, inputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Run a prediction over SSE: the name and data of each event, as they come."""
        # No limit on an event: the last one repeats the whole answer.
        request = self.client.sse("/predictions", method="POST", json={"input": inputs}, max_event_size=None)
        with request as source:
            if source.response.status_code != 200:
                source.response.read()
            source.response.raise_for_status()
            for event in source:
                yield event.event, event.json()


def print_setup(output: IO[bytes], answering: Event) -> None:
    """Print the model's log lines on stderr until `answering` is set, so that none gets into an answer.

    `output` is the server's own log, one JSON object a line. It is read until the server ends, so that the
    server never waits for a reader.
    """
    for line in output:
        message = _setup_message(line)
        if message is not None and not answering.is_set():
            with suppress(OSError):
                print(message, file=sys.stderr)


def _setup_message(line: bytes) -> str | None:
    """What the model logged, if this is such a line. Cog calls a line that arrives just after setup the
    user's."""
    with suppress(ValueError, TypeError, KeyError):
        entry = json.loads(line)
        if entry["target"] in ("coglet::setup", "coglet::user"):
            return str(entry["fields"]["message"])
    return None


def _dying_with_parent() -> Callable[[], None] | None:
    """To be run in a child before it becomes a program: on Linux, it gets SIGTERM when its parent is gone,
    however that ended. None on other systems."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was gone before this
            os._exit(1)

    return arrange
