"""Counts the kernels that a call launches, with torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.device import wait
from benchmarks.gpu.measurements import Skipped

_MOST_FREQUENT = 12


def launches(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Return the number of kernels, copies and fills of a call on the GPU, and the most frequent ones.

    Raises Skipped on a CPU, and RuntimeError if the profiler records nothing.
    """
    if device.type != "cuda":
        raise Skipped("a CPU launches no kernels")
    work()
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        wait(device)
    return counted_launches(profiler.events())


def counted_launches(events: Iterable[Any]) -> dict[str, Any]:
    """Count the events of torch's profiler that ran on the GPU. Raises RuntimeError if there are none."""
    on_gpu = (event for event in events if event.device_type.name == "CUDA")
    launched = [event for event in on_gpu if not event.is_user_annotation]
    if not launched:
        raise RuntimeError("torch's profiler recorded no kernel; it needs CUPTI, and permission to use it")
    return {
        "launches": len(launched),
        "seconds_of_kernels": sum(event.time_range.elapsed_us() for event in launched) / 1e6,
        "most_frequent": dict(Counter(event.name for event in launched).most_common(_MOST_FREQUENT)),
    }
