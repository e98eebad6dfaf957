"""Start a VLLMEngine for a folder of weights: which GPUs, in which precision, in how many parts.

Knows settings, GPUs and vLLM's arguments; knows nothing of requests.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig

from llama.errors import BadSettings
from llama.model.checkpoint import Checkpoint
from llama.model.memory import available_memory
from llama.model.placement import planner_for
from llama.model.precision_plan import Gpu, Planner, assume_identical, bytes_per_token, parallel_sizes
from llama.model.quantized_layers import Quantization
from llama.settings import Settings
from llama.setup_times import SetupTimes

# Before vLLM is imported, and for its processes: it starts them by itself, tells nobody of its use, and
# looks for nothing on a hub.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm import AsyncEngineArgs
from vllm.v1.executor import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from llama.vllm_engine.engine import VLLMEngine

logger = logging.getLogger(__name__)

_NAMES: dict[Quantization, str | None] = {"none": None, "fp8": "fp8_per_channel"}
_BLOCK = 128  # tokens of cache that vLLM gives out at a time on a CPU


def start_engine(
    folder: Path,
    config: LlamaConfig,
    settings: Settings,
    times: SetupTimes,
    *,
    vocabulary: int,
    eos_token_ids: Collection[int],
) -> VLLMEngine:
    """Load `folder` as the settings say and start serving it. Raises a WeightsError."""
    if settings.device != "auto":
        raise BadSettings(
            "LLAMA_DEVICE is for the torch engine; unset it, and name GPUs in CUDA_VISIBLE_DEVICES"
        )
    if settings.threads is not None:
        raise BadSettings("LLAMA_THREADS is for the torch engine; unset it, or set OMP_NUM_THREADS")
    checkpoint = Checkpoint(folder)  # in vLLM's processes a damaged file would be an error without a name
    gpus = gpus_for_vllm(settings)
    arguments = engine_arguments(folder, planner_for(settings, config, gpus, "vllm"), settings)
    if config.tie_word_embeddings and checkpoint.has_head_of_its_own:
        arguments.hf_overrides = {"tie_word_embeddings": False}
    logger.info(
        "vLLM: %s, pipeline parallel %d, tensor parallel %d, on %s",
        _method(config) or arguments.quantization or arguments.dtype,
        arguments.pipeline_parallel_size,
        arguments.tensor_parallel_size,
        "GPUs" if gpus else "the CPU",
    )
    with times.part("engine"):
        os.environ.pop("HF_TOKEN", None)  # which Ray would hand to every machine
        return VLLMEngine(arguments, vocabulary=vocabulary, eos_token_ids=eos_token_ids)


def gpus_for_vllm(settings: Settings) -> list[Gpu]:
    """Cards, with what vLLM may take of each. Asked of the driver: a process that has used CUDA itself
    holds memory on a card that its children need. Raises BadSettings."""
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        raise BadSettings("LLAMA_ENGINE is vllm, which finds no GPU; start the container with --gpus all")
    if not current_platform.is_cuda_alike():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        memory = int(current_platform.get_device_total_memory(index) * settings.memory_fraction)
        capability = current_platform.get_device_capability(index)
        assert capability is not None  # a CUDA device has one
        gpus.append(
            Gpu(current_platform.get_device_name(index), memory, (capability.major, capability.minor))
        )
    return gpus


def engine_arguments(folder: Path, planner: Planner, settings: Settings) -> AsyncEngineArgs:
    """What vLLM is started with on the planner's GPUs, which are this machine's; none means the CPU."""
    config, gpus = planner.config, planner.gpus
    pipeline, tensor = parallel_sizes(
        config, len(gpus), tensor=settings.tensor_parallel, pipeline=settings.pipeline_parallel
    )
    workers = pipeline * tensor
    cache: int | None = settings.cache_memory
    if not gpus:
        if "memory_fraction" in settings.model_fields_set:
            raise BadSettings("LLAMA_MEMORY_FRACTION is for GPUs; set LLAMA_CACHE_MEMORY, or unset it")
        if cache is None:
            cache = _cache_on_a_cpu(planner, settings)
    return AsyncEngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=str(planner.dtype).removeprefix("torch."),
        quantization=_quantization(replace(planner, gpus=assume_identical(gpus, workers)), settings),
        # vLLM's word for the FP8 of `weights pack`
        allow_deprecated_quantization=_method(config) == "fbgemm_fp8",
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        distributed_executor_backend=_backend(settings, workers, gpus),
        max_model_len=_context(planner, settings),
        max_num_seqs=settings.max_concurrency,
        enable_prefix_caching=settings.prefix_reuse,
        disable_log_stats=True,
        gpu_memory_utilization=settings.memory_fraction,
        kv_cache_memory_bytes=None if cache is None else cache // workers,
        # Compiling for a CPU takes a minute a start.
        enforce_eager=not (gpus and settings.cuda_graphs),
        # On a CPU a seeded request whose prompt was read in parts would end vLLM (0.32: torch has no such
        # generator). None: vLLM's own choice.
        enable_chunked_prefill=None if gpus else False,
    )


def _context(planner: Planner, settings: Settings) -> int:
    """-1: as much of the model's own as the cache holds."""
    config = planner.config
    if config.rope_parameters["rope_type"] == "dynamic":
        # vLLM (0.32) allows the stretched context, but has rotary tables for the trained positions only.
        return min(planner.context, int(config.max_position_embeddings))
    return planner.context if settings.max_context else -1


