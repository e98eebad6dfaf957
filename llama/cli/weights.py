"""`weights pull`, `verify`, `lock` and `pack`: the folder of weights, before it is served.

Translates arguments and prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from llama.errors import BadSettings
from llama.settings import Settings
from llama.weights.folder import Inspection, folder_to_fill, lock, pull, verify, weights_folder


def add_weights(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(command=command)
        return sub

    for name, command, summary in (
        ("pull", _pull, "download the files that are missing, resuming an earlier pull"),
        ("verify", _verify, "look for missing, short and damaged files; exit code 1 when there are any"),
        ("lock", _lock, "write the sha256 of the folder's files into the manifest"),
    ):
        add(name, command, summary).add_argument(
            "folder", nargs="?", type=Path, help="LLAMA_WEIGHTS, or weights/llama-2-70b-chat, when left out"
        )
    pack = add("pack", _pack, "quantize LLAMA_WEIGHTS once, so that later starts read less")
    pack.add_argument("target", type=Path, help="a new folder")
    pack.add_argument("--quantization", choices=("nf4", "int8", "fp8"), default="nf4")


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
    from llama.model.pack import pack
    from llama.model.placement import pick_device

    settings = Settings.from_environment()
    if settings.weights is None:
        raise BadSettings("LLAMA_WEIGHTS is not set; set it to the folder that is to be packed")
    pack(weights_folder(settings), arguments.target, arguments.quantization, pick_device(settings))
    print(f"{arguments.target} is whole; serve it with LLAMA_WEIGHTS={arguments.target}")
    return 0
