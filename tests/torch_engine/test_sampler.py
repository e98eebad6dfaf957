"""The sampler's rules, compared with the logits processors of transformers and with simple references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama.sampling_params import SamplingParams
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.rows import Rows
from llama.torch_engine.sampler import (
    NOT_FINITE,
    Sampler,
    draw,
    keep_top_k,
    keep_top_p,
    penalize_counts,
    penalize_repetition,
)

VOCABULARY, EOS = 50, 2
CPU = torch.device("cpu")


def random_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


class FilledSampler:
    """A sampler with a request in every row. Its cache has no layers."""

    def __init__(self, params: list[SamplingParams], prompts: list[list[int]], vocabulary: int) -> None:
        shape = CacheShape(len(params), 64)
        self.rows = Rows(KVCache(LlamaConfig(num_hidden_layers=0), shape, torch.float32, CPU))
        self.params, self._sampler = params, Sampler(self.rows, vocabulary, [EOS])
        for row, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
            self._sampler.add(row, torch.tensor(prompt), p)

    def sample(self, logits: torch.Tensor) -> list[int]:
        return self._sampler.sample(logits, 0, self.params).tolist()


def sampler_with(
    params: list[SamplingParams], prompts: list[list[int]] | None = None, vocabulary: int = VOCABULARY
) -> FilledSampler:
    return FilledSampler(params, prompts or [[1]] * len(params), vocabulary)


def top_k_of(logits: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Apply `keep_top_k` to logits that are not sorted, as the processor of transformers does."""
    ordered, order = logits.sort(dim=-1, descending=True)
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, keep_top_k(ordered, top_k))
    return logits.masked_fill(~keep, float("-inf"))


def top_p_of(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, keep_top_p(probabilities, top_p))
    return logits.masked_fill(~keep, float("-inf"))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 2.0])
def test_the_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    logits, seen_ids = random_logits(4), torch.randint(0, VOCABULARY, (4, 9))
    seen = torch.zeros(4, VOCABULARY, dtype=torch.bool).scatter_(1, seen_ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen_ids, logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, seen, torch.full((4,), penalty)), expected)


@pytest.mark.parametrize("top_k", [1, 3, 49, 50])
def test_top_k_equals_that_of_transformers(top_k: int) -> None:
    logits = random_logits(4)
    logits[0, :5] = 1.25  # logits equal to the k-th are kept
    expected = TopKLogitsWarper(top_k)(None, logits.clone())
    torch.testing.assert_close(top_k_of(logits, torch.full((4,), top_k)), expected)


@pytest.mark.parametrize("off", [0, -1])
def test_a_top_k_below_one_is_off(off: int) -> None:
    logits = random_logits(2)
    assert torch.equal(top_k_of(logits, torch.tensor([off, off])), logits)


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_equals_that_of_transformers(top_p: float) -> None:
    logits = random_logits(4)
    expected = TopPLogitsWarper(top_p)(None, logits.clone())
    torch.testing.assert_close(top_p_of(logits, torch.full((4,), top_p)), expected)


def test_each_row_has_its_own_top_k_and_top_p() -> None:
    logits = random_logits(3)
    kept = top_k_of(logits, torch.tensor([1, 0, 7]))
    assert [int(row.isfinite().sum()) for row in kept] == [1, VOCABULARY, 7]
    alone = [top_p_of(logits[i : i + 1], torch.tensor([p])) for i, p in enumerate((0.2, 1.0, 0.7))]
    assert torch.equal(top_p_of(logits, torch.tensor([0.2, 1.0, 0.7])), torch.cat(alone))


def test_frequency_counts_each_time_and_presence_counts_once() -> None:
    logits = torch.zeros(1, VOCABULARY)
    counts = torch.zeros(1, VOCABULARY, dtype=torch.int32)
    counts[0, 7], counts[0, 8] = 3, 1
    result = penalize_counts(logits, counts, torch.tensor([0.5]), torch.tensor([0.25]))[0]
    assert result[7:10].tolist() == [-(3 * 0.5 + 0.25), -(0.5 + 0.25), 0]


