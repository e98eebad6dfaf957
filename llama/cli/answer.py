"""`complete` and `chat`: answers from a model in this process.

Translates arguments and prints.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from llama.cli.inputs import check_inputs, read_inputs, settings_to_load
from llama.cli.terminal import undecodable
from llama.errors import InvalidInput, PromptRequired

if TYPE_CHECKING:
    from llama.generation import Llama


def complete(arguments: argparse.Namespace) -> None:
    inputs = read_inputs(arguments.inputs)
    inputs["prompt"] = _read_prompt() if arguments.prompt is None else arguments.prompt
    check_inputs(inputs)
    llama = _load()
    try:
        for piece in llama.answer(inputs, logging.getLogger("llama").info):
            print(piece, end="", flush=True)
        print()
    finally:
        llama.close()


def _read_prompt() -> str:
    if sys.stdin is None:
        raise PromptRequired("standard input is closed; give a prompt as an argument")
    prompt = sys.stdin.read().removeprefix("\ufeff")
    if undecodable(prompt):
        raise InvalidInput(f"standard input is not {sys.stdin.encoding} text; convert it and try again")
    return prompt


def chat(arguments: argparse.Namespace) -> None:
    inputs = read_inputs(arguments.inputs)
    if sys.stdin is None:
        raise PromptRequired("standard input is closed; open it, or use complete")
    check_inputs({**inputs, "messages": [*(inputs["messages"] or []), {"role": "user", "content": "Hi!"}]})
    from llama.cli.chat import Chat

    llama = _load()
    try:
        Chat(llama, inputs).run()
    finally:
        llama.close()


def _load() -> Llama:
    from llama.load import load_llama

    settings = settings_to_load()
    print("loading the model ...", file=sys.stderr)
    return load_llama(settings)
