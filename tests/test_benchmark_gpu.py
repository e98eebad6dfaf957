"""The GPU benchmark without a GPU: its processes, its checks, its verdict, and a whole run with a small model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import flash_reference
import psutil
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.gpu import results
from benchmarks.gpu.device import counted_launches
from benchmarks.gpu.engine_checks import compare_tokens
from benchmarks.gpu.kernel_checks import LENGTH, attention_config, attention_errors, check_attention
from benchmarks.gpu.parts import PARTS, chosen, run_child
from benchmarks.gpu.report import markdown
from benchmarks.gpu.results import PROCESS, CheckFailed, Measurements, Skipped
from benchmarks.gpu.verdict import verdict, verdict_table
from llama import ROOT
from llama.model.placement import Placement
from llama.torch_engine.flash_attention import FlashAttention
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import take_apart

CPU = torch.device("cpu")
FLASH = Placement(CPU, torch.float32, "none", LENGTH, flash_attention=True)
WRITES = (
    'import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps({"measured": {"a": 1}})); '
)


def child(code: str, written: Path, seconds: float = 60) -> dict[str, Any]:
    return run_child([sys.executable, "-c", code, str(written)], written, seconds)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_results_of_a_child_are_returned(tmp_path: Path) -> None:
    document = child(WRITES, tmp_path / "part.json")
    assert document.pop("seconds") > 0
    assert document == {"measured": {"a": 1}}


@pytest.mark.parametrize(
    ("code", "first_line", "last_line"),
    [
        (WRITES + "print('before'); sys.exit('the reason')", "it ended with exit code 1", "the reason"),
        (WRITES + "import os; os.kill(os.getpid(), 9)", "it ended with signal 9", None),
        ("import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{')", "not valid JSON", None),
        ("import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('[]')", "not a JSON object", None),
        ("print('nothing')", "it wrote no results", "nothing"),
    ],
)
def test_a_failed_child_is_recorded_with_the_end_of_its_output(
    tmp_path: Path, code: str, first_line: str, last_line: str | None
) -> None:
    document = child(code, tmp_path / "part.json")
    lines = document["failed"][PROCESS].splitlines()
    assert first_line in lines[0]
    assert lines[1:][-1:] == ([last_line] if last_line else [])
    assert document.get("measured", {}) == ({"a": 1} if code.startswith(WRITES) else {})


def test_a_child_that_takes_too_long_is_killed_with_its_own_children(tmp_path: Path) -> None:
    code = (
        WRITES + "import subprocess, time; "
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print(inner.pid, flush=True); time.sleep(600)"
    )
    document = child(code, tmp_path / "part.json", seconds=2)
    fault, pid = document["failed"][PROCESS].splitlines()
    assert fault == "it was ended after 2 s"
    assert document["measured"] == {"a": 1}
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_measurements_go_on_after_a_failure_and_are_saved_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    measurements = Measurements(path, {"torch": "2"})

    def skip() -> None:
        raise Skipped("no kernel")

    def fail() -> None:
        raise CheckFailed("1 instead of 2")

    assert measurements.take("wrong", fail) is None
    assert measurements.take("broken", lambda: 1 / 0) is None
    assert measurements.take("left out", skip) is None
    assert measurements.take("right", lambda: [1]) == [1]
    saved = json.loads(path.read_text())
    assert saved["torch"] == "2"
    assert saved["measured"] == {"right": [1]}
    assert saved["skipped"] == {"left out": "no kernel"}
    assert saved["failed"]["wrong"] == "1 instead of 2"
    assert saved["failed"]["broken"].endswith("ZeroDivisionError: division by zero")
    saved["failed"][PROCESS] = "it ended with exit code 1\na warning\nthe reason"
    assert list(results.failures({"checks": saved})) == [
        "checks: wrong: 1 instead of 2",
        "checks: broken: ZeroDivisionError: division by zero",
        "checks: the process: it ended with exit code 1: the reason",
    ]


def test_parts_run_in_a_fixed_order_with_fp8_and_nf4_before_other_precisions() -> None:
    assert [part.name for part in chosen(["nf4", "checks", "fp8"])] == ["checks", "fp8", "nf4"]
    assert [part.name for part in chosen([])] == [part.name for part in PARTS]
    assert all(part.minutes <= 9 for part in PARTS)
    with pytest.raises(ValueError, match="unknown part: fp4; choose from checks"):
        chosen(["fp4"])


def test_the_process_that_starts_parts_does_not_import_torch() -> None:
    code = "import sys, benchmarks.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_failed_part_does_not_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"parts": {"nf4": {"measured": {"kept": 1}, "small": True}}}))
    done = run("checks", "fp8", "--seconds", "0.2", "--results", str(path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-3:] == [
        "failed:",
        "checks: the process: it was ended after 0.2 s",
        "fp8: the process: it was ended after 0.2 s",
    ]
    parts = json.loads(path.read_text())["parts"]
    assert parts["nf4"] == {"measured": {"kept": 1}, "small": True}
    assert set(parts["fp8"]) >= {"commit", "date", "machine", "small", "seconds"}
    assert "- fp8: the process: it was ended after 0.2 s" in path.with_suffix(".md").read_text()


def test_a_file_without_results_of_this_program_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text("{}")
    done = run("checks", "--results", str(path))
    assert done.returncode == 1
    assert "has no results of this program" in done.stderr
    assert path.read_text() == "{}"


@pytest.mark.slow
def test_a_small_run_on_the_cpu_measures_and_reports_everything(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = run("checks", "memory-errors", "fp8", "serving", "--results", str(path))
    assert done.returncode == 0, done.stderr
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == ["checks", "memory-errors", "fp8", "serving"]
    assert not parts["checks"]["skipped"]
    assert len(parts["checks"]["measured"]) == 17
    assert parts["checks"]["measured"]["engine in nf4"]["positions_reused"] > 0
    fp8 = parts["fp8"]["measured"]
    assert fp8["weights"]["bytes"] == fp8["weights"]["bytes_calculated"]
    assert set(fp8["sampling"]) >= {"greedy", "all_rules", "published_defaults", "without_sampling"}
    assert fp8["mixed_lengths"]["seconds_mixed"] > 0
    assert set(parts["fp8"]["skipped"]) == {"launches", "graphs", "memory"}
    report = path.with_suffix(".md").read_text()
    for title in (
        "Checks that passed",
        "A decode step of one long request and many short ones",
        "Cog's server",
    ):
        assert f"## {title}" in report


def test_the_attention_check_accepts_the_engine_on_a_reference_of_flash_attention() -> None:
    before = flash_reference.positions_read.total
    checked = check_attention(attention_config(64, 8), FLASH, small=True)
    assert checked["kernel"] == "FlashAttention"
    assert flash_reference.positions_read.total > before


class ReadsTooFar(FlashAttention):
    """Reads one position more than a row has."""

    def _attend(self, step: Any, index: int, qkv: Tensor) -> Tensor:
        further = step._replace(lengths=step.lengths + 1, most_keys=step.most_keys + 1)
        return super()._attend(further, index, qkv)


class SwapsHeads(FlashAttention):
    """Returns the results of the heads in another order."""

    def _attend(self, step: Any, index: int, qkv: Tensor) -> Tensor:
        attended = super()._attend(step, index, qkv)
        return attended.view(len(qkv), -1, 64).flip(1).flatten(1)


@pytest.mark.parametrize("attention", [ReadsTooFar, SwapsHeads])
def test_the_attention_check_finds_wrong_attention(attention: type[FlashAttention]) -> None:
    config = attention_config(64, 8)
    parts = take_apart(LlamaForCausalLM(config).requires_grad_(False), FLASH)
    cache = KVCache.for_placement(config, CacheShape(6, LENGTH), FLASH)
    errors = attention_errors(attention(parts, cache), parts, cache, small=True)
    assert all(not error < 0.1 for error in errors)


def test_different_tokens_are_named() -> None:
    assert compare_tokens("a", "b", [[1, 2], [3]], [[1, 2], [3]]) == {"requests": 2, "tokens": 3}
    with pytest.raises(
        CheckFailed, match=r"^request 1 differs from token 1 on: \[5, 6\] with b, \[4, 6\] with a$"
    ):
        compare_tokens("a", "b", [[1], [3, 4, 6]], [[1], [3, 5, 6]])


class Event(NamedTuple):
    """An event of torch's profiler."""

    name: str
    device: str = "CUDA"
    is_user_annotation: bool = False

    @property
    def device_type(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.device)

    @property
    def time_range(self) -> SimpleNamespace:
        return SimpleNamespace(elapsed_us=lambda: 2.0)


