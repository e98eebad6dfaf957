"""Random inputs for the compiled kernels, and the formulas that they compute, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from batches import compiled_kernels
from torch import Tensor

from llama.torch_engine.cpu_compiler import Kernels, as_array

CONTEXT = 97  # a prime number

# The types of inputs and caches that `Placement` combines.
COMBINATIONS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]
combinations = pytest.mark.parametrize(
    ("dtype", "cached"), COMBINATIONS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def rounding(dtype: torch.dtype) -> float:
    """The relative error of a result that is rounded once to `dtype`, after sums in float32."""
    return max(torch.finfo(dtype).eps, 2e-5)


def kernels_of(dtype: torch.dtype, cached: torch.dtype | None = None) -> Kernels:
    return compiled_kernels(dtype, cached or dtype)


@dataclass
class Case:
    """Random inputs of one layer. Its cache has more rows than the batch."""

    heads: int
    kv_heads: int
    size: int
    dtype: torch.dtype
    cached: torch.dtype
    rows: int
    context: int = CONTEXT

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.size + self.rows)
        self.scale = self.size**-0.5
        angles = self.normal(2 * self.context, self.size // 2).float().repeat(1, 2)
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        shape = (2, self.rows + 2, self.kv_heads, self.context, self.size)
        self.cache = torch.randn(shape, generator=self.generator).to(self.cached)
        self.before = self.cache.clone()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def projections(self, tokens: int) -> Tensor:
        return self.normal(tokens, (self.heads + 2 * self.kv_heads) * self.size)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [tokens, heads, D] in float32."""
        heads = qkv.float().view(len(qkv), -1, self.size)
        queries, keys, values = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        return queries, keys, values

    def rotated(self, heads: Tensor, angles: Tensor) -> Tensor:
        cos, sin = self.cos[angles].float()[:, None], self.sin[angles].float()[:, None]
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-second, first), dim=-1) * sin

    def decode(self, qkv: Tensor, positions: Sequence[int], angles: Tensor) -> Tensor:
        attended = torch.full((len(qkv), self.heads * self.size), 7.0, dtype=self.dtype)
        kernels_of(self.dtype, self.cached).attend_rows(
            as_array(qkv),
            as_array(self.cos),
            as_array(self.sin),
            as_array(angles),
            as_array(self.cache),
            as_array(torch.tensor(positions)),
            np.float32(self.scale),
            as_array(attended),
        )
        return attended

    def expected(self, query: Tensor, row: int, length: int) -> Tensor:
        """The attention of a rotated query [heads, D] to the first tokens of a row of the cache."""
        keys, values = (
            self.cache[:, row, :, :length].float().repeat_interleave(self.heads // self.kv_heads, 1)
        )
        scores = (keys @ query[..., None]).squeeze(-1) * self.scale  # [heads, length]
        attended: Tensor = torch.softmax(scores, -1)[:, None] @ values
        return attended.flatten()

    def check_decode(self, positions: Sequence[int]) -> None:
        """Run a decode step. Compare its results and the whole cache with the formulas."""
        qkv = self.projections(len(positions))
        angles = torch.randint(0, 2 * self.context, (len(positions),), generator=self.generator)
        attended = self.decode(qkv, positions, angles)
        queries, keys, values = self.split(qkv)
        queries, keys = self.rotated(queries, angles), self.rotated(keys, angles)
        untouched = self.before
        error = rounding(self.dtype)
        for row, position in enumerate(positions):
            if position == self.context - 1:
                assert not attended[row].any()
                continue
            stored = self.cache[:, row, :, position]
            torch.testing.assert_close(stored[0].float(), keys[row], rtol=rounding(self.cached), atol=1e-5)
            assert torch.equal(stored[1], values[row].to(self.cached))
            untouched[:, row, :, position] = stored
            wanted = self.expected(queries[row], row, position + 1)
            torch.testing.assert_close(attended[row].float(), wanted, rtol=error, atol=error)
        assert torch.equal(self.cache, untouched)
