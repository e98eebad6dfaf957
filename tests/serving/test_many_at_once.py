"""Several predictions at once, cancelled ones, slow readers and the server's end."""

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

# --- several at once


def test_sixteen_streams_at_once_each_get_their_own_answer(server: CogServer) -> None:
    requests = [exactly(40 + i, prompt=f"Question {i}: what is {i} times {i + 1}?") for i in range(16)]
    alone = [text(server, inputs) for inputs in requests]

    def streamed(inputs: dict[str, Any]) -> str:
        return "".join(data["chunk"] for name, data in events(server, inputs) if name == "output")

    assert in_parallel(streamed, requests) == alone
    assert len(set(alone)) == 16


def waiting_stream(server: CogServer, prediction_id: str) -> BackgroundStream:
    """A stream behind another on a narrow server, surely past its start: Cog can lose a cancel that
    comes within the first millisecond."""
    return BackgroundStream(server, exactly(1500, prompt="two", debug=True), id=prediction_id).wait_for("log")


def test_a_prediction_beyond_the_slots_is_turned_away(narrow_server: CogServer) -> None:
    first = BackgroundStream(narrow_server, exactly(1500, prompt="one"), id="slot-one").wait_for("output")
    second = waiting_stream(narrow_server, "slot-two")

    response = narrow_server.client.post("/predictions", json={"input": {"prompt": "three"}})

    assert response.status_code == 409
    assert first.running
    for stream, name in ((second, "slot-two"), (first, "slot-one")):
        cancel(narrow_server, name)
        assert stream.result()["status"] == "canceled"
    assert answer(narrow_server, exactly(5, prompt="three"))["status"] == "succeeded"


# --- leaving early


def test_a_cancelled_prediction_ends_early_and_reports_the_tokens_it_made(
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
    made = result["metrics"]["output_token_count"]
    assert 0 < made < 1900
    # Billed is what was made; the last token's text may still have been held back.
    assert text(server, exactly(made + 1, prompt="Count")).startswith("".join(result["output"]))


def test_a_prediction_cancelled_while_it_waits_leaves_the_running_one_alone(narrow_server: CogServer) -> None:
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


@pytest.mark.skipif(BY_BLOCKS, reason="a second request begins in what the first has not filled")
def test_a_prediction_that_waits_runs_when_the_one_before_it_has_ended(narrow_server: CogServer) -> None:
    first = BackgroundStream(narrow_server, exactly(1200, prompt="one")).wait_for("output")
    second = BackgroundStream(narrow_server, exactly(20, prompt="two"))

    assert first.result()["metrics"]["output_token_count"] == 1200
    result = second.result()
    assert result["metrics"]["output_token_count"] == 20
    # The last piece and the first one set out at the same time, to two threads of this process.
    assert second.arrivals[0] > first.arrivals[-1] - 0.2
    assert second.arrivals[0] > first.arrivals[0] + 0.5


def test_a_dropped_stream_ends_its_work(server: CogServer, webhooks: WebhookReceiver) -> None:
    drop_after_output(events(server, exactly(1900, prompt="Count"), **webhooks.request("dropped")), 20)

    ended = webhooks.wait_for_end("dropped")
    assert ended["status"] == "canceled"
    assert ended["metrics"]["finish_reason"] == "cancelled"
    assert 20 <= ended["metrics"]["output_token_count"] < 1900


def test_a_dropped_plain_request_ends_its_work(server: CogServer, webhooks: WebhookReceiver) -> None:
    request = {"input": exactly(1900, prompt="Count"), **webhooks.request("hung-up")}
    with pytest.raises(httpx2.ReadTimeout):
        server.client.post("/predictions", json=request, timeout=0.5)

    ended = webhooks.wait_for_end("hung-up")
    assert ended["status"] == "canceled"
    assert ended["metrics"]["finish_reason"] == "cancelled"
    assert ended["metrics"]["output_token_count"] < 1900


def test_who_leaves_while_running_or_waiting_makes_room_for_the_next(narrow_server: CogServer) -> None:
    running = events(narrow_server, exactly(1900, prompt="one"))
    assert any(name == "output" for name, _ in running)
    waiting = events(narrow_server, exactly(1900, prompt="two", debug=True))
    assert any(name == "log" for name, _ in waiting)  # surely past its start

    waiting.close()
    running.close()

    body = answer(narrow_server, exactly(5, prompt="three"))
    assert body["status"] == "succeeded"
    # Neither of the two long answers was made first: that would have taken seconds.
    assert body["metrics"]["predict_time"] < 2


# --- long answers, and the end


@pytest.fixture
def long_folder(tmp_path: Path, sentencepiece_model: Path) -> Path:
    """A smaller model, to be quick, with Llama 2's context."""
    write_model(tmp_path, num_hidden_layers=1, max_position_embeddings=4096)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    return tmp_path


def test_a_reader_who_sleeps_in_the_middle_of_a_long_answer_gets_all_of_it(
    schema: None, long_folder: Path
) -> None:
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


def test_a_reader_who_comes_late_gets_the_answer_from_its_beginning(server: CogServer) -> None:
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


def test_a_server_told_to_end_lets_running_streams_finish(schema: None, llama_folder: Path) -> None:
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
