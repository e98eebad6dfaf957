"""The contract of every engine, compared with transformers and with simple definitions, in float32.

The same tests run for each engine. An engine that is not installed is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_models import VOCABULARY, write_model
from transformers import LlamaForCausalLM

from llama.engine import Engine, TokenStream
from llama.errors import EngineStopped, NotSupported, PromptTooLong
from llama.generation import Llama
from llama.load import load_llama
from llama.metrics import NoScope
from llama.sampling_params import SamplingParams
from llama.serving.cancellation import Cancellation
from llama.serving.schema import input_defaults
from llama.settings import Settings
from predict import Predictor

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run `make test-vllm`"
)
# The tensor-parallel ranks on a CPU are bound to cores, which only Linux can do.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="two ranks require two cores to bind to")
TWO_RANKS = "vllm, two ranks"
ENGINES = [
    "torch",
    pytest.param("vllm", marks=needs_vllm),
    pytest.param(TWO_RANKS, marks=[needs_vllm, needs_two_cores]),
]

CONTEXT = 512
PLACES = 4
PROMPT = [1, 300, 301, 302, 303, 304]
ENDS_AT = 9  # the number of tokens before EOS in the greedy answer to PROMPT
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 30}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> Path:
    """A model that ends its greedy answer to PROMPT after ENDS_AT tokens.

    Without a mask, its highest logits would often be those of ids that only pad the embedding table.
    """
    folder = tmp_path_factory.mktemp("contract")
    write_model(folder, vocab_size=VOCABULARY + 64)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] *= 2
    model.save_pretrained(folder)
    answer = reference(model, PROMPT, ENDS_AT + 1)
    assert answer[-1] not in answer[:-1]
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, answer[-1]]}))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=ENGINES)
def llama(request: pytest.FixtureRequest, folder: Path) -> Iterator[Llama]:
    llama = load(folder, request.param)
    try:
        yield llama
    finally:
        llama.close()


@pytest.fixture
def engine(llama: Llama) -> Engine:
    return llama._engine


def load(folder: Path, engine: str) -> Llama:
    settings = Settings(
        weights=folder,
        engine=engine.partition(",")[0],
        tensor_parallel=2 if engine == TWO_RANKS else None,
        dtype="float32",
        max_context=CONTEXT,
        cache_memory="64MB",
        COG_MAX_CONCURRENCY=PLACES,
    )
    with pytest.MonkeyPatch.context() as environment:
        if engine == TWO_RANKS:
            a_core_each = "|".join(map(str, CORES[:2]))
            environment.setenv("VLLM_CPU_OMP_THREADS_BIND", a_core_each)
        return load_llama(settings)


@torch.inference_mode()
def logits_after(model: LlamaForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """Return the logits of the next token, without ids that are not tokens: [VOCABULARY]."""
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0, -1, :VOCABULARY]
    return logits


def reference(
    model: LlamaForCausalLM,
    prompt: list[int],
    maximum: int,
    adjust: Callable[[torch.Tensor, list[int]], torch.Tensor] = lambda logits, _: logits,
) -> list[int]:
    """Decode greedily, with one full forward pass per token, and without stopping at EOS.

    `adjust` changes the logits and gets the answer so far.
    """
    answer: list[int] = []
    for _ in range(maximum):
        with torch.inference_mode():
            answer.append(int(adjust(logits_after(model, [*prompt, *answer]), answer).argmax()))
    return answer


def ends(model: LlamaForCausalLM) -> list[int]:
    ids: list[int] = model.generation_config.eos_token_id
    return ids


def until_its_end(model: LlamaForCausalLM, answer: list[int]) -> list[int]:
    return next((answer[:i] for i, token in enumerate(answer) if token in ends(model)), answer)


def prompt_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [1, *torch.randint(3, 690, (length - 1,), generator=generator).tolist()]


def greedy(maximum: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=maximum, **more)


def collect(stream: TokenStream) -> list[int]:
    return [token for tokens in stream for token in tokens]


def answer_of(llama: Llama, **inputs: object) -> str:
    prediction = llama.prepare({**input_defaults(Predictor.run), "temperature": 0, **inputs})
    pieces = llama.stream(prediction, scope=NoScope(), log=lambda _: None, cancellation=Cancellation())
    return "".join(pieces)


def test_an_engine_reports_its_context_and_number_of_requests(engine: Engine) -> None:
    assert (engine.context_length, engine.max_requests, engine.healthy) == (CONTEXT, PLACES, True)


def test_sixteen_concurrent_requests_get_the_answers_of_the_reference(
    engine: Engine, model: LlamaForCausalLM
) -> None:
    prompts = [prompt_of(seed, 3 + 11 * seed) for seed in range(16)]
    streams = [engine.submit(prompt, greedy(8 + seed)) for seed, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(collect, streams))
    for seed, prompt in enumerate(prompts):
        assert answers[seed] == until_its_end(model, reference(model, prompt, 8 + seed))


def test_an_answer_stops_at_eos_and_does_not_include_it(engine: Engine, model: LlamaForCausalLM) -> None:
    stream = engine.submit(PROMPT, greedy(40))
    assert collect(stream) == reference(model, PROMPT, ENDS_AT)
    assert stream.finish_reason == "stop"


def test_an_answer_of_maximum_length_finishes_with_length(engine: Engine) -> None:
    stream = engine.submit(PROMPT, greedy(ENDS_AT - 2))
    assert len(collect(stream)) == ENDS_AT - 2
    assert stream.finish_reason == "length"


def test_eos_is_not_generated_before_the_minimum(engine: Engine, model: LlamaForCausalLM) -> None:
    def without_ends(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor(ends(model)), float("-inf")) if len(answer) < 25 else logits

    wanted = until_its_end(model, reference(model, PROMPT, 30, without_ends))
    assert len(wanted) >= 25
    assert collect(engine.submit(PROMPT, greedy(30, min_new_tokens=25))) == wanted


@pytest.mark.parametrize("penalty", [1.4, 0.8])
def test_the_repetition_penalty_counts_prompt_and_answer(
    engine: Engine, model: LlamaForCausalLM, penalty: float
) -> None:
    def penalized(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        seen = torch.tensor(sorted({*PROMPT, *answer}))
        scores = logits[seen]
        return logits.index_copy(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))

    wanted = until_its_end(model, reference(model, PROMPT, 30, penalized))
    assert collect(engine.submit(PROMPT, greedy(30, repetition_penalty=penalty))) == wanted


def test_presence_and_frequency_count_only_the_answer(engine: Engine, model: LlamaForCausalLM) -> None:
    def penalized(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        for token, count in Counter(answer).items():
            logits[token] -= 0.7 * count + 1.1
        return logits

    wanted = until_its_end(model, reference(model, PROMPT, 30, penalized))
    params = greedy(30, frequency_penalty=0.7, presence_penalty=1.1)
    assert collect(engine.submit(PROMPT, params)) == wanted


@pytest.mark.parametrize("off", [{"repetition_penalty": 0.0}, {"top_k": -1}, {"min_new_tokens": -1}])
def test_a_parameter_that_is_off_changes_nothing(engine: Engine, off: dict[str, float]) -> None:
    params = SamplingParams(**SAMPLED, seed=3)
    wanted = collect(engine.submit(PROMPT, params))
    assert collect(engine.submit(PROMPT, params.model_copy(update=off))) == wanted


@pytest.mark.parametrize("best", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}])
def test_every_way_to_ask_for_the_best_token_gives_it(
    engine: Engine, model: LlamaForCausalLM, best: dict[str, float]
) -> None:
    params = SamplingParams(**{"temperature": 1.5, "seed": 1, "max_new_tokens": 20, **best})
    assert collect(engine.submit(PROMPT, params)) == reference(model, PROMPT, ENDS_AT)


@pytest.mark.parametrize("seed", [0, -1, 7, 2**40, -(2**62), 2**100])
def test_a_seed_gives_the_same_answer_again(engine: Engine, seed: int) -> None:
    params = SamplingParams(**SAMPLED, seed=seed)
    assert collect(engine.submit(PROMPT, params)) == collect(engine.submit(PROMPT, params))


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(engine: Engine) -> None:
    params = SamplingParams(**SAMPLED, seed=42)
    alone = collect(engine.submit(PROMPT, params))
    others = [engine.submit(prompt_of(s, 9), SamplingParams(**SAMPLED, seed=s)) for s in range(6)]
    among = engine.submit(PROMPT, params)
    others[2].cancel()
    assert collect(among) == alone
    assert len({tuple(collect(other)) for other in others}) > 3


def test_a_top_k_of_two_draws_one_of_the_best_two_tokens(engine: Engine, model: LlamaForCausalLM) -> None:
    best = logits_after(model, PROMPT).topk(2).indices.tolist()
    params = [SamplingParams(temperature=2.0, top_k=2, seed=seed, max_new_tokens=1) for seed in range(20)]
    first = {collect(engine.submit(PROMPT, p))[0] for p in params}
    assert first == set(best)


def test_an_id_that_pads_the_embedding_table_is_never_drawn(engine: Engine, model: LlamaForCausalLM) -> None:
    with torch.inference_mode():
        assert int(model(torch.tensor([PROMPT])).logits[0].argmax(-1).max()) >= VOCABULARY
    params = [SamplingParams(temperature=2.0, seed=s, max_new_tokens=60, min_new_tokens=60) for s in range(4)]
    streams = [engine.submit(PROMPT, p) for p in [greedy(60, min_new_tokens=60), *params]]
    assert max(max(collect(stream)) for stream in streams) < VOCABULARY


def test_a_prompt_and_an_answer_fill_the_context_together(engine: Engine, model: LlamaForCausalLM) -> None:
    prompt = prompt_of(1, CONTEXT - 4)
    answer = collect(engine.submit(prompt, greedy(4, min_new_tokens=4)))
    assert (len(answer), answer[:1]) == (4, reference(model, prompt, 1))


def test_requests_beyond_the_limit_wait_and_are_served(engine: Engine) -> None:
    streams = [engine.submit(prompt_of(s, 5), greedy(30, min_new_tokens=30)) for s in range(3 * PLACES)]
    assert [len(collect(stream)) for stream in streams] == [30] * (3 * PLACES)


def test_a_cancelled_request_frees_its_place_and_does_not_affect_others(
    engine: Engine, model: LlamaForCausalLM
) -> None:
    long = greedy(CONTEXT - 10, min_new_tokens=CONTEXT - 10)
    house = [engine.submit(prompt_of(seed, 5), long) for seed in range(PLACES)]
    iterators = [iter(stream) for stream in house]
    for pieces in iterators:
        next(pieces)
    waiting = engine.submit(PROMPT, greedy(20))
    gone = engine.submit(PROMPT, greedy(20))
    gone.cancel()
    house[1].cancel()
    assert collect(waiting) == reference(model, PROMPT, ENDS_AT)  # while three others are still running
    assert (collect(gone), gone.finish_reason) == ([], "cancelled")
    assert len([token for tokens in iterators[1] for token in tokens]) < CONTEXT - 20
    for stream in house:
        stream.cancel()
    assert [len(collect(engine.submit(PROMPT, greedy(3)))) for _ in range(PLACES)] == [3] * PLACES
    assert engine.healthy


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused(llama: Llama) -> None:
    with pytest.raises(PromptTooLong, match="^E1002 PromptTooLong: .*the model's context is 512"):
        answer_of(llama, prompt="word " * 600)


def test_an_answer_ends_at_a_stop_sequence_and_does_not_include_it(llama: Llama) -> None:
    whole = answer_of(llama, prompt="Tell me", max_new_tokens=40)
    stop = whole[20:23]
    assert (
        answer_of(llama, prompt="Tell me", max_new_tokens=40, stop_sequences=stop)
        == whole[: whole.index(stop)]
    )


@pytest.mark.parametrize("llama", ["torch"], indirect=True)
def test_the_torch_engine_supports_every_temperature_of_the_api(llama: Llama) -> None:
    for temperature in (0.001, 5):
        assert answer_of(llama, prompt="Hi", temperature=temperature, max_new_tokens=5, min_new_tokens=5)


@pytest.mark.parametrize("llama", ENGINES[1:], indirect=True)
def test_vllm_refuses_temperatures_that_it_does_not_support(llama: Llama) -> None:
    for temperature in (2.5, 0.001):
        with pytest.raises(NotSupported, match=f"^E1103 NotSupported: temperature is {temperature:g}, but"):
            answer_of(llama, prompt="Hi", temperature=temperature)


@pytest.mark.parametrize("name", ENGINES)
def test_closing_the_engine_fails_its_requests_and_refuses_new_ones(folder: Path, name: str) -> None:
    llama = load(folder, name)
    engine = llama._engine
    streams = [engine.submit(PROMPT, greedy(400, min_new_tokens=400)) for _ in range(PLACES + 2)]
    next(iter(streams[0]))
    llama.close()
    assert not engine.healthy
    for stream in streams:
        with pytest.raises(EngineStopped):
            collect(stream)
    with pytest.raises(EngineStopped, match="^E2002 "):
        engine.submit(PROMPT, greedy(1))
