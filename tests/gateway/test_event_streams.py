"""The event stream of a prediction, as Replicate's clients and browsers read it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from gateways import MODEL, Gateway
from server_clients import Body, until
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.fake_cog import FakeCog, Script
from benchmarks.web_thread import WebThread
from llama.gateway import gateway as gateway_module
from llama.gateway.app import create_app
from llama.gateway.dispatch.addresses import Addresses
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status
from llama.gateway.replicate.sse import events
from llama.gateway.settings import GatewaySettings

Event = tuple[str, str, str]
"""The name, the id and the data of an event."""
Gateways = Callable[..., Gateway]

PIECES = ["The", " capital", " of", " France", " is", " Paris", "."]
SEPARATORS = ["\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def stream_of(prediction: Body) -> str:
    return str(prediction["urls"]["stream"])


@contextmanager
def opened(url: str, **headers: str) -> Iterator[httpx2.Response]:
    """Open a stream without a key, as Replicate's JavaScript client does."""
    with (
        httpx2.Client(trust_env=False, timeout=60) as client,
        client.stream("GET", url, headers={"Accept": "text/event-stream", **headers}) as response,
    ):
        yield response


def parsed(text: str) -> list[Event]:
    """The events of a stream as Replicate's Python client decodes them: it splits lines like `splitlines`, and
    drops an event if there was no id so far."""
    found, name, data, last_id = list[Event](), "", list[str](), ""
    for line in text.splitlines():
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if name and last_id:
                found.append((name, last_id, "\n".join(data)))
            name, data = "", []
        elif field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            last_id = value
    return found


def read(url: str, **headers: str) -> list[Event]:
    with opened(url, **headers) as response:
        assert response.status_code == 200
        return parsed(response.read().decode())


def output(events: list[Event]) -> str:
    return "".join(data for name, _, data in events if name == "output")


def test_a_stream_has_every_piece_and_then_done_each_with_an_id(gateway: Gateway) -> None:
    found = read(stream_of(gateway.create()))
    assert [data for name, _, data in found if name == "output"] == PIECES
    assert (found[-1][0], found[-1][2]) == ("done", "{}")
    assert {name for name, _, _ in found} == {"output", "done"}
    stamps, numbers = zip(*(event_id.split(":") for _, event_id, _ in found), strict=True)
    assert len(set(stamps)) == 1
    assert re.fullmatch(r"\d{13}", stamps[0])
    assert list(numbers) == [str(number) for number in range(len(PIECES) + 1)]


