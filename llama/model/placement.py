"""Decides the device and the precision of the torch engine's model once, from settings and config.json.

`precision_plan.py` chooses the quantization; `vllm_engine/start.py` handles what is different for vLLM. Knows
settings, devices and dtypes; knows nothing about files or how a layer computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from llama.errors import BadSettings, DoesNotFit
from llama.model.config import context_length
from llama.model.gpu_errors import is_out_of_memory
from llama.model.precision_plan import Gpu, Planner
from llama.model.quantized_layers import Quantization, from_config
from llama.settings import EngineName, Settings

_LARGEST_FLASH_HEAD = 256


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in what precision the torch engine runs a model."""

    device: torch.device
    dtype: torch.dtype
    """The dtype of all weights that are not quantized."""
    quantization: Quantization
    """The quantization of the decoder's linear layers."""
    context: int
    """The maximum number of tokens of one request, prompt and answer together."""
    flash_attention: bool = False
    """Whether attention uses torch's flash attention, which only some GPUs and types support."""

    @property
    def arithmetic(self) -> torch.dtype:
        """The dtype of computation: `dtype` on a GPU; float32 on a CPU, unless the weights are in bfloat16
        and the CPU computes faster in it."""
        if self.device.type != "cpu" or (self.dtype is torch.bfloat16 and has_fast_bfloat16()):
            return self.dtype
        return torch.float32

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values: that of the weights before they are quantized."""
        return self.dtype

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        return f"{precision if self.quantization == 'none' else self.quantization} on {self.device}"


def place(settings: Settings, config: LlamaConfig) -> Placement:
    """Decide the placement on this machine. Raises BadSettings, BadConfig or DoesNotFit."""
    device = pick_device(settings)
    gpus = [gpu_of(device)] if device.type == "cuda" else []
    planner = planner_for(settings, config, gpus, "torch")
    quantization = planner.pick(settings.quantization)
    return Placement(device, planner.dtype, quantization, planner.context, planner.flash_attention)


def planner_for(settings: Settings, config: LlamaConfig, gpus: Sequence[Gpu], engine: EngineName) -> Planner:
    """Create a planner from the settings and a model's configuration. Without `gpus` it plans for the CPU."""
    capability = min((gpu.capability for gpu in gpus), default=None)
    dtype = _dtype(settings, config, capability)
    return Planner(
        config=config,
        gpus=tuple(gpus),
        context=context_length(config, settings.max_context),
        rows=settings.max_concurrency,
        dtype=dtype,
        cuda_graphs=settings.cuda_graphs,
        flash_attention=capability is not None and has_flash_attention(config, dtype, capability),
        engine=engine,
        stored=from_config(getattr(config, "quantization_config", None) or {}),
    )


def pick_device(settings: Settings) -> torch.device:
    """The device that the settings name; `auto` means the first CUDA GPU, or the CPU if there is none.

    Raises DoesNotFit if a GPU has no memory left. Raises BadSettings if torch cannot use the device for
    another reason, or if it is neither the CPU nor a CUDA GPU: `mps` is not supported.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type in ("cpu", "cuda"):
            return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise DoesNotFit(
                f"{name} has no memory left for this process ({error}); end other programs that use it, or "
                "set LLAMA_DEVICE to another GPU"
            ) from error
        raise BadSettings(
            f"LLAMA_DEVICE is {name!r}, which torch cannot use on this machine; set it to cpu or auto"
        ) from error
    raise BadSettings(
        f"LLAMA_DEVICE is {name!r}, but only CPUs and CUDA GPUs are supported; set it to cpu, cuda:0 or auto"
    )


def _dtype(settings: Settings, config: LlamaConfig, capability: tuple[int, int] | None) -> torch.dtype:
    """The dtype of weights. `capability` is None on a CPU.

    `auto` means bfloat16 on GPUs that compute in it, and float16 on older ones. On a CPU it means the
    checkpoint's dtype if that has 16 bits, otherwise float32 (`Placement.arithmetic` may be wider).
    """
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if capability is None:
        return config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def has_flash_attention(config: LlamaConfig, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether torch's flash attention supports a model on a GPU.

    Source: the checks of `mha_varlen_fwd` in torch 2.11's flash_api.cpp.
    """
    size = config.head_dim
    return capability >= (8, 0) and dtype.itemsize == 2 and size % 8 == 0 and size <= _LARGEST_FLASH_HEAD


def gpu_of(device: torch.device) -> Gpu:
    """Describe a GPU and its free memory."""
    free, _ = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(torch.cuda.get_device_name(device), free, (major, minor))


def local_gpus() -> list[Gpu]:
    """All GPUs of this machine. Raises BadSettings if torch cannot use any."""
    if not torch.cuda.is_available():
        raise BadSettings(
            "torch cannot use a GPU on this machine; describe the GPUs with --gpus, for example --gpus 85"
        )
    return [gpu_of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def has_fast_bfloat16() -> bool:
    """Whether oneDNN's bfloat16 matrix product is the fastest one on this CPU: with AMX, and with AVX512-BF16
    on AMD's CPUs. False if torch was built without oneDNN, as on macOS.

    One linear layer of the benchmark model with 32 rows, in ms:

        CPU                         oneDNN, bfloat16   FBGEMM, float16 weights
        Xeon with AMX               0.4                1.4
        the same Xeon without AMX   2.1                1.4
        EPYC with AVX512-BF16       1.1                2.2
    """
    capabilities = torch.cpu.get_capabilities()
    amd = str(capabilities.get("cpu_name")).startswith("AMD")
    fast = has_matrix_units() or (amd and capabilities.get("avx512_bf16"))
    # ONEDNN_MAX_CPU_ISA can forbid instructions that the CPU has.
    return bool(torch._C._has_mkldnn and fast and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_matrix_units() -> bool:
    """Whether the CPU has AMX matrix units for bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