def test_draw_follows_the_distribution_and_never_draws_a_token_of_weight_zero() -> None:
    weights = torch.tensor([[0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    uniform = torch.arange(0, 1, 1 / 1000, dtype=torch.float64)
    counts = torch.bincount(draw(weights.expand(1000, -1), uniform), minlength=4)
    assert counts.tolist() == [250, 0, 750, 0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("weight", [1.0, 0.1, 1 / 3, 1e-9, 0.7 + 2**-52])
def test_draw_returns_a_valid_index_at_the_ends_of_the_interval(uniform: float, weight: float) -> None:
    weights = torch.tensor([[0.0, 0.0, weight, 0.0]], dtype=torch.float64)
    assert draw(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [2]


def test_eos_is_masked_before_the_minimum_as_in_transformers() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[:, EOS] = 9
    params = SamplingParams(temperature=0.0, min_new_tokens=3, max_new_tokens=9)
    sampler = sampler_with([params])
    steps = [sampler.sample(logits) for _ in range(4)]
    masked = MinNewTokensLengthLogitsProcessor(1, 3, EOS)(torch.zeros(1, 3, dtype=torch.long), logits.clone())
    assert steps == [[int(masked.argmax())]] * 3 + [[EOS]]


CHAINS = [
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.3},
    {"temperature": 0.6, "presence_penalty": 1.5, "frequency_penalty": -0.5, "repetition_penalty": 0.8},
    {"temperature": 5.0, "top_p": 1.0, "min_new_tokens": 4},
    {"temperature": 0.0, "repetition_penalty": 1.7, "frequency_penalty": 0.3},
]


def reference_tokens(rows: list[torch.Tensor], prompt: list[int], p: SamplingParams) -> list[int]:
    """Apply all rules to one request, in the order of the API. Use the rules of transformers if it has them."""
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


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 3000])  # shorter than the shortlist, and longer
def test_every_request_of_a_mixed_batch_gets_the_tokens_of_the_reference(vocabulary: int) -> None:
    params = [SamplingParams(seed=seed, max_new_tokens=12, **chain) for seed, chain in enumerate(CHAINS)]
    prompts = [[1, 5 + row, 9, 9] for row in range(len(params))]
    sampler = sampler_with(params, prompts, vocabulary)
    steps = [random_logits(len(params), seed, vocabulary) for seed in range(12)]
    sampled = [sampler.sample(logits) for logits in steps]
    for row, p in enumerate(params):
        expected = reference_tokens([logits[row] for logits in steps], prompts[row], p)
        assert [tokens[row] for tokens in sampled] == expected


@pytest.mark.parametrize("chain", [*CHAINS, {"temperature": 2.0, "top_k": 1000, "top_p": 0.999}])
def test_a_request_alone_gets_the_tokens_of_the_reference(chain: dict[str, float]) -> None:
    """With a single request, the sampler can skip other rules than in a mixed batch."""
    p = SamplingParams(seed=3, max_new_tokens=20, **chain)
    steps = [random_logits(1, seed, 3000) for seed in range(20)]
    sampler = sampler_with([p], [[1, 7]], 3000)
    sampled = [sampler.sample(logits)[0] for logits in steps]
    assert sampled == reference_tokens([logits[0] for logits in steps], [1, 7], p)


@pytest.mark.parametrize("flat", [0.0, 1e-3])
@pytest.mark.parametrize(
    "chain", [{"top_k": 256}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 255, "top_p": 0.5}]
)
def test_tokens_outside_of_the_shortlist_can_be_drawn(chain: dict[str, float], flat: float) -> None:
    """All logits are equal, or nearly so, so that top_k and top_p keep more tokens than the shortlist has."""
    p = SamplingParams(temperature=1.0, seed=1, max_new_tokens=40, **chain)
    steps = [random_logits(1, seed, 3000) * flat for seed in range(40)]
    sampler = sampler_with([p], [[1]], 3000)
    sampled = [sampler.sample(logits)[0] for logits in steps]
    if flat:  # otherwise, it is not defined which of the equal tokens top_p keeps
        assert sampled == reference_tokens([logits[0] for logits in steps], [1], p)
    elif "top_p" not in chain:
        assert max(sampled) > 2000 > 1000 > min(sampled)


def test_a_request_that_moves_to_another_row_gets_the_same_tokens() -> None:
    params = [SamplingParams(seed=seed, max_new_tokens=12, **chain) for seed, chain in enumerate(CHAINS[:4])]
    steps = [random_logits(4, seed) for seed in range(12)]
    sampler = sampler_with(params, [[1, 7]] * 4)
    tokens = [sampler.sample(logits)[3] for logits in steps[:6]]
    sampler.rows.move(3, 1, 0)
    sampler.rows.vacate(3)
    sampler.params = [params[0], params[3]]
    tokens += [sampler.sample(logits[[0, 3]])[1] for logits in steps[6:]]
    assert tokens == reference_tokens([logits[3] for logits in steps], [1, 7], params[3])


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
    (token,) = sampler_with([params]).sample(random_logits(1))
    assert 0 <= token < VOCABULARY


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_reported_and_does_not_affect_other_rows(poison: float) -> None:
    logits = random_logits(2)
    logits[0, 3] = poison
    params = SamplingParams(temperature=0.8, seed=1, max_new_tokens=4)
    bad, good = sampler_with([params, params]).sample(logits)
    assert bad == NOT_FINITE
    assert [good] == sampler_with([params]).sample(logits[1:])
