"""Start a TorchEngine for a weights folder: load the model, and use the remaining memory for the cache.

Knows settings and memory; knows nothing about requests.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path

import torch
from transformers import LlamaConfig

from llama.engine import Vocabulary
from llama.errors import BadSettings
from llama.model.gpu_reserve import gpu_reserve
from llama.model.memory import available_memory
from llama.model.placement import Placement, place
from llama.settings import Settings
from llama.setup_times import SetupTimes
from llama.torch_engine.batch import Batch
from llama.torch_engine.cpu_compiler import compile_in_background, use_threads
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.kv_cache import CacheShape, KVCache, fit_cache
from llama.torch_engine.layer_packing import load_parts
from llama.torch_engine.layers import ModelParts
from llama.torch_engine.prompt_share import MOST_PROMPT_TOKENS
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner
from llama.torch_engine.thread_count import ThreadCount

logger = logging.getLogger(__name__)


def start_engine(
    folder: Path,
    config: LlamaConfig,
    settings: Settings,
    times: SetupTimes,
    vocabulary: Future[Vocabulary],
) -> TorchEngine:
    """Load the weights in `folder` according to the settings, and start an engine. Raises a WeightsError."""
    _refuse_settings_of_vllm(settings)
    placement = place(settings, config)
    kernels = None
    if placement.device.type == "cpu":
        kernels = compile_in_background(placement.arithmetic, placement.cache_dtype, settings.cache_dir)

    def load() -> Batch:
        with times.part("engine"):
            if settings.threads is not None:
                torch.set_num_threads(settings.threads)
            with times.part("weights"):
                parts = load_parts(folder, config, placement, vocabulary)
            logger.info("loaded %s: %s", folder.resolve().name, placement)
            compiled = None if kernels is None else kernels.result()
            batch = Batch(
                parts,
                _make_cache(parts, config, placement, settings),
                vocabulary=vocabulary.result().size,
                eos_token_ids=vocabulary.result().eos_token_ids,
                prefix_reuse=settings.prefix_reuse,
                kernels=compiled,
                threads=_thread_count(placement, settings),
            )
            if placement.device.type == "cuda":
                batch.prepare_gpu(graphs=settings.cuda_graphs)
            return batch

    return TorchEngine(load)


def _refuse_settings_of_vllm(settings: Settings) -> None:
    for name, is_vllms in (
        ("tensor_parallel", settings.tensor_parallel not in (None, 1)),
        ("pipeline_parallel", settings.pipeline_parallel not in (None, 1)),
        ("distributed", settings.distributed != "auto"),
        ("memory_fraction", "memory_fraction" in settings.model_fields_set),
    ):
        if is_vllms:
            raise BadSettings(
                f"LLAMA_{name.upper()} is {getattr(settings, name)}, which only the vllm engine supports; "
                "unset it, or set LLAMA_ENGINE to vllm"
            )


def _thread_count(placement: Placement, settings: Settings) -> ThreadCount | None:
    """Let torch and the kernels, which have been compiled, use the same number of CPU threads.

    Return None if this number is fixed or has no effect.
    """
    count = torch.get_num_threads()
    use_threads(count)
    if settings.threads is not None or placement.device.type != "cpu":
        return None
    return ThreadCount(count, use_threads)


def _make_cache(parts: ModelParts, config: LlamaConfig, placement: Placement, settings: Settings) -> KVCache:
    """Create the key/value cache, in the memory that the model leaves. Raises DoesNotFit."""
    budget = settings.cache_memory
    shape = fit_cache(
        config,
        placement.cache_dtype,
        budget=_free_memory(parts, config, placement, settings) if budget is None else int(budget),
        context=placement.context,
        rows=settings.max_concurrency,
    )
    return KVCache.for_placement(config, shape, placement)


def _free_memory(parts: ModelParts, config: LlamaConfig, placement: Placement, settings: Settings) -> int:
    """Return how many bytes the cache may use.

    On a GPU, this is the free memory minus a reserve. On a CPU, it is half of the available memory, because
    other programs use that memory too.
    """
    if placement.device.type != "cuda":
        return available_memory() // 2
    _run_once(parts, config, placement)
    torch.cuda.empty_cache()  # otherwise, unused memory that torch has kept would not count as free
    free, _ = torch.cuda.mem_get_info(placement.device)
    reserve = gpu_reserve(
        config,
        placement.quantization,
        placement.dtype,
        rows=settings.max_concurrency,
        context=placement.context,
        flash_attention=placement.flash_attention,
    )
    # Graphs contain addresses in the cache, so they are captured after it has been created.
    needed = reserve.total if settings.cuda_graphs else reserve.without_graphs
    return max(int(free) - needed, 0)


def _run_once(parts: ModelParts, config: LlamaConfig, placement: Placement) -> None:
    """Run one prefill and one decode step with a small cache.

    Libraries then allocate what they keep, such as workspaces, so that it does not count as free memory.
    """
    length = min(MOST_PROMPT_TOKENS["cuda"], placement.context)
    cache = KVCache.for_placement(config, CacheShape(1, length), placement)
    Runner(parts, Rows(cache)).run_largest_steps(length)
