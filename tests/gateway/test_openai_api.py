"""OpenAI's API over HTTP, in front of fake servers: whole and streamed completions, failures and disconnects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from gateways import KEY, MODEL, Gateway
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script

Gateways = Callable[..., Gateway]

ANSWER = "The capital of France is Paris."
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
USAGE_ON = {"stream_options": {"include_usage": True}}


def chat(gateway: Gateway, **members: Any) -> httpx2.Response:
    return gateway.client.post("/v1/chat/completions", json={**BODY, **members})


def text(gateway: Gateway, **members: Any) -> httpx2.Response:
    return gateway.client.post("/v1/completions", json={"model": MODEL, "prompt": "The capital", **members})


def events(response: httpx2.Response) -> list[Any]:
    """The data of all events; the last one is "[DONE]" unless the stream failed."""
    assert response.status_code == 200, response.text
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The joined text of one choice."""
    pieces = (choice for chunk in chunks if chunk != "[DONE]" for choice in chunk["choices"])
    return "".join(
        choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        for choice in pieces
        if choice["index"] == index
    )


@contextmanager
def streaming(gateway: Gateway, **members: Any) -> Iterator[Iterator[str]]:
    """The lines of a streamed chat that is still running. Leaving the block drops the connection."""
    body = {**BODY, "stream": True, **members}
    with gateway.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        yield response.iter_lines()


def listed(gateway: Gateway) -> list[dict[str, Any]]:
    """The predictions behind all requests, newest first."""
    return list(gateway.client.get("/v1/predictions").json()["results"])


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    return dict(error)


# --- whole completions


def test_a_chat_completion_has_openais_members(gateway: Gateway) -> None:
    body = chat(gateway).json()

    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    usage = body.pop("usage")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }


def test_a_text_completion_has_openais_members(gateway: Gateway) -> None:
    body = text(gateway).json()

    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}]


def test_the_finish_reason_is_the_servers(cog: FakeCog, gateway: Gateway) -> None:
    cog.rules.script = Script(finish_reason="length")

    assert chat(gateway).json()["choices"][0]["finish_reason"] == "length"
    assert events(chat(gateway, stream=True))[-2]["choices"][0]["finish_reason"] == "length"


def test_a_prompt_counts_once_for_all_its_choices(gateway: Gateway) -> None:
    one, three = (text(gateway, n=n).json()["usage"] for n in (1, 3))

    assert one["prompt_tokens"] > 0
    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["completion_tokens"] == 3 * one["completion_tokens"]


def test_every_prompt_of_a_list_is_counted_and_has_its_choices(cog: FakeCog, gateway: Gateway) -> None:
    cog.rules.script = lambda inputs: Script(pieces=[inputs["prompt"], "!"])
    one = text(gateway, prompt="a").json()["usage"]

    body = text(gateway, prompt=["a", "b"], n=2).json()

    assert [choice["text"] for choice in body["choices"]] == ["a!", "a!", "b!", "b!"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 2 * one["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 4 * one["completion_tokens"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions", "/v1/v1/chat/completions"])
def test_the_path_may_come_with_v1_or_without(gateway: Gateway, path: str) -> None:
    assert gateway.client.post(path, json=BODY).status_code == 200


def test_the_response_names_the_model_as_the_client_did(gateways: Gateways, cog: FakeCog) -> None:
    gateway = gateways(cog.url, deployments="acme/llama")

    for name in ("llama-2-70b-chat", "acme/llama"):
        assert chat(gateway, model=name).json()["model"] == name
        assert events(chat(gateway, model=name, stream=True))[0]["model"] == name


def test_the_server_gets_the_inputs_of_the_predictor(cog: FakeCog, gateway: Gateway) -> None:
    chat(gateway, stop=[", and", "\\"], max_tokens=5, temperature=0)

    (inputs,) = cog.predictions
    assert inputs == {
        "messages": BODY["messages"],
        "system_prompt": "",
        "temperature": 0,
        "top_p": 1,
        "max_new_tokens": 5,
        "stop_sequences": "\\, and,\\\\",
    }


