"""End to end: Cog's own server with a tiny random model behind it, over real HTTP.

The model makes no sense, so what is said is compared, never judged.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import httpx
import pytest
from conftest import CONTEXT, ROOT, write_model
from serving import (
    PATIENCE,
    BackgroundStream,
    WebhookReceiver,
    answer,
    drop_after_output,
    events,
    post,
    text,
    until,
)

from llama.serving.schema import openapi_schema, write_schema
from llama.serving.server import CogServer, read_events
from predict import Predictor

SYSTEM_PROMPT = "You are a helpful, respectful and honest assistant."
# vLLM gives its cache out by blocks, so that nobody waits before it is full.
BY_BLOCKS = os.environ.get("LLAMA_ENGINE") == "vllm"
BYTES_PER_TOKEN = 2 * 2 * 2 * 32 * 4  # keys and values, layers, KV heads, head size, float32


def tiny_server(folder: Path, *, output: Any = DEVNULL, **environment: str) -> CogServer:
    """A server of its own. One thread a step: for a model this small a second one costs three times
    what it brings."""
    variables = {"LLAMA_WEIGHTS": str(folder), "OMP_NUM_THREADS": "1", **environment}
    return CogServer(variables, output=output)


def exactly(tokens: int, **inputs: Any) -> dict[str, Any]:
    """Inputs for an answer of so many tokens, whatever the model would like."""
    return {"temperature": 0, "max_new_tokens": tokens, "min_new_tokens": tokens, **inputs}


@pytest.fixture(scope="module")
def schema() -> None:
    write_schema(Predictor.run, ROOT)


@pytest.fixture(scope="module")
def server_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "output.log"


@pytest.fixture(scope="module")
def server(schema: None, llama_folder: Path, server_log: Path) -> Iterator[CogServer]:
    with server_log.open("wb") as output, tiny_server(llama_folder, output=output) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def narrow_server(schema: None, llama_folder: Path) -> Iterator[CogServer]:
    """Lets two predictions in and has a cache for one: the other waits."""
    cache = str(BYTES_PER_TOKEN * CONTEXT)
    with tiny_server(llama_folder, COG_MAX_CONCURRENCY="2", LLAMA_CACHE_MEMORY=cache) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def webhooks() -> Iterator[WebhookReceiver]:
    with WebhookReceiver() as receiver:
        yield receiver


def start(server: CogServer, inputs: dict[str, Any], request: dict[str, Any]) -> None:
    """Start a prediction that nobody waits for."""
    response = server.client.put(
        f"/predictions/{request['id']}",
        json={"input": inputs, **request},
        headers={"Prefer": "respond-async"},
        timeout=PATIENCE,
    )
    assert response.status_code == 202, response.text


def cancel(server: CogServer, prediction_id: str) -> None:
    response = server.client.post(f"/predictions/{prediction_id}/cancel", timeout=PATIENCE)
    assert response.status_code == 200, response.text


def in_parallel(function: Any, arguments: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))


# --- one prediction


def test_a_loaded_server_reports_that_it_is_ready(server: CogServer) -> None:
    health = server.health()

    assert health["status"] == "READY"
    assert health["setup"]["status"] == "succeeded"


def test_the_published_schema_is_that_of_the_run_method(server: CogServer) -> None:
    assert server.client.get("/openapi.json").json() == openapi_schema(Predictor.run)


def test_a_plain_prediction_brings_the_whole_answer_and_its_metrics(server: CogServer) -> None:
    body = answer(server, exactly(30, prompt="Tell me about llamas"))

    assert body["status"] == "succeeded"
    assert "error" not in body
    assert "".join(body["output"]).strip()
    metrics = body["metrics"]
    assert metrics["input_token_count"] > 3
    assert metrics["output_token_count"] == 30
    assert metrics["finish_reason"] == "length"
    assert 0 < metrics["time_to_first_token"] < metrics["predict_time"]
    assert metrics["tokens_per_second"] >= 30 / metrics["predict_time"]


def test_an_answer_of_one_token_is_whole(server: CogServer) -> None:
    assert answer(server, exactly(1, prompt="hi"))["metrics"]["output_token_count"] == 1


def test_pieces_arrive_while_later_ones_are_still_being_made(server: CogServer) -> None:
    stream = BackgroundStream(server, exactly(600, prompt="Count"))
    result = stream.result()

    # Collected first and sent at the end, all would arrive at once.
    spread = stream.arrivals[-1] - stream.arrivals[0]
    assert len(stream.arrivals) > 10
    assert spread > result["metrics"]["predict_time"] / 2


def test_a_stream_is_a_start_then_numbered_pieces_then_metrics_and_the_end(server: CogServer) -> None:
    seen = list(events(server, exactly(40, prompt="Count", debug=True)))

    names = [name for name, _ in seen]
    assert names[0] == "start"
    assert names[-1] == "completed"
    assert set(names) == {"start", "log", "output", "metric", "completed"}
    outputs = [data for name, data in seen if name == "output"]
    assert [data["index"] for data in outputs] == list(range(len(outputs)))
    recorded = {data["name"]: data["value"] for name, data in seen if name == "metric"}
    last = seen[-1][1]
    assert last["status"] == "succeeded"
    assert last["output"] == [data["chunk"] for data in outputs]
    assert recorded.items() <= last["metrics"].items()


def test_a_stream_and_a_plain_prediction_say_the_same(server: CogServer) -> None:
    inputs = exactly(60, prompt="Say it twice")

    streamed = "".join(data["chunk"] for name, data in events(server, inputs) if name == "output")

    assert streamed == text(server, inputs)


@pytest.mark.parametrize("prompt", ["hi", "What is a cache?", "naïve 語 🦙\nand a second line"])
def test_a_greedy_answer_is_that_of_transformers(server: CogServer, llama_folder: Path, prompt: str) -> None:
    import torch
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaForCausalLM

    processor = SentencePieceProcessor(model_file=str(llama_folder / "tokenizer.model"))
    model = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    formatted = f"[INST] <<SYS>>\n{SYSTEM_PROMPT}\n<</SYS>>\n\n{prompt} [/INST]"
    prompt_ids = torch.tensor([[processor.bos_id(), *processor.encode(formatted)]])
    generated = model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), do_sample=False, max_new_tokens=120
    )
    expected = [int(i) for i in generated[0, prompt_ids.shape[1] :] if i != processor.eos_id()]

    body = answer(server, {"prompt": prompt, "temperature": 0, "max_new_tokens": 120})

    assert "".join(body["output"]) == processor.decode(expected)
    assert body["metrics"]["input_token_count"] == prompt_ids.shape[1]
    assert body["metrics"]["output_token_count"] == len(expected)


def free_answer(server: CogServer, pattern: str) -> tuple[dict[str, Any], str]:
    """Inputs whose answer, which may end where it likes, has `pattern` in it; and that answer."""
    for seed in range(50):
        inputs = {"prompt": "Go on", "temperature": 1, "seed": seed, "max_new_tokens": 120}
        whole = text(server, inputs)
        if re.search(pattern, whole, re.DOTALL):
            return inputs, whole
    raise AssertionError(f"no answer matches {pattern}")


def test_a_stop_sequence_ends_the_answer_and_never_reaches_the_caller(server: CogServer) -> None:
    # Nine characters begin and end inside pieces and are as long as several of them.
    inputs, whole = free_answer(server, r"^.{50,}[^,\\\s]{9}.{20,}$")
    match = re.search(r"^.{50,}?([^,\\\s]{9})", whole, re.DOTALL)
    assert match
    stop = match[1]

    for sequences in (stop, f"never said,{stop},nor this"):
        seen = list(events(server, inputs | {"stop_sequences": sequences}))
        assert "".join(data["chunk"] for name, data in seen if name == "output") == whole[: whole.index(stop)]
        assert seen[-1][1]["metrics"]["finish_reason"] == "stop"


def test_a_typed_newline_in_a_stop_sequence_is_a_newline(server: CogServer) -> None:
    inputs, whole = free_answer(server, r"^.+\n.+$")

    assert text(server, inputs | {"stop_sequences": r"\n"}) == whole.partition("\n")[0]


# --- seeds


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(server: CogServer) -> None:
    inputs = exactly(40, prompt="Surprise me", temperature=1)

    first, second, other = (text(server, inputs | {"seed": seed}) for seed in (7, 7, 8))

    assert first == second
    assert first != other


def test_a_seeded_answer_does_not_depend_on_what_else_is_running(server: CogServer) -> None:
    inputs = exactly(60, prompt="Surprise me", temperature=1, seed=11)
    alone = text(server, inputs)

    crowd = [inputs, *(exactly(60, prompt=f"Noise {i}", temperature=1, seed=i) for i in range(7))]

    assert in_parallel(lambda each: text(server, each), crowd)[0] == alone


def test_the_seed_that_was_drawn_is_in_the_log_and_gives_the_answer_again(server: CogServer) -> None:
    inputs = exactly(40, prompt="Surprise me", temperature=1)
    drawn = answer(server, inputs)
    match = re.search(r"^seed: (\d+)", drawn["logs"], re.MULTILINE)
    assert match

    again = answer(server, inputs | {"seed": int(match[1])})

    assert "".join(again["output"]) == "".join(drawn["output"])
    assert "seed" not in again["logs"]


# --- logs


def test_neither_prompt_nor_answer_is_written_down_unless_debug_is_on(
    server: CogServer, server_log: Path
) -> None:
    # Each of these has something to say in the log.
    requests = [
        exactly(2000, prompt="zebracrossing"),
        exactly(40, prompt="[INST] zebracrossing [/INST] zebrafinch", log_performance_metrics=True),
        exactly(40, prompt="zebracrossing", prompt_template="<|start_header_id|>zebrafish {prompt}"),
        exactly(40, prompt="zebracrossing", system_prompt="zebrafish", length_penalty=2, temperature=1),
        exactly(40, messages=[{"role": "user", "content": "zebracrossing"}], stop_sequences="zebrawood"),
    ]
    for inputs in requests:
        body = answer(server, inputs)
        assert body["logs"].strip() or "messages" in inputs
        assert "zebra" not in body["logs"]
        assert "".join(body["output"]) not in body["logs"]
        written = server_log.read_text("utf-8")
        assert "zebra" not in written
        assert "".join(body["output"]) not in written


def test_no_error_quotes_the_caller(server: CogServer, server_log: Path) -> None:
    for inputs in (
        {"prompt": "zebramussel " * 3000},
        {"prompt": "hi", "prompt_template": "zebramussel"},
        {"messages": [{"role": "zebramussel", "content": "hi"}]},
        {"prompt": "hi", "replicate_weights": "zebramussel"},
    ):
        assert "zebramussel" not in json.dumps(answer(server, inputs))
    assert "zebramussel" not in server_log.read_text("utf-8")


def test_debug_writes_the_formatted_prompt_the_settings_and_the_metrics(server: CogServer) -> None:
    body = answer(server, exactly(5, prompt="hello there", system_prompt="Be brief", debug=True, top_k=40))

    lines = body["logs"].splitlines()
    assert r"formatted prompt: '<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nhello there [/INST]'" in lines
    assert any(line.startswith("settings: ") and '"top_k":40' in line for line in lines)
    assert "output_token_count: 5" in lines
    assert "finish_reason: length" in lines


def test_performance_metrics_are_logged_without_the_prompt(server: CogServer) -> None:
    logs = answer(server, exactly(5, prompt="hello there", log_performance_metrics=True))["logs"]

    assert "output_token_count: 5\n" in logs
    assert re.search(r"^time_to_first_token: \d+\.\d+$", logs, re.MULTILINE)
    assert re.search(r"^tokens_per_second: \d+\.\d+$", logs, re.MULTILINE)
    assert "hello" not in logs


def test_a_log_never_holds_lines_of_another_prediction(server: CogServer) -> None:
    words = [
        f"unique{word}" for word in ("apple", "birch", "cedar", "daisy", "elder", "fern", "grape", "hazel")
    ]

    def logs(word: str) -> str:
        inputs = exactly(30 + len(words) * words.index(word), prompt=word, debug=True)
        return "".join(data["data"] for name, data in events(server, inputs) if name == "log")

    for word, log in zip(words, in_parallel(logs, words), strict=True):
        assert set(re.findall(r"unique\w+", log)) == {word}
        # Whole as well: the first line and the last are there, once.
        assert log.count("formatted prompt: ") == log.count("finish_reason: ") == 1
        assert log.endswith("\n")


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
def test_what_cannot_be_answered_fails_with_its_code_and_one_line(
    server: CogServer, line: str, inputs: dict[str, Any]
) -> None:
    body = answer(server, inputs)

    # Never "canceled", whatever words the caller used.
    assert body["status"] == "failed"
    assert line in body["error"]
    assert len(body["error"].splitlines()) == 1
    assert len(body["error"]) < 500
    assert "output" not in body


def test_a_refused_stream_ends_with_the_same_error_and_no_output(server: CogServer) -> None:
    (first, _), (last, data) = events(server, {"prompt": "hi", "prompt_template": "no place for it"})

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
        # of the wrong type
        ("prompt", 5),
        ("seed", 1.5),
        ("debug", "yes"),
        ("messages", "hi"),
        # an explicit null, even where the input is optional
        ("seed", None),
        ("stop_sequences", None),
        ("messages", None),
    ],
)
def test_a_value_outside_the_schema_is_refused_by_name(server: CogServer, name: str, value: object) -> None:
    response = post(server, {"prompt": "hi", name: value})

    assert response.status_code == 422
    (fault,) = response.json()["detail"]
    assert fault["loc"] == ["body", "input", name]


@pytest.mark.parametrize("element", ["hi", None, 5, []])
def test_a_message_that_is_no_object_is_refused(server: CogServer, element: object) -> None:
    response = post(server, {"messages": [element]})

    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][:2] == ["body", "input"]


def test_inputs_that_do_not_exist_are_ignored(server: CogServer) -> None:
    inputs = exactly(10, prompt="hi")

    assert text(server, inputs | {"stream": True, "stop": ["x"]}) == text(server, inputs)


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", "max_length"])
def test_asking_for_more_tokens_than_fit_is_no_error(server: CogServer, name: str) -> None:
    body = answer(server, {"prompt": "hi", "temperature": 0, name: 500_000})

    assert body["status"] == "succeeded"
    assert "the context leaves room for" in body["logs"]


def test_a_whole_number_may_be_written_as_a_float(server: CogServer) -> None:
    inputs = exactly(10, prompt="hi", temperature=1)

    assert text(server, inputs | {"max_new_tokens": 10.0, "seed": 5.0}) == text(server, inputs | {"seed": 5})


# --- hostile inputs


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(rb'{"input": {"prompt": "a\ud800b"}}', id="half a surrogate pair"),
        pytest.param(rb'{"input": {"prompt": "\udc00\ud800"}}', id="a pair the wrong way round"),
        pytest.param(b'{"input": {"prompt": "a\xff\xfe"}}', id="not UTF-8"),
        pytest.param(b'{"input": {"prompt": "a", "temperature": NaN}}', id="not a number"),
        pytest.param(b'{"input": {"prompt": "a", "temperature": 1e400}}', id="infinite"),
        pytest.param(b'{"input": {"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}}", id="deeply nested"),
        pytest.param(b"hello", id="not JSON"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b'{"input": []}', id="inputs that are no object"),
    ],
)
def test_a_body_that_cannot_be_read_is_the_clients_fault(server: CogServer, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/predictions", content=body, headers=headers, timeout=PATIENCE)

    assert response.status_code in (400, 422)
    assert response.text
    assert server.health()["status"] == "READY"


@pytest.mark.parametrize(
    "prompt", ["a\x00b", "\x01\x1b[31m\x7f\x85", "\ufeff\u202e\u2028\ufffe", "\U0010ffff"]
)
def test_control_characters_are_text_like_any_other(server: CogServer, prompt: str) -> None:
    body = answer(server, exactly(5, prompt=prompt, debug=True))

    assert body["status"] == "succeeded"
    # They do not reach a terminal either, nor break a log's lines.
    assert body["logs"].replace("\n", "").isprintable()
    assert len(re.findall("^formatted prompt: .*$", body["logs"], re.MULTILINE)) == 1


def test_as_many_stop_sequences_as_are_allowed_are_taken(server: CogServer) -> None:
    inputs = exactly(40, prompt="hi") | {"min_new_tokens": 0}
    stops = ",".join(f"unheard of {i}".ljust(256, ".") for i in range(64))

    assert text(server, inputs | {"stop_sequences": stops}) == text(server, inputs)
    one_too_many = answer(server, inputs | {"stop_sequences": f"{stops},another"})
    assert "E1000 InvalidInput: stop_sequences has 65 sequences" in one_too_many["error"]


def test_blank_ends_of_a_prompt_count_for_nothing(server: CogServer) -> None:
    inputs = exactly(5, prompt="hi")
    assert text(server, inputs | {"prompt": "hi" + "\n" * 40_000}) == text(server, inputs)


def test_the_tokens_so_far_are_recorded_with_every_piece(server: CogServer) -> None:
    recorded, tokens_at_pieces = [0], []
    # An answer that ends within a character has its rest as a last piece, to which no token belongs.
    prompts = (exactly(60, prompt=f"Count to {i}") for i in range(50))
    inputs = next(i for i in prompts if not text(server, i).endswith("\ufffd"))
    for name, data in events(server, inputs):
        if name == "metric" and data["name"] == "output_token_count":
            recorded.append(data["value"])
        elif name == "output":
            tokens_at_pieces.append(recorded[-1])
    # A server that is killed after a piece has recorded that piece's tokens.
    assert tokens_at_pieces[0] > 0
    assert all(before < after for before, after in pairwise(tokens_at_pieces))
    assert recorded == sorted(recorded)
    assert recorded[-1] == 60


def post_raw(server: CogServer, inputs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Seconds and body of a big prediction. By a plain socket, so that sending it takes no time from
    the thread that reads a stream."""
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
    stream.result()
    return max(after - before for before, after in pairwise(stream.arrivals))