def _backend(settings: Settings, workers: int, gpus: Sequence[Gpu]) -> str | type[Executor] | None:
    """Ray where there are more workers than GPUs in this machine. Raises BadSettings."""
    wanted = settings.distributed
    if wanted == "auto":
        wanted = "ray" if workers > len(gpus) > 0 else "mp"
    if wanted == "ray" and not gpus:
        raise BadSettings("LLAMA_DISTRIBUTED is ray, which vLLM has on GPUs only; unset it")
    if wanted == "mp" and workers > len(gpus) > 0:
        raise BadSettings(
            f"LLAMA_DISTRIBUTED is mp and {workers} workers have {len(gpus)} GPUs here; set it to ray, or "
            "ask for fewer with LLAMA_TENSOR_PARALLEL and LLAMA_PIPELINE_PARALLEL"
        )
    if workers > 1 or settings.distributed != "auto":
        return wanted
    # On a CPU vLLM gives even one worker a process of its own, and the two then wait for each other by
    # yielding their cores all the time: streams stood still for seconds on two cores. A class is left alone.
    return None if gpus else UniProcExecutor


def _method(config: LlamaConfig) -> str | None:
    """In what way a checkpoint comes quantized."""
    raw = getattr(config, "quantization_config", None) or {}
    return raw.get("quant_method")


def _quantization(planner: Planner, settings: Settings) -> str | None:
    """In vLLM's words. A checkpoint that comes quantized stays so, AWQ and GPTQ too: vLLM reads which."""
    if (method := _method(planner.config)) is not None:
        if method == "bitsandbytes":
            raise BadSettings(
                "the checkpoint is bitsandbytes', which vLLM does not read any more; set LLAMA_ENGINE to "
                "torch, or LLAMA_WEIGHTS to plain, AWQ, GPTQ or FP8 weights"
            )
        if settings.quantization not in ("auto", planner.stored):
            raise BadSettings(
                f"LLAMA_QUANTIZATION is {settings.quantization} and the checkpoint is quantized otherwise; "
                "unset it"
            )
        return None
    if not planner.gpus:
        if settings.quantization not in ("auto", "none"):
            raise BadSettings(
                f"LLAMA_QUANTIZATION is {settings.quantization}, which vLLM cannot do on a CPU; "
                "set it to none"
            )
        return None
    return _NAMES[replace(planner, stored="none").pick(settings.quantization)]


def _cache_on_a_cpu(planner: Planner, settings: Settings) -> int:
    """Bytes for all requests, or half of what is free. vLLM gives them out by blocks, and keeps one."""
    blocks = settings.max_concurrency * -(-planner.context // _BLOCK) + 1
    wanted = blocks * _BLOCK * bytes_per_token(planner.config, planner.dtype)
    return min(wanted, available_memory() // 2)
