"""Where the torch engine holds a model and in what precision: decided once, from settings and config.json.

`precision_plan.py` picks the quantization; `vllm_engine/start.py` has vLLM's exceptions. Knows settings,
devices and types of numbers; knows nothing of files or of how a layer computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from llama.errors import BadSettings
from llama.model.config import context_length
from llama.model.precision_plan import Gpu, Planner
from llama.model.quantized_layers import Quantization, from_config
from llama.settings import EngineName, Settings


@dataclass(frozen=True, slots=True)
class Placement:
    """How the torch engine holds a model."""

    device: torch.device
    dtype: torch.dtype
    """Of every weight that is not quantized."""
    quantization: Quantization
    """Of the decoder's linear layers."""
    context: int
    """Tokens of prompt and answer together that one request may have."""

    @property
    def arithmetic(self) -> torch.dtype:
        """What is computed in: `dtype` on a GPU, and float32 on a CPU unless its bfloat16 is not slower."""
        if self.device.type != "cpu" or (self.dtype is torch.bfloat16 and has_fast_bfloat16()):
            return self.dtype
        return torch.float32

    @property
    def cache_dtype(self) -> torch.dtype:
        """What keys and values are held in, and attention is computed in.

        Milliseconds of attention in one layer of the benchmark model, 32 requests of 192 tokens:

            CPU               fused, bfloat16   two products, bfloat16   two products, float32
            Xeon with AMX     1.3               2.9
            EPYC without      5.0                                        2.2
        """
        wide = self.device.type == "cpu" and not has_matrix_units()
        return torch.float32 if wide else self.arithmetic

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        return f"{precision if self.quantization == 'none' else self.quantization} on {self.device}"


def place(settings: Settings, config: LlamaConfig) -> Placement:
    """Decide it for this machine. Raises BadSettings, BadConfig or DoesNotFit."""
    device = pick_device(settings)
    gpus = [gpu_of(device)] if device.type == "cuda" else []
    planner = planner_for(settings, config, gpus, "torch")
    return Placement(device, planner.dtype, planner.pick(settings.quantization), planner.context)


def planner_for(settings: Settings, config: LlamaConfig, gpus: Sequence[Gpu], engine: EngineName) -> Planner:
    """What the settings and a model's configuration say, for these GPUs. No GPUs: the CPU."""
    return Planner(
        config=config,
        gpus=tuple(gpus),
        context=context_length(config, settings.max_context),
        dtype=_dtype(settings, config, min((gpu.capability for gpu in gpus), default=None)),
        engine=engine,
        stored=from_config(getattr(config, "quantization_config", None) or {}),
    )


def pick_device(settings: Settings) -> torch.device:
    """Raises BadSettings for a device that is not there."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError(f"{name} is no GPU that is served")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadSettings(
            f"LLAMA_DEVICE is {name!r} and torch cannot use it; set it to cpu, cuda:0 or auto"
        ) from error


def _dtype(settings: Settings, config: LlamaConfig, capability: tuple[int, int] | None) -> torch.dtype:
    """What weights are held in. `auto`: bfloat16 on GPUs that compute in it, float16 on older ones. On a CPU,
    which has no `capability`, 16 bits if the checkpoint has no more (`Placement.arithmetic` may be wider)."""
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if capability is None:
        return config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def gpu_of(device: torch.device) -> Gpu:
    """The card and what is free on it."""
    free, _ = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(torch.cuda.get_device_name(device), free, (major, minor))


def local_gpus() -> list[Gpu]:
    """All cards of this machine. Raises BadSettings when torch can use none."""
    if not torch.cuda.is_available():
        raise BadSettings(
            "there is no GPU here that torch can use; name some with --gpus, such as --gpus 80,80"
        )
    return [gpu_of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices faster than others: with matrix units, or with
    AVX512-BF16 on AMD's. One layer of the benchmark at 32 rows takes, in ms, oneDNN in bfloat16 and FBGEMM:
    0.4 and 1.4 on a Xeon with AMX, 2.1 and 1.4 there without it, 1.1 and 2.2 on an EPYC."""
    can = torch.cpu.get_capabilities()
    amd = str(can.get("cpu_name")).startswith("AMD")
    return bool(torch._C._has_mkldnn and (has_matrix_units() or (amd and can.get("avx512_bf16"))))


def has_matrix_units() -> bool:
    """AMX, for bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
