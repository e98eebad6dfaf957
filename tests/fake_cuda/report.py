"""Writes what the 70B needs on a GPU to benchmarks/results/gpu_calculated.json and .md.

All figures are calculated with fake tensors. Run it with `make gpu-calculated`; it takes about 5 minutes. Knows JSON
and Markdown; `measure.py` calculates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import bitsandbytes
import torch

from fake_cuda.cases import CASES, Case
from fake_cuda.gpu import BYTES_PER_LAUNCH
from fake_cuda.measure import CONTEXT, MIXED, PROMPT, ROWS, Figures, figures_of
from llama import ROOT
from llama.model.precision_plan import LLAMA_2_70B

LABEL = "calculated, nothing ran on a GPU"
LAYERS: int = LLAMA_2_70B.num_hidden_layers
JSON = ROOT / "benchmarks" / "results" / "gpu_calculated.json"
MARKDOWN = JSON.with_suffix(".md")

_TEXT = ("Card", "Precision", "Attention", "Lengths")  # columns without numbers

# Paragraphs are lines of any length, because numbers in them would move the line breaks.
_INTRODUCTION = (
    f"All figures are {LABEL}. The engine's own code ran on fake CUDA tensors, which have shapes and dtypes but no "
    "memory (`tests/fake_cuda/`). `make gpu-calculated` writes this file. `tests/torch_engine/test_fake_cuda_budget.py` "
    "fails if a change to the engine changes a figure.",
    f"Every step has {ROWS} rows of {CONTEXT:,} positions. The compute capabilities are 9.0 (H100), 8.9 (L40S), 8.0 "
    "(A100) and 7.5 (T4). Not every precision fits on one of these GPUs. The L40S stands for GPUs whose FP8 kernels take "
    "one scale for each matrix, and the T4 for GPUs without flash attention.",
)
_LAUNCHES = (
    f"A decode step is the step that one CUDA graph captures, with {ROWS} requests. A prefill reads {PROMPT:,} tokens. "
    "*Other* launches are those outside of the layers. There is one graph for each batch size and, without flash "
    "attention, for each of five lengths.",
    f"Drivers before version 550 take up to {BYTES_PER_LAUNCH // 1024} KiB of memory for each launch in a graph; newer "
    "ones take less. cuBLAS may split a 16-bit product into two launches, which is not counted.",
)
_BYTES = (
    f"*Mixed* lengths are one row of {MIXED[0]:,} tokens and {len(MIXED) - 1} of {MIXED[1]}. *Full* lengths are {ROWS} "
    f"rows of {CONTEXT:,}. The shortest time is the total divided by the memory bandwidth in the card's data sheet: H100 "
    "3.35 TB/s, A100 (80 GB) 2.04 TB/s, L40S 0.864 TB/s, T4 0.32 TB/s.",
)
_MEMORY = (
    "The weights and the cache are kept. The other columns are temporary: the largest sum of all tensors while a phase "
    "runs, minus the sum after it. *Take apart* joins the weights of a layer that have the same input. The prefill reads "
    f"the last {PROMPT:,} of {CONTEXT:,} positions. *Decode* and *sample* are for {ROWS} requests. *Swap rows* exchanges "
    "two rows of the cache. Workspaces of cuBLAS and the buffers in which torch sorts are not counted.",
)


def main() -> None:
    cases = {}
    for case in CASES:
        one, all_layers = figures_of(case, 1), figures_of(case, LAYERS)
        cases[str(case)] = _entry(case, one, all_layers)
        print(case)
    report = {
        "label": LABEL,
        "model": f"Llama 2 70B, {LAYERS} layers",
        "versions": {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__},
        "rows": ROWS,
        "context": CONTEXT,
        "cases": cases,
    }
    JSON.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    MARKDOWN.write_text(as_markdown(report), encoding="utf-8")


def _entry(case: Case, one: Figures, all_layers: Figures) -> dict[str, Any]:
    per_layer = {
        name: (sum(getattr(all_layers, name).values()) - sum(getattr(one, name).values())) // (LAYERS - 1)
        for name in ("decode", "prefill")
    }
    outside = {name: sum(getattr(one, name).values()) - count for name, count in per_layer.items()}
    return {
        "card": case.card.name,
        "bandwidth": case.card.bandwidth,
        "quantization": case.quantization,
        "dtype": case.dtype,
        "launches_per_layer": per_layer,
        "launches_outside_layers": outside,
        **all_layers.as_json(),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """Return the tables of a report."""
    cases = list(report["cases"].values())
    versions = " and ".join(f"{name} {version}" for name, version in report["versions"].items())
    sections = [
        "# The 70B on a GPU, calculated",
        *_INTRODUCTION,
        f"Calculated with {versions}.",
        "## Kernel launches",
        *_LAUNCHES,
        _table(
            "Card | Precision | Attention | Decode, per layer | Decode, other | Decode, all | Prefill, per layer | "
            "Prefill, other | Graphs | Memory of graphs",
            map(_launch_row, cases),
        ),
        "## Bytes of a decode step",
        *_BYTES,
        _table(
            "Card | Precision | Lengths | Weights read | Cache read | Other reads | Writes | Total | Shortest time",
            (row for case in cases for row in _byte_rows(case)),
        ),
        "## GPU memory",
        *_MEMORY,
        _table(
            "Card | Precision | Weights | Cache | Load | Take apart | Prefill | Decode | Sample | Swap rows",
            map(_memory_row, cases),
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _table(header: str, rows: Iterator[Sequence[str]]) -> str:
    names = header.split(" | ")
    lines = [names, ["---" if name in _TEXT else "---:" for name in names], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _precision(case: dict[str, Any]) -> str:
    return (
        str(case["dtype"]) if case["quantization"] == "none" else f"{case['quantization']}, {case['dtype']}"
    )


def _launch_row(case: dict[str, Any]) -> list[str]:
    inside, outside = case["launches_per_layer"], case["launches_outside_layers"]
    counts = [inside["decode"], outside["decode"], sum(case["decode"].values())]
    counts += [inside["prefill"], outside["prefill"], case["graphs"]]
    attention = "flash" if case["flash_attention"] else "two products"
    memory = f"{case['graph_bytes'] / 2**30:.2f} GiB"
    return [case["card"], _precision(case), attention, *(f"{count:,}" for count in counts), memory]


def _byte_rows(case: dict[str, Any]) -> Iterator[list[str]]:
    for lengths, traffic in case["traffic"].items():
        total = sum(traffic.values())
        sizes = [f"{size / 1e9:.1f} GB" for size in (*traffic.values(), total)]
        name = lengths.split()[0]
        yield [case["card"], _precision(case), name, *sizes, f"{1000 * total / case['bandwidth']:.1f} ms"]


def _memory_row(case: dict[str, Any]) -> list[str]:
    memory = case["memory"]
    weights = memory["take apart"]["kept"]
    kept = [weights, memory["cache"]["kept"] - weights]
    temporary = [
        memory[name]["temporary"] for name in ("load", "take apart", "prefill", "decode", "sample", "swap")
    ]
    return [
        case["card"],
        _precision(case),
        *(f"{size / 1e9:.1f} GB" for size in kept),
        *(f"{size / 2**20:,.0f} MiB" for size in temporary),
    ]


if __name__ == "__main__":
    main()
