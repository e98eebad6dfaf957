"""The default engine with a small model: a batch that a test steps, or a running engine."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import flash_reference  # noqa: F401
import pytest
import torch
from transformers import LlamaForCausalLM

from llama.engine import TokenStream
from llama.model.placement import Placement
from llama.sampling_params import SamplingParams
from llama.settings import Settings
from llama.torch_engine.batch import Batch
from llama.torch_engine.cpu_compiler import Kernels, compile_in_background
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import ModelParts, take_apart
from llama.torch_engine.scheduler import BatchRequest

EOS = 2
LENGTH = 512
POISON_TOKEN = 600

Computing = Literal["compiled", "torch", "flash"]
"""How steps are computed: with compiled kernels, with torch alone, or with torch and flash attention. On the
CPU, flash attention is the plain version of `flash_reference.py`."""


class Head(torch.nn.Module):
    """An output layer that counts the steps, can block before a step, and can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.steps, self.failing, self.open = torch.nn.Identity(), 0, False, threading.Event()
        self.open.set()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.open.wait(timeout=30)
        if self.failing:
            raise RuntimeError("a kernel failed")
        self.steps += 1
        logits: torch.Tensor = self.inner(hidden)
        return logits


@cache
def compiled_kernels(arithmetic: torch.dtype, cached: torch.dtype) -> Kernels:
    """Return the compiled kernels. Skips the test if a system other than Linux has no OpenMP for numba."""
    kernels = compile_in_background(arithmetic, cached, Settings().cache_dir).result()
    if kernels is None and sys.platform != "linux":
        pytest.skip("numba has no OpenMP threading layer on this machine")
    assert kernels is not None
    return kernels


def computing_parts(
    model: LlamaForCausalLM, shape: CacheShape, computing: Computing
) -> tuple[ModelParts, KVCache, Kernels | None]:
    """Take a model apart for one of the ways to compute its steps."""
    placement = Placement(model.device, model.dtype, "none", shape.length, computing == "flash")
    kernels = None
    if computing == "compiled":
        kernels = compiled_kernels(placement.arithmetic, placement.cache_dtype)
    cache = KVCache.for_placement(model.config, shape, placement)
    return take_apart(model, placement), cache, kernels


def batch_of(
    model: LlamaForCausalLM,
    rows: int = 8,
    eos: tuple[int, ...] = (EOS,),
    prefix_reuse: bool = True,
    head: Head | None = None,
    computing: Computing = "compiled",
) -> Batch:
    """Return a batch without a thread. The test calls its steps."""
    taken = copy.deepcopy(model)  # a batch takes its model apart
    if head is not None:
        head.inner, taken.lm_head = taken.lm_head, head
    parts, cache, kernels = computing_parts(taken, CacheShape(rows, LENGTH), computing)
    return Batch(
        parts,
        cache,
        vocabulary=model.config.vocab_size,
        eos_token_ids=eos,
        prefix_reuse=prefix_reuse,
        kernels=kernels,
    )


def add(batch: Batch, prompt: list[int], params: SamplingParams) -> BatchRequest:
    request = batch.request(prompt, params)
    batch.add(request)
    return request


def finish(batch: Batch) -> None:
    """Step until no request is left."""
    for _ in range(10_000):
        if batch.idle:
            return
        batch.step()
    raise AssertionError("the batch never becomes idle")


def answers_of(batch: Batch, *requests: tuple[list[int], SamplingParams]) -> list[list[int]]:
    """Return the answers to requests that arrive together."""
    added = [add(batch, *request) for request in requests]
    finish(batch)
    return [request.tokens[request.prompt_length :] for request in added]


@contextmanager
def running(model: LlamaForCausalLM, **more: Any) -> Iterator[TorchEngine]:
    """Run an engine with the same arguments as `batch_of`."""
    engine = TorchEngine(lambda: batch_of(model, **more))
    try:
        yield engine
    finally:
        engine.close()


def prompt_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [1, *torch.randint(3, 590, (length,), generator=generator).tolist()]


def greedy(maximum: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=maximum, **more)


def collect(stream: TokenStream) -> list[int]:
    return [token for tokens in stream for token in tokens]


def generate(model: LlamaForCausalLM, prompt: list[int], maximum: int, **more: object) -> list[int]:
    """Return the answer of `generate` of transformers, without EOS."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=maximum,
        do_sample=False,
        pad_token_id=0,
        **more,
    )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] == EOS else answer
