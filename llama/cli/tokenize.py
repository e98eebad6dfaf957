"""`tokenize`: the token ids of prompts, without loading a model.

Reads and prints lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from llama.cli.inputs import published_run
from llama.cli.terminal import undecodable
from llama.errors import InvalidInput, LlamaError
from llama.settings import Settings
from llama.weights.folder import weights_folder

if TYPE_CHECKING:
    from llama.prompt.limits import PromptLimits
    from llama.text.tokenizer import Tokenizer

_LLAMA_2_CONTEXT = 4096


def tokenize(_: argparse.Namespace) -> int:
    """Exit code 1 when any line was refused; the others are answered all the same."""
    from llama.prompt.limits import PromptLimits
    from llama.serving.schema import input_defaults
    from llama.text.load_tokenizer import fit_tokenizer, load_tokenizer

    settings = Settings.from_environment()
    folder = weights_folder(settings)
    tokenizer = load_tokenizer(folder)
    context = min(settings.max_context or _LLAMA_2_CONTEXT, _LLAMA_2_CONTEXT)
    if (folder / "config.json").is_file():
        from llama.model.config import context_length, load_config

        config = load_config(folder)
        fit_tokenizer(tokenizer, config.vocab_size, folder)
        context = context_length(config, settings.max_context)
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
