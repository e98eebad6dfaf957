"""Runs Cog's server on this machine without Docker: starts it, waits for it, sends it requests and stops it.

Used by `make predict`, `make serve`, the tests and the benchmarks. Knows processes and HTTP; knows nothing
about models.
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
    """The server did not become ready. The message is the log of its setup, if there is one."""


def server_environment(port: int) -> dict[str, str]:
    """Return the server's environment: the variables that `cog build` sets in an image, overridden by the
    current environment."""
    baked = {
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_MAX_CONCURRENCY": str(DEFAULT_CONCURRENCY),
        # The number of events kept for a client that joins a running stream. No answer has that many.
        "COG_STREAM_HISTORY_CAPACITY": "65536",
        "PYTHONUNBUFFERED": "1",
    }
    # The server starts its worker as `python`, which must be this interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**baked, **os.environ, "PORT": str(port), "PATH": path}


def numeric_address(host: str) -> str:
    """Resolve a host to an IP address, which is all that Cog's server accepts. Raises ValueError."""
    try:
        address = socket.getaddrinfo(host.strip("[]") or None, None, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
    return str(address)


def check_listening(address: str, port: int) -> None:
    """Raises ValueError with the reason if a server cannot listen on this IP address and port."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error
        except OverflowError as error:
            raise ValueError("a port is a number from 0 to 65535") from error


def url_of(address: str, port: int) -> str:
    """The URL of a server on this IP address. For one that listens on all addresses, it uses loopback."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"


def free_port() -> int:
    """Return a loopback port that is not in use at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ChildServer(ABC):
    """A server in a child process, as a context manager. `output` receives what the process prints. On exit,
    the server has `grace` seconds to finish its running requests; None means no limit."""

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        port: int,
        output: IO[bytes] | int | None = subprocess.DEVNULL,
        grace: float | None = 30,
        address: str = "127.0.0.1",
    ) -> None:
        self.port, self._grace = port, grace
        self._command, self._environment, self._output = command, environment, output
        # Ignore the proxies in the environment, which cannot reach the loopback interface of this machine.
        self.client = httpx2.Client(base_url=url_of(address, port), timeout=_NO_TIMEOUT, trust_env=False)

    @abstractmethod
    def ready(self) -> bool:
        """Whether the server accepts requests. Raises httpx2.TransportError while it does not listen yet, and
        ServerFailed if its setup has failed."""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # It makes only system calls, which are prepared before the fork: this is safe with threads.
            preexec_fn=_terminate_with_parent(),  # noqa: PLW1509
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
        finally:  # also if another Ctrl-C interrupts the wait
            # Kill the whole process group, because the workers are separate processes.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_until_ready(self, timeout: float = 600) -> None:
        """Raises ServerFailed if the setup fails, the process ends, or `timeout` seconds have passed."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(
                    f"the server ended with exit code {self.process.returncode}; see the server's log "
                    "(`python -m llama serve` shows it)"
                )
            with suppress(httpx2.TransportError):
                if self.ready():
                    return
            time.sleep(0.05)
        raise ServerFailed(
            f"the server was not ready after {timeout:.0f} s; see the server's log (`python -m llama serve` "
            "shows it)"
        )


class CogServer(ChildServer):
    """Cog's server, by default on a free port. `.cog/openapi_schema.json` must exist: see `write_schema`."""

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        output: IO[bytes] | int | None = subprocess.DEVNULL,
        address: str = "127.0.0.1",
        port: int | None = None,
        grace: float | None = 30,
    ) -> None:
        port = free_port() if port is None else port
        environment = {**server_environment(port), **(environment or {})}
        host = f"[{address}]" if ":" in address else address
        command = [sys.executable, "-m", "cog.server.http", "--host", host]
        super().__init__(command, environment, port, output, grace, address)

    def health(self) -> dict[str, Any]:
        """Return the body of `/health-check`, whose HTTP status is always 200."""
        body = self.client.get("/health-check").json()
        assert isinstance(body, dict)
        return body

    def ready(self) -> bool:
        health = self.health()
        if health["status"] in ("SETUP_FAILED", "DEFUNCT"):
            raise ServerFailed(str(health.get("setup", {}).get("logs", "")).strip() or health["status"])
        return bool(health["status"] == "READY")

    def stream(self, inputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Run a prediction and yield the name and data of its server-sent events as they arrive.

        Raises httpx2.HTTPStatusError if the server refuses the prediction, and httpx2.TransportError if it
        ends during the answer.
        """
        # No limit on the size of an event, because the last one repeats the whole answer.
        request = self.client.sse("/predictions", method="POST", json={"input": inputs}, max_event_size=None)
        with request as source:
            if source.response.status_code != 200:
                source.response.read()
            source.response.raise_for_status()
            for event in source:
                data = event.json()
                assert isinstance(data, dict)
                yield event.event, data


def print_setup(output: IO[bytes], answering: Event) -> None:
    """Print the log lines of the model's setup on stderr, until `answering` is set.

    `output` is the server's log, with one JSON object per line. It is read until the server ends, because the
    server would block on a full pipe.
    """
    for line in output:
        message = _setup_message(line)
        if message is not None and not answering.is_set():
            with suppress(OSError):
                print(message, file=sys.stderr)


def _setup_message(line: bytes) -> str | None:
    """Return the message of a log line if the model wrote it, otherwise None. A line that arrives just after
    setup has the target `coglet::user`."""
    with suppress(ValueError, TypeError, KeyError):
        entry = json.loads(line)
        if entry["target"] in ("coglet::setup", "coglet::user"):
            return str(entry["fields"]["message"])
    return None


def _terminate_with_parent() -> Callable[[], None] | None:
    """Return a function for `preexec_fn` that makes Linux send SIGTERM to the child when its parent ends,
    even if the parent is killed. Returns None on other systems."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def request_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)

    return request_signal
