"""Compiles the CPU kernels with numba while a model is being loaded.

Compiling takes some seconds, so the compiled code is kept in the cache folder. If numba or its OpenMP
threading layer is missing, or if this CPU cannot run the kernels, the engine uses torch alone. The results
are then the same, but the engine is slower. Knows numba; knows nothing about what the kernels compute.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Kernel = Callable[..., None]

_STORED = {torch.bfloat16: "uint16", torch.float16: "int16", torch.float32: "float32"}
"""For each type of a tensor, the type of the numbers in its array (`cpu_arithmetic.py`)."""
# With this threading layer, numba uses the OpenMP library that torch has loaded, and so the same threads. The
# other layers have their own threads, and only one thread at a time may call `workqueue`.
_LAYER = "omp"


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled functions of `cpu_kernels.py`, for one type of computation and one type of cache."""

    attend_rows: Kernel
    store_chunk: Kernel
    add_and_norm: Kernel
    swiglu: Kernel
    linear_rows: Kernel | None = None
    """None unless the inputs are in bfloat16."""


def as_array(tensor: Tensor) -> Any:
    """Return an array for the kernels, which shares the memory of a tensor on the CPU."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype is torch.float16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


def compile_in_background(
    arithmetic: torch.dtype, cached: torch.dtype, cache_dir: Path
) -> Future[Kernels | None]:
    """Start to compile the kernels for inputs of type `arithmetic` and keys and values of type `cached`.

    The result is None if the kernels cannot be compiled; a warning in the log has the reason. Compiled code
    is kept in a folder below `cache_dir`.
    """
    compiled: Future[Kernels | None] = Future()

    def work() -> None:
        try:
            compiled.set_result(_compile(arithmetic, cached, cache_dir))
        except BaseException as error:  # the thread that loads the model waits for a result
            logger.warning(
                "no compiled kernels, so the engine is slower: %s: %s",
                type(error).__name__,
                _first_line(error),
            )
            compiled.set_result(None)

    threading.Thread(target=work, name="llama-compiler", daemon=True).start()
    return compiled


def use_threads(count: int) -> None:
    """Let torch and the kernels use `count` threads. Call this function on the thread that computes."""
    torch.set_num_threads(count)
    numba = sys.modules.get("numba")
    if numba is None:
        return
    try:
        numba.threading_layer()
    except ValueError:  # numba has started no threads, because there are no kernels
        return
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


def _compile(arithmetic: torch.dtype, cached: torch.dtype, cache_dir: Path) -> Kernels:
    import numba

    if numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    # LLVM would end the process, because it has no conversion in software.
    if cached is torch.float16 and torch.cpu.get_capabilities().get("f16c") is False:
        raise RuntimeError("this CPU cannot convert float16 numbers")
    numba.config.THREADING_LAYER = _LAYER
    try:
        numba.get_num_threads()  # starts numba's threads
    except ValueError as error:
        raise RuntimeError(
            "numba's OpenMP threading layer cannot be loaded; install the OpenMP library of GCC "
            "(the package libgomp1 on Debian)"
        ) from error
    if (layer := numba.threading_layer()) != _LAYER:
        raise RuntimeError(f"numba uses the threading layer {layer} in this process, not {_LAYER}")
    signatures = _signatures(_STORED[arithmetic], _STORED[cached])
    if folder := _cache_folder(cache_dir, signatures):
        numba.config.CACHE_DIR = str(folder)
        try:
            return _kernels(signatures, kept=True)
        except Exception as error:  # numba does not check the files that it reads
            logger.warning(
                "the compiled kernels in %s are damaged (%s); the next start compiles them again",
                folder,
                _first_line(error),
            )
            shutil.rmtree(folder, ignore_errors=True)
    return _kernels(signatures, kept=False)


def _kernels(signatures: dict[str, tuple[str, bool]], *, kept: bool) -> Kernels:
    import numba

    from llama.torch_engine import cpu_kernels
    from llama.torch_engine.cpu_arithmetic import OPTIONS

    compiled = {}
    for name, (signature, in_parallel) in signatures.items():
        compiler = partial(numba.njit, signature, parallel=in_parallel, nogil=True, cache=kept, **OPTIONS)
        compiled[name] = compiler()(getattr(cpu_kernels, name))
    return Kernels(**compiled)


def _signatures(x: str, cached: str) -> dict[str, tuple[str, bool]]:
    """Return the signature of each kernel, and whether it runs on several threads."""
    cache = f"{cached}[:,:,:,:,::1]"
    rows, row, numbers = f"{x}[:,::1]", f"{x}[::1]", "int64[::1]"
    tables = f"{rows}, {rows}"
    signatures = {
        "attend_rows": (f"({rows}, {tables}, {numbers}, {cache}, {numbers}, float32, {rows})", True),
        "store_chunk": (f"({rows}, {tables}, int64, {cache}, int64, int64, {rows})", True),
        "add_and_norm": (f"({rows}, {rows}, {row}, float32, {rows})", False),
        "swiglu": (f"({rows}, {rows})", False),
    }
    if x == _STORED[torch.bfloat16]:
        signatures["linear_rows"] = f"(uint32[:,:,::1], {rows}, {rows})", True
    return signatures


def _version(signatures: dict[str, tuple[str, bool]]) -> str:
    """Return a hash of everything that the compiled code depends on.

    numba's own cache checks only the source file of each function. If two processes write to one folder at
    the same time, numba may also load the code of another signature or processor.
    """
    from numba.core.registry import cpu_target

    here = Path(__file__).parent
    digest = hashlib.sha256(repr((signatures, cpu_target.target_context.codegen().magic_tuple())).encode())
    for name in ("cpu_arithmetic.py", "cpu_compiler.py", "cpu_kernels.py", "linears.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder(cache_dir: Path, signatures: dict[str, tuple[str, bool]]) -> Path | None:
    """Create the folder for the compiled code. Return None if the folder cannot be written."""
    parent = os.environ.get("NUMBA_CACHE_DIR") or cache_dir / "numba"
    try:
        folder = Path(parent).expanduser() / _version(signatures)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: the home directory is unknown
        logger.info("compiled kernels are not kept, because %s cannot be written (%s)", parent, error)
        return None


def _first_line(error: BaseException) -> str:
    """Return the first line of a message. In numba's messages, the other lines are long and technical."""
    return str(error).partition("\n")[0]
