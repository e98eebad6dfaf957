"""Device, dtype and cache size of a placement, the log of a setup, and the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_models import LLAMA_2_TOKENIZER, needs_embedded, needs_llama_2_tokenizer
from transformers import LlamaConfig

from llama.errors import BadSettings, DoesNotFit
from llama.load import load_llama
from llama.model.config import eos_token_ids
from llama.model.placement import Placement, has_flash_attention, pick_device, place, planner_for
from llama.model.precision_plan import LLAMA_2_70B, Gpu, bytes_per_token
from llama.settings import Settings
from llama.torch_engine.kv_cache import CacheShape, KVCache, fit_cache
from llama.weights.embedded import embedded_folder as find_embedded_folder

CPU = torch.device("cpu")
TOKEN_70B = 2 * 80 * 8 * 128 * 2  # keys and values, layers, KV heads, head_dim, bytes of bfloat16


@needs_llama_2_tokenizer
def test_the_built_in_configuration_has_the_cache_size_of_the_real_70b() -> None:
    config = LlamaConfig.from_pretrained(LLAMA_2_TOKENIZER)
    assert bytes_per_token(config, torch.bfloat16) == bytes_per_token(LLAMA_2_70B, torch.bfloat16)


def test_a_token_of_the_70b_takes_327680_bytes_of_cache() -> None:
    assert bytes_per_token(LLAMA_2_70B, torch.bfloat16) == TOKEN_70B == 327_680


@pytest.mark.parametrize(
    ("tokens", "context", "rows", "plan"),
    [
        (4096 * 8, 4096, 32, CacheShape(rows=8, length=4096)),
        (4096 * 100, 4096, 32, CacheShape(rows=32, length=4096)),
        (4096 * 9 - 1, 4096, 32, CacheShape(rows=8, length=4096)),
        (4096 * 8, 1024, 32, CacheShape(rows=32, length=1024)),
        (1000, 4096, 32, CacheShape(rows=1, length=1000)),
        (64, 4096, 32, CacheShape(rows=1, length=64)),
        (16, 16, 32, CacheShape(rows=1, length=16)),
    ],
)
def test_the_context_is_shortened_only_if_not_even_one_row_fits(
    tokens: int, context: int, rows: int, plan: CacheShape
) -> None:
    budget = tokens * TOKEN_70B
    assert fit_cache(LLAMA_2_70B, torch.bfloat16, budget=budget, context=context, rows=rows) == plan


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_a_budget_of_less_than_64_tokens_is_refused(tokens: int) -> None:
    with pytest.raises(DoesNotFit, match="^E3005 DoesNotFit: .*LLAMA_CACHE_MEMORY"):
        fit_cache(LLAMA_2_70B, torch.bfloat16, budget=tokens * TOKEN_70B, context=4096, rows=1)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_takes_the_planned_bytes_and_starts_with_zeros(
    dtype: torch.dtype, by_position: bool
) -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    cache = KVCache(config, CacheShape(rows=5, length=70), dtype, CPU, by_position=by_position)
    assert sum(t.numel() * t.itemsize for t in cache.layers) == 5 * 70 * bytes_per_token(config, dtype)
    assert not any(t.any() for t in cache.layers)


@pytest.mark.parametrize(("name", "size"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_keys_and_values_take_as_many_bytes_as_weights_on_every_device(name: str, size: int) -> None:
    config = LlamaConfig(dtype=torch.bfloat16, max_position_embeddings=256)
    placed = place(Settings(device="cpu", dtype=name), config)
    assert placed.cache_dtype is getattr(torch, name)
    assert bytes_per_token(config, placed.cache_dtype) == 2 * 32 * 32 * 128 * size
    assert Placement(torch.device("cuda", 0), placed.dtype, "int8", 256).cache_dtype is placed.dtype


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", 8), ("float32", 4)])
def test_with_16_bit_weights_on_a_cpu_twice_as_many_requests_fit_in_a_cache(
    llama_folder: Path, dtype: str, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    memory = 4 * 100 * 2 * 2 * 2 * 32 * 4  # four rows of 100 positions in float32
    settings = Settings(weights=llama_folder, dtype=dtype, max_context=100, cache_memory=memory)
    caplog.set_level("INFO", logger="llama")
    load_llama(settings).close()
    assert f"context 100 tokens, room for {rows} requests at once" in caplog.text


def dtype_of(settings: Settings, config: LlamaConfig, capability: tuple[int, int] | None) -> torch.dtype:
    gpus = [] if capability is None else [Gpu("a GPU", 10**9, capability)]
    return planner_for(settings, config, gpus, "torch").dtype


def test_weights_on_a_cpu_are_in_float32_unless_a_dtype_is_set() -> None:
    assert dtype_of(Settings(), LlamaConfig(), None) is torch.float32
    assert dtype_of(Settings(dtype="bfloat16"), LlamaConfig(), None) is torch.bfloat16


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_weights_of_a_16_bit_checkpoint_stay_in_16_bits_on_a_cpu(name: str) -> None:
    dtype = getattr(torch, name)
    assert dtype_of(Settings(), LlamaConfig(dtype=dtype), None) is dtype
    assert dtype_of(Settings(dtype="float32"), LlamaConfig(dtype=dtype), None) is torch.float32


def test_weights_on_a_gpu_are_in_bfloat16_if_it_supports_that() -> None:
    assert dtype_of(Settings(), LlamaConfig(), (8, 0)) is torch.bfloat16
    assert dtype_of(Settings(), LlamaConfig(dtype="bfloat16"), (7, 5)) is torch.float16
    assert dtype_of(Settings(dtype="float16"), LlamaConfig(), (9, 0)) is torch.float16


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "supported"),
    [
        ((8, 0), torch.bfloat16, 128, True),
        ((9, 0), torch.float16, 64, True),
        ((12, 0), torch.bfloat16, 256, True),
        ((7, 5), torch.float16, 128, False),
        ((8, 0), torch.float32, 128, False),
        ((9, 0), torch.bfloat16, 100, False),
        ((9, 0), torch.bfloat16, 264, False),
    ],
)
def test_flash_attention_needs_a_new_gpu_16_bits_and_a_head_dimension_that_it_supports(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, supported: bool
) -> None:
    config = LlamaConfig(head_dim=head_dim)
    assert has_flash_attention(config, dtype, capability) is supported
    name = str(dtype).removeprefix("torch.")
    planner = planner_for(Settings(dtype=name), config, [Gpu("a GPU", 10**9, capability)], "torch")
    assert planner.flash_attention is supported


def test_there_is_no_flash_attention_on_a_cpu() -> None:
    assert not place(Settings(device="cpu", dtype="bfloat16"), LlamaConfig()).flash_attention


def test_a_placement_has_the_device_dtype_quantization_and_context() -> None:
    placed = place(Settings(device="cpu", max_context=100), LlamaConfig(dtype=torch.float16))
    assert placed == Placement(CPU, torch.float16, "none", 100)
    assert (placed.arithmetic, str(placed)) == (torch.float32, "float16 on cpu")
    on_a_gpu = Placement(torch.device("cuda", 0), torch.bfloat16, "nf4", 4096)
    assert (on_a_gpu.arithmetic, on_a_gpu.cache_dtype) == (torch.bfloat16, torch.bfloat16)
    assert str(on_a_gpu) == "nf4 on cuda:0"


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_torch_cannot_use_is_refused(device: str) -> None:
    message = f"^E3000 BadSettings: LLAMA_DEVICE is '{device}', which torch cannot use on this machine; set it to cpu"
    with pytest.raises(BadSettings, match=message):
        pick_device(Settings(device=device))


@pytest.mark.parametrize("device", ["mps", "mps:0", "meta"])
def test_a_device_that_is_neither_a_cpu_nor_a_cuda_gpu_is_refused(device: str) -> None:
    message = f"^E3000 BadSettings: LLAMA_DEVICE is '{device}', but only CPUs and CUDA GPUs are supported; set it to cpu"
    with pytest.raises(BadSettings, match=message):
        pick_device(Settings(device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_without_a_cuda_gpu_the_automatic_device_is_the_cpu() -> None:
    assert pick_device(Settings()) == CPU


@pytest.mark.parametrize(("eos", "expected"), [(2, {2}), ([2, 7], {2, 7})])
def test_all_ids_that_end_an_answer_are_read(tmp_path: Path, eos: object, expected: set[int]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert eos_token_ids(tmp_path, LLAMA_2_70B) == expected


def test_setup_logs_the_precision_the_limits_and_the_time_of_each_part(
    llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="llama")
    load_llama(Settings(weights=llama_folder, max_context=100, cache_memory="1MB")).close()
    lines = [record.getMessage() for record in caplog.records]
    assert any(": float32 on cpu" in line for line in lines)
    assert any("context 100 tokens, room for " in line for line in lines)
    (ready,) = (line for line in lines if line.startswith("ready after "))
    assert all(part in ready for part in ("imports", "tokenizer", "weights", "engine", "warm-up"))


@needs_embedded
def test_the_embedded_model_is_converted_once(embedded_folder: Path) -> None:
    weights = embedded_folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert find_embedded_folder(embedded_folder.parent) == embedded_folder
    assert weights.stat().st_mtime_ns == before
    assert not list(embedded_folder.parent.glob("*.part-*"))
