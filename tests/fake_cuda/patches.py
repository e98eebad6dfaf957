"""Everything inside torch and bitsandbytes that the tests on fake CUDA tensors replace or rely on.

`check_internals` reports which internal of torch has changed. The replacements apply to the whole process, and each
context manager undoes its own. Modes of torch belong to one thread, so each thread enters `new_fake_mode` itself.
Knows torch and how safetensors are opened; knows nothing about the engine.
"""

# mypy: disable-error-code="no-untyped-call"
# Many internals of torch have no types.

from __future__ import annotations

import ast
import ctypes
import functools
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import bitsandbytes
import torch
from safetensors import safe_open
from torch import Tensor

import llama.model.checkpoint

if TYPE_CHECKING:
    from fake_cuda.gpu import FakeGpu


class TorchChanged(Exception):
    """An internal of torch or bitsandbytes on which these tests rely has changed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"torch {torch.__version__}: {what}; update tests/fake_cuda/patches.py")


try:
    from torch._ops import OpOverload as OpOverload  # noqa: PLC0414
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # noqa: PLC0414
    from torch.utils._python_dispatch import _disable_current_modes
    from torch.utils._pytree import tree_leaves as tree_leaves  # noqa: PLC0414
except ImportError as error:
    raise TorchChanged(str(error)) from error

CPU, CUDA = 0, 1  # numbers of c10::DeviceType

RELIED_ON = """
torch.Tensor._make_subclass torch.UntypedStorage._cdata torch._C._jit_get_schemas_for_operator torch._C.parse_schema
torch._ops.OpOverload.decompose torch._subclasses.fake_tensor.FakeTensor.tolist torch.backends.cuda.cudnn_sdp_enabled
torch.cuda.CUDAGraph torch.cuda.device torch.cuda.get_device_capability torch.cuda.get_device_name torch.cuda.graph
torch.cuda.graph_pool_handle torch.cuda.mem_get_info torch.cuda.set_device torch.cuda.synchronize
torch.ops.aten._scaled_dot_product_efficient_attention.default torch.ops.aten._scaled_mm.default
torch.ops.prim.device.default
"""
"""The names in torch on which these tests rely. `check_behaviour` checks what some of them do."""


@functools.cache
def check_internals(names: str = RELIED_ON) -> None:
    """Check all internals. Raises TorchChanged with the first one that is missing or behaves differently."""
    for name in names.split():
        try:
            pkgutil.resolve_name(name)
        except AttributeError:
            raise TorchChanged(f"{name} does not exist") from None
    with cuda_device_guard(), new_fake_mode():
        check_behaviour()


def check_behaviour() -> None:
    """Check what fake tensors can and cannot do. Call it under a fake mode. Raises TorchChanged."""
    tensor, on_cpu = torch.zeros(4, 2, device="cuda:0"), torch.zeros(4, 2)
    for what, act in {
        "a row of a fake CUDA tensor cannot be selected": lambda: tensor[1][0],
        "a fake tensor cannot become a Parameter": lambda: _fake_parameter(torch.nn.Parameter, tensor),
        "a fake tensor has no storage": lambda: 1 / tensor.untyped_storage().nbytes(),
    }.items():
        try:
            act()
        except Exception as error:
            raise TorchChanged(f"{what} ({error})") from error
    for what, forbidden in {
        "fake tensors on two devices can be added": lambda: tensor + on_cpu,
        "a fake tensor has a value": lambda: bool(tensor.sum() > 0),
    }.items():
        try:
            forbidden()
        except Exception:
            continue
        raise TorchChanged(what)


def new_fake_mode() -> FakeTensorMode:
    """Return a mode under which a thread creates fake tensors only, and operators accept real ones too."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def cuda_device_guard() -> Iterator[None]:
    """Let CUDA tensors be indexed. `tensor[i]` sets the current device through a C++ object, the device guard.

    A CUDA build has a guard for CUDA even without a GPU. A CPU build has none, so it uses the CPU's guard, which
    does nothing. The guard is removed at the end, because torch would use it elsewhere too, such as when autograd
    starts one thread per device.
    """
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        yield
        return
    registry = guard_registry()
    before = registry[CUDA]
    registry[CUDA] = registry[CPU]
    try:
        yield
    finally:
        registry[CUDA] = before


