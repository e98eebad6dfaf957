"""The commands `weights pull`, `verify`, `lock` and `pack`, which prepare a weights folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from llama.cli.terminal import command
from llama.errors import BadSettings
from llama.settings import Settings, expanded
from llama.weights.folder import Inspection, folder_to_fill, weights_folder
from llama.weights.folder import lock as lock_folder
from llama.weights.folder import pull as pull_folder
from llama.weights.folder import verify as verify_folder

weights = typer.Typer(
    help="Download, verify, lock and pack the weights. LLAMA_WEIGHTS_MANIFEST names the manifest, which "
    "lists the files and their URLs; the default is weights.txt in the repository.",
    no_args_is_help=True,
)

FolderArgument = Annotated[
    Path | None,
    typer.Argument(
        help="The weights folder; by default LLAMA_WEIGHTS or, if that is unset, "
        "weights/llama-2-70b-chat in the repository."
    ),
]


def _folder(argument: Path | None, settings: Settings) -> Path:
    return expanded(argument, "FOLDER") if argument else folder_to_fill(settings)


@weights.command()
@command
def pull(folder: FolderArgument = None) -> None:
    """Download and verify the files of the manifest that are missing or wrong."""
    settings = Settings.from_environment()
    folder = _folder(folder, settings)
    downloaded = pull_folder(folder, settings)
    print(f"{folder} is complete; {_files(downloaded)} downloaded")


@weights.command()
@command
def verify(folder: FolderArgument = None) -> int:
    """Look for missing, incomplete and damaged files. The exit code is 1 if there are any."""
    settings = Settings.from_environment()
    folder = _folder(folder, settings)
    return _print_inspection(folder, verify_folder(folder, settings))


@weights.command()
@command
def lock(folder: FolderArgument = None) -> int:
    """Verify the files of the manifest and, if all are valid, write their SHA-256 hashes into it."""
    settings = Settings.from_environment()
    folder = _folder(folder, settings)
    inspection = lock_folder(folder, settings)
    if inspection.faults:
        _print_faults(inspection)
        print(f"{settings.weights_manifest} was not changed", file=sys.stderr)
    else:
        print(f"{settings.weights_manifest} now has the SHA-256 of {_files(inspection.files)}")
    return int(bool(inspection.faults))


def _print_faults(inspection: Inspection) -> None:
    for fault in inspection.faults:
        print(fault, file=sys.stderr)


def _print_inspection(folder: Path, inspection: Inspection) -> int:
    _print_faults(inspection)
    if not inspection.faults:
        hashed = len(inspection.hashes)
        rest = inspection.files - hashed
        note = f", {rest} by format only (`weights lock` records the missing hashes)" if rest else ""
        print(f"{folder} is valid: {_files(inspection.files)}, {hashed} checked by SHA-256{note}")
    return int(bool(inspection.faults))


def _files(number: int) -> str:
    return f"{number} file{'' if number == 1 else 's'}"


@weights.command()
@command
def pack(
    target: Annotated[Path, typer.Argument(help="A new folder for the packed weights.")],
    quantization: Annotated[
        Literal["nf4", "int8", "fp8"], typer.Option(help="The precision of the linear layers.")
    ] = "nf4",
) -> None:
    """Quantize the weights in LLAMA_WEIGHTS into a new folder, so that later starts read fewer bytes."""
    from llama.model.pack import pack as pack_folder
    from llama.model.placement import pick_device

    settings = Settings.from_environment()
    if settings.weights is None:
        raise BadSettings("LLAMA_WEIGHTS is not set; set it to the folder to pack")
    target = expanded(target, "TARGET")
    pack_folder(weights_folder(settings), target, quantization, pick_device(settings))
    print(f"{target} is complete; serve it with LLAMA_WEIGHTS={target.absolute()}")
