"""From logits to tokens, for a whole batch, with every parameter per request.

The rules are functions over [B, V] logits with one parameter a row, applied in the order of the API:
repetition, frequency, presence, minimum tokens, temperature, top_k, top_p. `Sampler` keeps their
parameters by slot. A seeded request's noise depends on its seed and its own position alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from llama.sampling import SamplingParams

_UNUSABLE = -1  # in place of a token, where a row of logits is not finite
# float32 cannot hold every number that a caller may send; beyond these a rule has done all it can
_COLDEST = 1e-6
_PENALTY_RANGE = (1e-6, 1e6)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide what is positive and multiply what is negative, for tokens of prompt and answer
    (`seen` [B, V] bool). Source: CTRL, arXiv:1909.05858, as in transformers."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_counts(logits: Tensor, counts: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    """Subtract `frequency` for each time a token is in the answer (`counts` [B, V]) and `presence`
    once when it is there at all."""
    return logits - counts * frequency[:, None] - (counts > 0) * presence[:, None]


def keep_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """Mask all but the k best (and what equals the k-th); below 1 is off."""
    ordered = logits.sort(dim=-1, descending=True).values
    size = logits.shape[-1]
    k = torch.where(top_k < 1, size, top_k.clamp(max=size))
    return logits.masked_fill(logits < ordered.gather(-1, k[:, None] - 1), float("-inf"))


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Mask the tail that holds at most 1 - p of the probability; the best token always stays."""
    ordered, order = logits.sort(dim=-1, descending=False)
    drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p[:, None]
    drop[:, -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter_(-1, order, drop), float("-inf"))


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniform` [B], each in [0, 1).

    In float64: a sum over tens of thousands of float32 terms would move with the order of adding.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


class Sampler:
    """Sampling parameters and token counts of the requests in `slots` slots."""

    def __init__(
        self, slots: int, vocabulary: int, eos_token_ids: Collection[int], device: torch.device
    ) -> None:
        self._device = device
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self._seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        self._counts = torch.zeros(slots, vocabulary, dtype=torch.int32, device=device)
        self._params: dict[int, SamplingParams] = {}
        self._uniforms: dict[int, np.ndarray] = {}

    def add(self, slot: int, prompt: Tensor, params: SamplingParams) -> None:
        """Start a request in a slot: `prompt` [N] counts for the repetition penalty."""
        self._params[slot] = params
        self._seen[slot].zero_().index_fill_(0, prompt, True)
        self._counts[slot].zero_()
        if not params.greedy:
            assert params.seed is not None  # drawn where the request was read
            # One number a position from a counter-based generator, keyed by the seed alone.
            generator = np.random.Generator(np.random.Philox(key=params.seed % 2**128))
            self._uniforms[slot] = generator.random(params.maximum)

    def remove(self, slot: int) -> None:
        """Forget a request."""
        del self._params[slot]
        self._uniforms.pop(slot, None)

    @torch.inference_mode()
    def sample(self, logits: Tensor, slots: list[int], generated: list[int]) -> list[int]:
        """The next token of each request, or a negative number where its logits are not finite.

        `logits` [B, V] float32; `generated` is how many tokens each answer has so far.
        """
        params = [self._params[slot] for slot in slots]
        rows = torch.tensor(slots, dtype=torch.long, device=self._device)
        usable = logits.isfinite().all(dim=-1)
        logits = self._penalized(logits, rows, params)
        logits = self._without_early_eos(logits, params, generated)

        tokens = logits.argmax(dim=-1)
        if drawn := [row for row, p in enumerate(params) if not p.greedy]:
            index = torch.tensor(drawn, dtype=torch.long, device=self._device)
            tokens[index] = self._drawn(
                logits[index],
                [params[row] for row in drawn],
                [self._uniforms[slots[row]][generated[row]] for row in drawn],
            )
        self._seen[rows, tokens] = True
        self._counts[rows, tokens] += 1
        return torch.where(usable, tokens, _UNUSABLE).tolist()

    def _penalized(self, logits: Tensor, rows: Tensor, params: list[SamplingParams]) -> Tensor:
        if any(p.repetition_penalty not in (0, 1) for p in params):
            penalty = self._column([p.repetition_penalty or 1.0 for p in params]).clamp_(*_PENALTY_RANGE)
            logits = penalize_repetition(logits, self._seen[rows], penalty)
        if any(p.frequency_penalty or p.presence_penalty for p in params):
            frequency = self._column([p.frequency_penalty for p in params])
            presence = self._column([p.presence_penalty for p in params])
            logits = penalize_counts(logits, self._counts[rows], frequency, presence)
        return logits

    def _without_early_eos(
        self, logits: Tensor, params: list[SamplingParams], generated: list[int]
    ) -> Tensor:
        early = [row for row, (p, n) in enumerate(zip(params, generated, strict=True)) if n < p.minimum]
        if not early:
            return logits
        index = torch.tensor(early, dtype=torch.long, device=self._device)
        return logits.index_put((index[:, None], self._eos[None]), logits.new_tensor(float("-inf")))

    def _drawn(self, logits: Tensor, params: list[SamplingParams], uniform: list[float]) -> Tensor:
        logits = logits / self._column([max(p.temperature, _COLDEST) for p in params])[:, None]
        if any(p.top_k > 0 for p in params):
            top_k = [min(p.top_k, logits.shape[-1]) for p in params]
            logits = keep_top_k(logits, self._column(top_k, torch.long))
        if any(p.top_p < 1 for p in params):
            logits = keep_top_p(logits, self._column([p.top_p for p in params]))
        return draw(logits, self._column(uniform, torch.float64))

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)
