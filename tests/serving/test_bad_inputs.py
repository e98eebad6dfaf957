"""Invalid and hostile inputs to Cog's server, and their effect on other predictions."""

from __future__ import annotations

import json
import re
import socket
import time
from itertools import pairwise
from typing import Any

import pytest
from server_clients import (
    PATIENCE,
    BackgroundStream,
    answer,
    events,
    exactly,
    post,
    text,
)

from llama.serving.server import CogServer

# --- inputs that are refused

TOO_MANY_WORDS = "word " * 3000
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("line", "inputs"),
    [
        ("E1001 PromptRequired: ", {}),
        ("E1001 PromptRequired: ", {"prompt": " \n"}),
        ("E1001 PromptRequired: ", {"prompt": "[INST] [/INST]"}),
        ("E1001 PromptRequired: ", {"messages": []}),
        ("E1002 PromptTooLong: ", {"prompt": TOO_MANY_WORDS}),
        ("E1002 PromptTooLong: ", {"prompt": "hi", "system_prompt": TOO_MANY_WORDS}),
        ("E1003 BadPromptTemplate: ", {"prompt": "hi", "prompt_template": "cancelled: CancelledError"}),
        ("E1005 BadMessages: message 1 ", {"messages": [USER, USER]}),
        ("E1005 BadMessages: message 0 ", {"messages": [{"role": "cancelled", "content": "CancelledError"}]}),
        ("E1005 BadMessages: message 2 ", {"messages": [USER, {"role": "assistant", "content": "x"}, {}]}),
        ("E1005 BadMessages: message 0 ", {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}),
        ("E1005 BadMessages: ", {"prompt": "hi", "messages": [USER]}),
        ("E1006 UnsupportedWeights: ", {"prompt": "hi", "replicate_weights": "https://cancelled.example"}),
        ("E1101 MinimumAboveMaximum: ", {"prompt": "hi", "min_new_tokens": 6, "max_new_tokens": 5}),
        ("E1101 MinimumAboveMaximum: ", {"prompt": "hi", "min_tokens": 9000, "max_length": 8000}),
        ("E1000 InvalidInput: seed ", {"prompt": "hi", "seed": 1e20}),
        ("E1000 InvalidInput: stop_sequences ", {"prompt": "hi", "stop_sequences": "x" * 300_000}),
    ],
)
def test_invalid_inputs_fail_with_an_error_code_on_one_line(
    server: CogServer, line: str, inputs: dict[str, Any]
) -> None:
    body = answer(server, inputs)

    # Never "canceled", even if the inputs contain words such as "cancelled".
    assert body["status"] == "failed"
    assert line in body["error"]
    assert len(body["error"].splitlines()) == 1
    assert len(body["error"]) < 500
    assert "output" not in body


def test_a_refused_stream_ends_with_the_same_error_and_no_output(server: CogServer) -> None:
    (first, _), (last, data) = events(server, {"prompt": "hi", "prompt_template": "no placeholder"})

    assert (first, last) == ("start", "completed")
    assert data["status"] == "failed"
    assert "E1003 BadPromptTemplate: " in data["error"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 5.1),
        ("top_p", -0.1),
        ("top_k", -2),
        ("max_new_tokens", 0),
        ("presence_penalty", 3),
        # wrong types
        ("prompt", 5),
        ("seed", 1.5),
        ("debug", "yes"),
        ("messages", "hi"),
        # an explicit null, which is refused even for optional inputs
        ("seed", None),
        ("stop_sequences", None),
        ("messages", None),
    ],
)
def test_a_value_that_violates_the_schema_is_refused_with_the_inputs_name(
    server: CogServer, name: str, value: object
) -> None:
    response = post(server, {"prompt": "hi", name: value})

    assert response.status_code == 422
    (fault,) = response.json()["detail"]
    assert fault["loc"] == ["body", "input", name]


@pytest.mark.parametrize("element", ["hi", None, 5, []])
def test_a_message_that_is_not_an_object_is_refused(server: CogServer, element: object) -> None:
    response = post(server, {"messages": [element]})

    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][:2] == ["body", "input"]


def test_unknown_inputs_are_ignored(server: CogServer) -> None:
    inputs = exactly(10, prompt="hi")

    assert text(server, inputs | {"stream": True, "stop": ["x"]}) == text(server, inputs)


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", "max_length"])
def test_a_maximum_beyond_the_context_is_not_an_error(server: CogServer, name: str) -> None:
    body = answer(server, {"prompt": "hi", "temperature": 0, name: 500_000})

    assert body["status"] == "succeeded"
    assert "the maximum was lowered to" in body["logs"]


def test_a_whole_number_may_be_written_as_a_float(server: CogServer) -> None:
    inputs = exactly(10, prompt="hi", temperature=1)

    assert text(server, inputs | {"max_new_tokens": 10.0, "seed": 5.0}) == text(server, inputs | {"seed": 5})


