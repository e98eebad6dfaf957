"""Cog's own server on this machine, without Docker: start it, wait for it, talk to it, end it.

Used by `make predict`, `make serve`, the tests and the benchmarks. Knows processes and HTTP; knows
nothing of models.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import httpx

ROOT = Path(__file__).resolve().parent.parent
_NO_TIMEOUT = httpx.Timeout(None, connect=10)


class ServerFailed(Exception):
    """The server did not become ready; the text says what its setup said."""


def server_environment(port: int) -> dict[str, str]:
    """What `cog build` bakes into an image, on top of the current environment."""
    baked = {
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_MAX_CONCURRENCY": "32",
        # Events kept for a reader who joins a running stream: more than any answer has.
        "COG_STREAM_HISTORY_CAPACITY": "65536",
        "PYTHONUNBUFFERED": "1",
    }
    # The server starts its worker as `python`, so that must be this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**baked, **os.environ, "PORT": str(port), "PATH": path}


def server_command(host: str) -> list[str]:
    return [sys.executable, "-m", "cog.server.http", "--host", host]


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class CogServer:
    """Cog's server as a child process on a free loopback port: a context manager.

    `.cog/openapi_schema.json` must have been written. `output` takes the server's own output.
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, *, output: IO[bytes] | int = subprocess.DEVNULL
    ) -> None:
        self.port = free_port()
        self._environment = {**server_environment(self.port), **(environment or {})}
        self._output = output
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=_NO_TIMEOUT)

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            server_command("127.0.0.1"),
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        # The worker is a process of its own in the same group: nothing is left behind.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def health(self) -> dict[str, Any]:
        """The body of `/health-check`; its HTTP status is always 200."""
        body = self.client.get("/health-check").json()
        assert isinstance(body, dict)
        return body

    def wait_until_ready(self, timeout: float = 600) -> None:
        """Raises ServerFailed with the setup's own words, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerFailed(f"the server ended with exit code {self.process.returncode}")
            try:
                health = self.health()
            except httpx.TransportError:
                health = {"status": "STARTING"}
            if health["status"] == "READY":
                return
            if health["status"] in ("SETUP_FAILED", "DEFUNCT"):
                raise ServerFailed(str(health.get("setup", {}).get("logs", "")).strip() or health["status"])
            time.sleep(0.05)
        raise ServerFailed(f"the server was not ready after {timeout:.0f} s")

    def stream(self, inputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Run a prediction over SSE: the name and data of each event, as they come."""
        headers = {"Accept": "text/event-stream"}
        with self.client.stream("POST", "/predictions", json={"input": inputs}, headers=headers) as response:
            if response.status_code != 200:
                response.read()
            response.raise_for_status()
            yield from read_events(response.iter_lines())


def read_events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The server-sent events in lines of text."""
    event, data = "", list[str]()
    for line in lines:
        field, _, value = line.partition(":")
        if field == "event":
            event = value.strip()
        elif field == "data":
            data.append(value.removeprefix(" "))
        elif not line and data:
            yield event, json.loads("\n".join(data))
            event, data = "", []
