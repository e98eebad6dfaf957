"""Start a TorchEngine for a folder of weights: load, plan the cache, say what is served.

Knows settings and memory; knows nothing of requests.
"""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama.errors import BadCheckpoint, EngineError
from llama.loader import (
    arithmetic_dtype,
    check_tokenizer,
    context_wanted,
    eos_token_ids,
    load_model,
    pick_device,
    pick_dtype,
    pick_quantization,
)
from llama.metrics import SetupTimes
from llama.plan import RESERVE
from llama.sampling import SamplingParams
from llama.settings import Settings
from llama.tokenizer import Tokenizer
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.kv_cache import CachePlan, plan_cache

logger = logging.getLogger(__name__)


def start_engine(
    folder: Path, config: LlamaConfig, tokenizer: Tokenizer, settings: Settings, times: SetupTimes
) -> TorchEngine:
    """Load `folder` as the settings say and start serving it. Raises a WeightsError."""
    check_tokenizer(config, tokenizer.size, folder)
    ends = eos_token_ids(folder, config) | {tokenizer.eos_token_id}
    device = pick_device(settings)
    dtype, quantization = pick_dtype(settings, device, config), pick_quantization(settings, device, config)
    precision = str(dtype).removeprefix("torch.") if quantization == "none" else quantization

    def load() -> tuple[LlamaForCausalLM, CachePlan]:
        with times.part("weights"):
            model = load_model(folder, config, dtype, device, quantization)
        logger.info("loaded %s: %s on %s", folder.name, precision, device)
        return model, plan_for(model, settings)

    with times.part("engine"):
        engine = TorchEngine(
            load,
            vocabulary=tokenizer.size,
            eos_token_ids={i for i in ends if i < tokenizer.size},
            prefix_reuse=settings.prefix_reuse,
        )
    with times.part("warm-up"):
        _warm_up(engine, tokenizer.eos_token_id, folder)
    logger.info("context %d tokens, %d requests at once", engine.context_length, engine.max_requests)
    return engine


def _warm_up(engine: TorchEngine, token_id: int, folder: Path) -> None:
    """Prefill and decode once, so that the first caller does not pay for first-time work, nor meet
    weights that cannot be computed with."""
    params = SamplingParams(temperature=0.0, max_new_tokens=2, min_new_tokens=2)
    try:
        for _ in engine.submit([token_id], params):
            pass
    except EngineError as error:
        engine.close()
        raise BadCheckpoint(
            f"the first step of the model in {folder} failed ({error}); copy the weights again, or try "
            "other values of LLAMA_DTYPE and LLAMA_DEVICE"
        ) from error


def plan_for(model: LlamaForCausalLM, settings: Settings) -> CachePlan:
    """The cache that fits beside a loaded model. Raises DoesNotFit."""
    budget = _free_memory(model.device) if settings.cache_memory is None else settings.cache_memory
    return plan_cache(
        model.config,
        arithmetic_dtype(model.dtype, model.device),
        budget=int(budget),
        context=context_wanted(settings, model.config),
        rows=settings.max_concurrency,
    )


def _free_memory(device: torch.device) -> int:
    """Bytes that the cache may take: on a GPU what is free but a reserve; on a CPU, which others use
    too, half of what is available."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(int(free) - RESERVE, 0)
    return int(psutil.virtual_memory().available) // 2
