"""The command `complete`: one answer, from a model in this process."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from llama.cli.inputs import InputOptions, check_inputs, read_inputs, settings_to_load
from llama.cli.terminal import command, undecodable
from llama.errors import InvalidInput, PromptRequired

if TYPE_CHECKING:
    from llama.generation import Llama


@command
def complete(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. If omitted, it is read from standard input.")
    ] = None,
    inputs: InputOptions = None,
) -> None:
    """Answer one prompt. Only the answer goes to standard output."""
    values = read_inputs(inputs)
    values["prompt"] = _read_prompt() if prompt is None else prompt
    check_inputs(values)
    llama = load_with_notice()
    try:
        for piece in llama.answer(values, logging.getLogger("llama").info):
            print(piece, end="", flush=True)
        print()
    finally:
        llama.close()


def _read_prompt() -> str:
    if sys.stdin is None:
        raise PromptRequired("standard input is closed; pass the prompt as an argument")
    prompt = sys.stdin.read().removeprefix("\ufeff")
    if undecodable(prompt):
        raise InvalidInput(f"standard input is not valid {sys.stdin.encoding}; convert it and try again")
    return prompt


def load_with_notice() -> Llama:
    """Check the settings, print that the model is being loaded, and load it."""
    from llama.load import load_llama

    settings = settings_to_load()
    print("loading the model ...", file=sys.stderr)
    return load_llama(settings)