def test_only_what_ran_on_the_gpu_counts_as_a_launch() -> None:
    events = [
        Event("gemm"),
        Event("gemm"),
        Event("copy"),
        Event("aten::mm", "CPU"),
        Event("mine", "CUDA", True),
    ]
    assert counted_launches(events) == {
        "launches": 3,
        "seconds_of_kernels": 6e-6,
        "most_frequent": {"gemm": 2, "copy": 1},
    }
    with pytest.raises(RuntimeError, match="recorded no kernel"):
        counted_launches(events[3:])


PRECISION = {
    "copy_bandwidth": 2e12,
    "weights": {
        "bytes": 70e9,
        "bytes_calculated": 70e9,
        "bytes_of_embedding": 1e9,
        "bytes_per_cached_token": 1e6,
    },
    "launches": {"1": {"launches": 4000, "seconds_of_kernels": 0.03}},
    "decode": {
        "1": {"prompt_tokens": 500, "seconds": 0.045, "tokens_per_second": 22},
        "8": {"prompt_tokens": 500, "seconds": 0.08, "tokens_per_second": 100},
    },
    "mixed_lengths": {
        "requests": 2,
        "long": 900,
        "short": 100,
        "seconds_mixed": 0.036,
        "seconds_equal": 0.025,
    },
    "memory": {
        "used": 79e9,
        "weights_calculated": 70e9,
        "cache_calculated": 6e9,
        "reserve_calculated": {"total": 2e9},
        "reserve_used": 3e9,
        "rows": 8,
        "context": 2048,
    },
}
CALCULATED = {
    "rows": 8,
    "cases": {
        "H100-fp8-bfloat16": {
            "decode_launches": {"1": 4100, "8": 4000},
            "traffic": {"full context": {"weights": 69e9, "cache": 9e9, "other_reads": 2e9, "writes": 1e9}},
        }
    },
}


