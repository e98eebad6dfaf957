"""Check the engine on one GPU, and measure a random Llama 2 70B on it.

Each part runs in a process of its own, and a part that fails does not stop the others. The results are added
to a JSON file, from which a Markdown file next to it is written. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.parts import PARTS, SECONDS_PER_PART, Part, chosen, run_child
from benchmarks.gpu.report import markdown
from benchmarks.gpu.results import Document, failures, load
from benchmarks.gpu.verdict import CALCULATED, verdict, verdict_table
from benchmarks.machine import commit, describe
from benchmarks.report import write_json
from benchmarks.workload import OUT
from llama import ROOT

RESULTS = ROOT / "benchmarks/results/gpu.json"


def main() -> None:
    arguments = _arguments()
    try:
        parts = chosen(arguments.parts)
        results = load(arguments.results)
    except ValueError as error:
        sys.exit(str(error))
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    ran: dict[str, Document] = {}
    for part in parts:
        print(f"{part.name} (estimate for a GPU: {part.minutes:g} min) ...", file=sys.stderr, flush=True)
        ran[part.name] = _measure(part, arguments)
        # A run that measured nothing, for example without a GPU, does not replace an earlier one.
        if ran[part.name].get("measured") or part.name not in results["parts"]:
            results["parts"][part.name] = ran[part.name]
        if any(known.get("measured") for known in results["parts"].values()):
            _write(results, arguments)
        _print_outcome(part.name, ran[part.name])
    if results.get("verdict"):
        print(verdict_table(results["verdict"]))
    failed = [*failures(ran), *results.get("not_compared", [])]
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


def _arguments() -> argparse.Namespace:
    parts = "\n".join(f"  {part.name:14} {part.minutes:2g} min  {part.measures}" for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}\nparts, and estimates of their time (not measured):\n\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="the parts to run (default: all, in this order)"
    )
    parser.add_argument("--device", default="cuda:0", help="the device to measure (default: %(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="use models of two layers on the CPU, to test this program"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="the JSON file of the results (default: benchmarks/results/gpu.json; with --small, "
        "benchmarks/out/gpu-small.json)",
    )
    parser.add_argument("--disk", type=Path, help="a folder on a disk with 45 GB free, for the packed 70B")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS_PER_PART,
        help="the time limit of each part (default: %(default)g)",
    )
    arguments = parser.parse_args()
    if arguments.small:
        arguments.device = "cpu"
    if arguments.results is None:
        arguments.results = OUT / "gpu-small.json" if arguments.small else RESULTS
    if arguments.results.is_dir():
        parser.error(f"--results is {arguments.results}, which is a folder; name a file")
    if arguments.disk is not None and not arguments.disk.is_dir():
        parser.error(f"--disk is {arguments.disk}, which is not a folder")
    return arguments


def _measure(part: Part, arguments: argparse.Namespace) -> Document:
    with tempfile.TemporaryDirectory(dir=arguments.disk) as folder:
        written = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu.parts", part.name, str(written)]
        command += ["--device", arguments.device, *(["--small"] if arguments.small else [])]
        measured = run_child(command, written, arguments.seconds)
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe(),
        "small": arguments.small,
        **measured,
    }


def _write(results: Document, arguments: argparse.Namespace) -> None:
    results["verdict"], results["not_compared"] = verdict(results["parts"], CALCULATED)
    write_json(arguments.results, results)
    arguments.results.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def _print_outcome(name: str, part: Document) -> None:
    counts = ", ".join(f"{len(part.get(key, {}))} {key}" for key in ("measured", "skipped", "failed"))
    print(f"{name}: {part['seconds']:.0f} s, {counts}", file=sys.stderr, flush=True)
    for measurement, text in part.get("failed", {}).items():
        print(f"--- {name}: {measurement} failed:\n{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
