"""The GPU benchmark on fake CUDA tensors: its steps run, and its verdict finds the calculated figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_cuda.kernel_costs import H100
from fake_cuda.session import fake_cuda

from benchmarks.gpu.parts import PRECISIONS
from benchmarks.gpu.precision import measure_precision
from benchmarks.gpu.results import Measurements
from benchmarks.gpu.verdict import CALCULATED, verdict
from llama.model.quantized_layers import Quantization

NEEDS_A_GPU = {
    "clocks_after_decode",  # asks the driver
    "generate_of_transformers",  # waits for values
    "launches",  # uses the profiler
}


@pytest.mark.parametrize("quantization", ["fp8", "nf4"])
def test_graphs_memory_and_steps_are_measured_on_a_fake_gpu(
    tmp_path: Path, quantization: Quantization
) -> None:
    with fake_cuda(H100) as fakes:
        measurements = Measurements(tmp_path / "part.json", {})
        measure_precision(measurements, quantization, torch.device("cuda:0"), small=True)
    document = measurements.document
    assert set(document["failed"]) == NEEDS_A_GPU
    assert not document["skipped"]
    assert fakes.gpu.replays > 0
    measured = document["measured"]
    assert (measured["graphs"]["graphs"], measured["graphs"]["batch_sizes"]) == (3, [1, 2, 4])
    assert 0 < measured["graphs"]["bytes"] <= measured["graphs"]["bytes_calculated"]
    memory = measured["memory"]
    assert (memory["rows"], memory["context"]) == (4, 256)
    assert 0 < memory["reserve_used"] <= memory["reserve_calculated"]["total"]
    assert set(measured["decode"]) == {"1", "4"}
    assert set(measured["prompts"]) == {"32", "64"}


def test_a_precision_that_the_gpu_cannot_hold_is_left_out(tmp_path: Path) -> None:
    with fake_cuda(H100, total=10**7):
        measurements = Measurements(tmp_path / "part.json", {})
        measure_precision(measurements, "none", torch.device("cuda:0"), small=True)
    assert measurements.document["failed"] == {}
    assert "needs" in measurements.document["skipped"]["placement"]
    assert list(measurements.document["measured"]) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_committed_calculation_has_every_precision(precision: str) -> None:
    measured = {"launches": {"1": {"launches": 1000}, "9": {"launches": 1000}, "32": {"launches": 1000}}}
    part = {"device": {"name": "H100", "capability": "9.0"}, "measured": measured}
    rows, reasons = verdict({precision: part}, CALCULATED)
    assert reasons == []
    assert [row["name"] for row in rows] == [
        "launches of a step, 1 request",
        "launches of a step, 9 requests",
        "launches of a step, 32 requests",
    ]
    assert all(row["calculated"] > 1000 for row in rows)
