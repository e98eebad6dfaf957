"""How many kernels an operator launches on CUDA, and which bytes they read, write and allocate.

An operator that is not listed is one launch that reads each input once and writes each output once. The reasons
come from the sources of torch 2.11 (built with CUDA 12.8) and bitsandbytes 0.50.2. Memory that CUDA sets or copies
without a kernel is no launch. Knows operators and tensors; knows nothing about the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fake_cuda.patches import nf4_rule


class Card(NamedTuple):
    """A kind of GPU."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    bandwidth: float
    """Bytes per second of its memory, by its data sheet."""


H100 = Card("H100", (9, 0), 132, 3.35e12)
A100 = Card("A100", (8, 0), 108, 2.04e12)
L40S = Card("L40S", (8, 9), 142, 0.864e12)
T4 = Card("T4", (7, 5), 40, 0.32e12)


class Op(NamedTuple):
    """One call of an operator."""

    name: str
    """Without the namespace `aten`, such as `add.Tensor`."""
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    card: Card


class Traffic(NamedTuple):
    """Bytes that kernels read and write, by what they are."""

    weights: int = 0
    cache: int = 0
    other_reads: int = 0
    writes: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(*map(sum, zip(self, other, strict=True)))


VIEWS = frozenset({
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided",
    "expand", "lift_fresh", "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unbind", "unsqueeze", "view",
})  # fmt: skip
"""Operators without a kernel."""


def launches_of(op: Op) -> int:
    """Return the number of kernels. cuBLAS may add one to a product (split-K), which only a GPU can tell."""
    rule = _LAUNCHES.get(op.name, 1)
    return rule if isinstance(rule, int) else rule(op)


def _scaled_mm(op: Op) -> int:
    """RowwiseScaledMM.cu: one kernel. From compute capability 9.0 on, the scales of the rows are first copied and
    padded to a multiple of 256 rows."""
    rows = op.inputs[0].shape[0]
    return 1 if op.card.capability < (9, 0) or rows % 256 == 0 else 2


def _int8_scaled_mm(op: Op) -> int:
    """bitsandbytes: the product in int32, its conversion to float16, and, for another type, one more conversion."""
    return 2 if op.outputs[0].dtype is torch.float16 else 3


def _gemm_4bit(op: Op) -> int:
    return 2 if _unpacked_bytes(op) else 1


def _flash_attention(op: Op) -> int:
    """flash_api.cpp: one kernel if a row has several queries. Otherwise, the query heads of one KV head become
    rows, which copies the queries before the kernel, and both result and queries after it. If there are few
    rows, the keys are split, and one more kernel combines the parts."""
    if not _heads_become_rows(op):
        return 1
    return 4 + (_splits(op) > 1)


_LAUNCHES: Mapping[str, int | Callable[[Op], int]] = {
    "_flash_attention_forward.default": _flash_attention,
    "_scaled_mm.default": _scaled_mm,
    "bitsandbytes.gemm_4bit.default": _gemm_4bit,
    "bitsandbytes.int8_scaled_mm.default": _int8_scaled_mm,
    "baddbmm.default": 2,  # Blas.cpp: the bias is copied into the result, which the product then adds to
    "masked_fill.Scalar": 2,  # a copy, which is then filled
    "index_copy.default": 2,  # a copy, into which the rows are then copied
    "cumsum.default": 2,  # cub::DeviceScan: one kernel for its state, one for the scan
    "topk.default": 3,  # TensorTopK.cu: selects in several passes, then sorts
    "sort.default": 4,  # Sort.cu: fills the indices, then several passes over the bits of the keys
    "sort.stable": 4,
}


def _heads_become_rows(op: Op) -> bool:
    queries, keys, _, starts, *_ = op.inputs
    return len(queries) == len(starts) - 1 and queries.shape[-2] > keys.shape[-2]


def _splits(op: Op) -> int:
    """The number of parts into which flash_api.cpp splits the keys (num_splits_heuristic), for decode steps.

    The longest row counts as long as a row of the cache.
    """
    queries, keys = op.inputs[:2]
    rows, heads = len(queries), keys.shape[-2]
    blocks = -(-len(keys) // rows // (256 if keys.shape[-1] <= 64 else 128 if keys.shape[-1] <= 128 else 64))
    tasks, slots = rows * heads, 2 * op.card.multiprocessors
    if tasks >= 0.8 * slots:
        return 1
    efficiency = {
        splits: tasks * splits / slots / -(-tasks * splits // slots)
        for splits in range(1, min(128, slots, blocks) + 1)
        if splits == 1 or -(-blocks // splits) != -(-blocks // (splits - 1))
    }
    return min(splits for splits, value in efficiency.items() if value >= 0.85 * max(efficiency.values()))


def _unpacked_bytes(op: Op) -> int:
    """The bytes of a weight that bitsandbytes' 4-bit product first writes in 16 bits, or 0."""
    x, result = op.inputs[0], op.outputs[0]
    outputs, inputs = result.shape[-1], x.shape[-1]
    rows = x.numel() // inputs
    packed = rows <= 1536 and nf4_rule(op.card.multiprocessors, op.card.capability)(
        0, x.dtype, rows, outputs, inputs
    )
    return 0 if packed else outputs * inputs * x.itemsize


def temporary_bytes(op: Op) -> int:
    """Return the bytes that an operator allocates in addition to its result, if it is an operator that needs many."""
    match op.name:
        case "bitsandbytes.gemm_4bit.default":
            return _unpacked_bytes(op)
        case "bitsandbytes.int8_scaled_mm.default":  # the product in int32, and in float16
            count = op.outputs[0].numel()
            return 4 * count + (0 if op.outputs[0].dtype is torch.float16 else 2 * count)
        case "_flash_attention_forward.default" if _heads_become_rows(op):
            queries, splits = op.inputs[0], _splits(op)
            partial_results = 4 * splits * queries.numel() if splits > 1 else 0
            return 3 * queries.numel() * queries.itemsize + partial_results
        case _:
            return 0


Owner = Callable[[Tensor], str]
"""Returns "weights", "cache" or "other_reads"."""

_OVERWRITES = frozenset({"copy_", "fill_", "zero_", "index_copy_", "index_fill_", "scatter_"})
_SELECTS = frozenset({"embedding", "index", "gather"})


def traffic_of(op: Op, owner: Owner, lengths: Sequence[int] | None) -> Traffic:
    """Return the bytes of one operator. `lengths` are the lengths of the rows that flash attention reads; without
    them, all positions count."""
    base = op.name.rpartition(".")[0]
    reads = dict.fromkeys(("weights", "cache", "other_reads"), 0)
    for index, tensor in enumerate(op.inputs):
        if index == 0 and base in _SELECTS:
            reads[owner(tensor)] += sum(map(_bytes_of, op.outputs))
        elif index in (1, 2) and base == "_flash_attention_forward" and lengths is not None:
            reads[owner(tensor)] += sum(lengths) * tensor[0].numel() * tensor.itemsize
        elif index > 0 or base not in _OVERWRITES:
            reads[owner(tensor)] += _bytes_of(tensor)
    written = _bytes_of(op.inputs[-1]) if base == "index_copy_" else sum(map(_bytes_of, op.outputs))
    temporary = temporary_bytes(op)  # written once and read once
    return Traffic(reads["weights"], reads["cache"], reads["other_reads"] + temporary, written + temporary)


def _bytes_of(tensor: Tensor) -> int:
    """The bytes of a tensor's distinct elements: an expanded dimension has one."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * tensor.itemsize
