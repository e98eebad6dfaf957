"""A batch that the tests step: every request gets the answer that it would get alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from batches import (
    EOS,
    LENGTH,
    POISON_TOKEN,
    Computing,
    add,
    answers_of,
    batch_of,
    collect,
    compiled_kernels,
    finish,
    generate,
    greedy,
    prompt_of,
    running,
)
from transformers import LlamaForCausalLM

from llama.errors import GenerationFailed
from llama.model.placement import Placement
from llama.sampling_params import SamplingParams
from llama.torch_engine.batch import Batch
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import take_apart
from llama.torch_engine.prompt_share import PromptShare
from llama.torch_engine.scheduler import RequestState


def test_every_answer_of_a_mixed_batch_equals_that_of_generate(
    model: LlamaForCausalLM, computing: Computing
) -> None:
    lengths = (1, 5, 40, 127, 128, 129, 260, 300, 17, 63, 64, 2)  # more requests than rows
    requests = [(prompt_of(i, length), greedy(20 + 5 * i)) for i, length in enumerate(lengths)]
    expected = [generate(model, prompt, params.maximum) for prompt, params in requests]
    assert answers_of(batch_of(model, rows=5, computing=computing), *requests) == expected
    with running(model, rows=5, computing=computing) as engine:
        streams = [engine.submit(*request) for request in requests]
        assert [collect(stream) for stream in streams] == expected


def test_requests_that_join_a_running_batch_do_not_change_its_answers(
    model: LlamaForCausalLM, computing: Computing
) -> None:
    batch = batch_of(model, computing=computing)
    first = add(batch, prompt_of(1, 30), greedy(120))
    for _ in range(3):
        batch.step()
    others = [add(batch, prompt_of(seed, 50), greedy(10)) for seed in (2, 3)]
    finish(batch)
    assert collect(first.stream) == generate(model, prompt_of(1, 30), 120)
    tails = [collect(other.stream) for other in others]
    assert tails == [generate(model, prompt_of(seed, 50), 10) for seed in (2, 3)]


def test_a_request_passes_through_its_states_one_step_at_a_time(model: LlamaForCausalLM) -> None:
    batch = batch_of(model, rows=1)
    long, next_one = (add(batch, prompt_of(seed, 500), greedy(3)) for seed in (1, 2))
    states = []
    while not batch.idle:
        states.append((long.state.name, next_one.state.name, batch.running, batch.waiting))
        batch.step()
    # A prompt of 501 tokens fits in one step, which also decodes the second token.
    assert states == [
        ("WAITING", "WAITING", 0, 2),
        ("DECODING", "WAITING", 1, 1),
        ("ENDED", "WAITING", 0, 1),
        ("ENDED", "DECODING", 1, 0),
    ]
    assert (long.state, next_one.state, batch.generated) == (RequestState.ENDED, RequestState.ENDED, 6)


class FixedShare(PromptShare):
    """A share that does not depend on how fast the machine is."""

    def tokens(self, decoding: bool, unread: int) -> int:
        return self._most


def test_a_long_prompt_is_read_in_several_steps_while_other_requests_decode(model: LlamaForCausalLM) -> None:
    batch = batch_of(model, rows=2)
    batch._share = FixedShare(most=40)
    first = add(batch, prompt_of(1, 5), greedy(100))
    batch.step()
    long = add(batch, prompt_of(2, 400), greedy(5))
    steps, before = 0, first.generated
    while long.state in (RequestState.WAITING, RequestState.READING):
        batch.step()
        steps += 1
    assert steps == 11  # for 401 tokens
    assert first.generated == before + steps
    finish(batch)
    assert collect(long.stream) == generate(model, prompt_of(2, 400), 5)
    assert collect(first.stream) == generate(model, prompt_of(1, 5), 100)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_equals_that_of_generate(model: LlamaForCausalLM, penalty: float) -> None:
    prompt = prompt_of(4, 30)
    (answer,) = answers_of(batch_of(model), (prompt, greedy(40, repetition_penalty=penalty)))
    assert answer == generate(model, prompt, 40, repetition_penalty=penalty)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(model: LlamaForCausalLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=42, max_new_tokens=60)
    prompt, batch = prompt_of(9, 20), batch_of(model, rows=8)
    (alone,) = answers_of(batch, (prompt, params))
    noise = [
        add(batch, prompt_of(seed, 10 + seed), SamplingParams(temperature=1.5, seed=seed, max_new_tokens=50))
        for seed in range(31)
    ]
    among = add(batch, prompt, params)
    batch.step()
    noise[3].stream.cancel()
    finish(batch)
    assert collect(among.stream) == alone
    assert answers_of(batch, (prompt, params.model_copy(update={"seed": 43}))) != [alone]


def test_an_answer_ends_at_eos_and_does_not_include_it(model: LlamaForCausalLM) -> None:
    prompt = prompt_of(5, 12)
    answer = generate(model, prompt, 30)
    eos = answer[10]
    batch = batch_of(model, eos=(eos,))
    request = add(batch, prompt, greedy(30))
    finish(batch)
    assert collect(request.stream) == answer[: answer.index(eos)]
    assert request.stream.finish_reason == "stop"


def test_eos_does_not_end_an_answer_before_its_minimum(model: LlamaForCausalLM) -> None:
    prompt = prompt_of(5, 12)
    eos = generate(model, prompt, 30)[4]
    (answer,) = answers_of(batch_of(model, eos=(eos,)), (prompt, greedy(30, min_new_tokens=25)))
    assert len(answer) >= 25
    assert eos not in answer[:25]


def test_an_answer_of_maximum_length_finishes_with_length(model: LlamaForCausalLM) -> None:
    batch = batch_of(model)
    request = add(batch, prompt_of(5, 12), greedy(7))
    finish(batch)
    assert len(collect(request.stream)) == 7
    assert request.stream.finish_reason == "length"


def test_a_prompt_and_an_answer_can_fill_the_context_together(
    model: LlamaForCausalLM, computing: Computing
) -> None:
    batch = batch_of(model, computing=computing)
    full = greedy(LENGTH - 1, min_new_tokens=LENGTH - 1)
    answers = answers_of(batch, (prompt_of(1, LENGTH - 2), greedy(1)), ([1], full))
    assert [len(answer) for answer in answers] == [1, LENGTH - 1]


def test_requests_beyond_the_rows_are_queued_and_served_in_order(model: LlamaForCausalLM) -> None:
    batch = batch_of(model, rows=1)
    requests = [add(batch, prompt_of(i, 5), greedy(20)) for i in range(6)]
    finished: list[int] = []
    while not batch.idle:
        batch.step()
        ended = [i for i, request in enumerate(requests) if request.state is RequestState.ENDED]
        finished += [i for i in ended if i not in finished]
    assert finished == [0, 1, 2, 3, 4, 5]


def test_a_cancelled_request_leaves_the_batch_and_the_others_continue(
    model: LlamaForCausalLM, computing: Computing
) -> None:
    batch = batch_of(model, rows=2, computing=computing)
    leaving, staying = add(batch, prompt_of(1, 5), greedy(400)), add(batch, prompt_of(2, 5), greedy(60))
    for _ in range(5):
        batch.step()
    leaving.stream.cancel()
    assert batch.running == 2
    batch.step()
    assert (batch.running, leaving.state) == (1, RequestState.ENDED)
    assert len(collect(leaving.stream)) < 10
    assert leaving.stream.finish_reason == "cancelled"
    finish(batch)
    assert collect(staying.stream) == generate(model, prompt_of(2, 5), 60)


def test_a_request_cancelled_while_it_waits_never_runs(model: LlamaForCausalLM) -> None:
    batch = batch_of(model, rows=1)
    first, waiting = (add(batch, prompt_of(i, 5), greedy(100)) for i in (1, 2))
    waiting.stream.cancel()
    finish(batch)
    assert collect(waiting.stream) == []
    assert (waiting.stream.finish_reason, waiting.state) == ("cancelled", RequestState.ENDED)
    assert collect(first.stream) == generate(model, prompt_of(1, 5), 100)


def test_preparing_a_gpu_does_not_change_later_answers(model: LlamaForCausalLM, computing: Computing) -> None:
    batch, params = batch_of(model, rows=3, computing=computing), SamplingParams(seed=4, max_new_tokens=9)
    requests = [(prompt_of(1, 30), greedy(20)), (prompt_of(2, 9), params)]
    expected = answers_of(batch_of(model, rows=3, computing=computing), *requests)
    batch.prepare_gpu(graphs=False)
    assert answers_of(batch, *requests) == expected


def test_preparing_a_gpu_leaves_no_numbers_that_are_not_finite(
    model: LlamaForCausalLM, computing: Computing
) -> None:
    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight[0] = float("inf")
    batch = batch_of(broken, rows=3, computing=computing)
    batch.prepare_gpu(graphs=False)
    requests = [(prompt_of(seed, 30), greedy(9)) for seed in range(5)]
    assert answers_of(batch, *requests) == answers_of(batch_of(model, rows=3, computing=computing), *requests)


def test_a_prompt_that_is_not_finite_does_not_reach_a_later_request_in_another_row(
    model: LlamaForCausalLM, computing: Computing
) -> None:
    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight[POISON_TOKEN] = float("nan")
    batch = batch_of(broken, rows=3, computing=computing, prefix_reuse=False)
    batch._share = FixedShare(most=40)
    first, second = (add(batch, [POISON_TOKEN, *prompt_of(seed, 60)], greedy(3)) for seed in (2, 3))
    finish(batch)
    clean = [(prompt_of(seed, length), greedy(9)) for seed, length in ((4, 100), (5, 1), (6, 1))]
    assert answers_of(batch, *clean) == [generate(model, prompt, 9) for prompt, _ in clean]
    for request in (first, second):
        with pytest.raises(GenerationFailed):
            collect(request.stream)


def test_many_short_requests_lose_no_row(model: LlamaForCausalLM) -> None:
    batch = batch_of(model, rows=3)
    for round_ in range(30):
        requests = [add(batch, prompt_of(i, 3 + i), greedy(3)) for i in range(5)]
        batch.step()
        requests[round_ % 5].stream.cancel()
        finish(batch)
        assert {request.state for request in requests} == {RequestState.ENDED}
    answers = answers_of(batch, *[(prompt_of(i, 4), greedy(3)) for i in range(3)])
    assert answers == [generate(model, prompt_of(i, 4), 3) for i in range(3)]


def test_prefix_reuse_on_and_off_give_the_same_tokens(model: LlamaForCausalLM, computing: Computing) -> None:
    """A dialogue of five turns, concurrent requests with a common prefix, and a sampled next turn."""
    system = prompt_of(1, 60)
    answers: dict[bool, list[list[int]]] = {}
    for reuse in (True, False):
        given: list[list[int]] = []
        batch, history = batch_of(model, rows=4, prefix_reuse=reuse, computing=computing), system
        for turn in range(5):
            history = history + prompt_of(10 + turn, 12)
            given += answers_of(batch, (history, greedy(15)))
            history = history + given[-1]
        together = [(system + prompt_of(30 + i, 20), greedy(10 + i)) for i in range(9)]
        given += answers_of(batch, *together)
        params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_new_tokens=30)
        given += answers_of(batch, (history + prompt_of(50, 5), params))
        answers[reuse] = given
    assert answers[True] == answers[False]
    assert answers[True][0] == generate(model, system + prompt_of(10, 12), 15)


def test_requests_that_move_leave_and_share_prefixes_get_the_answers_of_generate(
    model: LlamaForCausalLM, computing: Computing
) -> None:
    shared, batch = prompt_of(1, 40), batch_of(model, rows=5, computing=computing)
    requests = []
    for index in range(24):
        prompt = (shared if index % 2 else []) + prompt_of(index, 3 + 11 * (index % 7))
        requests.append(add(batch, prompt, greedy(4 + 5 * (index % 4))))
        batch.step()
        if index % 6 == 5:
            requests[index - 2].stream.cancel()
    finish(batch)
    ends = []
    for request in requests:
        answer = generate(model, request.tokens[: request.prompt_length], request.params.maximum)
        tokens = collect(request.stream)
        ends.append(request.stream.finish_reason)
        assert tokens == (answer[: len(tokens)] if ends[-1] == "cancelled" else answer)
    assert ends.count("length") >= 20
    assert "cancelled" in ends


class CountedEmbedding(torch.nn.Module):
    """Token embeddings that count the tokens that they embed."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.count = inner, 0

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.count += len(token_ids)
        output: torch.Tensor = self.inner(token_ids)
        return output


@pytest.mark.parametrize("reuse", [True, False])
def test_the_next_turn_of_a_dialogue_reads_only_its_new_tokens(model: LlamaForCausalLM, reuse: bool) -> None:
    counted = copy.deepcopy(model)
    embedding = CountedEmbedding(counted.model.embed_tokens)
    first = prompt_of(1, 300)
    placement = Placement(model.device, model.dtype, "none", LENGTH)
    parts = replace(take_apart(counted, placement), embedding=embedding)
    cache = KVCache.for_placement(model.config, CacheShape(2, LENGTH), placement)
    batch = Batch(
        parts,
        cache,
        vocabulary=model.config.vocab_size,
        eos_token_ids=[EOS],
        prefix_reuse=reuse,
        kernels=compiled_kernels(torch.float32, torch.float32),
    )
    (answer,) = answers_of(batch, (first, greedy(20)))
    following = first + answer + prompt_of(2, 30)
    before = embedding.count
    assert answers_of(batch, (following, greedy(20))) == [generate(model, following, 20)]
    # The model never reads the last token of an answer, neither of the first answer nor of the second.
    new = len(following) - (len(first) + len(answer) - 1 if reuse else 0)
    assert embedding.count - before == new + 19
