"""The processes that are measured: gateways and the servers behind them, with their CPU time and memory."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import psutil

from llama.serving.server import ChildServer, free_port, server_environment, url_of

KEY = f"sk-{secrets.token_hex(32)}"
"""The key of both gateways. LiteLLM's proxy refuses to start with a weak one."""


class Process(ChildServer):
    """A server on a free port; `{port}` in the command stands for it. The server is ready when `path`
    responds with 200."""

    def __init__(
        self,
        command: Sequence[str],
        path: str,
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        port = free_port()
        self._path, self._log = path, log
        self.url = url_of("127.0.0.1", port)
        words = [word.replace("{port}", str(port)) for word in command]
        super().__init__(words, {**server_environment(port), **(environment or {})}, port, grace=10)

    def ready(self) -> bool:
        return bool(self.client.get(self._path).status_code == 200)

    def __enter__(self) -> Self:
        if self._log is None:
            return super().__enter__()
        with self._log.open("ab") as output:
            self._output = output
            return super().__enter__()

    def kill(self) -> None:
        """End the process as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    @property
    def cpu_seconds(self) -> float:
        """The CPU time of the process and its children so far."""
        return sum(float(t.user + t.system) for t in (p.cpu_times() for p in self._processes()))

    @property
    def memory(self) -> int:
        """The resident memory of the process and its children, in bytes."""
        return sum(int(p.memory_info().rss) for p in self._processes())

    def _processes(self) -> Iterator[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        yield parent
        yield from parent.children(recursive=True)


def fake_cog(pieces: int, gap: float) -> Process:
    """A fake of Cog's server that sends `pieces` pieces, one every `gap` seconds."""
    return _fake("benchmarks.fake_cog", "/health-check", pieces, gap)


def fake_openai(pieces: int, gap: float) -> Process:
    """A fake OpenAI server with the same pieces."""
    return _fake("benchmarks.fake_openai", "/v1/models", pieces, gap)


def _fake(module: str, path: str, pieces: int, gap: float) -> Process:
    options = ["--port", "{port}", "--pieces", str(pieces), "--gap", str(gap)]
    return Process([sys.executable, "-m", module, *options], path)


def gateway(servers: Sequence[str], database: Path, log: Path | None = None, **settings: str) -> Process:
    """Our gateway, with the key `KEY`. `settings`: its variables, without their prefix."""
    command = [sys.executable, "-m", "llama", *gateway_arguments(servers)]
    return Process(command, "/readyz", environment=gateway_environment(database, **settings), log=log)


def gateway_arguments(servers: Sequence[str]) -> list[str]:
    options = [option for server in servers for option in ("--server", server)]
    return ["gateway", "--port", "{port}", *options]


def gateway_environment(database: Path, **settings: str) -> dict[str, str]:
    variables = {"KEY": KEY, "DATABASE": str(database), **settings}
    return {f"LLAMA_GATEWAY_{name.upper()}": value for name, value in variables.items()}


def litellm(python: str, upstream: str, folder: Path) -> Process:
    """LiteLLM's proxy in front of an OpenAI server, run by an interpreter that has it."""
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n"
        "  - model_name: meta/llama-2-70b-chat\n"
        "    litellm_params:\n"
        f"      {{model: openai/llama, api_base: {upstream}/v1, api_key: none}}\n"
    )
    command = [str(Path(python).with_name("litellm")), "--config", str(config), "--port", "{port}"]
    # Without these and `--telemetry`, LiteLLM downloads a price list and sends statistics.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY}
    return Process(
        [*command, "--host", "127.0.0.1", "--telemetry", "False"],
        "/health/liveliness",
        environment=environment,
        log=folder / "litellm.log",
    )


def version_of_litellm(python: str) -> str:
    code = "import importlib.metadata as m; print(m.version('litellm'))"
    return subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


@contextmanager
def peak_memory(process: Process) -> Iterator[list[int]]:
    """Measure a process's resident memory ten times a second. After the block, the list has the maximum."""
    import threading

    peak, stop = [process.memory], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            peak[0] = max(peak[0], process.memory)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
