"""What survives a killed gateway, a restart, and a full disk. The gateway is a process of its own here."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
from gateways import MODEL, Gateway
from server_clients import Body, until

from benchmarks.fake_cog import FakeCog, Script
from benchmarks.gateway.books import read_books
from benchmarks.gateway.processes import KEY, Process, gateway, gateway_arguments, gateway_environment
from llama.serving.server import ServerFailed

_PREDICTIONS = f"/v1/models/{MODEL}/predictions"
ANSWER = list(Script().pieces)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "gateway" / "gateway.sqlite3"


def started(process: Process) -> Process:
    """Wait until a gateway is ready, and let its client send the key."""
    process.wait_until_ready()
    process.client.headers["Authorization"] = f"Bearer {KEY}"
    return process


def create(process: Process, number: int) -> Body:
    response = process.client.post(_PREDICTIONS, json={"input": {"prompt": f"request {number}"}})
    assert response.status_code == 201, response.text
    body: Body = response.json()
    return body


def get(process: Process, prediction: Body) -> Body:
    response = process.client.get(f"/v1/predictions/{prediction['id']}")
    assert response.status_code == 200, response.text
    body: Body = response.json()
    return body


def has_ended(prediction: Body) -> bool:
    return prediction["status"] in ("succeeded", "failed", "canceled")


# --- killed gateways


def test_a_killed_gateway_fails_what_ran_runs_what_waited_and_keeps_what_had_ended(
    cog: FakeCog, database: Path
) -> None:
    with gateway([cog.url], database, places="1") as killed:
        started(killed)
        finished = create(killed, 1)
        until(lambda: has_ended(get(killed, finished)))
        cog.rules.script = Script(hold_after=3)
        running, waiting = create(killed, 2), create(killed, 3)
        until(lambda: len(get(killed, running)["output"]) == 3)
        time.sleep(1)  # the counts of a running prediction are stored several times a second
        killed.kill()
    cog.rules.script = Script()
    until(lambda: cog.counts.cancelled == 1)
    with gateway([cog.url], database) as restarted:
        started(restarted)
        until(lambda: has_ended(get(restarted, waiting)))
        after = [get(restarted, prediction) for prediction in (finished, running, waiting)]
    assert [prediction["status"] for prediction in after] == ["succeeded", "failed", "succeeded"]
    assert after[1]["error"].startswith("E4002 GatewayRestarted: ")
    assert after[0]["output"] == after[2]["output"] == ANSWER
    books = read_books(database)
    assert (books.counted, books.counted_tokens) == (3, 2 * len(ANSWER) + 3)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_finished_prediction_and_no_count_is_lost_if_the_gateway_is_killed_at_any_moment(
    seed: int, cog: FakeCog, database: Path
) -> None:
    cog.rules.script = Script(gap=0.002)
    chance, seen, accepted = random.Random(seed), dict[str, Body](), list[Body]()

    def ask(process: Process, number: int) -> None:
        """Create a prediction and read it until it has ended or the gateway is killed."""
        with suppress(httpx2.TransportError):
            prediction = create(process, number)
            accepted.append(prediction)
            while not has_ended(body := get(process, prediction)):
                pass
            seen[body["id"]] = body

    for round_number in range(3):
        with gateway([cog.url], database, places="4") as process:
            started(process)
            with ThreadPoolExecutor(8) as pool:
                for number in range(200):
                    pool.submit(ask, process, 1000 * round_number + number)
                time.sleep(chance.uniform(0.05, 0.6))
                process.kill()
    with gateway([cog.url], database) as process:
        started(process)
        until(lambda: all(has_ended(get(process, prediction)) for prediction in accepted))
        for prediction_id, before in seen.items():
            after = get(process, {"id": prediction_id})
            assert {key: after[key] for key in ("status", "output", "error", "metrics", "completed_at")} == {
                key: before[key] for key in ("status", "output", "error", "metrics", "completed_at")
            }
    assert seen
    books = read_books(database)
    assert books.rows == books.counted >= len(accepted)
    assert books.tokens == books.counted_tokens
    assert len(books.predictions) == books.rows
    for number in books.numbers("succeeded"):
        assert books.predictions[number]["output"] == ANSWER
        assert books.predictions[number]["metrics"]["output_token_count"] == len(ANSWER)


def test_a_restart_keeps_predictions_and_lets_running_ones_end(
    cog: FakeCog, gateways: Callable[..., Gateway]
) -> None:
    gateway = gateways(cog.url, wiring={"grace": 60})
    cog.rules.script = Script(gap=0.05)
    running = gateway.create()
    gateway.wait_for(running, "processing")
    gateway.restart()
    ended = gateway.get(running)
    assert (ended["status"], ended["output"]) == ("succeeded", ANSWER)
    assert gateway.client.get("/v1/predictions").json()["results"][0]["id"] == running["id"]


# --- one gateway per database


def test_a_second_gateway_on_the_same_database_is_refused(
    cog: FakeCog, database: Path, tmp_path: Path
) -> None:
    log = tmp_path / "second.log"
    with gateway([cog.url], database) as first:
        started(first)
        with gateway([cog.url], database, log) as second, pytest.raises(ServerFailed):
            second.wait_until_ready()
        assert f"another gateway uses the database {database}" in log.read_text()
        assert "Traceback" not in log.read_text()
        assert create(first, 1)["status"] == "starting"


# --- a full disk

_WITH_A_LIMIT = """
import resource, signal
from pathlib import Path

