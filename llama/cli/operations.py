"""`python -m llama plan`, `weights` and `tokenize`: what is done before, and without, serving.

Translates arguments and prints; knows settings, folders and which engine would serve; starts none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama.errors import BadSettings, InvalidInput, LlamaError
from llama.serving.process import undecodable
from llama.settings import Settings
from llama.weights.folder import Inspection, folder_to_fill, lock, pull, verify, weights_folder

if TYPE_CHECKING:
    from llama.model.plan import Gpu, Plan
    from llama.prompt.limits import PromptLimits
    from llama.text.tokenizer import Tokenizer

# What --gpus says nothing about: a card with FP8, as all are since Ada and Hopper.
_ASSUMED_CAPABILITY = (9, 0)
_LLAMA_2_CONTEXT = 4096


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


def add_weights(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(command=command)
        return sub

    for name, command, summary in (
        ("pull", _pull, "bring what is missing, going on where an earlier pull was cut"),
        ("verify", _verify, "look for missing, short and damaged files; exit code 1 when there are any"),
        ("lock", _lock, "write the sha256 of the folder's files into the manifest"),
    ):
        add(name, command, summary).add_argument(
            "folder", nargs="?", type=Path, help="LLAMA_WEIGHTS, or weights/llama-2-70b-chat, when left out"
        )
    pack = add("pack", _pack, "quantize LLAMA_WEIGHTS once, so that later starts read less")
    pack.add_argument("target", type=Path, help="a new folder")
    pack.add_argument("--quantization", choices=("nf4", "int8", "fp8"), default="nf4")


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
    from llama.model.loader import context_wanted, load_config, pick_dtype, stored_quantization
    from llama.model.plan import LLAMA_2_70B, alike, parallel_sizes, plan

    settings = Settings.from_environment()
    config = LLAMA_2_70B if settings.weights is None else load_config(weights_folder(settings))
    gpus = _gpus(arguments)
    context = context_wanted(settings, config)
    several = max(len(gpus), settings.tensor_parallel or 1, settings.pipeline_parallel or 1) > 1
    engine: Literal["torch", "vllm"] = "vllm" if several else settings.engine
    if engine == "vllm":
        stages, tensor = parallel_sizes(
            config, len(gpus), tensor=settings.tensor_parallel, pipeline=settings.pipeline_parallel
        )
        share = settings.memory_fraction
        gpus = [replace(gpu, free=int(gpu.free * share)) for gpu in alike(gpus, stages * tensor)]
    dtype = pick_dtype(settings, config, min(gpu.capability for gpu in gpus))
    found = plan(
        config, gpus, context=context, stored=stored_quantization(config), engine=engine, dtype=dtype
    )
    print(table(found, context, settings.max_concurrency, dtype.itemsize * 8))
    return int(found.auto is None)


def table(found: Plan, context: int, most: int, bits: int) -> str:
    """For people: one row for each choice. `most`: the requests that the server takes at once; `bits`: the
    width of weights that are not quantized."""
    head = ("precision", "weights", "cache", f"requests of {context} tokens", "engine", "")
    rows = [
        (
            f"{bits} bits" if choice.quantization == "none" else choice.quantization,
            f"{choice.weights / 1e9:.1f} GB",
            f"{choice.cache / 1e9:.1f} GB",
            f"{most} ({choice.requests} fit)" if choice.requests > most else str(choice.requests),
            choice.engine,
            choice.refusal or ("what auto takes" if choice is found.auto else ""),
        )
        for choice in found.choices
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )


def _gpus(arguments: argparse.Namespace) -> Sequence[Gpu]:
    import torch

    from llama.model.loader import gpu_of
    from llama.model.plan import Gpu

    if arguments.gpus is not None:
        return [Gpu(f"{size:g} GB", int(size * 1e9), arguments.capability) for size in arguments.gpus]
    if not torch.cuda.is_available():
        raise BadSettings(
            "there is no GPU here that torch can use; name some with --gpus, such as --gpus 80,80"
        )
    return [gpu_of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def _pull(arguments: argparse.Namespace) -> int:
    settings = Settings.from_environment()
    folder = arguments.folder or folder_to_fill(settings)
    brought = pull(folder, settings)
    print(f"{folder} is whole, {brought} files brought")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from llama.weights.manifest import read_manifest

    settings = Settings.from_environment()
    folder = arguments.folder or folder_to_fill(settings)
    return _print_inspection(folder, verify(folder, read_manifest(settings.weights_manifest)))


def _lock(arguments: argparse.Namespace) -> int:
    settings = Settings.from_environment()
    folder = arguments.folder or folder_to_fill(settings)
    inspection = lock(folder, settings.weights_manifest)
    failed = _print_inspection(folder, inspection)
    if not failed:
        print(f"{settings.weights_manifest} has the sha256 of all {inspection.files} files now")
    if failed:
        print(f"{settings.weights_manifest} is as it was", file=sys.stderr)
    return failed


def _print_inspection(folder: Path, inspection: Inspection) -> int:
    for fault in inspection.faults:
        print(fault, file=sys.stderr)
    if not inspection.faults:
        files, hashed = inspection.files, len(inspection.hashes)
        rest = "" if hashed == files else ", the others by their form (`weights lock` writes the hashes)"
        print(f"{folder} is well: {files} files, {hashed} by their sha256{rest}")
    return int(bool(inspection.faults))


def _pack(arguments: argparse.Namespace) -> int:
    from llama.model.loader import pick_device
    from llama.model.pack import pack

    settings = Settings.from_environment()
    if settings.weights is None:
        raise BadSettings("LLAMA_WEIGHTS is not set; set it to the folder that is to be packed")
    pack(weights_folder(settings), arguments.target, arguments.quantization, pick_device(settings))
    print(f"{arguments.target} is whole; serve it with LLAMA_WEIGHTS={arguments.target}")
    return 0


def tokenize(_: argparse.Namespace) -> int:
    """Exit code 1 when any line was refused; the others are answered all the same."""
    from llama.prompt.limits import PromptLimits
    from llama.serving.schema import input_defaults, published_run
    from llama.text.load_tokenizer import load_tokenizer

    settings = Settings.from_environment()
    folder = weights_folder(settings)
    tokenizer = load_tokenizer(folder)
    context = min(settings.max_context or _LLAMA_2_CONTEXT, _LLAMA_2_CONTEXT)
    if (folder / "config.json").is_file():
        from llama.model.loader import context_wanted, fit_tokenizer, load_config

        config = load_config(folder)
        fit_tokenizer(tokenizer, config, folder)
        context = context_wanted(settings, config)
    limits = PromptLimits(context, tokenizer.longest_piece)
    defaults = input_defaults(published_run())
    refused = False
    for line in filter(str.strip, (line.removeprefix("\ufeff") for line in sys.stdin or ())):
        result = _tokenize_line(line, defaults, tokenizer, limits)
        refused |= "error" in result
        print(json.dumps(result), flush=True)
    return int(refused)


def _tokenize_line(
    line: str, defaults: dict[str, Any], tokenizer: Tokenizer, limits: PromptLimits
) -> dict[str, Any]:
    from llama.prompt.request import Request
    from llama.text.tokenizer import encode_within

    try:
        if undecodable(line):
            raise InvalidInput(f"a line is not {sys.stdin.encoding} text; convert it and try again")
        try:
            inputs = json.loads(line)
        except (ValueError, RecursionError):
            inputs = None
        if not isinstance(inputs, dict):
            raise InvalidInput("a line is not a JSON object; write one object of inputs a line")
        for name in inputs.keys() - defaults.keys():
            print(f"unknown input dropped: {name}", file=sys.stderr)
        request = Request.from_inputs({**defaults, **inputs}, limits)
        token_ids = encode_within(limits, request.prompt, tokenizer)
        return {"token_ids": token_ids, "text": tokenizer.render(request.prompt)}
    except LlamaError as error:
        return {"error": str(error)}
