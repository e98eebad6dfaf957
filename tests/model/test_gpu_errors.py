"""Which errors mean that a GPU is out of memory, and how the engine reports them.

The errors are real objects of torch, but no GPU raised them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama.errors import DoesNotFit, EngineNotStarted
from llama.model.assembly import TakeLayer
from llama.model.config import load_config
from llama.model.gpu_errors import is_out_of_memory
from llama.model.loader import load_model
from llama.model.placement import Placement
from llama.torch_engine.batch import Batch
from llama.torch_engine.engine import TorchEngine

LACK_OF_MEMORY = {
    "torch's allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "the driver": torch.AcceleratorError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "a new handle": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
}


def raised_while_handling(first: BaseException, second: BaseException) -> BaseException:
    try:
        try:
            raise first
        finally:
            raise second
    except BaseException as error:
        return error


@pytest.mark.parametrize("error", LACK_OF_MEMORY.values(), ids=LACK_OF_MEMORY.keys())
def test_a_lack_of_memory_is_recognized_even_if_it_caused_another_error(error: BaseException) -> None:
    assert is_out_of_memory(error)
    later = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert is_out_of_memory(raised_while_handling(error, later))


def test_errors_that_cause_each_other_are_followed_once() -> None:
    first, second = RuntimeError("a kernel failed"), RuntimeError("and so did its caller")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)
    second.__context__ = LACK_OF_MEMORY["the driver"]
    assert is_out_of_memory(first)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("the file says: out of memory"),
        EngineNotStarted("a decode step cannot be captured"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_not_a_lack_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", LACK_OF_MEMORY.values(), ids=LACK_OF_MEMORY.keys())
def test_an_engine_that_lacks_memory_while_it_starts_says_what_to_set(error: Exception) -> None:
    def load() -> Batch:
        raise error

    with pytest.raises(DoesNotFit, match="^E3005 DoesNotFit: .*CUDA (error|out of memory)") as raised:
        TorchEngine(load)
    assert "set a smaller LLAMA_CACHE_MEMORY, COG_MAX_CONCURRENCY or LLAMA_MAX_CONTEXT" in str(raised.value)


def test_an_error_that_already_says_what_to_do_is_not_replaced() -> None:
    def load() -> Batch:
        raise DoesNotFit("the model does not fit") from LACK_OF_MEMORY["the driver"]

    with pytest.raises(DoesNotFit, match="^E3005 DoesNotFit: the model does not fit$"):
        TorchEngine(load)


def raises(error: Exception) -> TakeLayer:
    def take_layer(layers: torch.nn.ModuleList, index: int) -> None:
        raise error

    return take_layer


@pytest.mark.parametrize("error", LACK_OF_MEMORY.values(), ids=LACK_OF_MEMORY.keys())
def test_a_model_that_does_not_fit_while_it_is_loaded_is_named(llama_folder: Path, error: Exception) -> None:
    placement = Placement(torch.device("cpu"), torch.float32, "none", 64)
    with pytest.raises(
        DoesNotFit, match="^E3005 DoesNotFit: the model in .*tiny-llama-chat does not fit on cpu"
    ):
        load_model(llama_folder, load_config(llama_folder), placement, raises(error))


def test_other_errors_of_a_start_are_raised_unchanged() -> None:
    error = RuntimeError("a kernel failed")

    def load() -> Batch:
        raise error

    with pytest.raises(RuntimeError, match="a kernel failed") as raised:
        TorchEngine(load)
    assert raised.value is error