# --- hostile inputs


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(rb'{"input": {"prompt": "a\ud800b"}}', id="unpaired surrogate"),
        pytest.param(rb'{"input": {"prompt": "\udc00\ud800"}}', id="reversed surrogate pair"),
        pytest.param(b'{"input": {"prompt": "a\xff\xfe"}}', id="not UTF-8"),
        pytest.param(b'{"input": {"prompt": "a", "temperature": NaN}}', id="NaN"),
        pytest.param(b'{"input": {"prompt": "a", "temperature": 1e400}}', id="infinity"),
        pytest.param(b'{"input": {"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}}", id="deeply nested"),
        pytest.param(b"hello", id="not JSON"),
        pytest.param(b"[]", id="not an object"),
        pytest.param(b'{"input": []}', id="input is not an object"),
    ],
)
def test_an_invalid_body_is_refused_as_a_client_error(server: CogServer, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/predictions", content=body, headers=headers, timeout=PATIENCE)

    assert response.status_code in (400, 422)
    assert response.text
    assert server.health()["status"] == "READY"


@pytest.mark.parametrize(
    "prompt", ["a\x00b", "\x01\x1b[31m\x7f\x85", "\ufeff\u202e\u2028\ufffe", "\U0010ffff"]
)
def test_control_characters_are_ordinary_text(server: CogServer, prompt: str) -> None:
    body = answer(server, exactly(5, prompt=prompt, debug=True))

    assert body["status"] == "succeeded"
    # The log escapes them, so they reach no terminal and add no line breaks.
    assert body["logs"].replace("\n", "").isprintable()
    assert len(re.findall("^formatted prompt: .*$", body["logs"], re.MULTILINE)) == 1


def test_the_maximum_number_of_stop_sequences_is_accepted(server: CogServer) -> None:
    inputs = exactly(40, prompt="hi") | {"min_new_tokens": 0}
    stops = ",".join(f"unheard of {i}".ljust(256, ".") for i in range(64))

    assert text(server, inputs | {"stop_sequences": stops}) == text(server, inputs)
    one_too_many = answer(server, inputs | {"stop_sequences": f"{stops},another"})
    assert "E1000 InvalidInput: stop_sequences has 65 sequences" in one_too_many["error"]


def test_white_space_around_a_prompt_does_not_count(server: CogServer) -> None:
    inputs = exactly(5, prompt="hi")
    assert text(server, inputs | {"prompt": "hi" + "\n" * 40_000}) == text(server, inputs)


def test_the_token_count_is_recorded_before_every_piece(server: CogServer) -> None:
    recorded, tokens_at_pieces = [0], []
    # Skip answers that end with an incomplete character: its replacement is a last piece without a new token.
    prompts = (exactly(60, prompt=f"Count to {i}") for i in range(50))
    inputs = next(i for i in prompts if not text(server, i).endswith("\ufffd"))
    for name, data in events(server, inputs):
        if name == "metric" and data["name"] == "output_token_count":
            recorded.append(data["value"])
        elif name == "output":
            tokens_at_pieces.append(recorded[-1])
    # If the server is killed after a piece, the tokens of that piece are therefore already recorded.
    assert tokens_at_pieces[0] > 0
    assert all(before < after for before, after in pairwise(tokens_at_pieces))
    assert recorded == sorted(recorded)
    assert recorded[-1] == 60


def post_raw(server: CogServer, inputs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The duration in seconds and the response of a large prediction.

    It is sent through a plain socket, so that sending does not slow down the thread that reads a stream.
    """
    body = json.dumps({"input": inputs}).encode()
    head = (
        "POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        started = time.monotonic()
        connection.sendall(head.encode() + body)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
        seconds = time.monotonic() - started
    return seconds, json.loads(received.partition(b"\r\n\r\n")[2])


COUNTING = exactly(1900, prompt="Count")


def longest_pause(stream: BackgroundStream) -> float:
    """The longest time in seconds between two pieces."""
    stream.result()
    return max(after - before for before, after in pairwise(stream.arrivals))


@pytest.fixture(scope="module")
def own_pause(server: CogServer) -> float:
    """The longest pause of a stream that runs alone: many consecutive tokens may complete no text."""
    return longest_pause(BackgroundStream(server, COUNTING))


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({"prompt": "word " * 10_000_000}, id="50 MB of words"),
        pytest.param({"prompt": " " * 20_000_000 + "hi"}, id="white space around a prompt"),
        pytest.param(
            {"prompt": "hi", "system_prompt": " " * 20_000_000 + "hi"},
            id="white space around a system prompt",
        ),
        pytest.param(
            {"messages": [{"role": r, "content": ""} for r in ("user", "assistant") * 75_000] + [USER]},
            id="empty messages",
        ),
    ],
)
def test_a_huge_prompt_is_refused_quickly_and_does_not_delay_other_streams(
    server: CogServer, own_pause: float, inputs: dict[str, Any]
) -> None:
    measured = []
    for _ in range(3):  # on a busy machine, any program may pause for a second
        other = BackgroundStream(server, COUNTING).wait_for("output")
        seconds, body = post_raw(server, inputs)
        pause = longest_pause(other)
        assert "E1002 PromptTooLong" in body["error"]
        measured.append((seconds, pause - own_pause))
        if seconds < 2 and pause < own_pause + 1:
            return
    pytest.fail(f"(seconds to refuse the prompt, longest extra pause of another stream): {measured}")
