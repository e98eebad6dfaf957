"""Llama with a scripted engine: text, stop sequences, limits, metrics, logs and the end of an answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llama.engine import FinishReason, TokenStream
from llama.errors import EngineStopped, GenerationFailed, MinimumAboveMaximum, NotSupported, PromptTooLong
from llama.generation import Llama
from llama.sampling_params import SamplingParams
from llama.serving.cancellation import Cancellation
from llama.serving.schema import input_defaults
from llama.text.llama2_tokenizer import Llama2Tokenizer
from llama.text.load_tokenizer import load_tokenizer
from llama.text.tokenizer import Tokenizer
from predict import Predictor

CONTEXT = 200
DEFAULTS = input_defaults(Predictor.run)


@dataclass
class ScriptedEngine:
    """An `Engine` that answers every request with the same tokens, all available immediately."""

    answer: list[int] = field(default_factory=list)
    ending: FinishReason | GenerationFailed | None = "stop"
    context_length: int = CONTEXT
    max_requests: int = 1
    healthy: bool = True
    refused_temperature: float | None = None
    submitted: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    streams: list[TokenStream] = field(default_factory=list)

    def check(self, params: SamplingParams) -> None:
        if params.temperature == self.refused_temperature:
            raise NotSupported("temperature is 5, which this engine does not support; lower it")

    def submit(self, token_ids: Sequence[int], params: SamplingParams) -> TokenStream:
        if not self.healthy:
            raise EngineStopped("the engine is not running; restart the server")
        stream = TokenStream()
        self.submitted.append((list(token_ids), params))
        self.streams.append(stream)
        for token in self.answer:
            stream.put(token)
        if isinstance(self.ending, GenerationFailed):
            stream.fail(self.ending)
        elif self.ending is not None:
            stream.finish(self.ending)
        return stream

    def close(self) -> None:
        self.healthy = False


@dataclass
class Recorder:
    """A metrics scope and a log that keep what they are given."""

    metrics: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def record_metric(self, name: str, value: float | str) -> None:
        self.metrics[name] = value

    def log(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def tokenizer(llama_folder: Path) -> Tokenizer:
    return load_tokenizer(llama_folder)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    assert isinstance(tokenizer, Llama2Tokenizer)
    return tokenizer._encode_text(text)


def start(
    tokenizer: Tokenizer,
    engine: ScriptedEngine,
    recorder: Recorder,
    cancellation: Cancellation | None = None,
    **inputs: object,
) -> Generator[str, None, None]:
    llama = Llama(tokenizer, engine)
    prediction = llama.prepare({**DEFAULTS, "prompt": "Hi!", "system_prompt": "", "temperature": 0, **inputs})
    pieces = llama.stream(
        prediction, scope=recorder, log=recorder.log, cancellation=cancellation or Cancellation()
    )
    assert isinstance(pieces, Generator)
    return pieces


def test_tokens_that_are_ready_together_are_sent_as_one_piece(tokenizer: Tokenizer) -> None:
    engine, recorder = ScriptedEngine(ids_of(tokenizer, "the answer is a number")), Recorder()
    assert list(start(tokenizer, engine, recorder)) == ["the answer is a number"]
    assert recorder.metrics["output_token_count"] == len(engine.answer)
    assert recorder.metrics["finish_reason"] == "stop"
    assert recorder.metrics["input_token_count"] == len(engine.submitted[0][0])
    assert 0 < recorder.metrics["time_to_first_token"] < 60
    assert recorder.metrics["tokens_per_second"] > 0


def test_unsupported_parameters_are_refused_before_the_answer_begins(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(refused_temperature=5.0)
    with pytest.raises(NotSupported, match="^E1103 NotSupported: "):
        start(tokenizer, engine, Recorder(), temperature=5)
    assert engine.submitted == []


def test_a_partial_answer_is_continued_with_the_leading_space_kept(tokenizer: Tokenizer) -> None:
    engine, recorder = ScriptedEngine(ids_of(tokenizer, "is a number")), Recorder()
    prompt = "[INST] what? [/INST] The answer"
    assert "".join(start(tokenizer, engine, recorder, prompt=prompt)) == " is a number"
    assert any("continued" in line for line in recorder.lines)


def test_a_stop_sequence_ends_the_answer_and_stops_the_engine(tokenizer: Tokenizer) -> None:
    answer = [ids_of(tokenizer, text) for text in ("one two three f", "our five")]
    engine, recorder = ScriptedEngine([*answer[0], *answer[1]], ending=None), Recorder()
    assert "".join(start(tokenizer, engine, recorder, stop_sequences="e f,zzz")) == "one two thre"
    assert engine.streams[0].cancelled
    assert recorder.metrics["finish_reason"] == "stop"
    # Tokens after the stop sequence are not billed, even if the engine had already generated them.
    assert recorder.metrics["output_token_count"] == len(answer[0])


def test_text_held_back_for_an_incomplete_stop_sequence_is_sent_at_the_end(tokenizer: Tokenizer) -> None:
    engine, recorder = ScriptedEngine(ids_of(tokenizer, "one two three"), ending="length"), Recorder()
    assert "".join(start(tokenizer, engine, recorder, stop_sequences="three blind")) == "one two three"
    assert recorder.metrics["finish_reason"] == "length"


def test_stop_sequences_have_no_effect_before_the_minimum(tokenizer: Tokenizer) -> None:
    answer = ids_of(tokenizer, "stop stop stop stop")
    minimum = len(ids_of(tokenizer, "stop stop stop"))
    engine, recorder = ScriptedEngine(answer), Recorder()
    text = "".join(start(tokenizer, engine, recorder, stop_sequences="stop", min_new_tokens=minimum))
    assert text == "stop stop stop "


def test_each_byte_of_an_incomplete_character_becomes_a_replacement_character(tokenizer: Tokenizer) -> None:
    llama_bytes = [3 + byte for byte in "🦙".encode()]  # byte pieces begin at id 3
    engine, recorder = ScriptedEngine([*llama_bytes, *llama_bytes[:2]], ending="length"), Recorder()
    assert "".join(start(tokenizer, engine, recorder)) == "🦙\ufffd\ufffd"


@pytest.mark.parametrize(
    "asked", [{"max_new_tokens": 500_000}, {"max_length": 10_000}, {"max_tokens": 10**20}]
)
def test_a_maximum_beyond_the_context_is_clamped_and_the_log_says_so(
    tokenizer: Tokenizer, asked: dict[str, Any]
) -> None:
    engine, recorder = ScriptedEngine(), Recorder()
    list(start(tokenizer, engine, recorder, **asked))
    ((token_ids, params),) = engine.submitted
    assert params.maximum == CONTEXT - len(token_ids)
    note = f"the maximum was lowered to {params.maximum} new tokens, the room left in the context"
    assert note in recorder.lines


def test_a_minimum_beyond_the_context_is_clamped(tokenizer: Tokenizer) -> None:
    engine, recorder = ScriptedEngine(), Recorder()
    list(start(tokenizer, engine, recorder, min_new_tokens=10_000))
    params = engine.submitted[0][1]
    assert params.minimum == params.maximum == CONTEXT - len(engine.submitted[0][0])


def test_minimum_and_maximum_are_compared_before_they_are_clamped(tokenizer: Tokenizer) -> None:
    with pytest.raises(MinimumAboveMaximum):
        start(tokenizer, ScriptedEngine(), Recorder(), min_new_tokens=20_000, max_new_tokens=10_000)


def test_a_prompt_that_leaves_room_for_one_token_is_served_and_a_longer_one_is_refused(
    tokenizer: Tokenizer,
) -> None:
    llama = Llama(tokenizer, ScriptedEngine())

    def count(words: int) -> int:
        inputs = {**DEFAULTS, "prompt": "5" * words, "system_prompt": ""}
        return len(llama.prepare(inputs).token_ids)

    words = CONTEXT - 1 - (count(1) - 1)  # every digit is a token
    assert count(words) == CONTEXT - 1
    with pytest.raises(
        PromptTooLong, match=f"is {CONTEXT} tokens and the model's context is {CONTEXT}; .* at least 1 tokens"
    ):
        count(words + 1)


def test_an_engine_failure_is_raised_after_the_text_generated_so_far(
    tokenizer: Tokenizer,
) -> None:
    engine = ScriptedEngine(ids_of(tokenizer, "one two"), ending=GenerationFailed("a step failed; restart"))
    recorder = Recorder()
    pieces = start(tokenizer, engine, recorder)
    assert next(pieces) == "one two"
    with pytest.raises(GenerationFailed, match="^E2001 "):
        next(pieces)
    assert "finish_reason" not in recorder.metrics
    assert recorder.metrics["output_token_count"] == len(engine.answer)


class BrokenScope:
    """A metrics scope and a log that always fail."""

    def record_metric(self, name: str, value: float | str) -> None:
        raise OSError("the socket is gone")

    def log(self, line: str) -> None:
        raise ValueError("the file is closed")


def stream_with_broken_scope(tokenizer: Tokenizer, engine: ScriptedEngine) -> Iterator[str]:
    scope = BrokenScope()
    llama = Llama(tokenizer, engine)
    prediction = llama.prepare({**DEFAULTS, "prompt": "Hi!", "debug": True})
    return llama.stream(prediction, scope=scope, log=scope.log, cancellation=Cancellation())


def test_a_failing_scope_and_log_do_not_hide_the_engines_error(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(ids_of(tokenizer, "one"), ending=GenerationFailed("it broke"))
    pieces = stream_with_broken_scope(tokenizer, engine)
    assert next(pieces) == "one"
    with pytest.raises(GenerationFailed, match="^E2001 GenerationFailed: it broke"):
        next(pieces)
    assert caplog.messages == [
        "the metric input_token_count could not be recorded; no more metrics are recorded for this prediction",
        "a prediction's log could not be written; no more lines are logged for this prediction",
    ]


def test_a_failing_scope_and_log_do_not_end_the_answer(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(ids_of(tokenizer, "an answer"))
    assert "".join(stream_with_broken_scope(tokenizer, engine)) == "an answer"


def test_the_logged_metrics_equal_the_recorded_ones(tokenizer: Tokenizer) -> None:
    recorder = Recorder()
    engine = ScriptedEngine(ids_of(tokenizer, "one two three"))
    list(start(tokenizer, engine, recorder, log_performance_metrics=True))
    logged = dict(line.split(": ") for line in recorder.lines if line.startswith(("tokens_", "time_")))
    assert logged == {name: f"{recorder.metrics[name]:.3f}" for name in logged}
    assert len(logged) == 2


def test_the_token_counts_are_recorded_before_each_piece(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "one two three")
    engine, recorder = ScriptedEngine(ids, ending=None), Recorder()
    pieces = start(tokenizer, engine, recorder)
    next(pieces)
    assert recorder.metrics.keys() == {"input_token_count", "output_token_count"}
    assert recorder.metrics["output_token_count"] == len(ids)
    assert recorder.metrics["input_token_count"] > 0
    pieces.close()


@pytest.mark.parametrize("minimum", [3, 4, 5, 6])
def test_a_stop_sequence_that_ends_after_the_minimum_ends_the_answer_even_if_it_begins_before(
    tokenizer: Tokenizer, minimum: int
) -> None:
    text = "abcdefghij and more"
    ids = [3 + byte for byte in text.encode()]  # one token per byte
    engine = ScriptedEngine(ids)
    answer = "".join(start(tokenizer, engine, Recorder(), stop_sequences="cdefg", min_new_tokens=minimum))
    assert answer == "ab"
    unstopped = "".join(start(tokenizer, engine, Recorder(), stop_sequences="cdefg", min_new_tokens=7))
    assert unstopped == text


def test_a_prediction_can_be_prepared_in_a_thread(tokenizer: Tokenizer) -> None:
    llama = Llama(tokenizer, ScriptedEngine())
    inputs = {**DEFAULTS, "prompt": "Hi!"}
    prediction = asyncio.run(llama.prepare_in_thread(inputs))
    assert prediction.token_ids == llama.prepare(inputs).token_ids
    with pytest.raises(PromptTooLong):
        asyncio.run(llama.prepare_in_thread(inputs | {"prompt": "5" * CONTEXT}))
    llama.close()
    with pytest.raises(EngineStopped):
        asyncio.run(llama.prepare_in_thread(inputs))


def test_a_stopped_engine_refuses_requests(tokenizer: Tokenizer) -> None:
    with pytest.raises(EngineStopped, match="^E2002 "):
        list(start(tokenizer, ScriptedEngine(healthy=False), Recorder()))


def test_cancelling_ends_the_answer_and_counts_the_tokens_so_far(tokenizer: Tokenizer) -> None:
    engine, recorder = ScriptedEngine(ids_of(tokenizer, "one two"), ending=None), Recorder()
    cancellation = Cancellation()
    pieces = start(tokenizer, engine, recorder, cancellation)
    assert next(pieces) == "one two"
    cancellation.set()
    assert list(pieces) == []
    assert recorder.metrics["finish_reason"] == "cancelled"
    assert recorder.metrics["output_token_count"] == len(engine.answer)
    assert engine.streams[0].cancelled


def test_cancelling_before_the_first_token_reports_no_tokens(tokenizer: Tokenizer) -> None:
    engine, recorder, cancellation = ScriptedEngine(ending=None), Recorder(), Cancellation()
    cancellation.set()
    assert list(start(tokenizer, engine, recorder, cancellation)) == []
    assert (recorder.metrics["output_token_count"], recorder.metrics["finish_reason"]) == (0, "cancelled")
    assert "time_to_first_token" not in recorder.metrics


def test_closing_a_stream_early_stops_the_engine(tokenizer: Tokenizer) -> None:
    engine, recorder = ScriptedEngine(ids_of(tokenizer, "one two"), ending=None), Recorder()
    pieces = start(tokenizer, engine, recorder)
    next(pieces)
    pieces.close()
    assert engine.streams[0].cancelled
    assert recorder.metrics["finish_reason"] == "cancelled"


def test_a_stream_that_is_never_read_submits_nothing_to_the_engine(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine()
    start(tokenizer, engine, Recorder()).close()
    assert engine.submitted == []


def test_prompts_and_answers_are_logged_only_with_debug(tokenizer: Tokenizer) -> None:
    inputs: dict[str, Any] = {
        "prompt": "my secret",
        "log_performance_metrics": True,
        "seed": None,
        "temperature": 1,
    }
    quiet, loud = Recorder(), Recorder()
    for recorder, debug in ((quiet, False), (loud, True)):
        list(
            start(tokenizer, ScriptedEngine(ids_of(tokenizer, "an answer")), recorder, **inputs, debug=debug)
        )
    assert not any("secret" in line or "answer" in line.replace("this answer", "") for line in quiet.lines)
    assert any("secret" in line for line in loud.lines)
    assert any(line.startswith("time_to_first_token: ") for line in quiet.lines)


def test_an_unpaired_surrogate_in_a_stop_sequence_can_be_logged(tokenizer: Tokenizer) -> None:
    recorder = Recorder()
    list(start(tokenizer, ScriptedEngine(), recorder, debug=True, stop_sequences="\ud800"))
    assert any(line.startswith("settings: ") and r"\ud800" in line for line in recorder.lines)


def test_a_random_seed_is_logged_and_passed_to_the_engine(tokenizer: Tokenizer) -> None:
    engine, recorder = ScriptedEngine(), Recorder()
    list(start(tokenizer, engine, recorder, temperature=0.7))
    assert any(line.startswith(f"seed: {engine.submitted[0][1].seed} ") for line in recorder.lines)


def test_zero_is_a_valid_seed(tokenizer: Tokenizer) -> None:
    engine, recorder = ScriptedEngine(), Recorder()
    list(start(tokenizer, engine, recorder, temperature=0.7, seed=0))
    assert engine.submitted[0][1].seed == 0
    assert not any("seed" in line for line in recorder.lines)


def test_the_tokens_of_a_fast_engine_are_combined_into_few_lists() -> None:
    stream, lists = TokenStream(), list[list[int]]()

    def make_tokens() -> None:
        for token in range(400):
            stream.put(token)
            time.sleep(0.001)
        stream.finish("length")

    maker = threading.Thread(target=make_tokens)
    maker.start()
    lists.extend(stream)
    maker.join()
    assert [token for tokens in lists for token in tokens] == list(range(400))
    assert len(lists) < 100
