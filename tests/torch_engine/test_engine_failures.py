"""A failure that concerns one request of the default engine fails only that request, wherever it happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from batches import collect, generate, greedy, prompt_of, running
from transformers import LlamaForCausalLM

from llama.engine import TokenStream
from llama.errors import EngineError, EngineStopped, GenerationFailed, InvalidInput
from llama.sampling_params import SamplingParams
from llama.torch_engine.engine import TorchEngine

Place = tuple[str, str, int]
"""A line of the engine: file, function and line number."""

# Functions that run only while the prompt of one request is prepared or read.
PROMPTS = {
    ("scheduler.py", "reuse_prefix"),
    ("prefix_cache.py", "reuse"),
    ("prefix_cache.py", "_best_match"),
    ("kv_cache.py", "copy"),
    ("runner.py", "prefill"),
    ("cpu_attention.py", "_bias"),
    ("cpu_attention.py", "_attend_chunk"),
    ("batch.py", "_begin_answer"),
    ("sampler.py", "add"),
    ("runner.py", "start_decoding"),
}


class Fault(Exception):
    pass


class Saboteur:
    """Traces the loop of the engine's thread, and raises once, at one line."""

    def __init__(self, at: Place | None = None, hit: int = 1) -> None:
        """Raise when the line `at` is reached for the `hit`-th time."""
        self.at, self.left, self.seen = at, hit, dict[Place, None]()
        self.raised, self.started = False, False

    def __call__(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        if "llama/torch_engine/" not in file or threading.current_thread().name != "llama-engine":
            return None
        self.started |= frame.f_code.co_name == "_take_arrivals"
        if event == "line" and self.started and frame.f_code.co_name != "_run":
            place = (file.rpartition("/")[2], frame.f_code.co_name, frame.f_lineno)
            self.seen[place] = None
            if place == self.at and not self.raised:
                self.left -= 1
                self.raised = self.left == 0
                if self.raised:
                    raise Fault
        return self


@contextmanager
def sabotaged(saboteur: Saboteur) -> Iterator[None]:
    """Trace the engines that are started in the body."""
    before = threading.gettrace()
    threading.settrace(saboteur)
    try:
        yield
    finally:
        threading.settrace(before)


def submitted(engine: TorchEngine, request: tuple[list[int], SamplingParams]) -> TokenStream:
    """Return the stream of a request; if the engine has stopped, return a stream that has failed."""
    try:
        return engine.submit(*request)
    except EngineStopped as error:
        stream = TokenStream()
        stream.fail(error)
        return stream


def outcome(stream: TokenStream) -> list[int] | str:
    """Return the tokens, or the error code. If the stream never ends, this hangs, and the test times out."""
    try:
        return collect(stream)
    except EngineError as error:
        return error.code


PROMPT = prompt_of(1, 40)
REQUESTS = [
    (prompt_of(2, 9), greedy(12)),
    (prompt_of(4, 9), greedy(9)),
    (PROMPT, greedy(6)),
    ([*PROMPT, 5, 6, 7], SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_new_tokens=5)),
    (prompt_of(3, 30), SamplingParams(temperature=0.0, repetition_penalty=1.2, max_new_tokens=4)),
    ([*PROMPT, 8, 9], greedy(3)),
]


def life(engine: TorchEngine) -> list[list[int] | str]:
    """Run concurrent requests, more than there are rows and some with a common prefix, and then one more."""
    streams = [submitted(engine, request) for request in REQUESTS]
    outcomes = [outcome(stream) for stream in streams]
    return [*outcomes, outcome(submitted(engine, REQUESTS[3]))]


@pytest.fixture(scope="module")
def undisturbed(model: LlamaForCausalLM) -> tuple[list[list[int] | str], list[Place]]:
    saboteur = Saboteur()
    with sabotaged(saboteur), running(model, rows=4) as engine:
        answers = life(engine)
    assert all(isinstance(answer, list) for answer in answers)
    return answers, [*saboteur.seen]


@pytest.mark.slow
@pytest.mark.parametrize("hit", [1, 3])
def test_a_failure_at_any_line_lets_every_request_end_and_corrupts_no_answer(
    model: LlamaForCausalLM, undisturbed: tuple[list[list[int] | str], list[Place]], hit: int
) -> None:
    answers, places = undisturbed
    assert len(places) > 100
    raised = 0
    for place in places:
        saboteur = Saboteur(place, hit)
        with sabotaged(saboteur), running(model, rows=4) as engine:
            outcomes = life(engine)
            healthy = engine.healthy
        raised += saboteur.raised
        failed = [index for index, answer in enumerate(outcomes) if answer != answers[index]]
        # Every answer that arrives is correct.
        assert all(outcomes[index] in ("E2001", "E2002") for index in failed), (place, outcomes)
        assert healthy == (len(failed) <= 1 and outcomes[-1] != "E2002"), (place, outcomes)
        if place[:2] in PROMPTS:
            assert healthy, (place, outcomes)
    # How often a line is reached depends on when requests arrive.
    assert raised > 0.8 * len(places)


def test_the_traced_lines_include_every_function_that_handles_prompts(
    undisturbed: tuple[list[list[int] | str], list[Place]],
) -> None:
    assert {place[:2] for place in undisturbed[1]} >= PROMPTS


class Fussy(torch.nn.Module):
    """Token embeddings that raise an error for one token."""

    BAD = 77

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if bool((token_ids == self.BAD).any()):
            raise RuntimeError("this token cannot be embedded")
        result: torch.Tensor = self.inner(token_ids)
        return result


def test_prompts_that_are_read_together_with_a_failing_one_are_answered(model: LlamaForCausalLM) -> None:
    inner = model.model.embed_tokens
    good = [[token for token in prompt_of(i, 12) if token != Fussy.BAD] for i in range(4)]
    model.model.embed_tokens = Fussy(inner)
    try:
        with running(model, rows=8) as engine:
            bad = [engine.submit([1, 5, Fussy.BAD, 9], greedy(5)) for _ in range(3)]
            streams = [engine.submit(prompt, greedy(5)) for prompt in good]
            for stream in bad:
                with pytest.raises(GenerationFailed, match=r"^E2001 .*failed on this prompt \(RuntimeError"):
                    collect(stream)
            answers = [outcome(stream) for stream in streams]
            assert engine.healthy
    finally:
        model.model.embed_tokens = inner
    assert answers == [generate(model, prompt, 5) for prompt in good]


@pytest.mark.parametrize("token_ids", [[], [1, -1], [1, 700], [1, 2**40]])
def test_invalid_token_ids_are_refused_immediately(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    with running(model) as engine:
        with pytest.raises(InvalidInput, match="^E1000 "):
            engine.submit(token_ids, greedy(3))
        assert collect(engine.submit([1, 5], greedy(3))) == generate(model, [1, 5], 3)


def test_a_failed_stream_raises_its_error_every_time_it_is_iterated() -> None:
    stream = TokenStream()
    stream.put(5)
    stream.fail(GenerationFailed("it broke; try again"))
    assert next(iter(stream)) == [5]
    for _ in range(3):
        with pytest.raises(GenerationFailed, match="it broke"):
            collect(stream)
