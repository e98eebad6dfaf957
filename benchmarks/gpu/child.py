"""Measure one part, in a process of its own: `python -m benchmarks.gpu.child PART FILE`.

`benchmarks/gpu/__main__.py` starts it. The results are written to FILE after each measurement. What only one
part needs is imported by that part, so that a missing package fails no other.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.device import describe_device
from benchmarks.gpu.measurements import Measurements
from benchmarks.gpu.parts import PARTS
from llama.model.quantized_layers import Quantization

_QUANTIZATION: dict[str, Quantization] = {"fp8": "fp8", "nf4": "nf4", "int8": "int8", "bf16": "none"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child", description=__doc__)
    parser.add_argument("part", choices=[part.name for part in PARTS])
    parser.add_argument("written", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("torch cannot use a GPU on this machine")
        torch.cuda.set_device(device)
    measurements = Measurements(arguments.written, describe_device(device))
    measure(arguments.part, measurements, device, arguments.written.parent, small=arguments.small)


def measure(
    part: str, measurements: Measurements, device: torch.device, folder: Path, *, small: bool
) -> None:
    """Take the measurements of a part. Large files go to `folder`. `small` models are for tests on a CPU."""
    if part == "checks":
        from benchmarks.gpu.checks import check_all

        check_all(measurements, device, small)
    elif part == "memory-errors":
        from benchmarks.gpu.memory_errors import check_memory_errors

        check_memory_errors(measurements, device)
    elif part == "quality":
        from benchmarks.gpu.quality import measure_quality

        measure_quality(measurements, device, folder)
    elif part == "serving":
        from benchmarks.gpu.serving import measure_serving

        measurements.take("serving", partial(measure_serving, device, folder, small=small))
    else:
        from benchmarks.gpu.precision import measure_precision

        measure_precision(measurements, _QUANTIZATION[part], device, small)


if __name__ == "__main__":
    main()
