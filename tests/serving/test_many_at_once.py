"""Concurrent predictions, cancellation, slow readers and shutdown."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from server_clients import (
    BY_BLOCKS,
    PATIENCE,
    BackgroundStream,
    WebhookReceiver,
    answer,
    cancel,
    drop_after_output,
    events,
    exactly,
    in_parallel,
    start,
    text,
    tiny_server,
    until,
)
from small_models import write_model

from llama.serving.server import CogServer

# --- concurrent predictions


def test_sixteen_streams_at_once_each_get_their_own_answer(server: CogServer) -> None:
    requests = [exactly(40 + i, prompt=f"Question {i}: what is {i} times {i + 1}?") for i in range(16)]
    alone = [text(server, inputs) for inputs in requests]

    def streamed(inputs: dict[str, Any]) -> str:
        return "".join(data["chunk"] for name, data in events(server, inputs) if name == "output")

    assert in_parallel(streamed, requests) == alone
    assert len(set(alone)) == 16


def waiting_stream(server: CogServer, prediction_id: str) -> BackgroundStream:
    """A stream that waits behind another one on a narrow server.

    Its first log line has arrived: Cog may miss a cancel within the first millisecond of a prediction.
    """
    return BackgroundStream(server, exactly(1500, prompt="two", debug=True), id=prediction_id).wait_for("log")


def test_a_prediction_beyond_the_concurrency_limit_is_refused_with_409(narrow_server: CogServer) -> None:
    first = BackgroundStream(narrow_server, exactly(1500, prompt="one"), id="slot-one").wait_for("output")
    second = waiting_stream(narrow_server, "slot-two")

    response = narrow_server.client.post("/predictions", json={"input": {"prompt": "three"}})

    assert response.status_code == 409
    assert first.running
    for stream, name in ((second, "slot-two"), (first, "slot-one")):
        cancel(narrow_server, name)
        assert stream.result()["status"] == "canceled"
    assert answer(narrow_server, exactly(5, prompt="three"))["status"] == "succeeded"


# --- cancelled predictions and dropped connections


def test_a_cancelled_prediction_ends_early_and_reports_the_tokens_it_generated(
    server: CogServer, webhooks: WebhookReceiver
) -> None:
    start(server, exactly(1900, prompt="Count"), webhooks.request("to-cancel"))
    webhooks.wait_for_output("to-cancel")

    cancel(server, "to-cancel")

    ended = webhooks.wait_for_end("to-cancel")
    assert ended["status"] == "canceled"
    assert ended["metrics"]["finish_reason"] == "cancelled"
    assert 0 < ended["metrics"]["output_token_count"] < 1900
    assert ended["metrics"]["input_token_count"] > 0


def test_a_cancelled_stream_ends_with_the_text_so_far(server: CogServer) -> None:
    inputs = exactly(1900, prompt="Count")
    stream = BackgroundStream(server, inputs, id="stream-to-cancel").wait_for("output")

    cancel(server, "stream-to-cancel")

    result = stream.result()
    assert result["status"] == "canceled"
    assert result["metrics"]["finish_reason"] == "cancelled"
    generated = result["metrics"]["output_token_count"]
    assert 0 < generated < 1900
    # All generated tokens are billed, but the text of the last one may have been held back.
    assert text(server, exactly(generated + 1, prompt="Count")).startswith("".join(result["output"]))


def test_cancelling_a_waiting_prediction_does_not_affect_the_running_one(narrow_server: CogServer) -> None:
    running = BackgroundStream(narrow_server, exactly(1200, prompt="one")).wait_for("output")
    waiting = waiting_stream(narrow_server, "waits")

    cancel(narrow_server, "waits")

    ended = waiting.result()
    assert running.running
    assert ended["status"] == "canceled"
    assert ended["metrics"]["finish_reason"] == "cancelled"
    assert BY_BLOCKS or ended["metrics"]["output_token_count"] == 0
    result = running.result()
    assert result["status"] == "succeeded"
    assert result["metrics"]["output_token_count"] == 1200
    assert "".join(result["output"]) == text(narrow_server, exactly(1200, prompt="one"))


@pytest.mark.skipif(BY_BLOCKS, reason="vLLM starts a second request in the free blocks of the cache")
def test_a_waiting_prediction_starts_when_the_running_one_has_ended(narrow_server: CogServer) -> None:
    first = BackgroundStream(narrow_server, exactly(1200, prompt="one")).wait_for("output")
    second = BackgroundStream(narrow_server, exactly(20, prompt="two"))

    assert first.result()["metrics"]["output_token_count"] == 1200
    result = second.result()
    assert result["metrics"]["output_token_count"] == 20
    # The last piece of one and the first piece of the other are sent to two threads at almost the same time.
    assert second.arrivals[0] > first.arrivals[-1] - 0.2
    assert second.arrivals[0] > first.arrivals[0] + 0.5


def test_dropping_a_stream_cancels_its_prediction(server: CogServer, webhooks: WebhookReceiver) -> None:
    drop_after_output(events(server, exactly(1900, prompt="Count"), **webhooks.request("dropped")), 20)

    ended = webhooks.wait_for_end("dropped")
    assert ended["status"] == "canceled"
    assert ended["metrics"]["finish_reason"] == "cancelled"
    assert 20 <= ended["metrics"]["output_token_count"] < 1900


def test_dropping_a_plain_request_cancels_its_prediction(
    server: CogServer, webhooks: WebhookReceiver
) -> None:
    request = {"input": exactly(1900, prompt="Count"), **webhooks.request("hung-up")}
    with pytest.raises(httpx2.ReadTimeout):
        server.client.post("/predictions", json=request, timeout=0.5)

    ended = webhooks.wait_for_end("hung-up")
    assert ended["status"] == "canceled"
    assert ended["metrics"]["finish_reason"] == "cancelled"
    assert ended["metrics"]["output_token_count"] < 1900


def test_dropped_running_and_waiting_streams_make_room_for_the_next_prediction(
    narrow_server: CogServer,
) -> None:
    running = events(narrow_server, exactly(1900, prompt="one"))
    assert any(name == "output" for name, _ in running)
    waiting = events(narrow_server, exactly(1900, prompt="two", debug=True))
    assert any(name == "log" for name, _ in waiting)  # see `waiting_stream`

    waiting.close()
    running.close()

    body = answer(narrow_server, exactly(5, prompt="three"))
    assert body["status"] == "succeeded"
    # Neither of the two long answers was generated first, which would have taken seconds.
    assert body["metrics"]["predict_time"] < 2


# --- long answers and shutdown


@pytest.fixture
def long_folder(tmp_path: Path, sentencepiece_model: Path) -> Path:
    """A smaller, faster model with the context length of Llama 2."""
    write_model(tmp_path, num_hidden_layers=1, max_position_embeddings=4096)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    return tmp_path


def test_a_reader_that_pauses_during_a_long_answer_gets_all_of_it(schema: None, long_folder: Path) -> None:
    inputs = exactly(4000, prompt="Tell me everything")
    with tiny_server(long_folder) as server:
        server.wait_until_ready()
        quick = BackgroundStream(server, inputs)
        pieces = list[str]()
        for name, data in events(server, inputs):
            if name == "output":
                pieces.append(data["chunk"])
                if len(pieces) == 50:
                    time.sleep(20)
        whole = quick.result()

    assert name == "completed", data
    assert data["metrics"]["output_token_count"] == 4000
    assert pieces == data["output"]
    assert "".join(pieces) == "".join(whole["output"])


def test_a_late_reader_gets_the_answer_from_its_beginning(server: CogServer) -> None:
    inputs = exactly(1900, prompt="Tell me everything")
    request = {"id": "late-reader"}
    start(server, inputs, request)

    def so_far() -> list[str]:
        asked = server.client.put(
            "/predictions/late-reader",
            json={"input": inputs, **request},
            headers={"Prefer": "respond-async"},
            timeout=PATIENCE,
        )
        output: list[str] = asked.json().get("output", [])
        return output

    until(lambda: len(so_far()) > 20)
    with server.client.sse(
        "/predictions/late-reader",
        method="PUT",
        json={"input": inputs, **request},
        timeout=PATIENCE,
        max_event_size=None,
    ) as source:
        seen: list[tuple[str, Any]] = [(event.event, event.json()) for event in source]

    name, last = seen[-1]
    assert name == "completed", last
    assert [data["chunk"] for name, data in seen if name == "output"] == last["output"]
    assert "".join(last["output"]) == text(server, inputs)


def test_a_terminated_server_lets_running_streams_finish(schema: None, llama_folder: Path) -> None:
    with tiny_server(llama_folder) as server:
        server.wait_until_ready()
        streams = [BackgroundStream(server, exactly(1000, prompt=f"Stream {i}")) for i in range(4)]
        for stream in streams:
            stream.wait_for("output")

        server.process.terminate()
        assert all(stream.running for stream in streams)

        results = [stream.result() for stream in streams]
        server.process.wait(timeout=PATIENCE)

    for result in results:
        assert result["status"] == "succeeded"
        assert result["metrics"]["finish_reason"] == "length"
        assert result["metrics"]["output_token_count"] == 1000
    assert server.process.returncode == 0