@functools.cache
def guard_registry() -> Any:
    """Return the addresses of the device guards of this build, by type of device. Raises TorchChanged."""
    symbol = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
    name = "libc10.dylib" if sys.platform == "darwin" else "libc10.so"
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        registry = (ctypes.c_void_p * 2).in_dll(library, symbol)
    except (OSError, ValueError) as error:
        raise TorchChanged(f"{name} has no {symbol}, the device guards") from error
    if not registry[CPU]:
        raise TorchChanged(f"{symbol} has no guard of the CPU at index {CPU}")
    return registry


@contextmanager
def replaced_cuda(gpu: FakeGpu) -> Iterator[None]:
    """Let torch report `gpu`, and let bitsandbytes' layers hold fake tensors.

    `torch.cuda.is_available` is not replaced, because torch would then try to use the GPU. So settings must name the
    device.
    """
    check_internals()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # the engine switches it off
    with ExitStack() as stack:
        stack.callback(torch.backends.cuda.enable_cudnn_sdp, cudnn)
        stack.enter_context(cuda_device_guard())
        for name, value in _cuda_functions(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda tensor: gpu.read(tensor)))  # noqa: PLW0108 - becomes a method
        stack.enter_context(_fake_parameters())
        stack.enter_context(mock.patch.object(llama.model.checkpoint, "safe_open", _SafeOpen))
        yield


def _cuda_functions(gpu: FakeGpu) -> dict[str, Callable[..., Any]]:
    class Graph:
        def replay(self) -> None:
            gpu.replay()

    return {
        "CUDAGraph": Graph,
        "graph": gpu.capture,
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": gpu.synchronize,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "mem_get_info": gpu.mem_get_info,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: gpu.name,
    }


@contextmanager
def _fake_parameters() -> Iterator[None]:
    """Let a fake tensor become one of bitsandbytes' subclasses of Parameter, such as Params4bit.

    A fake tensor is itself a subclass of Tensor, and `_make_subclass` refuses it.
    """
    real = torch.Tensor._make_subclass

    def make(cls: type, data: Tensor, requires_grad: bool = False, *rest: Any, **more: Any) -> Tensor:
        if isinstance(data, FakeTensor):
            return _fake_parameter(cls, data)
        made: Tensor = real(cls, data, requires_grad, *rest, **more)
        return made

    with mock.patch.object(torch.Tensor, "_make_subclass", staticmethod(make)):
        yield


def _fake_parameter(cls: type, data: Tensor) -> Tensor:
    result = data.detach()
    result.__class__ = _fake_class(cls)
    return result


@functools.cache
def _fake_class(cls: type) -> type:
    """A class that is both a FakeTensor and a `cls`, and whose instances are made without `cls.__new__`."""
    metaclass: Any = type(torch.nn.Parameter)
    made: type = metaclass("Fake" + cls.__name__, (FakeTensor, cls), {})
    return made


class _SafeOpen:
    """Reads safetensors files without the fake mode, which cannot use mapped memory."""

    def __init__(self, path: Path, framework: str) -> None:
        self._file = safe_open(path, framework=framework)

    def __enter__(self) -> _SafeOpen:
        return self

    def __exit__(self, *error: object) -> None:
        del self._file

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_tensor(self, name: str) -> Tensor:
        with _disable_current_modes():
            tensor: Tensor = self._file.get_tensor(name)
        return tensor


@functools.cache
def nf4_rule(multiprocessors: int, capability: tuple[int, int]) -> Callable[..., bool]:
    """Return bitsandbytes' rule of 4-bit products for one kind of GPU.

    The rule takes (device, dtype, rows, outputs, inputs). If it returns False, the weights are first written to memory
    in 16 bits. Its module can only be imported with a CUDA build, so the function is taken from its source.
    """
    source = Path(str(bitsandbytes.__file__)).parent / "backends" / "cuda" / "ops.py"
    functions = {getattr(node, "name", ""): node for node in ast.parse(source.read_text("utf-8")).body}
    if (name := "_gemm_4bit_use_custom_cuda") not in functions:
        raise TorchChanged(f"bitsandbytes has no {name} in {source.name}")
    scope: dict[str, Any] = {
        "functools": functools,
        "torch": torch,
        "_GEMM_4BIT_CUSTOM_FLOOR_M": 4,
        "_gpu_dispatch_props": lambda device: (multiprocessors, *capability),
    }
    exec(compile(ast.Module([functions[name]], []), str(source), "exec"), scope)
    rule: Callable[..., bool] = scope[name]
    return rule
