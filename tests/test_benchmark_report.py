"""The benchmark's report, results file and targets when parts of a run are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import dialogue, isa
from benchmarks.report import markdown, summary_table
from benchmarks.results_file import ResultsFile
from benchmarks.targets import OURS, OURS_IN_FLOAT32, VLLM, evaluate
from llama import ROOT

COMPLETE: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text("utf-8"))
SETTING: dict[str, Any] = {name: COMPLETE[name] for name in ("date", "commit", "machine", "workload")}
MEASURED = [
    *("linears", "versions", "throughput", "beside_vllm", "arriving", "long_prompt_beside", "next_turn"),
    *("soak", "cold_start", "load", "busy_cpu"),
]


def row(speed: float) -> dict[str, float]:
    return {"tokens_per_second": speed, "time_to_first_token": 0.1, "time_between_tokens": 0.01}


def got(results: dict[str, Any], target: str) -> Any:
    (found,) = (row["got"] for row in evaluate(results) if row["target"] == target)
    return found


@pytest.mark.parametrize("section", MEASURED)
def test_a_report_lacks_only_the_sections_that_were_not_measured(section: str) -> None:
    partial = {name: value for name, value in COMPLETE.items() if name != section}
    before = [line for line in markdown(COMPLETE, "cpu").splitlines() if line.startswith("## ")]
    after = [line for line in markdown(partial, "cpu").splitlines() if line.startswith("## ")]
    assert set(after) < set(before)
    assert len(after) >= len(before) - 3


@pytest.mark.parametrize("section", MEASURED)
def test_a_target_that_was_not_measured_has_no_verdict(section: str) -> None:
    complete = {target["target"]: target for target in evaluate(COMPLETE)}
    partial = {name: value for name, value in COMPLETE.items() if name != section}
    verdicts = {target["target"]: target for target in evaluate(partial)}
    assert list(verdicts) == list(complete)
    for name, target in verdicts.items():
        assert target == complete[name] or target["met"] is None


def test_a_run_that_is_killed_leaves_results_from_which_a_report_is_written(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    left_out = {"an engine": {"scenario": "mixed lengths", "reason": "KeyError: 'a | b'"}}
    file = ResultsFile(path, {**SETTING, "left_out": left_out})
    file.add("next_turn", OURS, value={"cold": 1.0, "next_turn": 0.1})
    file.add("load", "nf4", value=None)  # it failed
    assert "load" not in json.loads(path.read_text())
    assert not list(tmp_path.glob("*.part"))
    done = subprocess.run([sys.executable, "-m", "benchmarks.report", str(path)], cwd=ROOT, check=False)
    assert done.returncode == 0
    report = (tmp_path / "cpu.md").read_text()
    assert f"| {OURS} | 1.00 | 0.10 |" in report
    assert "| an engine | mixed lengths | KeyError: 'a \\| b' |" in report
    assert "at most 0.15 | 0.10 | met |" in report
    assert "| at least 0.6 |  | not measured |" in report


def test_results_that_are_added_later_do_not_remove_earlier_ones(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "cpu.json", dict(SETTING))
    for batch in ("1", "8"):
        file.add("throughput", batch, value={OURS: row(10), VLLM: row(8)})
    saved = json.loads((tmp_path / "cpu.json").read_text())
    assert list(saved["throughput"]) == ["1", "8"]
    assert got(saved, f"tokens/s of our engine relative to {VLLM}; 8 requests") == 1.25
    assert got(saved, f"tokens/s of our engine relative to {VLLM}; 32 requests") is None


def test_the_summary_has_the_fastest_peer_of_the_same_precision_for_each_kind_of_requests() -> None:
    mixed = {OURS: row(60), VLLM: row(40), "llama.cpp, bf16": row(50), "llama.cpp, q4_0": row(99)}
    results = {"throughput": {"8": {OURS: row(20), OURS_IN_FLOAT32: row(5), VLLM: row(40)}}}
    lines = summary_table({**results, "mixed_lengths": mixed}).splitlines()[2:]
    assert lines == [
        "| bfloat16 | 8 | 20 | vLLM engine (CPU, eager) | 40 | 0.50 |",
        "| bfloat16 | 16, mixed lengths | 60 | llama.cpp | 50 | 1.20 |",
    ]


def test_the_report_names_the_vector_instructions_that_were_used() -> None:
    assert "Widest vector instructions in this run: AVX512-BF16." in markdown(COMPLETE, "cpu")
    limited = markdown({**COMPLETE, "isa": "avx2"}, "cpu-avx2")
    assert "Widest vector instructions in this run: AVX2." in limited
    assert "All engines were limited to AVX2" in limited


def test_limited_vector_instructions_are_the_only_ones_that_torch_reports() -> None:
    if not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("this CPU does not have AVX2")
    code = (
        "import torch, json; print(json.dumps([torch.backends.cpu.get_cpu_capability(), "
        "torch.cpu.get_capabilities()['avx2'], torch.cpu.get_capabilities().get('avx512_f'), "
        "torch.cpu._is_avx512_supported()]))"
    )
    environment = {**os.environ, **isa.variables("avx2")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert json.loads(done.stdout) == ["AVX2", True, False, False]


def test_the_prompts_of_a_dialogue_begin_like_those_of_the_turns_before(embedded_folder: Path) -> None:
    rounds = dialogue.dialogues(embedded_folder)
    assert len(rounds) == dialogue.ROUNDS
    assert all(len(requests) == 8 for requests in rounds)
    for requests in rounds:
        for earlier, later in pairwise(requests):
            assert later.prompt[: len(earlier.prompt)] == earlier.prompt
    lengths = [[len(request.prompt) for request in requests] for requests in rounds]
    assert lengths[0] == lengths[1] == lengths[2]
    assert rounds[0][0].prompt[:16] != rounds[1][0].prompt[:16]
