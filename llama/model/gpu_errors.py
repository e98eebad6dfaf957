"""Recognizes the errors with which torch and CUDA report that a GPU is out of memory.

Knows their exceptions and messages; knows nothing about the work that failed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# The driver's message, and those of cuBLAS, which allocates the memory of its handles without torch.
_MESSAGES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one of the errors that caused it, reports that a GPU is out of memory.

    torch's allocator raises `torch.OutOfMemoryError`. Other memory, such as that of a captured graph, is
    allocated by CUDA itself. If that fails, torch raises `torch.AcceleratorError`, which is a RuntimeError,
    with the message of the driver.
    """
    return any(
        isinstance(one, torch.OutOfMemoryError)
        or (isinstance(one, RuntimeError) and any(message in str(one) for message in _MESSAGES))
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its causes, and the errors during whose handling these were raised."""
    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__cause__, one.__context__]
