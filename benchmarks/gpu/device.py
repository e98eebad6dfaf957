"""The device that is measured: its description, the time and the kernel launches of a call, and free memory.

Everything except launches can also be measured on a CPU, so that the program can be tested without a GPU.
Knows torch's interface to devices; knows nothing about models.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.results import Skipped

_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
_DEVICE_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
_MOST_FREQUENT = 12


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return the device, the driver and the versions of the software. The driver is None if it is unknown."""
    described: dict[str, Any] = {"torch": torch.__version__, "versions": {}, "driver": None}
    for package in ("transformers", "bitsandbytes", "cog"):
        try:
            described["versions"][package] = version(package)
        except PackageNotFoundError:
            described["versions"][package] = None
    if device.type == "cpu":
        return {**described, "device": {"name": "cpu"}}
    properties, cudnn = torch.cuda.get_device_properties(device), torch.backends.cudnn
    facts = _nvidia_smi(device, *_DEVICE_FIELDS)
    described["driver"] = facts.pop("driver_version", None)
    described["device"] = {
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),  # type: ignore[no-untyped-call]
        **facts,
    }
    return described


def clocks(device: torch.device) -> dict[str, str]:
    """Return the current clocks, power and temperature, or nothing if nvidia-smi cannot be run."""
    return _nvidia_smi(device, "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def _nvidia_smi(device: torch.device, *names: str) -> dict[str, str]:
    """Query nvidia-smi. Return nothing on a CPU, or if it is not installed or does not know the device."""
    if device.type == "cpu":
        return {}
    # The number of a device here may differ from that of nvidia-smi, but its UUID is the same.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, map(str.strip, done.stdout.split(",")), strict=False))


def wait(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Return the median seconds of a call, including launching its kernels and waiting for the device."""
    for _ in range(min(repeats, 3)):
        work()
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - started)
    return median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bandwidth of a large copy, in bytes per second. Read and written bytes both count."""
    size = _COPY_BYTES[device.type]
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_per_call(lambda: target.copy_(source), device)


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


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the GPU, without the unused blocks that torch keeps. 0 on a CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def release_memory(device: torch.device) -> None:
    """Give the GPU memory that torch keeps, but does not use, back to the driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
