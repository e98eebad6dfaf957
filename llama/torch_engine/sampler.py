"""Sample the next tokens of a batch from logits, on the model's device. Every request has its own parameters.

The rules are functions with one parameter per row. They are applied in this order: repetition,
frequency, presence, minimum tokens, temperature, top_k, top_p. `Sampler` keeps the parameters of each row in
tensors, so that a step needs nothing from the host. The noise of a seeded request depends only on its seed
and on the token's position in the answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from llama.sampling_params import SamplingParams
from llama.torch_engine.rows import Rows

NOT_FINITE = -1
"""Returned in place of a token if a row of logits is not finite."""

# On a CPU, only the best logits are sorted at first: sorting all 32,000 takes longer than the rest of
# sampling.
_SHORTLIST = 256
_EVERY_RULE = SamplingParams(
    repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1, min_new_tokens=1, top_k=50, top_p=0.9
)
# A lower temperature is raised to this one: a caller may send a number that float32 cannot represent, and
# sampling at this temperature is practically greedy already.
_COLDEST = 1e-6


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive logits by the penalty, and multiply negative logits by it, for tokens that were seen.

    `seen` [B, V] bool marks the tokens of prompt and answer. Source: CTRL, arXiv:1909.05858, as in
    transformers.
    """
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_counts(logits: Tensor, counts: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    """Subtract `frequency` for each occurrence of a token in the answer, and `presence` once if it occurs.

    `counts` [B, V] has the number of occurrences.
    """
    return logits - counts * frequency[:, None] - (counts > 0) * presence[:, None]


def keep_top_k(ordered: Tensor, top_k: Tensor) -> Tensor:
    """Return which logits are among the k best or equal to the k-th best, [B, S] bool.

    `ordered` [B, S] is sorted, best first. If k is below 1, all are kept.
    """
    size = ordered.shape[-1]
    k = torch.where(top_k < 1, size, top_k.clamp(max=size))
    return ordered >= ordered.gather(-1, k[:, None] - 1)


def keep_top_p(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Return, for each token, whether the probabilities before it sum to less than p, [B, S] bool.

    `probabilities` [B, S] are sorted, highest first. The first token is always kept. If p is 1 or more, all
    are kept.
    """
    before = probabilities.cumsum(dim=-1) - probabilities
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    keep[:, 0] = True
    return keep


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the index at which the cumulative sum of `weights` [B, S] exceeds `uniform` [B] times the total.

    Both are float64: a sum of tens of thousands of float32 terms would depend on the order of addition.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    below = torch.nextafter(
        total, torch.zeros_like(total)
    )  # the product on the next line may round up to the total
    index = torch.searchsorted(cumulative, torch.minimum(uniform[:, None] * total, below), right=True)
    return index[:, 0].clamp(max=weights.shape[-1] - 1)  # needed if weights are not finite


class Sampler:
    """The sampling parameters, token counts and noise of the requests in a batch, by row."""

    def __init__(self, rows: Rows, vocabulary: int, eos_token_ids: Collection[int]) -> None:
        device = rows.cache.device
        self._shortlist = _SHORTLIST if device.type == "cpu" else vocabulary
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self._greedy = rows.tensor(dtype=torch.bool)
        self._repetition, self._frequency, self._presence = rows.tensor(fill=1), rows.tensor(), rows.tensor()
        self._minimum, self._generated = rows.tensor(dtype=torch.long), rows.tensor(dtype=torch.long)
        self._temperature, self._top_p = rows.tensor(fill=1), rows.tensor()
        self._top_k = rows.tensor(dtype=torch.long)
        self._uniforms = rows.tensor(rows.cache.shape.length, dtype=torch.float64)
        self._seen = rows.tensor(vocabulary, dtype=torch.bool)
        self._counts = rows.tensor(vocabulary, dtype=torch.int32)

    @torch.inference_mode()
    def add(self, row: int, prompt: Tensor, params: SamplingParams) -> None:
        """Start a request in a row. Its prompt [N] has been read, and its first token is sampled next."""
        only = slice(row, row + 1)  # to assign to a single element, torch would wait for the GPU
        self._greedy[only] = params.greedy
        self._repetition[only] = params.repetition
        self._frequency[only], self._presence[only] = params.frequency_penalty, params.presence_penalty
        self._minimum[only], self._generated[only] = params.minimum, 0
        self._temperature[only] = max(params.temperature, _COLDEST)
        self._top_p[only] = params.top_p
        self._top_k[only] = min(params.top_k, self._seen.shape[1])
        self._seen[row].zero_().index_fill_(0, prompt, True)
        self._counts[row].zero_()
        if not params.greedy:
            assert params.seed is not None  # a missing seed is drawn before the request is submitted
            # One number per position, from a counter-based generator whose key is the seed alone.
            generator = np.random.Generator(np.random.Philox(key=params.seed % 2**128))
            self._uniforms[row, : params.maximum] = torch.from_numpy(generator.random(params.maximum))

    @torch.inference_mode()
    def sample(self, logits: Tensor, first: int, params: Sequence[SamplingParams]) -> Tensor:
        """Return the next tokens [B] of the rows from `first` on, or NOT_FINITE if logits are not finite.

        `logits` is [B, V] float32. `params` has the parameters of the requests in these rows that have been
        added; a rule that none of them uses is skipped. Other rows get an arbitrary token. On a GPU, this
        does not wait for the device.
        """
        rows = slice(first, first + len(logits))
        usable = logits.sum(dim=-1).isfinite()
        logits = self._without_early_eos(self._penalized(logits, rows, params), rows, params)
        tokens = logits.argmax(dim=-1)
        drawn = [p for p in params if not p.greedy]
        if drawn:
            filtered = any(p.top_k > 0 or p.top_p < 1 for p in drawn)
            tokens = torch.where(self._greedy[rows], tokens, self._drawn(logits, rows, filtered))
        self._seen[rows].scatter_(1, tokens[:, None], True)
        self._counts[rows].scatter_add_(
            1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32)
        )
        self._generated[rows] += 1
        return torch.where(usable, tokens, NOT_FINITE)

    def sample_all(self, logits: Tensor) -> None:
        """Sample in all rows by every rule, to allocate the most memory. `logits` is [rows, V] float32."""
        self.sample(logits, 0, [_EVERY_RULE])

    def _penalized(self, logits: Tensor, rows: slice, params: Sequence[SamplingParams]) -> Tensor:
        if any(p.repetition_penalty not in (0, 1) for p in params):
            logits = penalize_repetition(logits, self._seen[rows], self._repetition[rows])
        if any(p.frequency_penalty or p.presence_penalty for p in params):
            counts, frequency, presence = self._counts[rows], self._frequency[rows], self._presence[rows]
            logits = penalize_counts(logits, counts, frequency, presence)
        return logits

    def _without_early_eos(self, logits: Tensor, rows: slice, params: Sequence[SamplingParams]) -> Tensor:
        if not any(p.minimum for p in params):
            return logits
        early = self._generated[rows] < self._minimum[rows]
        masked = logits[:, self._eos].masked_fill(early[:, None], float("-inf"))
        return logits.index_copy(1, self._eos, masked)

    def _drawn(self, logits: Tensor, rows: slice, filtered: bool) -> Tensor:
        position = self._generated[rows].clamp(max=self._uniforms.shape[1] - 1)
        uniform = self._uniforms[rows].gather(1, position[:, None])[:, 0]
        scaled = logits / self._temperature[rows, None]
        if not filtered:
            return draw(scaled.double().softmax(dim=-1), uniform)
        # Draw in the order of token ids: the order by weight may change if two weights are nearly equal.
        if self._shortlist < scaled.shape[-1]:
            values, ids = scaled.topk(self._shortlist)
            weights, settled = self._kept(values, scaled, rows)
            # Only on a CPU, where the shortlist is rarely too short. On a GPU, this check would wait for it.
            if (settled | self._greedy[rows]).all():
                ids, order = ids.sort(dim=-1)
                index = draw(weights.gather(-1, order), uniform)
                return ids.gather(-1, index[:, None])[:, 0]
        values, ids = scaled.sort(dim=-1, descending=True)
        weights, _ = self._kept(values, scaled, rows)
        return draw(torch.empty_like(weights).scatter_(-1, ids, weights), uniform)

    def _kept(self, values: Tensor, scaled: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Apply top_k and top_p to `values` [B, S], the best logits of each row, sorted best first.

        Returns two tensors: the weights [B, S] float64, which are zero for tokens that are not kept; and, for
        each row, whether top_k and top_p keep no token outside of `values` [B].
        """
        top_k = self._top_k[rows]
        among_k = keep_top_k(values, top_k)
        weights = (values - values[:, :1]).double().exp() * among_k
        everything = (scaled - values[:, :1]).exp().sum(dim=-1, dtype=torch.float64)
        weights /= torch.where(top_k < 1, everything, weights.sum(dim=-1))[:, None]
        among_p = keep_top_p(weights, self._top_p[rows].double())
        return weights * among_p, ~torch.where(top_k < 1, among_p[:, -1], among_k[:, -1])
