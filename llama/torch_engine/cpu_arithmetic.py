"""Arithmetic of the CPU kernels (`cpu_kernels.py`): 16-bit numbers, and functions that LLVM can vectorise.

numba has neither bfloat16 nor float16. So arrays hold bfloat16 numbers as uint16, and float16 numbers as
int16. The functions here convert them to and from float32. Knows the bits of numbers; knows nothing
about what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic as _intrinsic

F = TypeVar("F", bound=Callable[..., Any])

# Sums may be computed in any order. Infinity and NaN keep their meaning, because the engine reports them.
OPTIONS = {"fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add types to numba's decorator for functions that are written in LLVM instructions.

    `function` gets numba's context and the types of the arguments. It returns a signature, and a function
    that generates the instructions.
    """
    compiled: Callable[..., Any] = _intrinsic(function)
    return compiled


def inlined(function: F) -> F:
    """Compile a function that kernels call. LLVM can inline it."""
    compiled: F = njit(**OPTIONS)(function)
    return compiled


_BITS32, _FLOAT = ir.IntType(32), ir.FloatType()


@intrinsic
def widened(_context: Any, number: Any) -> Any:
    """Return a stored number as float32."""

    def generate(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if signature.args[0] == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, _BITS32), _BITS32(16)), _FLOAT)
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), _FLOAT)
        return value

    return types.float32(number), generate


@intrinsic
def narrowed(_context: Any, value: Any, like: Any) -> Any:
    """Return a float32 number rounded to the type of `like`."""

    def generate(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, _ = arguments
        if signature.return_type == types.uint16:
            bits = builder.bitcast(value, _BITS32)
            odd = builder.and_(builder.lshr(bits, _BITS32(16)), _BITS32(1))
            rounded = builder.add(bits, builder.add(odd, _BITS32(0x7FFF)))
            not_a_number = builder.fcmp_unordered("uno", value, value)
            kept = builder.select(not_a_number, _BITS32(0x7FC00000), rounded)
            return builder.trunc(builder.lshr(kept, _BITS32(16)), ir.IntType(16))
        if signature.return_type == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        return value

    return like(types.float32, like), generate


@intrinsic
def _power_of_two(_context: Any, exponent: Any) -> Any:
    """Return 2 to the power of a float32 number, which must be a whole number from -126 to 127.

    The number is written into the exponent bits of the result.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        biased = builder.add(builder.fptosi(arguments[0], _BITS32), _BITS32(127))
        return builder.bitcast(builder.shl(biased, _BITS32(23)), _FLOAT)

    return types.float32(types.float32), generate


@intrinsic
def lower(_context: Any, pair: Any) -> Any:
    """Return the bfloat16 number in the lower half of a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(arguments[0], _BITS32(16)), _FLOAT)

    return types.float32(types.uint32), generate


@intrinsic
def upper(_context: Any, pair: Any) -> Any:
    """Return the bfloat16 number in the upper half of a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.and_(arguments[0], _BITS32(0xFFFF0000)), _FLOAT)

    return types.float32(types.uint32), generate


@inlined
def exp(x: Any) -> Any:
    """Return e to the power of x, for x up to 88, with an error of at most 2 units in the last place.

    LLVM cannot vectorise a call to the C library's function. The polynomial is that of Cephes' `expf`.
    """
    x = min(max(x, np.float32(-87)), np.float32(88))
    whole = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    rest = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    power = np.float32(1.9875691500e-4)
    power = power * rest + np.float32(1.3981999507e-3)
    power = power * rest + np.float32(8.3334519073e-3)
    power = power * rest + np.float32(4.1665795894e-2)
    power = power * rest + np.float32(1.6666665459e-1)
    power = power * rest + np.float32(5.0000001201e-1)
    power = power * rest * rest + rest + np.float32(1)
    return power * _power_of_two(whole)
