"""Servers that end, drain, hang, fail or are full while the gateway uses them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest
from gateways import MODEL, Gateway
from server_clients import Body, until

from benchmarks.fake_cog import FakeCog, Script, real_schema
from benchmarks.gateway.books import read_books
from llama.gateway.dispatch.cog_client import CogClient, Unavailable

StartGateway = Callable[..., Gateway]
ANSWER = "".join(Script().pieces)


@pytest.fixture
def other() -> Iterator[FakeCog]:
    with FakeCog() as running:
        yield running


def ready_servers(gateway: Gateway) -> int:
    return int(gateway.client.get("/readyz").json()["ready"])


def started_on(cog: FakeCog, other: FakeCog, gateways: StartGateway, **inputs: Any) -> tuple[Gateway, Body]:
    """Start a prediction on `cog`, and then make `other` ready too."""
    other.rules.health = "STARTING"
    gateway = gateways(cog.url, other.url)
    prediction = gateway.create(prompt="request 1", **inputs)
    until(lambda: cog.counts.running == 1)
    other.rules.health = None
    until(lambda: ready_servers(gateway) == 2)
    return gateway, prediction


def chat(gateway: Gateway, **body: Any) -> httpx2.Response:
    message = {"role": "user", "content": "Hello"}
    return gateway.client.post("/v1/chat/completions", json={"model": MODEL, "messages": [message], **body})


def test_a_prediction_without_pieces_goes_to_another_server_if_its_server_dies(
    cog: FakeCog, other: FakeCog, gateways: StartGateway
) -> None:
    cog.rules.script = Script(hold_after=0)
    gateway, prediction = started_on(cog, other, gateways)
    cog.die()
    ended = gateway.wait_for(prediction)
    assert (ended["status"], "".join(ended["output"])) == ("succeeded", ANSWER)
    assert (cog.counts.lost, other.counts.succeeded) == (1, 1)


def test_a_prediction_with_pieces_fails_if_its_server_dies_and_keeps_and_counts_them(
    cog: FakeCog, other: FakeCog, gateways: StartGateway, tmp_path: Path
) -> None:
    cog.rules.script = Script(hold_after=2)
    gateway, prediction = started_on(cog, other, gateways)
    until(lambda: len(gateway.get(prediction)["output"]) == 2)
    cog.die()
    ended = gateway.wait_for(prediction)
    assert ended["status"] == "failed"
    assert ended["output"] == ["The", " capital"]
    assert ended["error"].startswith("E4001 ServerLost: ")
    assert other.predictions == []
    books = read_books(tmp_path / "gateway.sqlite3")
    assert (books.counted, books.counted_tokens) == (1, 2)


def test_a_prediction_that_every_server_dies_of_is_not_given_to_all_of_them(gateways: StartGateway) -> None:
    servers = [FakeCog(Script(die_after=0)) for _ in range(4)]
    for server in servers:
        server.__enter__()
    try:
        gateway = gateways(*(server.url for server in servers))
        until(lambda: ready_servers(gateway) == 4)
        ended = gateway.wait_for(gateway.create())
        assert ended["status"] == "failed"
        assert sum(server.counts.lost for server in servers) == 3
    finally:
        for server in servers:
            server.__exit__(None, None, None)


def test_a_failure_of_the_server_itself_moves_the_prediction_and_one_of_the_caller_does_not(
    cog: FakeCog, other: FakeCog, gateways: StartGateway
) -> None:
    scripts = iter([Script([], error="E2002 EngineStopped: the engine is not running"), Script()])
    cog.rules.script = other.rules.script = lambda _: next(scripts)
    gateway = gateways(cog.url, other.url)
    assert gateway.wait_for(gateway.create())["status"] == "succeeded"
    cog.rules.script = other.rules.script = Script([], error="E1001 PromptRequired: prompt is blank")
    ended = gateway.wait_for(gateway.create())
    assert (ended["status"], ended["error"]) == ("failed", "E1001 PromptRequired: prompt is blank")
    assert cog.counts.failed + other.counts.failed == 2


def test_a_draining_server_ends_its_answers_and_gets_no_more(
    cog: FakeCog, other: FakeCog, gateways: StartGateway
) -> None:
    cog.rules.script = Script(hold_after=1)
    gateway, prediction = started_on(cog, other, gateways)
    cog.drain()
    until(lambda: ready_servers(gateway) == 1)
    assert gateway.wait_for(gateway.create())["status"] == "succeeded"
    assert other.counts.succeeded == 1
    cog.release()
    assert gateway.wait_for(prediction)["status"] == "succeeded"


def test_requests_wait_while_no_server_is_there_and_are_answered_when_one_is_back(
    cog: FakeCog, gateway: Gateway
) -> None:
    cog.die()
    until(lambda: gateway.client.get("/readyz").status_code == 503)
    predictions = [gateway.create() for _ in range(5)]
    answers = list[httpx2.Response]()
    thread = Thread(target=lambda: answers.append(chat(gateway)))
    thread.start()
    assert {gateway.get(prediction)["status"] for prediction in predictions} == {"starting"}
    cog.start_again()
    assert {gateway.wait_for(prediction)["status"] for prediction in predictions} == {"succeeded"}
    thread.join(60)
    assert answers[0].json()["choices"][0]["message"]["content"] == ANSWER


def test_a_request_that_no_server_takes_in_time_fails(cog: FakeCog, gateways: StartGateway) -> None:
    gateway = gateways(cog.url, queue_timeout=0.5)
    cog.rules.health = "STARTING"
    until(lambda: gateway.client.get("/readyz").status_code == 503)
    ended = gateway.wait_for(gateway.create())
    assert ended["status"] == "failed"
    assert ended["error"].startswith("E4003 NotStarted: ")
    assert chat(gateway).status_code >= 500


def test_a_server_that_stops_responding_is_given_up(
    cog: FakeCog, other: FakeCog, gateways: StartGateway
) -> None:
    cog.rules.script = Script(hang=True)
    other.rules.health = "STARTING"
    gateway = gateways(cog.url, other.url, wiring={"lost_after": 0.2})
    prediction = gateway.create()
    until(lambda: cog.counts.running == 1)
    cog.rules.frozen = True
    other.rules.health = None
    assert gateway.wait_for(prediction)["status"] == "succeeded"
    assert other.counts.succeeded == 1
    until(lambda: cog.counts.cancelled == 1)


@pytest.mark.parametrize("health", ["STARTING", "SETUP_FAILED", "UNHEALTHY", "DEFUNCT"])
def test_a_server_that_is_not_ready_gets_no_requests(
    health: str, cog: FakeCog, other: FakeCog, gateways: StartGateway
) -> None:
    cog.rules.health = health
    gateway = gateways(cog.url, other.url)
    predictions = [gateway.create() for _ in range(3)]
    assert {gateway.wait_for(prediction)["status"] for prediction in predictions} == {"succeeded"}
    assert cog.predictions == []


def test_no_conflict_of_a_server_reaches_a_client(cog: FakeCog, gateway: Gateway) -> None:
    cog.rules.false_conflicts = 20
    predictions = [gateway.create() for _ in range(10)]
    ended = [gateway.wait_for(prediction) for prediction in predictions]
    assert {"".join(prediction["output"]) for prediction in ended} == {ANSWER}
    assert cog.rules.false_conflicts == 0
    assert cog.counts.succeeded == 10


def test_requests_wait_while_another_client_has_all_places_of_a_server(gateways: StartGateway) -> None:
    with FakeCog(Script(hold_after=1), places=1) as cog:
        gateway = gateways(cog.url)
        body = {"input": {"prompt": "Hello"}}
        arguments: dict[str, Any] = {"method": "POST", "json": body}
        with gateway.client_of(None).sse(f"{cog.url}/predictions", **arguments) as source:
            assert source.response.status_code == 200
            prediction = gateway.create()
            until(lambda: len(cog.predictions) > 8)  # it was refused again and again
            assert gateway.get(prediction)["status"] == "starting"
            cog.rules.script = Script()
        assert gateway.wait_for(prediction)["status"] == "succeeded"


def test_a_server_never_gets_more_requests_than_it_has_places(
    cog: FakeCog, other: FakeCog, gateways: StartGateway
) -> None:
    gateway = gateways(cog.url, other.url, places=2)
    cog.rules.script = other.rules.script = Script(gap=0.005)
    predictions = [gateway.create(prompt=f"request {number}") for number in range(20)]
    assert {gateway.wait_for(prediction)["status"] for prediction in predictions} == {"succeeded"}
    assert (cog.counts.most_running, other.counts.most_running) == (2, 2)
    assert len(cog.predictions) + len(other.predictions) == 20  # none was refused and sent again


def test_a_chat_whose_server_dies_is_an_error_before_its_first_piece_and_an_error_event_after_it(
    cog: FakeCog, gateways: StartGateway
) -> None:
    gateway = gateways(cog.url, queue_timeout=1)
    cog.rules.script = Script(die_after=2)
    response = chat(gateway)
    assert response.status_code >= 500
    assert "ServerLost" in response.json()["error"]["message"]
    cog.start_again()
    until(lambda: gateway.client.get("/readyz").status_code == 200)
    lines = [
        json.loads(line.removeprefix("data: "))
        for line in chat(gateway, stream=True).text.splitlines()
        if line.startswith("data: {")
    ]
    assert "".join(line["choices"][0]["delta"].get("content", "") for line in lines[:-1]) == "The capital"
    assert "ServerLost" in lines[-1]["error"]["message"]


def with_prompt(**members: Any) -> str:
    """A schema whose prompt is described by `members`."""
    schema = real_schema()
    components = {"schemas": {"Input": {"type": "object", "properties": {"prompt": members}}}}
    return json.dumps({**schema, "components": components})


UNUSABLE = {
    "not JSON": "{",
    "not an object": "[]",
    "too deep": "[" * 100_000,
    "without inputs": "{}",
    "a type that is not one": with_prompt(type="text"),
    "a pattern that is not one": with_prompt(pattern="("),
    "a reference to itself": with_prompt(**{"$ref": "#/components/schemas/Input/properties/prompt"}),
    "a missing reference": with_prompt(**{"$ref": "#/components/schemas/None"}),
    "half a character": with_prompt(title="\ud800"),
    "not a number": with_prompt(default=float("nan")),
    "no object as info": json.dumps({**real_schema(), "info": []}),
    "a version of 5000 digits": json.dumps({**real_schema(), "info": {"version": "9" * 5000 + ".0.0"}}),
}


@pytest.mark.parametrize("schema", UNUSABLE.values(), ids=UNUSABLE)
def test_a_schema_that_cannot_be_used_is_reported_in_one_line_and_ignored(
    schema: str, cog: FakeCog, gateways: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    cog.rules.schema = schema
    with caplog.at_level(logging.WARNING):
        gateway = gateways(cog.url)
        until(lambda: "has no usable /openapi.json" in caplog.text)
    (message,) = [record.message for record in caplog.records if "openapi" in record.message]
    assert len(message) < 500
    assert "\n" not in message
    model = gateway.client.get(f"/v1/models/{MODEL}")
    assert (model.status_code, model.json()["latest_version"]) == (200, None)
    assert gateway.wait_for(gateway.create())["status"] == "succeeded"


def test_a_schema_cannot_make_the_gateway_ask_another_server(cog: FakeCog, gateways: StartGateway) -> None:
    with FakeCog() as other:
        cog.rules.schema = with_prompt(**{"$ref": f"{other.url}/elsewhere"})
        gateway = gateways(cog.url)
        assert gateway.create()["status"] == "starting"
        assert other.received == []


@pytest.mark.parametrize("document", ["[" * 100_000, "{"])
def test_what_a_server_says_that_is_not_json_makes_it_unavailable(document: str, cog: FakeCog) -> None:
    async def ask() -> None:
        async with CogClient() as client:
            await client.ask(f"{cog.url}/openapi.json", "x")

    cog.rules.schema = document
    with pytest.raises(Unavailable):
        asyncio.run(ask())


@pytest.mark.parametrize("head", ["transfer-encoding: chunked", "content-length: 1", "sesame\0: 1"])
def test_what_a_server_sends_is_not_in_the_reason_of_its_loss(head: str) -> None:
    """The reason is logged, and aiohttp's own errors quote the bytes that it cannot read."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{head}\r\n\r\n".encode())
        writer.write(b"zz an answer with sesame\r\n")
        await writer.drain()
        writer.close()

    async def predict() -> None:
        server = await asyncio.start_server(respond, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        async with server, CogClient() as client:
            async for _ in client.predict(f"http://{host}:{port}", host, "{}"):
                pass

    with pytest.raises(Unavailable) as raised:
        asyncio.run(predict())
    assert "sesame" not in str(raised.value)


def test_the_predictions_of_a_server_that_ends_have_as_much_time_as_they_need(
    gateways: Callable[..., Gateway],
) -> None:
    with FakeCog(Script(hold_after=1)) as cog:
        gateway = gateways(cog.url, wiring={"lost_after": 0.2})
        running = gateway.create()
        until(lambda: gateway.get(running)["output"])
        cog.drain()
        until(lambda: gateway.client.get("/readyz").status_code == 503)
        time.sleep(1)  # several health checks
        assert gateway.get(running)["status"] == "processing"
        cog.release()
        assert gateway.wait_for(running)["status"] == "succeeded"
