"""Copying, exchanging and clearing rows of the cache, in both of its layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from llama.torch_engine.kv_cache import CacheShape, KVCache

CONFIG = LlamaConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


@pytest.fixture(params=[False, True], ids=["by head", "by position"])
def cache(request: pytest.FixtureRequest) -> KVCache:
    cache = KVCache(CONFIG, CacheShape(4, 10), torch.float32, torch.device("cpu"), by_position=request.param)
    for layer in cache.layers:
        layer.copy_(torch.randn(layer.shape))
    return cache


def contents(cache: KVCache) -> list[Tensor]:
    """A copy of each layer as [2, rows, length, KV heads, head_dim]."""
    return [(layer if cache.by_position else layer.transpose(2, 3)).clone() for layer in cache.layers]


def test_a_layer_has_the_shape_of_its_layout() -> None:
    by_head, by_position = (
        KVCache(CONFIG, CacheShape(4, 10), torch.float32, torch.device("cpu"), by_position=by_position)
        for by_position in (False, True)
    )
    assert by_head.layers[0].shape == (2, 4, 2, 10, 8)
    assert by_position.layers[0].shape == (2, 4, 10, 2, 8)
    assert by_position.layers[0].is_contiguous()


def test_only_the_first_positions_of_a_row_are_copied(cache: KVCache) -> None:
    before = contents(cache)
    cache.copy(1, 3, 6)
    for old, new in zip(before, contents(cache), strict=True):
        assert torch.equal(new[:, 3, :6], old[:, 1, :6])
        assert torch.equal(new[:, 3, 6:], old[:, 3, 6:])
        assert torch.equal(new[:, :3], old[:, :3])


def test_only_the_first_positions_of_two_rows_are_exchanged(cache: KVCache) -> None:
    before = contents(cache)
    cache.swap(0, 2, 4)
    for old, new in zip(before, contents(cache), strict=True):
        assert torch.equal(new[:, 0, :4], old[:, 2, :4])
        assert torch.equal(new[:, 2, :4], old[:, 0, :4])
        assert torch.equal(new[:, :, 4:], old[:, :, 4:])
        assert torch.equal(new[:, [1, 3]], old[:, [1, 3]])


def test_the_first_positions_and_the_last_one_of_a_row_are_cleared(cache: KVCache) -> None:
    before = contents(cache)
    cache.clear(1, 3)
    for old, new in zip(before, contents(cache), strict=True):
        assert not new[:, 1, :3].any()
        assert not new[:, 1, -1].any()
        assert torch.equal(new[:, 1, 3:-1], old[:, 1, 3:-1])
        assert torch.equal(new[:, [0, 2, 3]], old[:, [0, 2, 3]])
