"""The command `complete`: one answer, from a model in this process."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llama.cli.inputs import InputOptions, check_inputs, read_inputs
from llama.cli.loading import load_with_notice
from llama.cli.terminal import command, decoded
from llama.errors import PromptRequired


@command
def complete(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. If omitted, it is read from standard input.")
    ] = None,
    inputs: InputOptions = None,
) -> None:
    """Answer one prompt. Only the answer goes to standard output."""
    values = read_inputs(inputs)
    values["prompt"] = _read_prompt() if prompt is None else decoded(prompt, "the prompt")
    check_inputs(values)
    llama = load_with_notice()
    log = list[str]()  # printed after the answer, or it would end up on the answer's line
    try:
        for piece in llama.answer(values, log.append):
            print(piece, end="", flush=True)
        print()
    finally:
        print(*log, sep="\n", end="\n" if log else "", file=sys.stderr)
        llama.close()


def _read_prompt() -> str:
    if sys.stdin is None:
        raise PromptRequired("standard input is closed; pass the prompt as an argument")
    if sys.stdin.isatty():
        print("reading the prompt from the terminal; Ctrl-D ends it", file=sys.stderr)
    try:
        prompt = sys.stdin.read().removeprefix("\ufeff")
    except OSError as error:
        raise PromptRequired(
            f"standard input cannot be read ({error.strerror}); pass the prompt as an argument"
        ) from error
    return decoded(prompt, "standard input", sys.stdin.encoding)
