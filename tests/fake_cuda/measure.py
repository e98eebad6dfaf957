"""Calculates the launches, bytes and memory of the 70B on a fake GPU, for one precision.

Nothing runs on a GPU. `report.py` writes the figures to files, and `test_fake_cuda_budget.py` compares the engine with
them. Knows the phases of the engine; `trace.py` and `memory.py` count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from fake_cuda.cases import EVERY_RULE, Case
from fake_cuda.gpu import BYTES_PER_LAUNCH
from fake_cuda.models import EOS, Step, llama_2_70b, load, placement_of, token_ids
from fake_cuda.session import Fakes, fake_cuda
from fake_cuda.trace import Trace
from llama.model.gpu_reserve import graph_shapes
from llama.torch_engine.attention import Chunk
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import take_apart
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner
from llama.torch_engine.sampler import Sampler

T = TypeVar("T")

ROWS, CONTEXT, PROMPT = 32, 4096, 1024
MIXED = [4000] + 31 * [200]
"""The lengths of one long request and many short ones."""
FULL = ROWS * [CONTEXT]


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes of GPU memory in one phase of the engine."""

    kept: int
    """The bytes in use after the phase."""
    temporary: int
    """The largest number of bytes in use during the phase, minus those after it."""
    peak_operator: str
    """The operator that was running when most bytes were in use."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a number of layers needs."""

    flash_attention: bool
    decode: dict[str, int]
    """Launches of a decode step of ROWS rows by operator."""
    decode_launches: dict[str, int]
    """Launches of a decode step by batch size."""
    prefill: dict[str, int]
    """Launches of a prefill of PROMPT tokens that ends at CONTEXT, by operator."""
    traffic: dict[str, dict[str, int]]
    """Bytes of a decode step of ROWS rows, by the lengths of the rows."""
    graphs: int
    """The number of captured graphs."""
    graph_bytes: int
    """The bytes of all captured graphs with BYTES_PER_LAUNCH."""
    memory: dict[str, Phase]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def figures_of(case: Case, layers: int) -> Figures:
    """Run every phase of the engine with the 70B's shape."""
    memory: dict[str, Phase] = {}
    with fake_cuda(case.card) as fakes:
        step = _load(case, layers, fakes, memory)
        runner, sampler = step.runner, step.sampler
        prefill = Trace(case.card)
        tokens = token_ids(PROMPT)
        with prefill:
            chunk = Chunk(0, CONTEXT - PROMPT, tokens)
            logits = _phase(fakes, memory, "prefill", lambda: runner.prefill([chunk]))
        del logits
        traces = {lengths: _decode(case, step, lengths) for lengths in (tuple(MIXED), tuple(FULL))}
        logits = _phase(fakes, memory, "decode", lambda: runner.decode(ROWS, CONTEXT))
        for row in range(ROWS):
            sampler.add(row, tokens, EVERY_RULE)
        sampled = _phase(fakes, memory, "sample", partial(sampler.sample, logits, 0, ROWS * [EVERY_RULE]))
        del logits, sampled
        _phase(fakes, memory, "swap", lambda: step.rows.swap(0, 1, CONTEXT))
        flash = step.cache.by_position
        batch_sizes, lengths = graph_shapes(ROWS, CONTEXT, flash_attention=flash)
        launches = {size: _decode(case, step, size * (CONTEXT,)).count for size in batch_sizes}
    graph_launches = sum(launches.values()) * len(lengths)
    return Figures(
        flash_attention=flash,
        decode=_sorted(traces[tuple(FULL)].operators),
        decode_launches={str(size): count for size, count in launches.items()},
        prefill=_sorted(prefill.operators),
        traffic={
            "mixed lengths": traces[tuple(MIXED)].traffic._asdict(),
            "full context": traces[tuple(FULL)].traffic._asdict(),
        },
        graphs=len(batch_sizes) * len(lengths),
        graph_bytes=graph_launches * BYTES_PER_LAUNCH,
        memory=memory,
    )


def _load(case: Case, layers: int, fakes: Fakes, memory: dict[str, Phase]) -> Step:
    config = llama_2_70b(layers)
    placement = placement_of(config, quantization=case.quantization, dtype=case.dtype)
    model = [_phase(fakes, memory, "load", lambda: load(config, placement))]
    parts = _phase(fakes, memory, "take apart", lambda: take_apart(model.pop(), placement))
    shape = CacheShape(ROWS, CONTEXT)
    cache = _phase(
        fakes,
        memory,
        "cache",
        lambda: KVCache.for_placement(config, shape, placement),
    )
    rows = Rows(cache)
    return Step(parts, cache, rows, Runner(parts, rows), Sampler(rows, config.vocab_size, {EOS}))


def _phase(fakes: Fakes, memory: dict[str, Phase], name: str, run: Callable[[], T]) -> T:
    fakes.memory.start_phase()
    result = run()
    kept = fakes.memory.now
    memory[name] = Phase(kept, max(fakes.memory.peak - kept, 0), fakes.memory.peak_at)
    return result


def _decode(case: Case, step: Step, lengths: tuple[int, ...]) -> Trace:
    """Trace the part of a decode step that is captured."""
    trace = Trace(case.card, owner=step.owner(), lengths=lengths)
    with trace, torch.inference_mode():
        step.runner._step(len(lengths), CONTEXT)
    return trace


def _sorted(operators: Counter[str]) -> dict[str, int]:
    return dict(sorted(operators.items()))