def part(**changes: Any) -> dict[str, Any]:
    return {
        "device": {"name": "H100"},
        "commit": "abc",
        "date": "2026-01-01",
        "measured": PRECISION,
        **changes,
    }


def test_the_verdict_compares_measured_with_calculated_figures(tmp_path: Path) -> None:
    (tmp_path / "calculated.json").write_text(json.dumps(CALCULATED))
    rows, reasons = verdict({"fp8": part()}, tmp_path / "calculated.json")
    assert reasons == []
    assert {row["name"]: (round(row["ratio"], 2), row["ok"]) for row in rows} == {
        "weights": (1.0, True),
        "launches of a step, 1 request": (0.98, True),
        "decode step, 1 request": (1.29, True),
        "decode step, 8 requests": (2.11, False),
        "step of mixed lengths, 2 requests": (1.03, True),
        "step of mixed lengths, compared with equal ones": (1.44, False),
        "memory besides weights and cache": (1.5, False),
        "all memory": (1.01, True),
    }
    lines = verdict_table(rows).splitlines()
    assert "| fp8 | decode step, 8 requests | 38.00 ms | 80.00 ms | 2.11 | 0 to 1.5 | **not ok** |" in lines


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no calculated.json"),
        ("{", "calculated.json is invalid"),
        ("{}", "calculated.json has no cases"),
        ('{"cases": {"T4": {}}}', "fp8 were not compared: calculated.json has none"),
    ],
)
def test_a_missing_calculation_is_reported(tmp_path: Path, text: str | None, reason: str) -> None:
    path = tmp_path / "calculated.json"
    if text is not None:
        path.write_text(text)
    rows, reasons = verdict({"fp8": part()}, path)
    assert "all memory" in [row["name"] for row in rows]
    assert reason in reasons[0]
    assert reason in markdown({"parts": {"fp8": part()}, "verdict": rows, "not_compared": reasons})
    assert verdict({"fp8": part(small=True)}, path) == ([], [])


def test_the_report_says_which_parts_were_measured_elsewhere(tmp_path: Path) -> None:
    parts = {"fp8": part(), "nf4": part(device={"name": "H200"}, commit="def")}
    assert results.differences(parts) == {
        "device": {"H100": ["fp8"], "H200": ["nf4"]},
        "commit": {"abc": ["fp8"], "def": ["nf4"]},
    }
    report = markdown({"parts": parts, "verdict": [], "not_compared": []})
    assert "**Not all parts were measured with the same device** (H100: fp8; H200: nf4)." in report
