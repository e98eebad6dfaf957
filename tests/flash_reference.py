"""A plain version of torch's flash attention for CPUs, and the number of positions that it reads.

torch has no kernel of `aten::_flash_attention_forward` for CPUs. Importing this module registers one, so the
engine's own code runs in the tests. It refuses what the CUDA kernel refuses or would compute wrongly
(`mha_varlen_fwd` in torch 2.11's flash_api.cpp), except that it also accepts types other than 16-bit ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class PositionsRead:
    """How many positions of the cache were read since the last reset, over all calls."""

    total: int = 0


positions_read = PositionsRead()


@torch.library.impl("aten::_flash_attention_forward", "CPU")
def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`query` is [N, heads, D]; `key` and `value` are [positions of all rows, KV heads, D]."""
    assert (dropout_p, is_causal, return_debug_mask) == (0, True, False)
    assert seqused_k is not None
    _check(query, key, value, cum_seq_q, cum_seq_k, seqused_k)
    starts = cum_seq_q.tolist()
    assert (starts[0], starts[-1]) == (0, len(query))
    assert max_q > 1 or starts == list(range(len(query) + 1))
    attended = torch.zeros(query.shape, dtype=query.dtype)
    for index, (first, end) in enumerate(pairwise(starts)):
        used, count = int(seqused_k[index]), end - first
        assert count <= max_q
        assert used <= max_k
        if used == 0:
            continue
        assert used >= count
        positions_read.total += used
        row = slice(int(cum_seq_k[index]), int(cum_seq_k[index]) + used)
        visible = torch.ones(count, used, dtype=torch.bool).tril(used - count)
        attended[first:end] = F.scaled_dot_product_attention(
            query[first:end].transpose(0, 1)[None],
            key[row].transpose(0, 1)[None],
            value[row].transpose(0, 1)[None],
            attn_mask=visible,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    nothing = torch.empty(0)
    return attended, nothing, nothing, nothing, nothing


def _check(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, seqused_k: Tensor
) -> None:
    rows, (_, heads, size) = len(seqused_k), query.shape
    assert query.dtype is key.dtype is value.dtype
    assert (key.shape, size) == (value.shape, key.shape[2])
    assert heads % key.shape[1] == 0
    assert size in range(8, 257, 8)
    for tensor in (query, key, value):
        assert tensor.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in tensor.stride()[:-1])  # the kernel copies 16 bytes at a time
        assert tensor.storage_offset() % 8 == 0
    for tensor, count in ((cum_seq_q, rows + 1), (cum_seq_k, rows + 1), (seqused_k, rows)):
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (torch.int32, (count,), (1,))
