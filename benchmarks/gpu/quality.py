"""Run `python -m benchmarks.quality` on the device, and keep its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measurements import CheckFailed, Measurements, Skipped
from llama import ROOT

_LINES = 15


def measure_quality(measurements: Measurements, device: torch.device, folder: Path) -> None:
    """Measure the quality of each precision that the device supports. Files are written to `folder`."""
    path = folder / "quality.json"
    command = [sys.executable, "-m", "benchmarks.quality", "--device", str(device), "--results", str(path)]
    with measurements.recording_failures("quality"):
        if device.type == "cpu":
            raise Skipped("on a CPU, it takes minutes; run `python -m benchmarks.quality`")
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        measurements.take("quality", partial(_read, path))
        if done.returncode:
            last = "\n".join(done.stdout.splitlines()[-_LINES:])
            raise CheckFailed(f"benchmarks.quality ended with exit code {done.returncode}:\n{last}")


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
