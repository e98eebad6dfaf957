"""`plan`: which precision fits which GPUs, as a table.

Translates arguments and prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from llama.settings import EngineName, Settings
from llama.weights.folder import weights_folder

if TYPE_CHECKING:
    from llama.model.precision_plan import Gpu, Plan, Planner

# What --gpus says nothing about: a card with FP8, as all are since Ada and Hopper.
_ASSUMED_CAPABILITY = (9, 0)


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus",
        metavar="GB[,GB...]",
        type=_gigabytes,
        help="free memory of each GPU in GB (1e9 bytes); this machine's when left out",
    )
    parser.add_argument(
        "--capability",
        metavar="X.Y",
        type=_capability,
        default=_ASSUMED_CAPABILITY,
        help="CUDA compute capability of the GPUs of --gpus, such as 8.0 for an A100; 9.0 when left out",
    )
    parser.set_defaults(command=_plan)


def _gigabytes(text: str) -> list[float]:
    with suppress(ValueError):
        sizes = [float(size) for size in text.split(",")]
        if all(0 < size < float("inf") for size in sizes):
            return sizes
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes in GB, such as 80 or 48,48")


def _capability(text: str) -> tuple[int, int]:
    with suppress(ValueError):
        major, minor = text.split(".")
        return int(major), int(minor)
    raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability, such as 8.0")


def _plan(arguments: argparse.Namespace) -> int:
    from llama.model.config import load_config
    from llama.model.placement import planner_for
    from llama.model.precision_plan import LLAMA_2_70B, assume_identical, parallel_sizes

    settings = Settings.from_environment()
    config = LLAMA_2_70B if settings.weights is None else load_config(weights_folder(settings))
    gpus = _gpus(arguments)
    several = max(len(gpus), settings.tensor_parallel or 1, settings.pipeline_parallel or 1) > 1
    engine: EngineName = "vllm" if several else settings.engine
    if engine == "vllm":
        stages, tensor = parallel_sizes(
            config, len(gpus), tensor=settings.tensor_parallel, pipeline=settings.pipeline_parallel
        )
        share = settings.memory_fraction
        gpus = [replace(gpu, free=int(gpu.free * share)) for gpu in assume_identical(gpus, stages * tensor)]
    planner = planner_for(settings, config, gpus, engine)
    found = planner.plan()
    print(table(found, planner, settings.max_concurrency))
    return int(found.chosen is None)


def table(found: Plan, planner: Planner, most: int) -> str:
    """For people: one row for each choice. `most`: the requests that the server takes at once."""
    head = ("precision", "weights", "cache", f"requests of {planner.context} tokens", "engine", "")
    rows = [
        (
            f"{planner.dtype.itemsize * 8} bits" if choice.quantization == "none" else choice.quantization,
            f"{choice.weights / 1e9:.1f} GB",
            f"{choice.cache / 1e9:.1f} GB",
            f"{most} ({choice.requests} fit)" if choice.requests > most else str(choice.requests),
            planner.engine,
            choice.refusal or ("what auto takes" if choice is found.chosen else ""),
        )
        for choice in found.choices
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )


def _gpus(arguments: argparse.Namespace) -> Sequence[Gpu]:
    from llama.model.placement import local_gpus
    from llama.model.precision_plan import Gpu

    if arguments.gpus is None:
        return local_gpus()
    return [Gpu(f"{size:g} GB", int(size * 1e9), arguments.capability) for size in arguments.gpus]