@pytest.fixture(scope="module")
def own_pause(server: CogServer) -> float:
    """Of the stream by itself: many tokens in a row may have no text of their own."""
    return longest_pause(BackgroundStream(server, COUNTING))


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({"prompt": "word " * 10_000_000}, id="fifty megabytes of words"),
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
def test_a_huge_prompt_is_refused_at_once_and_holds_nobody_up(
    server: CogServer, own_pause: float, inputs: dict[str, Any]
) -> None:
    measured = []
    for _ in range(3):  # anything may pause for a second on a machine that others use too
        beside = BackgroundStream(server, COUNTING).wait_for("output")
        seconds, body = post_raw(server, inputs)
        pause = longest_pause(beside)
        assert "E1002 PromptTooLong" in body["error"]
        measured.append((seconds, pause - own_pause))
        if seconds < 2 and pause < own_pause + 1:
            return
    pytest.fail(f"seconds to refuse it, and the longest pause beside it: {measured}")


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
    with pytest.raises(httpx.ReadTimeout):
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
    with server.client.stream(
        "PUT",
        "/predictions/late-reader",
        json={"input": inputs, **request},
        headers={"Accept": "text/event-stream"},
        timeout=PATIENCE,
    ) as response:
        seen = list(read_events(response.iter_bytes()))

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
