"""Single predictions through Cog's server, over real HTTP."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from server_clients import (
    SYSTEM_PROMPT,
    BackgroundStream,
    answer,
    events,
    exactly,
    in_parallel,
    text,
    until,
)

from llama.serving.schema import openapi_schema
from llama.serving.server import CogServer
from predict import Predictor

# --- one prediction


def test_a_loaded_server_reports_that_it_is_ready(server: CogServer) -> None:
    health = server.health()

    assert health["status"] == "READY"
    assert health["setup"]["status"] == "succeeded"


def test_the_server_publishes_the_schema_of_the_run_method(server: CogServer) -> None:
    assert server.client.get("/openapi.json").json() == openapi_schema(Predictor.run)


def test_a_plain_prediction_returns_the_complete_answer_and_its_metrics(server: CogServer) -> None:
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


def test_an_answer_of_one_token_is_complete(server: CogServer) -> None:
    assert answer(server, exactly(1, prompt="hi"))["metrics"]["output_token_count"] == 1


def test_pieces_arrive_while_later_ones_are_still_being_generated(server: CogServer) -> None:
    stream = BackgroundStream(server, exactly(600, prompt="Count"))
    result = stream.result()

    # If the server collected the pieces first, all would arrive at once. On a busy machine, a piece can have
    # many tokens.
    spread = stream.arrivals[-1] - stream.arrivals[0]
    assert len(stream.arrivals) > 3
    assert spread > result["metrics"]["predict_time"] / 2


def test_a_stream_has_a_start_numbered_pieces_metrics_and_an_end(server: CogServer) -> None:
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


def test_the_servers_log_names_a_prediction_by_the_id_of_its_request(
    server: CogServer, server_log: Path
) -> None:
    """The gateway sends such an id, so that its log and the server's have the same one."""
    stream = dict(events(server, exactly(2, prompt="Hi"), id="5a3f-2"))

    assert stream["start"]["id"] == stream["completed"]["id"] == "5a3f-2"
    until(lambda: server_log.read_text().count('"prediction_id":"5a3f-2"') == 2)


def test_a_stream_and_a_plain_prediction_give_the_same_answer(server: CogServer) -> None:
    inputs = exactly(60, prompt="Say it twice")

    streamed = "".join(data["chunk"] for name, data in events(server, inputs) if name == "output")

    assert streamed == text(server, inputs)


@pytest.mark.parametrize("prompt", ["hi", "What is a cache?", "naïve 語 🦙\nand a second line"])
def test_a_greedy_answer_equals_that_of_transformers(
    server: CogServer, llama_folder: Path, prompt: str
) -> None:
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
    """Inputs without a minimum whose answer contains `pattern`, and that answer."""
    for seed in range(500):
        inputs = {"prompt": "Go on", "temperature": 1, "seed": seed, "max_new_tokens": 120}
        whole = text(server, inputs)
        if re.search(pattern, whole, re.DOTALL):
            return inputs, whole
    raise AssertionError(f"no answer matches {pattern}")


def test_a_stop_sequence_ends_the_answer_and_never_reaches_the_caller(server: CogServer) -> None:
    # A stop sequence of nine characters spans several pieces and may begin and end inside them.
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


def test_a_random_seed_is_logged_and_reproduces_the_answer(server: CogServer) -> None:
    inputs = exactly(40, prompt="Surprise me", temperature=1)
    first = answer(server, inputs)
    match = re.search(r"^seed: (\d+)", first["logs"], re.MULTILINE)
    assert match

    again = answer(server, inputs | {"seed": int(match[1])})

    assert "".join(again["output"]) == "".join(first["output"])
    assert "seed" not in again["logs"]


# --- logs


def test_neither_prompt_nor_answer_is_logged_unless_debug_is_on(server: CogServer, server_log: Path) -> None:
    # Each of these but the last writes something to the log.
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


def test_no_error_quotes_the_callers_text(server: CogServer, server_log: Path) -> None:
    for inputs in (
        {"prompt": "zebramussel " * 3000},
        {"prompt": "hi", "prompt_template": "zebramussel"},
        {"messages": [{"role": "zebramussel", "content": "hi"}]},
        {"prompt": "hi", "replicate_weights": "zebramussel"},
    ):
        assert "zebramussel" not in json.dumps(answer(server, inputs))
    assert "zebramussel" not in server_log.read_text("utf-8")


def test_debug_logs_the_formatted_prompt_the_settings_and_the_metrics(server: CogServer) -> None:
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


def test_a_predictions_log_has_all_of_its_lines_and_none_of_another_prediction(server: CogServer) -> None:
    words = [
        f"unique{word}" for word in ("apple", "birch", "cedar", "daisy", "elder", "fern", "grape", "hazel")
    ]

    def logs(word: str) -> str:
        inputs = exactly(30 + len(words) * words.index(word), prompt=word, debug=True)
        return "".join(data["data"] for name, data in events(server, inputs) if name == "log")

    for word, log in zip(words, in_parallel(logs, words), strict=True):
        assert set(re.findall(r"unique\w+", log)) == {word}
        # The log is complete: its first and last lines appear exactly once.
        assert log.count("formatted prompt: ") == log.count("finish_reason: ") == 1
        assert log.endswith("\n")
