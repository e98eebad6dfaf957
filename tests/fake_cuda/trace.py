"""Records the kernels that operators launch on CUDA, the bytes that they move, and calls that make the host wait.

Knows operators and tensors; knows nothing about the engine. `kernel_costs.py` has the launches and bytes of
each operator.
"""

# mypy: disable-error-code="no-untyped-call"
# Many internals of torch have no types.

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fake_cuda.emulated import COMPOSED, ON_CUDA
from fake_cuda.kernel_costs import H100, VIEWS, Card, Op, Owner, Traffic, launches_of, traffic_of
from fake_cuda.patches import OpOverload, TorchDispatchMode, tree_leaves


class CudaDispatch(TorchDispatchMode):
    """Takes operators apart as the dispatcher of a CUDA build does, and reports each that has a kernel.

    In inference mode, a dispatch mode gets composite operators as a whole.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if composed := COMPOSED.get(str(func)):
            with self:
                return composed(*args, **kwargs)
        if _name(func) not in ON_CUDA:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            self.failed(error)
            raise
        self.ran(func, args, kwargs, result)
        return result

    def failed(self, error: Exception) -> None:
        """Called after an operator has raised an exception, for example because its result depends on data."""

    def ran(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Called after an operator that has a kernel has run."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One operator that launched kernels."""

    operator: str
    count: int
    traffic: Traffic
    shapes: str
    place: str

    def __str__(self) -> str:
        return f"{self.count} x {self.operator} {self.shapes} at {self.place}"


@dataclass(frozen=True, slots=True)
class Wait:
    """A call that makes the host wait for the GPU."""

    kind: str
    """"upload" and "download" are copies between pageable host memory and the GPU. Anything else is the
    exception of an operator whose result depends on data."""
    place: str


class Trace(CudaDispatch):
    def __init__(
        self,
        card: Card = H100,
        owner: Owner = lambda tensor: "other_reads",
        lengths: Sequence[int] | None = None,
    ) -> None:
        """`owner` and `lengths` are as in `kernel_costs.traffic_of`."""
        super().__init__()
        self._card, self._owner, self._lengths = card, owner, lengths
        self.launches: list[Launch] = []
        self.waits: list[Wait] = []

    @property
    def count(self) -> int:
        """The number of kernels that were launched."""
        return sum(launch.count for launch in self.launches)

    @property
    def operators(self) -> Counter[str]:
        """The number of kernels by operator."""
        counts: Counter[str] = Counter()
        for launch in self.launches:
            counts[launch.operator] += launch.count
        return counts

    @property
    def traffic(self) -> Traffic:
        total = Traffic()
        for launch in self.launches:
            total = total.plus(launch.traffic)
        return total

    @property
    def wait_places(self) -> set[tuple[str, str]]:
        return {(wait.kind, wait.place) for wait in self.waits}

    def failed(self, error: Exception) -> None:
        self.waits.append(Wait(type(error).__name__, place_in_engine()))

    def ran(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        read = {name: value for name, value in kwargs.items() if name != "out"}
        inputs, outputs = tensors_in((args, read)), tensors_in(result)
        devices = {tensor.device.type for tensor in (*inputs, *outputs)}
        name = _name(func)
        if name in ("_to_copy", "copy_") and devices == {"cpu", "cuda"}:
            kind = "upload" if outputs[0].device.type == "cuda" else "download"
            self.waits.append(Wait(kind, place_in_engine()))
        elif name not in VIEWS and "cuda" in devices:
            op = Op(str(func).removeprefix("aten."), inputs, outputs, self._card)
            shapes = " ".join(str(list(tensor.shape)) for tensor in inputs)
            traffic = traffic_of(op, self._owner, self._lengths)
            self.launches.append(Launch(op.name, launches_of(op), traffic, shapes, place_in_engine()))


def place_in_engine() -> str:
    """Return the innermost running function of the package, such as `torch_engine/runner.py Runner.decode`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        folder, found, file = frame.f_code.co_filename.rpartition("/llama/")
        if found and "site-packages" not in folder:
            function = frame.f_code.co_qualname.partition(".<locals>")[0]
            return f"{file} {function}"
        frame = frame.f_back
    return "outside of the package"


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _name(func: OpOverload) -> str:
    return func._schema.name.partition("::")[2]
