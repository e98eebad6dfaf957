"""The sampler's rules against transformers' own processors and against plain references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama.sampling import SamplingParams
from llama.torch_engine.sampler import (
    Sampler,
    draw,
    keep_top_k,
    keep_top_p,
    penalize_counts,
    penalize_repetition,
)

VOCABULARY, EOS = 50, 2
CPU = torch.device("cpu")


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def sampler_with(params: list[SamplingParams], prompts: list[list[int]] | None = None) -> Sampler:
    sampler = Sampler(len(params), VOCABULARY, [EOS], CPU)
    for slot, p in enumerate(params):
        sampler.add(slot, torch.tensor((prompts or [[1]] * len(params))[slot]), p)
    return sampler


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, seen_ids = random_logits(4), torch.randint(0, VOCABULARY, (4, 9))
    seen = torch.zeros(4, VOCABULARY, dtype=torch.bool).scatter_(1, seen_ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen_ids, logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, seen, torch.full((4,), penalty)), expected)


@pytest.mark.parametrize("top_k", [1, 3, 49, 50])
def test_top_k_is_that_of_transformers(top_k: int) -> None:
    logits = random_logits(4)
    logits[0, :5] = 1.25  # what equals the k-th stays
    expected = TopKLogitsWarper(top_k)(None, logits.clone())
    torch.testing.assert_close(keep_top_k(logits, torch.full((4,), top_k)), expected)


@pytest.mark.parametrize("off", [0, -1])
def test_a_top_k_below_one_is_off(off: int) -> None:
    logits = random_logits(2)
    assert torch.equal(keep_top_k(logits, torch.tensor([off, off])), logits)


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_is_that_of_transformers(top_p: float) -> None:
    logits = random_logits(4)
    expected = TopPLogitsWarper(top_p)(None, logits.clone())
    torch.testing.assert_close(keep_top_p(logits, torch.full((4,), top_p)), expected)


def test_each_row_has_its_own_top_k_and_top_p() -> None:
    logits = random_logits(3)
    kept = keep_top_k(logits, torch.tensor([1, 0, 7]))
    assert [int(row.isfinite().sum()) for row in kept] == [1, VOCABULARY, 7]
    alone = [keep_top_p(logits[i : i + 1], torch.tensor([p])) for i, p in enumerate((0.2, 1.0, 0.7))]
    assert torch.equal(keep_top_p(logits, torch.tensor([0.2, 1.0, 0.7])), torch.cat(alone))


def test_frequency_counts_each_time_and_presence_counts_once() -> None:
    logits = torch.zeros(1, VOCABULARY)
    counts = torch.zeros(1, VOCABULARY, dtype=torch.int32)
    counts[0, 7], counts[0, 8] = 3, 1
    result = penalize_counts(logits, counts, torch.tensor([0.5]), torch.tensor([0.25]))[0]
    assert (result[7], result[8], result[9]) == (-(3 * 0.5 + 0.25), -(0.5 + 0.25), 0)


def test_draw_follows_the_distribution_and_never_takes_what_is_masked() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0, float("-inf")]])
    uniform = torch.arange(0, 1, 1 / 1000, dtype=torch.float64)
    tokens = draw(logits.expand(1000, -1), uniform)
    counts = torch.bincount(tokens, minlength=4)
    assert counts[1] == counts[3] == 0
    assert abs(int(counts[2]) / 1000 - logits.softmax(-1)[0, 2]) < 0.002


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_draw_stays_inside_at_the_ends_of_the_interval(uniform: float) -> None:
    logits = torch.full((1, 4), float("-inf"))
    logits[0, 2] = 0.0
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [2]


def test_eos_is_masked_before_the_minimum_as_in_transformers() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, EOS] = 9
    params = SamplingParams(temperature=0.0, min_new_tokens=3, max_new_tokens=9)
    tokens = sampler_with([params, params]).sample(logits, [0, 1], [2, 3])
    masked = MinNewTokensLengthLogitsProcessor(1, 3, EOS)(
        torch.zeros(1, 3, dtype=torch.long), logits[:1].clone()
    )
    assert tokens == [int(masked.argmax()), EOS]


CHAINS = [
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.3},
    {"temperature": 0.6, "presence_penalty": 1.5, "frequency_penalty": -0.5, "repetition_penalty": 0.8},
    {"temperature": 5.0, "top_p": 1.0, "min_new_tokens": 4},
    {"temperature": 0.0, "repetition_penalty": 1.7, "frequency_penalty": 0.3},
]


def reference_tokens(rows: list[torch.Tensor], prompt: list[int], p: SamplingParams) -> list[int]:
    """The whole chain for one request, in the API's order, with transformers' parts where it has them."""
    uniforms = np.random.Generator(np.random.Philox(key=p.seed or 0)).random(len(rows))
    answer: list[int] = []
    for position, row in enumerate(rows):
        seen = torch.tensor([prompt + answer])
        logits = RepetitionPenaltyLogitsProcessor(float(p.repetition_penalty))(seen, row[None].clone())
        for token in set(answer):
            logits[0, token] -= p.frequency_penalty * answer.count(token) + p.presence_penalty
        if position < p.minimum:
            logits[0, EOS] = float("-inf")
        if p.temperature == 0:
            answer.append(int(logits.argmax()))
            continue
        logits = TemperatureLogitsWarper(float(p.temperature))(None, logits)
        logits = TopKLogitsWarper(p.top_k)(None, logits) if p.top_k else logits
        logits = TopPLogitsWarper(float(p.top_p))(None, logits) if p.top_p < 1 else logits
        cumulative = np.cumsum(logits[0].double().softmax(-1).numpy())
        answer.append(int(np.searchsorted(cumulative, uniforms[position] * cumulative[-1], side="right")))
    return answer


def test_the_whole_chain_is_the_plain_reference_for_every_request_of_a_mixed_batch() -> None:
    params = [SamplingParams(seed=seed, max_new_tokens=12, **chain) for seed, chain in enumerate(CHAINS)]
    prompts = [[1, 5 + slot, 9, 9] for slot in range(len(params))]
    sampler = sampler_with(params, prompts)
    steps = [random_logits(len(params), seed) for seed in range(12)]
    slots = list(range(len(params)))
    sampled = [sampler.sample(logits, slots, [step] * len(slots)) for step, logits in enumerate(steps)]
    for slot, p in enumerate(params):
        expected = reference_tokens([logits[slot] for logits in steps], prompts[slot], p)
        assert [tokens[slot] for tokens in sampled] == expected


@pytest.mark.parametrize(
    "chain",
    [
        {"temperature": 1e-300},
        {"temperature": 1.0, "top_k": 10**20},
        {"temperature": 1.0, "repetition_penalty": 1e300},
        {"temperature": 1.0, "repetition_penalty": 1e-300},
        {"temperature": 1.0, "seed": -1},
        {"temperature": 1.0, "seed": 2**200},
    ],
)
def test_numbers_beyond_float32_and_int64_still_give_a_token(chain: dict[str, float]) -> None:
    params = SamplingParams(**{"seed": 0, "max_new_tokens": 4, **chain})
    (token,) = sampler_with([params]).sample(random_logits(1), [0], [0])
    assert 0 <= token < VOCABULARY


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_told_apart_and_its_neighbour_is_not_touched(poison: float) -> None:
    logits = random_logits(2)
    logits[0, 3] = poison
    params = SamplingParams(temperature=0.8, seed=1, max_new_tokens=4)
    bad, good = sampler_with([params, params]).sample(logits, [0, 1], [0, 0])
    assert bad < 0
    assert [good] == sampler_with([params]).sample(logits[1:], [0], [0])
