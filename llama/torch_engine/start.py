"""Start a TorchEngine for a folder of weights: load, plan the cache, say what is served.

Knows settings and memory; knows nothing of requests.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection
from pathlib import Path

import torch
from transformers import LlamaConfig

from llama.errors import BadSettings
from llama.metrics import SetupTimes
from llama.model.loader import (
    context_wanted,
    load_model,
    pick_device,
    pick_dtype,
    pick_quantization,
)
from llama.model.memory import available_memory
from llama.model.plan import RESERVE
from llama.settings import Settings
from llama.torch_engine.engine import MOST_A_TURN, TorchEngine
from llama.torch_engine.kv_cache import CachePlan, KVCache, plan_cache
from llama.torch_engine.layers import Parts, take_apart
from llama.torch_engine.runner import Chunk, Runner

logger = logging.getLogger(__name__)


def start_engine(
    folder: Path,
    config: LlamaConfig,
    settings: Settings,
    times: SetupTimes,
    *,
    vocabulary: int,
    eos_token_ids: Collection[int],
) -> TorchEngine:
    """Load `folder` as the settings say and start serving it. Raises a WeightsError."""
    for name, is_vllms in (
        ("tensor_parallel", settings.tensor_parallel not in (None, 1)),
        ("pipeline_parallel", settings.pipeline_parallel not in (None, 1)),
        ("distributed", settings.distributed != "auto"),
        ("memory_fraction", "memory_fraction" in settings.model_fields_set),
    ):
        if is_vllms:
            raise BadSettings(
                f"LLAMA_{name.upper()} is {getattr(settings, name)}; set LLAMA_ENGINE to vllm, or unset it"
            )
    device = pick_device(settings)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    dtype = pick_dtype(settings, config, capability)
    quantization = pick_quantization(settings, device, config)
    precision = str(dtype).removeprefix("torch.") if quantization == "none" else quantization

    def load() -> tuple[Parts, KVCache]:
        with times.part("weights"):
            model = load_model(folder, config, dtype, device, quantization)
        logger.info("loaded %s: %s on %s", folder.resolve().name, precision, device)
        parts = take_apart(model, context_wanted(settings, config))
        del model  # what was joined or packed is there once
        plan = plan_for(parts, config, settings)
        return parts, KVCache(config, plan, parts.cache_dtype, parts.device)

    with times.part("engine"):
        return TorchEngine(
            load,
            vocabulary=vocabulary,
            eos_token_ids=eos_token_ids,
            prefix_reuse=settings.prefix_reuse,
            cuda_graphs=settings.cuda_graphs,
            threads=settings.threads,
        )


def plan_for(parts: Parts, config: LlamaConfig, settings: Settings) -> CachePlan:
    """The cache that fits beside a model that is taken apart. Raises DoesNotFit."""
    budget = _free_memory(parts, config) if settings.cache_memory is None else settings.cache_memory
    return plan_cache(
        config,
        parts.cache_dtype,
        budget=int(budget),
        context=context_wanted(settings, config),
        rows=settings.max_concurrency,
    )


def _free_memory(parts: Parts, config: LlamaConfig) -> int:
    """Bytes that the cache may take: on a GPU what is free but a reserve; on a CPU, which others use
    too, half of what is available."""
    if parts.device.type == "cuda":
        _run_once(parts, config)
        gc.collect()  # a runner refers to itself
        torch.cuda.empty_cache()  # what loading has left there is free, and not seen to be
        free, _ = torch.cuda.mem_get_info(parts.device)
        return max(int(free) - RESERVE["torch"], 0)
    return available_memory() // 2


def _run_once(parts: Parts, config: LlamaConfig) -> None:
    """A prompt and a step in a small cache: what libraries then keep, such as workspaces, is not free."""
    length = min(MOST_A_TURN["cuda"], len(parts.cos) - parts.stretched_from)
    cache = KVCache(config, CachePlan(1, length), parts.cache_dtype, parts.device)
    runner = Runner(parts, cache)
    runner.prefill([Chunk(0, 0, torch.zeros(length, dtype=torch.long, device=parts.device))])
    runner.decode(1, length)
