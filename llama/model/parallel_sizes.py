"""How many GPUs share every layer, and into how many pipeline stages vLLM divides a model.

Knows the shape of a model and the number of GPUs; knows nothing about memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama.errors import BadSettings

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from llama.model.precision_plan import Gpu


def parallel_sizes(
    config: LlamaConfig, gpus: int, *, tensor: int | None, pipeline: int | None
) -> tuple[int, int]:
    """The number of pipeline stages, and of GPUs in each stage, for vLLM.

    Sizes that are None are chosen to use all of the machine's `gpus`: the tensor-parallel size is the largest
    one that divides the heads and the MLP width evenly, and the pipeline uses the remaining GPUs. Raises
    BadSettings.
    """
    heads, kv_heads, mlp = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size

    def divides(size: int) -> bool:
        return heads % size == mlp % size == 0 and 0 in (kv_heads % size, size % kv_heads)

    if tensor is None:
        left = max(gpus // (pipeline or 1), 1)
        tensor = max(size for size in range(1, left + 1) if left % size == 0 and divides(size))
    elif not divides(tensor):
        raise BadSettings(
            f"LLAMA_TENSOR_PARALLEL is {tensor}, but the model has {heads} attention heads, {kv_heads} "
            f"key/value heads and an MLP width of {mlp}; set it to a common divisor of the attention heads "
            "and the MLP width that also divides the key/value heads or is a multiple of them"
        )
    return pipeline or max(gpus // tensor, 1), tensor


def assume_identical(gpus: Sequence[Gpu], workers: int) -> tuple[Gpu, ...]:
    """The GPUs of all workers. Every one is assumed to be like the smallest GPU of this machine."""
    return (min(gpus, key=lambda gpu: gpu.free),) * workers if gpus else ()
