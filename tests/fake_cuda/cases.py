"""The precisions and kinds of GPUs that the suite runs, and sampling parameters that use every rule."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fake_cuda.kernel_costs import A100, H100, L40S, T4, Card
from llama.model.quantized_layers import Quantization
from llama.sampling_params import SamplingParams


class Case(NamedTuple):
    card: Card
    quantization: Quantization
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def __str__(self) -> str:
        return f"{self.card.name}-{self.quantization}-{self.dtype}"


FLASH_CASES = (
    Case(H100, "none", "bfloat16"),
    Case(H100, "none", "float16"),
    Case(H100, "fp8", "bfloat16"),
    Case(H100, "fp8", "float16"),
    Case(H100, "int8", "bfloat16"),
    Case(H100, "int8", "float16"),
    Case(H100, "nf4", "bfloat16"),
    Case(A100, "nf4", "bfloat16"),
    Case(L40S, "fp8", "bfloat16"),
)
TWO_PRODUCT_CASES = (
    Case(T4, "none", "float16"),
    Case(T4, "int8", "float16"),
    Case(T4, "nf4", "float16"),
    Case(H100, "none", "float32"),
)
CASES = FLASH_CASES + TWO_PRODUCT_CASES

GREEDY = SamplingParams(temperature=0, max_tokens=20)
DRAWN = SamplingParams(temperature=0.7, seed=1, max_tokens=20)
EVERY_RULE = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=50,
    seed=1,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    min_tokens=3,
    max_tokens=20,
)
