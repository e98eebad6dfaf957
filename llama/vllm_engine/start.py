"""Start a VLLMEngine for a weights folder: choose the GPUs, the precision and the number of workers.

Knows settings, GPUs and vLLM's arguments; knows nothing about requests.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig

from llama.engine import Vocabulary
from llama.errors import BadSettings
from llama.model.checkpoint import Checkpoint
from llama.model.memory import available_memory
from llama.model.parallel_sizes import assume_identical, parallel_sizes
from llama.model.placement import planner_for
from llama.model.precision_plan import Gpu, Planner, bytes_per_token
from llama.model.quantized_layers import Quantization
from llama.settings import Settings
from llama.setup_times import SetupTimes

# These must be set before vLLM is imported, and its processes inherit them: vLLM spawns its workers, sends no
# usage statistics, and does not contact the Hugging Face hub.
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
_BLOCK = 128  # tokens per block of vLLM's cache on a CPU


def start_engine(
    folder: Path,
    config: LlamaConfig,
    settings: Settings,
    times: SetupTimes,
    vocabulary: Future[Vocabulary],
) -> VLLMEngine:
    """Load the weights in `folder` according to the settings, and start an engine. Raises a WeightsError."""
    if settings.device != "auto":
        raise BadSettings(
            f"LLAMA_DEVICE is {settings.device}, which only the torch engine supports; unset it, and select "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )
    if settings.threads is not None:
        raise BadSettings(
            f"LLAMA_THREADS is {settings.threads}, which only the torch engine supports; unset it, or set "
            "OMP_NUM_THREADS instead"
        )
    checkpoint = Checkpoint(folder)  # checks the files: vLLM's error would not name a damaged file
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
        os.environ.pop("HF_TOKEN", None)  # Ray would copy it to every machine
        tokens = vocabulary.result()
        return VLLMEngine(arguments, vocabulary=tokens.size, eos_token_ids=tokens.eos_token_ids)


def gpus_for_vllm(settings: Settings) -> list[Gpu]:
    """Return this machine's GPUs, each with the memory that vLLM may use. Raises BadSettings.

    This asks the driver, not CUDA: a process that has used CUDA occupies GPU memory that its child processes
    need.
    """
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        raise BadSettings(
            "LLAMA_ENGINE is vllm, but vLLM found no GPU; in a container, pass --gpus all to `docker run`, "
            "otherwise unset LLAMA_ENGINE"
        )
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
    """Return vLLM's arguments for the planner's GPUs, which are those of this machine. Raises BadSettings.

    Without GPUs, vLLM uses the CPU.
    """
    config, gpus = planner.config, planner.gpus
    pipeline, tensor = parallel_sizes(
        config, len(gpus), tensor=settings.tensor_parallel, pipeline=settings.pipeline_parallel
    )
    workers = pipeline * tensor
    cache: int | None = settings.cache_memory
    if not gpus:
        if "memory_fraction" in settings.model_fields_set:
            raise BadSettings(
                f"LLAMA_MEMORY_FRACTION is {settings.memory_fraction}, which applies to GPUs only; unset it, "
                "or set LLAMA_CACHE_MEMORY instead"
            )
        if cache is None:
            cache = _cache_on_a_cpu(planner, settings)
    return AsyncEngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=str(planner.dtype).removeprefix("torch."),
        quantization=_quantization(replace(planner, gpus=assume_identical(gpus, workers)), settings),
        # "fbgemm_fp8" is vLLM's name for the FP8 format of `weights pack`. Without this, vLLM refuses it as
        # deprecated.
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
        # Compiling for a CPU would take one minute at every start.
        enforce_eager=not (gpus and settings.cuda_graphs),
        # On a CPU, a seeded request whose prompt is read in several chunks would crash vLLM 0.32, because
        # torch's CPU generators have no offset. None leaves the choice to vLLM.
        enable_chunked_prefill=None if gpus else False,
    )


def _context(planner: Planner, settings: Settings) -> int:
    """Return the context length; -1 means the model's context, or as much of it as fits in the cache."""
    config = planner.config
    if config.rope_parameters["rope_type"] == "dynamic":
        # vLLM 0.32 accepts the stretched context, but its rotary tables have only the trained positions.
        return min(planner.context, int(config.max_position_embeddings))
    return planner.context if settings.max_context else -1


def _backend(settings: Settings, workers: int, gpus: Sequence[Gpu]) -> str | type[Executor] | None:
    """Return vLLM's executor: Ray if there are more workers than GPUs in this machine. Raises BadSettings."""
    wanted = settings.distributed
    if wanted == "auto":
        wanted = "ray" if workers > len(gpus) > 0 else "mp"
    if wanted == "ray" and not gpus:
        raise BadSettings("LLAMA_DISTRIBUTED is ray, which vLLM supports only on GPUs; unset it")
    if wanted == "mp" and workers > len(gpus) > 0:
        raise BadSettings(
            f"LLAMA_DISTRIBUTED is mp, but this machine has {len(gpus)} GPUs for {workers} workers; set it "
            "to ray, or use fewer workers (LLAMA_TENSOR_PARALLEL, LLAMA_PIPELINE_PARALLEL)"
        )
    if workers > 1 or settings.distributed != "auto":
        return wanted
    # By default on a CPU, vLLM runs even a single worker in a separate process. The two processes then wait
    # for each other by yielding their cores all the time: on two cores, streams paused for seconds. vLLM does
    # not replace an executor that is passed as a class.
    return None if gpus else UniProcExecutor


def _method(config: LlamaConfig) -> str | None:
    """Return how a checkpoint is quantized, or None."""
    raw = getattr(config, "quantization_config", None) or {}
    return raw.get("quant_method")


def _quantization(planner: Planner, settings: Settings) -> str | None:
    """Return the quantization in vLLM's terms. Raises BadSettings.

    A quantized checkpoint keeps its quantization, which may be AWQ or GPTQ: vLLM reads the configuration.
    """
    if (method := _method(planner.config)) is not None:
        if method == "bitsandbytes":
            raise BadSettings(
                "the checkpoint is quantized with bitsandbytes, which vLLM no longer supports; set "
                "LLAMA_ENGINE to torch, or set LLAMA_WEIGHTS to plain, AWQ, GPTQ or FP8 weights"
            )
        if settings.quantization not in ("auto", planner.stored):
            raise BadSettings(
                f"LLAMA_QUANTIZATION is {settings.quantization}, but the checkpoint is quantized with "
                f"{method}; unset it"
            )
        return None
    if not planner.gpus:
        if settings.quantization not in ("auto", "none"):
            raise BadSettings(
                f"LLAMA_QUANTIZATION is {settings.quantization}, which vLLM does not support on a CPU; "
                "set it to none"
            )
        return None
    return _NAMES[replace(planner, stored="none").pick(settings.quantization)]


def _cache_on_a_cpu(planner: Planner, settings: Settings) -> int:
    """Return the bytes that all requests need, but at most half of the available memory.

    vLLM assigns the cache in blocks, and keeps one block for itself.
    """
    blocks = settings.max_concurrency * -(-planner.context // _BLOCK) + 1
    wanted = blocks * _BLOCK * bytes_per_token(planner.config, planner.dtype)
    return min(wanted, available_memory() // 2)
