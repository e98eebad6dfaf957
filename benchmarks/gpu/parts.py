"""The parts of `make bench-gpu`, and the process in which each of them runs.

Each part can use all GPU memory, and its failure does not stop the others. The command
`python -m benchmarks.gpu.parts PART FILE` measures one part, and writes its results to FILE after each
measurement. torch is imported only in that process. Packages that only one part needs are imported by that
part, so that the others run without them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.results import PROCESS, CheckFailed, Document, Measurements, Skipped, last_lines
from benchmarks.process import kill_tree, time_limit
from llama import ROOT

if TYPE_CHECKING:
    import torch

    from llama.model.quantized_layers import Quantization

SECONDS_PER_PART = 540.0
"""The default time limit of a part, so that a run of one part ends within 10 minutes."""

PRECISIONS: dict[str, Quantization] = {"fp8": "fp8", "nf4": "nf4", "int8": "int8", "bf16": "none"}
"""The parts that measure a random 70B, and how its weights are quantized."""


@dataclass(frozen=True, slots=True)
class Part:
    """Measurements that run together, in one process."""

    name: str
    minutes: float
    """An estimate for an H100 (not measured)."""
    measures: str


PARTS = (
    Part(
        "checks", 2, "correctness of attention, linear layers, CUDA graphs and the engine, with small models"
    ),
    Part("memory-errors", 1, "errors that a lack of GPU memory causes at each stage of the start"),
    Part("fp8", 3, "speed and memory of a random 70B in FP8"),
    Part("nf4", 3, "the same in NF4"),
    Part("int8", 4, "the same in int8"),
    Part("bf16", 3, "the same in bfloat16, which needs a GPU with more than 140 GB"),
    Part("quality", 5, "perplexity of each precision, with a small model"),
    Part("serving", 6, "the start of Cog's server with a packed 70B; writes 40 GB to the disk"),
)


def chosen(names: list[str]) -> list[Part]:
    """Return the parts with these names, in the order of PARTS, or all if there are no names.

    Raises ValueError if a name is unknown.
    """
    known = [part.name for part in PARTS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown part: {', '.join(unknown)}; choose from {', '.join(known)}")
    return [part for part in PARTS if not names or part.name in names]


def run_child(command: Sequence[str], written: Path, seconds: float) -> Document:
    """Run a program that writes its results to the file `written`, for at most this many seconds.

    Return what it has written, even if it failed later. A failure of the process is added to `failed`, with
    the last lines of its output.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            with time_limit(process.pid, seconds) as expired:
                code = process.wait()
        except BaseException:  # also Ctrl-C
            kill_tree(process.pid)
            process.wait()
            raise
        log.seek(0)
        output = last_lines(log.read().decode(errors="replace"))
    document, fault = _read(written)
    if expired():
        fault = f"it was ended after {seconds:g} s"
    elif code:
        fault = f"it ended with signal {-code}" if code < 0 else f"it ended with exit code {code}"
    if fault:
        document.setdefault("failed", {})[PROCESS] = f"{fault}\n{output}".strip()
    document["seconds"] = time.monotonic() - started
    return document


def _read(path: Path) -> tuple[Document, str]:
    """Return the document in a file and "", or an empty document and the reason."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}, "it wrote no results"
    except ValueError as error:
        return {}, f"its results are not valid JSON ({error})"
    return (document, "") if isinstance(document, dict) else ({}, "its results are not a JSON object")


def main() -> None:
    """Measure the part that the command line names."""
    import torch

    from benchmarks.gpu.device import describe_device

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.parts", description=__doc__)
    parser.add_argument("part", choices=[part.name for part in PARTS])
    parser.add_argument("written", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("torch cannot use a GPU on this machine")
        torch.cuda.set_device(device)
    measurements = Measurements(arguments.written, describe_device(device))
    _measure(arguments.part, measurements, device, arguments.written.parent, small=arguments.small)


def _measure(
    part: str, measurements: Measurements, device: torch.device, folder: Path, *, small: bool
) -> None:
    """Take the measurements of a part. Large files go to `folder`. `small` models are for tests on a CPU."""
    if part == "checks":
        from benchmarks.gpu.engine_checks import check_engines
        from benchmarks.gpu.kernel_checks import check_kernels

        check_kernels(measurements, device, small=small)
        check_engines(measurements, device)
    elif part == "memory-errors":
        from benchmarks.gpu.memory import check_memory_errors

        check_memory_errors(measurements, device)
    elif part == "quality":
        with measurements.recording_failures("quality"):
            _measure_quality(measurements, device, folder)
    elif part == "serving":
        from benchmarks.gpu.serving import measure_serving

        measurements.take("serving", partial(measure_serving, device, folder, small=small))
    else:
        from benchmarks.gpu.precision import measure_precision

        measure_precision(measurements, PRECISIONS[part], device, small=small)


def _measure_quality(measurements: Measurements, device: torch.device, folder: Path) -> None:
    """Run `benchmarks.quality`, and keep its figures even if one precision fails."""
    if device.type == "cpu":
        raise Skipped("on a CPU, it takes minutes; run `python -m benchmarks.quality`")
    path = folder / "quality.json"
    command = [sys.executable, "-m", "benchmarks.quality", "--device", str(device), "--results", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    measurements.take("quality", lambda: json.loads(path.read_text(encoding="utf-8")))
    if done.returncode:
        raise CheckFailed(
            f"benchmarks.quality ended with exit code {done.returncode}:\n{last_lines(done.stdout)}"
        )


if __name__ == "__main__":
    main()
