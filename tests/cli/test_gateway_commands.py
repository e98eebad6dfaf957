"""The commands `gateway` and `up` as a person runs them: real processes, signals and ports."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest
from gateways import MODEL
from server_clients import PATIENCE, until

from benchmarks.fake_cog import FakeCog, Script
from llama import ROOT
from llama.gateway.storage.storage import Storage
from llama.gateway.storage.store import Store
from llama.serving.server import free_port

COMMAND = [sys.executable, "-m", "llama"]


class Process:
    """A running command. `text` is what it has printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self.text = process, ""
        self.url, self.pid = "", process.pid
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.text += line

    def wait_for(self, pattern: str) -> str:
        """Wait until a pattern was printed, and return its first group."""
        until(lambda: re.search(pattern, self.text) or self._process.poll() is not None)
        found = re.search(pattern, self.text)
        assert found, self.text
        return found[1]

    def end(self, number: signal.Signals) -> int:
        self._process.send_signal(number)
        return self._process.wait(timeout=PATIENCE)

    def wait(self) -> int:
        return self._process.wait(timeout=PATIENCE)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)


def environment(database: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "LLAMA_GATEWAY_DATABASE": str(database), **more}


@contextmanager
def running(
    database: Path, *arguments: str, limit_of_files: int | None = None, **variables: str
) -> Iterator[Process]:
    limited = [] if limit_of_files is None else ["sh", "-c", f'ulimit -Sn {limit_of_files}; exec "$@"', "sh"]
    process = subprocess.Popen(
        [*limited, *COMMAND, *arguments],
        cwd=ROOT,
        env=environment(database, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Process(process)
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


def refused(database: Path, *arguments: str, **variables: str) -> str:
    """The line with which a command ends."""
    result = subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=environment(database, **variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "gateway.sqlite3"


def test_a_gateway_serves_until_a_signal_ends_it(database: Path) -> None:
    with FakeCog() as cog, running(database, "gateway", "--server", cog.url, "--port", "0") as process:
        url = process.wait_for(r"Open (http:\S+) in a browser")
        assert "There is no key" in process.text
        assert httpx2.get(f"{url}/healthz").json() == {"status": "alive"}
        assert httpx2.get(f"{url}/readyz").json() == {"status": "ready", "servers": 1, "ready": 1}
        assert process.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert "Traceback" not in process.text


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_such_as_the_end_of_the_terminal_ends_a_gateway(
    database: Path, number: signal.Signals
) -> None:
    with FakeCog() as cog, running(database, "gateway", "--server", cog.url, "--port", "0") as process:
        process.wait_for(r"Open (http:\S+) in a browser")
        assert process.end(number) == 128 + number
        assert "Traceback" not in process.text


def test_a_gateway_may_open_as_many_files_as_the_system_allows(database: Path) -> None:
    with FakeCog() as cog:
        arguments = ["gateway", "--server", cog.url, "--port", "0"]
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with running(database, *arguments, limit_of_files=min(hard, 512)) as process:
            process.wait_for(r"Open (http:\S+) in a browser")
            soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            assert soft == hard


def test_a_gateway_without_a_ready_server_lives_and_is_not_ready(database: Path) -> None:
    with running(
        database, "gateway", "--server", f"http://127.0.0.1:{free_port()}", "--port", "0"
    ) as process:
        url = process.wait_for(r"Open (http:\S+) in a browser")
        assert httpx2.get(f"{url}/healthz").status_code == 200
        response = httpx2.get(f"{url}/readyz")
        assert (response.status_code, response.json()["ready"]) == (503, 0)


def test_sighup_makes_the_gateway_read_its_list_of_servers_again(database: Path, tmp_path: Path) -> None:
    servers = tmp_path / "servers.txt"
    with FakeCog() as one, FakeCog() as other:
        servers.write_text(one.url + "\n")
        with running(database, "gateway", "--servers", str(servers), "--port", "0") as process:
            url = process.wait_for(r"Open (http:\S+) in a browser")
            servers.write_text(f"# both\n{one.url}\n{other.url}\n")
            process.signal(signal.SIGHUP)
            until(lambda: httpx2.get(f"{url}/readyz").json()["ready"] == 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --server URL or --servers FILE"),
        (["--server", "http://127.0.0.1:1", "--servers", "/dev/null"], "give either --server URL"),
        (["--server", "127.0.0.1:5000"], "'127.0.0.1:5000' is not the address of a server"),
        (["--servers", "/no/such/file"], "cannot be read"),
        (["--server", "http://127.0.0.1:1", "--port", "99999"], "cannot listen on 127.0.0.1:99999"),
        (["--server", "http://127.0.0.1:1", "--host", "no.such.host.invalid"], "cannot listen on"),
        (["--server", "http://127.0.0.1:1", "--host", "0.0.0.0", "--port", "0"], "keys add NAME"),
    ],
)
def test_what_cannot_be_served_is_refused_on_one_line(
    database: Path, arguments: list[str], message: str
) -> None:
    line = refused(database, "gateway", *arguments)
    assert line.startswith("E3000 BadSettings: ")
    assert message in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (["gateway", "--server", "http://127.0.0.1:1"], "--host and --port\n"),
        (["up"], "--host and --port (make up PORT=...)\n"),
    ],
)
def test_a_port_in_use_names_the_make_target_of_the_command_only(
    database: Path, arguments: list[str], end: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused(database, *arguments, "--port", str(taken.getsockname()[1]))
    assert "Address already in use" in line
    assert line.endswith(end)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PLACES", "0"),
        ("MODEL", "no-owner"),
        ("DEPLOYMENTS", "a/b,c"),
        ("WEBHOOK_NETWORKS", "10.0.0.1/8"),
        ("TRUSTED_PROXIES", "localhost"),
        ("DATABASE", "/dev/null/gateway.sqlite3"),
        ("PUBLIC_URL", "llama.example.com"),
    ],
)
def test_an_invalid_setting_is_refused_with_its_name(database: Path, variable: str, value: str) -> None:
    name = f"LLAMA_GATEWAY_{variable}"
    line = refused(database, "gateway", "--server", "http://127.0.0.1:1", "--port", "0", **{name: value})
    assert name in line
    assert line.count("\n") == 1