from llama.cli.main import main

_, most = resource.getrlimit(resource.RLIMIT_FSIZE)

def fill(*_):
    largest = max(path.stat().st_size for path in Path(DATABASE).parent.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, most))

def free(*_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

signal.signal(signal.SIGUSR1, fill)
signal.signal(signal.SIGUSR2, free)
main()
"""


class GatewayOnADiskThatFills(Process):
    """A gateway whose files cannot grow between `fill` and `free`. Its writes fail then, as on a full disk."""

    def __init__(self, server: str, database: Path) -> None:
        code = _WITH_A_LIMIT.replace("DATABASE", repr(str(database)))
        command = [sys.executable, "-c", code, *gateway_arguments([server])]
        super().__init__(command, "/readyz", environment=gateway_environment(database))

    def fill(self) -> None:
        self.process.send_signal(signal.SIGUSR1)

    def free(self) -> None:
        self.process.send_signal(signal.SIGUSR2)


def test_a_full_disk_refuses_new_work_and_loses_nothing(cog: FakeCog, database: Path) -> None:
    cog.rules.script = Script(hold_after=2)
    with GatewayOnADiskThatFills(cog.url, database) as full:
        started(full)
        running = create(full, 1)
        until(lambda: len(get(full, running)["output"]) == 2)
        full.fill()
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "request 9"}]}

        def refused() -> bool:
            responses = [
                full.client.post(_PREDICTIONS, json={"input": {"prompt": "request 9"}}),
                full.client.post("/v1/chat/completions", json={**chat, "stream": True}),
            ]
            statuses = {response.status_code for response in responses}
            assert responses[0].status_code != 503 or responses[0].json()["status"] == 503
            assert responses[1].status_code != 503 or responses[1].json()["error"]["type"] == "server_error"
            return statuses == {503}

        until(refused)
        cog.release()
        until(lambda: has_ended(get(full, running)))
        assert get(full, running)["output"] == ANSWER
        full.free()
        cog.rules.script = Script()
        until(lambda: read_books(database).numbers("succeeded") >= {1})
        assert create(full, 2)["status"] == "starting"
        full.kill()
    with gateway([cog.url], database) as restarted:
        started(restarted)
        assert get(restarted, running)["output"] == ANSWER
    assert read_books(database).counted_tokens >= len(ANSWER)