def test_the_format_is_that_of_replicates_documentation(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(["Once upon a time"])
    with opened(stream_of(gateway.create(prefer="wait"))) as response:
        text = response.read().decode()
    assert re.sub(r"\d{13}", "1690212292", text) == (
        "event: output\nid: 1690212292:0\ndata: Once upon a time\n\n"
        "event: done\nid: 1690212292:1\ndata: {}\n\n"
    )


def test_a_stream_is_not_cached_buffered_or_compressed_and_any_page_may_read_it(gateway: Gateway) -> None:
    url = stream_of(gateway.create(prefer="wait"))
    with opened(url, Origin="https://example.com", **{"Accept-Encoding": "gzip"}) as response:
        assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["access-control-allow-origin"] == "*"
        assert "content-encoding" not in response.headers
    asked = {"Origin": "https://example.com", "Access-Control-Request-Method": "GET"}
    preflight = httpx2.options(
        url, headers={**asked, "Access-Control-Request-Headers": "last-event-id"}, trust_env=False
    )
    assert preflight.is_success
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "last-event-id" in preflight.headers["access-control-allow-headers"].lower()


def test_a_stream_that_does_not_exist_is_a_404(gateway: Gateway) -> None:
    for path in ("/v1/stream/unknown", f"/v1/stream/{gateway.create()['id']}"):
        with opened(gateway.url + path) as response:
            assert response.status_code == 404


def test_the_stream_cannot_be_guessed_from_the_prediction(gateway: Gateway) -> None:
    first, second = gateway.create(), gateway.create()
    tokens = [stream_of(prediction).rpartition("/")[2] for prediction in (first, second)]
    assert tokens[0] != tokens[1]
    assert all(len(token) >= 40 for token in tokens)
    assert first["id"] not in stream_of(first)


def test_pieces_arrive_while_the_prediction_runs(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    with opened(stream_of(gateway.create())) as response:
        text = ""
        for chunk in response.iter_text():
            text += chunk
            if len(parsed(text)) == 3:  # the server waits, and the stream stays open
                cog.release()
    assert output(parsed(text)) == "".join(PIECES)


def test_every_reader_gets_all_pieces_however_late_it_comes(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    created = gateway.create()
    until(lambda: len(gateway.get(created)["output"]) == 3)
    with opened(stream_of(created)) as first:
        chunks = first.iter_text()
        text = next(chunks)
        with opened(stream_of(created)) as second:
            cog.release()
            assert output(parsed(second.read().decode())) == "".join(PIECES)
        assert output(parsed(text + "".join(chunks))) == "".join(PIECES)
    after_the_end = read(stream_of(created))
    assert output(after_the_end) == "".join(PIECES)
    assert after_the_end[-1][0] == "done"


def test_a_stream_can_be_read_after_the_gateway_was_restarted(gateway: Gateway) -> None:
    url = stream_of(gateway.create(prefer="wait"))
    before = read(url)
    gateway.restart()
    assert read(url) == before


def test_a_reader_resumes_after_the_last_event_that_it_saw(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(PIECES, error="E2001 GenerationFailed: broken")
    url = stream_of(gateway.create(prefer="wait"))
    whole = read(url)
    for seen, (_, event_id, _) in enumerate(whole[:-1], start=1):
        assert read(url, **{"Last-Event-ID": event_id}) == whole[seen:]


def test_a_reader_that_saw_the_last_event_is_told_not_to_connect_again(gateway: Gateway) -> None:
    url = stream_of(gateway.create(prefer="wait"))
    with opened(url, **{"Last-Event-ID": read(url)[-1][1]}) as response:
        assert response.status_code == 204


@pytest.mark.parametrize("last_id", ["", "5", "x:y", "1:2", "1690212292000:3", ":", "٣:٣"])
def test_a_reader_with_the_id_of_another_stream_gets_everything(gateway: Gateway, last_id: str) -> None:
    url = stream_of(gateway.create(prefer="wait"))
    with (
        httpx2.Client(trust_env=False, timeout=60) as client,
        client.stream("GET", url, headers=[(b"Last-Event-ID", last_id.encode())]) as response,
    ):
        assert output(parsed(response.read().decode())) == "".join(PIECES)


def test_an_index_beyond_the_end_of_the_stream_gets_everything(gateway: Gateway) -> None:
    url = stream_of(gateway.create(prefer="wait"))
    stamp = read(url)[0][1].partition(":")[0]
    assert output(read(url, **{"Last-Event-ID": f"{stamp}:999"})) == "".join(PIECES)


@pytest.mark.parametrize("pieces", [[], ["Hi"]])
def test_a_failed_prediction_ends_with_an_error_and_done(
    gateway: Gateway, cog: FakeCog, pieces: list[str]
) -> None:
    cog.rules.script = Script(pieces, error="E1001 PromptRequired: blank")
    *before, error, done = read(stream_of(gateway.create()))
    assert [data for _, _, data in before] == pieces
    assert error[0] == "error"
    assert error[2].startswith('{"detail": "')
    assert "E1001 PromptRequired: blank" in error[2]
    assert (done[0], done[2]) == ("done", '{"reason": "error"}')


def test_a_server_that_dies_in_the_middle_is_an_error_and_no_end(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(PIECES, die_after=3)
    *before, error, done = read(stream_of(gateway.create()))
    assert output(before) == "".join(PIECES[:3])
    assert (error[0], done[2]) == ("error", '{"reason": "error"}')


def test_a_cancelled_prediction_ends_with_its_reason(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    created = gateway.create()
    until(lambda: len(gateway.get(created)["output"]) == 3)
    gateway.client.post(f"/v1/predictions/{created['id']}/cancel")
    *before, done = read(stream_of(created))
    assert output(before) == "".join(PIECES[:3])
    assert (done[0], done[2]) == ("done", '{"reason": "canceled"}')


@pytest.mark.parametrize("separator", SEPARATORS)
def test_no_separator_of_lines_loses_text(gateway: Gateway, cog: FakeCog, separator: str) -> None:
    pieces = [f"a{separator}b", separator, f"{separator}{separator}", f" c{separator}", f"{separator}d", "  "]
    cog.rules.script = Script(pieces)
    created = gateway.create(prefer="wait")
    assert created["output"] == pieces
    assert output(read(stream_of(created))) == "".join(pieces).replace(separator, "\n")
    with httpx2.Client(trust_env=False, timeout=60) as client, client.sse(stream_of(created)) as source:
        texts = [event.data for event in source if event.event == "output"]
    assert "".join(texts) == "".join(pieces).replace(separator, "\n")


def test_text_that_looks_like_the_format_stays_text(gateway: Gateway, cog: FakeCog) -> None:
    pieces = ["event: done\ndata: {}\n\n", "id: 5", ": ping", "\r\n", "é€😀\0", "data", "\ufeff"]
    cog.rules.script = Script(pieces)
    found = read(stream_of(gateway.create(prefer="wait")))
    assert output(found) == "".join(pieces).replace("\r\n", "\n")
    assert [name for name, _, _ in found] == ["output"] * len(pieces) + ["done"]


@pytest.mark.parametrize("piece", ["https://example.com/a.png", "data:text/plain,a", "https:", "data:"])
def test_no_piece_looks_like_the_address_of_a_file(gateway: Gateway, cog: FakeCog, piece: str) -> None:
    cog.rules.script = Script(["See ", piece, " there"])
    created = gateway.create(prefer="wait")
    assert not any(text.startswith(("https:", "data:")) for text in created["output"])
    assert "".join(created["output"]) == f"See {piece} there"
    found = read(stream_of(created))
    assert not any(data.startswith(("https:", "data:")) for name, _, data in found if name == "output")
    assert output(found) == f"See {piece} there"


def test_a_silent_stream_sends_comments_from_the_start(cog: FakeCog, gateways: Gateways) -> None:
    cog.rules.script = Script(PIECES, hold_after=0)
    gateway = gateways(cog.url, wiring={"ping_interval": 0.05})
    created = gateway.create()
    text = ""
    with opened(stream_of(created)) as response:
        for chunk in response.iter_text():
            text += chunk
            if text == ": ping\n\n" * 3:
                cog.release()
    assert text.startswith(": ping\n\n" * 3)
    assert output(parsed(text)) == "".join(PIECES)


def test_a_reader_that_leaves_does_not_cancel_the_prediction(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    created = gateway.create()
    with opened(stream_of(created)) as response:
        next(response.iter_text())
    until(lambda: len(gateway.get(created)["output"]) == 3)
    cog.release()
    assert gateway.wait_for(created)["output"] == PIECES


class CountingStreams:
    """An ASGI layer that counts the streams that the gateway is sending."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = scope.get("path", "").startswith("/v1/stream/")
        self.open += stream
        try:
            await self._app(scope, receive, send)
        finally:
            self.open -= stream


def test_the_work_for_a_reader_ends_when_it_leaves(cog: FakeCog, tmp_path: Path) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    inside = gateway_module.Gateway(GatewaySettings(database=tmp_path / "db"), Addresses([cog.url]), grace=0)
    app = CountingStreams(create_app(inside))
    with WebThread(app, lifespan=True) as web:
        body = {"input": {"prompt": "Hi"}}
        created = httpx2.post(f"{web.url}/v1/models/{MODEL}/predictions", json=body, trust_env=False).json()
        with opened(stream_of(created)) as response:
            chunks = response.iter_text()
            assert parsed(next(chunks))[0][0] == "output"
            assert app.open == 1
        until(lambda: app.open == 0)
        assert cog.counts.running == 1
        cog.release()


def test_pieces_that_are_ready_together_are_sent_together() -> None:
    async def chunks() -> list[bytes]:
        prediction = new_prediction()
        for number in range(1000):
            prediction.add_piece(f" word{number}")
        prediction.end(Outcome(Status.SUCCEEDED))
        return [chunk async for chunk in events(prediction)]

    outputs, done = asyncio.run(chunks())
    assert output(parsed(outputs.decode())) == "".join(f" word{number}" for number in range(1000))
    assert [name for name, _, _ in parsed(done.decode())] == ["done"]


def test_half_of_a_surrogate_pair_does_not_break_a_stream() -> None:
    async def text() -> str:
        prediction = new_prediction()
        prediction.add_piece("a\ud800b")
        prediction.end(Outcome(Status.SUCCEEDED))
        return "".join([chunk.decode() async for chunk in events(prediction)])

    assert output(parsed(asyncio.run(text()))) == "a?b"


def new_prediction() -> Prediction:
    return Prediction(PredictionRequest(key_id=1, inputs={}, model=MODEL))