def test_a_gateway_that_others_can_reach_needs_a_key(database: Path) -> None:
    with FakeCog() as cog:
        arguments = ["gateway", "--server", cog.url, "--host", "0.0.0.0", "--port", "0"]
        with running(database, *arguments, LLAMA_GATEWAY_KEY="secret") as process:
            url = process.wait_for(r"Open (http:\S+) in a browser")
            assert "Clients need a key;" in process.text
            assert httpx2.get(f"{url}/v1/models").status_code == 401
            with_key = httpx2.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"})
            assert with_key.status_code == 200
            assert "secret" not in process.text


def test_a_second_gateway_on_the_same_database_is_refused_before_it_starts_a_server(database: Path) -> None:
    storage = Storage(database)
    try:
        for arguments in (["gateway", "--server", "http://127.0.0.1:1"], ["up"]):
            line = refused(database, *arguments, "--port", "0")
            assert line.startswith("E3000 BadSettings: another gateway uses the database ")
    finally:
        storage.close()


def test_a_second_ctrl_c_ends_the_gateway_at_once_and_its_predictions_fail(database: Path) -> None:
    with FakeCog(Script(hold_after=1)) as cog:
        arguments = ["gateway", "--server", cog.url, "--port", "0"]
        with running(database, *arguments) as process:
            url = process.wait_for(r"Open (http:\S+) in a browser")
            created = httpx2.post(
                f"{url}/v1/models/{MODEL}/predictions", json={"input": {"prompt": "Hi"}}
            ).json()
            until(lambda: httpx2.get(created["urls"]["get"]).json()["output"])
            process.signal(signal.SIGINT)
            process.wait_for(r"stopping; running predictions \((1)\)")
            assert process.end(signal.SIGINT) == 128 + signal.SIGINT
            assert "Traceback" not in process.text
        store = Store(database)
        stored = store.prediction(created["id"])
        store.close()
    assert stored is not None
    assert str(stored.error).startswith("E4002 GatewayRestarted: ")


def test_up_ends_with_an_error_when_its_server_is_killed(database: Path, embedded_folder: Path) -> None:
    with running(database, "up", "--port", "0", LLAMA_WEIGHTS=str(embedded_folder)) as process:
        process.wait_for(r"Open (\S+) in")
        port = int(process.wait_for(r"the server http://127.0.0.1:(\d+) is ready"))
        (server,) = [p for p in psutil.Process(process.pid).children() if listens(p, port)]
        server.kill()
        assert process.wait() == 1
        assert "the server has ended" in process.text


def listens(process: psutil.Process, port: int) -> bool:
    return any(c.laddr.port == port for c in process.net_connections() if c.status == psutil.CONN_LISTEN)


def test_up_runs_a_server_and_a_gateway_and_ctrl_c_ends_both(database: Path) -> None:
    with running(database, "up", "--port", "0") as process:
        url = process.wait_for(r"(?s)Open (\S+) in a browser\..*OpenAI.*Replicate's client.*flush=True\)")
        assert httpx2.get(f"{url}/readyz").status_code == 200
        assert "A small test model answers" in process.text
        assert httpx2.get(f"{url}/page/session").json()["notice"].startswith("A small test model answers")
        server = process.wait_for(r"the server (\S+) is ready")
        question = [{"role": "user", "content": "What is the capital of France?"}]
        body = {"model": "meta/llama-2-70b-chat", "messages": question, "temperature": 0}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert process.end(signal.SIGINT) == 128 + signal.SIGINT
        for address in (url, server):
            with pytest.raises(httpx2.ConnectError):
                httpx2.get(f"{address}/health-check")