# --- streams


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_finish_reason(gateway: Gateway) -> None:
    *chunks, done = events(chat(gateway, stream=True))

    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert text_of(chunks) == ANSWER
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}


def test_a_streamed_text_completion_has_texts(gateway: Gateway) -> None:
    *chunks, done = events(text(gateway, stream=True))

    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert text_of(chunks) == ANSWER
    assert chunks[-1]["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]


def test_a_stream_contains_usage_only_on_request(gateway: Gateway) -> None:
    usage = chat(gateway).json()["usage"]

    without = events(chat(gateway, stream=True))[:-1]
    with_usage = events(chat(gateway, stream=True, **USAGE_ON))[:-1]

    assert all("usage" not in chunk and chunk["choices"] for chunk in without)
    assert [chunk["usage"] for chunk in with_usage] == [None] * (len(with_usage) - 1) + [usage]
    assert with_usage[-1]["choices"] == []


@pytest.mark.parametrize("complete", [chat, text])
def test_a_response_is_ascii_and_keeps_every_character(
    cog: FakeCog, gateway: Gateway, complete: Callable[..., httpx2.Response]
) -> None:
    pieces = ["a\u2028b", "\n\n", "\r", "data: x", "é€😀", '"content":""', '"text":""', "\x85", "\x00"]
    cog.rules.script = Script(pieces=pieces)

    whole, streamed = complete(gateway), complete(gateway, stream=True)

    assert whole.content.isascii()
    assert streamed.content.isascii()
    choice = whole.json()["choices"][0]
    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == "".join(pieces)
    assert text_of(events(streamed)) == "".join(pieces)


def test_a_stream_has_no_ids_and_is_not_buffered(gateway: Gateway) -> None:
    response = chat(gateway, stream=True)

    assert all(line.startswith("data: ") for line in response.text.splitlines() if line)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


def test_a_silent_stream_sends_comments(cog: FakeCog, gateways: Gateways) -> None:
    gateway = gateways(cog.url, wiring={"ping_interval": 0.05})
    cog.rules.script = Script(hold_after=2)

    with streaming(gateway) as lines:
        assert any(line == ": ping" for line in lines)
        cog.release()
        rest = list(lines)

    assert rest[-2:] == ["data: [DONE]", ""]


def test_the_choices_of_a_stream_are_interleaved(cog: FakeCog, gateway: Gateway) -> None:
    cog.rules.script = lambda inputs: Script(pieces=[str(inputs["seed"]), "a", "b"], gap=0.02)

    *chunks, last, done = events(chat(gateway, stream=True, n=2, seed=7, **USAGE_ON))

    assert done == "[DONE]"
    assert [text_of(chunks, index) for index in (0, 1)] == ["7ab", "8ab"]
    ends = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert sorted(choice["index"] for choice in ends) == [0, 1]
    assert last["usage"]["completion_tokens"] == 6
    order = [chunk["choices"][0]["index"] for chunk in chunks[2:]]
    assert order not in (sorted(order), sorted(order, reverse=True))


def test_an_empty_answer_is_a_complete_stream(cog: FakeCog, gateway: Gateway) -> None:
    cog.rules.script = Script(pieces=[])

    role, last, done = events(chat(gateway, stream=True))

    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert (last["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")


# --- failures

FAILURES = [
    ("E1001 PromptRequired: prompt is blank", 400, "invalid_value", "messages"),
    ("E1002 PromptTooLong: the prompt is 9 tokens", 400, "context_length_exceeded", "messages"),
    ("E1101 MinimumAboveMaximum: lower it", 400, "invalid_value", "min_tokens"),
    ("E1103 NotSupported: vLLM", 400, "unsupported_value", None),
    ("E1000 InvalidInput: x", 400, "invalid_value", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("line", "status", "code", "param"), FAILURES)
def test_a_failure_before_the_first_piece_is_an_http_error(
    cog: FakeCog, gateway: Gateway, line: str, status: int, code: str, param: str | None, stream: bool
) -> None:
    cog.rules.script = Script(pieces=[], error=f"ValueError: {line}")

    error = error_of(chat(gateway, stream=stream), status)

    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert error["message"].endswith(line)


def test_a_context_that_is_too_long_is_named_in_openais_words(cog: FakeCog, gateway: Gateway) -> None:
    cog.rules.script = Script(pieces=[], error="E1002 PromptTooLong: the prompt is 9 tokens")

    assert "This model's maximum context length is" in error_of(chat(gateway), 400)["message"]
    assert error_of(text(gateway), 400)["param"] == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_no_server_starts_in_time_is_an_http_error(
    cog: FakeCog, gateways: Gateways, stream: bool
) -> None:
    gateway = gateways(cog.url, queue_timeout=0.5)
    cog.rules.script = Script(die_after=0)

    error = error_of(chat(gateway, stream=stream), 503)

    assert error["code"] == "service_unavailable"
    assert "E4003 NotStarted" in error["message"]


@pytest.mark.parametrize(
    "line", ["E2001 GenerationFailed: the engine failed", "it broke", "E1000 InvalidInput: x"]
)
def test_a_failure_after_the_first_piece_is_an_error_event_at_the_end(
    cog: FakeCog, gateway: Gateway, line: str
) -> None:
    cog.rules.script = Script(pieces=["The", " capital"], error=line)

    *chunks, last = events(chat(gateway, stream=True))

    assert text_of(chunks) == "The capital"
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert last["error"]["message"]


def test_a_failure_of_a_whole_completion_is_an_http_error_despite_its_pieces(
    cog: FakeCog, gateway: Gateway
) -> None:
    cog.rules.script = Script(pieces=["The"], error="E2001 GenerationFailed: the engine failed")

    assert error_of(chat(gateway), 500)["code"] == "server_error"


def test_a_server_that_dies_during_a_stream_ends_it_with_an_error_event(
    cog: FakeCog, gateway: Gateway
) -> None:
    cog.rules.script = Script(die_after=2)

    *chunks, last = events(chat(gateway, stream=True))

    assert text_of(chunks) == "The capital"
    assert "E4001 ServerLost" in last["error"]["message"]
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "service_unavailable")


@pytest.mark.parametrize("stream", [False, True])
def test_when_one_choice_fails_the_others_are_cancelled(cog: FakeCog, gateway: Gateway, stream: bool) -> None:
    def script(inputs: dict[str, Any]) -> Script:
        if inputs["seed"] == 8:
            return Script(pieces=[], error="E1000 InvalidInput: x")
        return Script(hold_after=0)

    cog.rules.script = script

    assert error_of(chat(gateway, n=3, seed=7, stream=stream), 400)["code"] == "invalid_value"

    until(lambda: cog.counts.running == 0)
    assert (cog.counts.cancelled, cog.counts.failed) == (2, 1)


def test_a_request_for_more_choices_than_can_wait_creates_none_of_them(
    cog: FakeCog, gateways: Gateways
) -> None:
    gateway = gateways(cog.url, places=2, queue=2)
    cog.rules.script = Script(hold_after=1)
    created = [gateway.create()["id"] for _ in range(3)]  # two of them run

    error = error_of(chat(gateway, n=2), 429)

    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert {prediction["id"] for prediction in listed(gateway)} == set(created)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prediction_that_is_cancelled_elsewhere_is_an_error(
    cog: FakeCog, gateway: Gateway, stream: bool
) -> None:
    cog.rules.script = Script(hold_after=0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, gateway, stream=stream)
        until(lambda: cog.counts.running == 1)
        (prediction,) = listed(gateway)
        gateway.client.post(f"/v1/predictions/{prediction['id']}/cancel")

    response = waiting.result()
    assert error_of(response, 500)["code"] == "cancelled"
    assert response.headers["x-should-retry"] == "false"


def test_a_stream_that_is_cancelled_elsewhere_ends_with_an_error_event(
    cog: FakeCog, gateway: Gateway
) -> None:
    cog.rules.script = Script(hold_after=1)

    with streaming(gateway) as lines:
        assert any('"content":"The"' in line for line in lines)
        (prediction,) = listed(gateway)
        gateway.client.post(f"/v1/predictions/{prediction['id']}/cancel")
        rest = [line for line in lines if line]

    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "cancelled"


# --- clients that leave


def test_a_client_that_leaves_a_stream_frees_its_place(cog: FakeCog, gateway: Gateway) -> None:
    cog.rules.script = Script(hold_after=2)

    with streaming(gateway, n=2) as lines:
        next(lines)
        until(lambda: cog.counts.running == 2)

    until(lambda: cog.counts.running == 0)
    assert cog.counts.cancelled == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_piece_frees_its_place(
    cog: FakeCog, gateway: Gateway, stream: bool
) -> None:
    cog.rules.script = Script(hold_after=0)

    with pytest.raises(httpx2.ReadTimeout), gateway.client_of(KEY) as client:
        client.post("/v1/chat/completions", json={**BODY, "stream": stream}, timeout=0.5)

    until(lambda: cog.counts.cancelled == 1)
    assert cog.counts.running == 0


def test_a_request_whose_client_left_while_it_waited_is_never_sent_to_a_server(
    cog: FakeCog, gateways: Gateways
) -> None:
    gateway = gateways(cog.url, places=1)
    cog.rules.script = Script(hold_after=1)

    with streaming(gateway) as lines:
        next(lines)
        with pytest.raises(httpx2.ReadTimeout), gateway.client_of(KEY) as client:
            client.post("/v1/chat/completions", json=BODY, timeout=0.5)
        until(lambda: [p["status"] for p in listed(gateway)] == ["canceled", "processing"])
        cog.release()

    assert len(cog.predictions) == 1


# --- what is refused


def test_an_unknown_model_is_not_found(gateway: Gateway) -> None:
    error = error_of(chat(gateway, model="gpt-4o"), 404)

    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_a_wrong_key_is_refused_in_openais_shape(gateway: Gateway) -> None:
    with gateway.client_of("wrong") as client:
        error = error_of(client.post("/v1/chat/completions", json=BODY), 401)

    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")


def test_an_invalid_member_is_refused_before_anything_is_queued(cog: FakeCog, gateway: Gateway) -> None:
    error = error_of(chat(gateway, temperature=3), 400)

    assert (error["param"], error["code"]) == ("temperature", "invalid_value")
    assert cog.predictions == []
    assert listed(gateway) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"model": "x", "temperature": NaN}',
        b'{"model": "\\ud800"}',
        b"\xff\xfe",
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(gateway: Gateway, content: bytes) -> None:
    error_of(gateway.client.post("/v1/chat/completions", content=content), 400)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/v1/responses", "chat/completions"),
        ("/v1/responses/resp_1/cancel", "chat/completions"),
        ("/v1/embeddings", "chat model"),
        ("/v1/images/generations", "chat model"),
        ("/v1/audio/speech", "chat model"),
        ("/v1/moderations", "chat model"),
        ("/v1/assistants", "chat/completions"),
        ("/v1/threads/runs", "chat/completions"),
        ("/v1/batches", "chat/completions"),
        ("/v1/fine_tuning/jobs", "chat model"),
    ],
)
def test_an_endpoint_that_is_not_offered_says_what_to_use(gateway: Gateway, path: str, advice: str) -> None:
    assert advice in error_of(gateway.client.post(path, json={"model": MODEL}), 404)["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_get_of_a_completion_is_not_allowed(gateway: Gateway, path: str) -> None:
    error_of(gateway.client.get(path), 405)


def test_an_alias_is_a_name_of_the_model_and_any_other_name_is_not(cog: FakeCog, gateways: Gateways) -> None:
    gateway = gateways(cog.url, aliases="gpt-4o, gpt-3.5-turbo")
    answer = chat(gateway, model="gpt-4o")
    assert (answer.status_code, answer.json()["model"]) == (200, "gpt-4o")
    assert gateway.client.get("/v1/models/gpt-3.5-turbo").json()["id"] == "gpt-3.5-turbo"
    names = [card["id"] for card in gateway.client.get("/v1/models").json()["data"]]
    assert names == [gateway.settings.model, "gpt-4o", "gpt-3.5-turbo"]
    assert chat(gateway, model="gpt-4").status_code == 404
    assert gateway.client.get("/v1/models/gpt-4").status_code == 404
