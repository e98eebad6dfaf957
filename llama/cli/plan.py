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


@command
def plan(
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="GB[,GB...]",
            help="The free memory of each GPU in GB (1e9 bytes). If omitted, this machine's GPUs are used.",
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
    """Print which precisions fit the GPUs, and how many requests each leaves room for.

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
    print(f"model: {settings.weights or 'Llama 2 70B (LLAMA_WEIGHTS is not set)'}", file=sys.stderr)
    planner = planner_for(settings, config, cards, engine)
    found = planner.plan()
    _print_table(table(found, planner, settings.max_concurrency), found)
    return int(found.chosen is None)


def _share_for_vllm(cards: Sequence[Gpu], config: LlamaConfig, settings: Settings) -> list[Gpu]:
    """The GPUs that vLLM would use, each with the share of its memory that vLLM would take."""
    from llama.model.parallel_sizes import assume_identical, parallel_sizes

    stages, tensor = parallel_sizes(
        config, len(cards), tensor=settings.tensor_parallel, pipeline=settings.pipeline_parallel
    )
    share = settings.memory_fraction
    return [replace(gpu, free=int(gpu.free * share)) for gpu in assume_identical(cards, stages * tensor)]


def _print_table(text: str, found: Plan) -> None:
    """Print the table; on a terminal, the row of the chosen precision is in colour."""
    from rich.console import Console
    from rich.text import Text

    if not sys.stdout.isatty():  # rich would turn a closed pipe into the exit code 1
        print(text)
        return
    console = Console(highlight=False)
    for choice, line in zip((None, *found.choices), text.splitlines(), strict=True):
        chosen = choice is not None and choice is found.chosen
        console.print(Text(line, style="bold green" if chosen else ""), soft_wrap=True)


def table(found: Plan, planner: Planner, most: int) -> str:
    """The plan as text: a header and one row per choice. `most`: requests that the server takes at once."""
    head = ("precision", "weights", "cache", f"requests of {planner.context} tokens", "engine", "")
    rows = [
        (
            f"{planner.dtype.itemsize * 8} bits" if choice.quantization == "none" else choice.quantization,
            f"{choice.weights / 1e9:.1f} GB",
            f"{choice.cache / 1e9:.1f} GB",
            _requests(choice, most),
            planner.engine,
            choice.refusal or ("chosen" if choice is found.chosen else ""),
        )
        for choice in found.choices
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )


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
