"""The command `plan`: a table of the precisions that fit the GPUs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from llama.cli.terminal import command
from llama.settings import EngineName, Settings
from llama.weights.folder import weights_folder

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from llama.model.precision_plan import Gpu, Plan, Planner, PrecisionOption

_LARGEST = 1e9  # GB
# The memory of a GPU that torch's CUDA context takes, measured with torch 2.10 on an RTX 6000 Ada in
# https://github.com/unslothai/unsloth-zoo/pull/1053. It is subtracted only from sizes that the user gives: on
# this machine's GPUs, the context exists before the free memory is read.
_CUDA_CONTEXT = 426 * 2**20
# The most requests at a time for which bitsandbytes multiplies by packed NF4 weights, by compute capability.
# For more requests, it first writes the large weights to memory in 16 bits. Source: the function
# `_gemm_4bit_use_custom_cuda` in its backends/cuda/ops.py, with which the tests compare these numbers.
_NF4_REQUESTS = {(8, 7): 4, (9, 0): 16, (10, 0): 4, (10, 3): 4, (11, 0): 4}
_NF4_REQUESTS_ELSEWHERE = 32


@command
def plan(
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="GB[,GB...]",
            help="The free memory of each GPU in GB (1e9 bytes), before a server starts. If omitted, this "
            "machine's GPUs are used.",
        ),
    ] = None,
    capability: Annotated[
        str,
        typer.Option(
            metavar="X.Y",
            help="The CUDA compute capability of the GPUs that --gpus names, such as 8.0 for an A100.",
        ),
    ] = "9.0",
) -> int:
    """Print which precisions fit the GPUs, how many requests each leaves room for, and what it is good for.

    LLAMA_WEIGHTS names the model; if it is unset, the model is Llama 2 70B. No weights are loaded.

    The exit code is 1 if no precision fits.
    """
    from llama.model.config import load_config
    from llama.model.placement import planner_for
    from llama.model.precision_plan import LLAMA_2_70B

    cards = _gpus(gpus, capability)
    settings = Settings.from_environment()
    config = LLAMA_2_70B if settings.weights is None else load_config(weights_folder(settings))
    several = max(len(cards), settings.tensor_parallel or 1, settings.pipeline_parallel or 1) > 1
    engine: EngineName = "vllm" if several else settings.engine
    if engine == "vllm":
        cards = _share_for_vllm(cards, config, settings)
    elif gpus is not None:
        cards = [replace(gpu, free=max(gpu.free - _CUDA_CONTEXT, 0)) for gpu in cards]
    print(f"model: {settings.weights or 'Llama 2 70B (LLAMA_WEIGHTS is not set)'}", file=sys.stderr)
    planner = planner_for(settings, config, cards, engine)
    found = planner.plan()
    if settings.quantization != "auto":
        named = (choice for choice in found.choices if choice.quantization == settings.quantization)
        found = replace(found, chosen=next((choice for choice in named if not choice.refusal), None))
    print(f"requests of {planner.context} tokens on the {engine} engine:")
    _print_table(table_cells(found, planner), found)
    planner.pick(settings.quantization)  # raises the error that a server would raise
    return 0


def _share_for_vllm(cards: Sequence[Gpu], config: LlamaConfig, settings: Settings) -> list[Gpu]:
    """The GPUs that vLLM would use, each with the share of its memory that vLLM would take."""
    from llama.model.parallel_sizes import assume_identical, parallel_sizes

    stages, tensor = parallel_sizes(
        config, len(cards), tensor=settings.tensor_parallel, pipeline=settings.pipeline_parallel
    )
    share = settings.memory_fraction
    return [replace(gpu, free=int(gpu.free * share)) for gpu in assume_identical(cards, stages * tensor)]


def _print_table(cells: Sequence[Sequence[str]], found: Plan) -> None:
    """Print a table. On a terminal, its last column is wrapped, and the chosen precision is in colour."""
    if not sys.stdout.isatty():  # rich would turn a closed pipe into the exit code 1
        print(_aligned(cells))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for name in cells[0]:
        table.add_column(name, no_wrap=bool(name))
    for choice, row in zip(found.choices, cells[1:], strict=True):
        table.add_row(*row, style="bold green" if choice is found.chosen else "")
    Console(highlight=False).print(table)


def table_cells(found: Plan, planner: Planner) -> list[tuple[str, ...]]:
    """The cells of the table: a header and one row per choice. The last column has no name."""
    return [
        ("precision", "weights", "cache", "requests", ""),
        *(
            (
                f"{planner.dtype.itemsize * 8} bits"
                if choice.quantization == "none"
                else choice.quantization,
                f"{choice.weights / 1e9:.1f} GB",
                f"{choice.cache / 1e9:.1f} GB",
                _requests(choice, planner.rows),
                choice.refusal or ("chosen: " if choice is found.chosen else "") + _use(choice, planner),
            )
            for choice in found.choices
        ),
    ]


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    """Return a table as text, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _use(choice: PrecisionOption, planner: Planner) -> str:
    """What a precision is good for on these GPUs."""
    capability = min(gpu.capability for gpu in planner.gpus)
    match choice.quantization:
        case "none":
            return "most accurate; needs the most memory"
        case "fp8":
            return "fast for one or many requests"
        case "int8":
            return "slower than fp8" if capability >= (8, 9) else "slower than nf4, but rounds less"
        case "nf4":
            most, requests = nf4_requests(capability), min(planner.rows, choice.requests)
            speed = f"slow with more than {most} at once" if most < requests else "fast for one or many"
            return f"saves memory; {speed}"


def nf4_requests(capability: tuple[int, int]) -> int:
    """The most requests at a time for which NF4 is fast on a GPU of this compute capability."""
    return _NF4_REQUESTS.get(capability, _NF4_REQUESTS_ELSEWHERE)


def _requests(choice: PrecisionOption, most: int) -> str:
    if choice.refusal:
        return "-"
    return f"{most} ({choice.requests} fit)" if choice.requests > most else str(choice.requests)


def _gpus(sizes: str | None, capability: str) -> Sequence[Gpu]:
    from llama.model.placement import local_gpus
    from llama.model.precision_plan import Gpu

    parsed = _parse_capability(capability)
    if sizes is None:
        return local_gpus()
    return [Gpu(f"{size:g} GB", int(size * 1e9), parsed) for size in _parse_gigabytes(sizes)]


def _parse_gigabytes(text: str) -> list[float]:
    with suppress(ValueError):
        sizes = [float(size) for size in text.split(",")]
        if all(0 < size < _LARGEST for size in sizes):
            return sizes
    raise typer.BadParameter(
        f"{text!r} is not a list of sizes in GB, such as 80 or 48,48", param_hint="--gpus"
    )


def _parse_capability(text: str) -> tuple[int, int]:
    with suppress(ValueError):
        major, minor = text.split(".")
        return int(major), int(minor)
    raise typer.BadParameter(f"{text!r} is not a compute capability, such as 8.0", param_hint="--capability")
