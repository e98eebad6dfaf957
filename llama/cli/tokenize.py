"""The command `tokenize`: the token ids of prompts, without loading the weights.

Reads and prints one JSON object per line.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from llama.cli.inputs import published_run
from llama.cli.terminal import command, decoded
from llama.errors import InvalidInput, LlamaError
from llama.settings import Settings
from llama.weights.folder import weights_folder

if TYPE_CHECKING:
    from llama.prompt.limits import PromptLimits
    from llama.text.tokenizer import Tokenizer

_LLAMA_2_CONTEXT = 4096


@command
def tokenize() -> int:
    """Read inputs from standard input, one JSON object per line, and print their token ids.

    Each output line has the `token_ids` and the formatted `text`, or an `error`.

    The exit code is 1 if any line has an error; the other lines are still processed.
    """
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
    failed = False
    for number, line in enumerate(sys.stdin or (), start=1):
        if text := line.removeprefix("\ufeff").strip():
            result = _tokenize_line(text, number, defaults, tokenizer, limits)
            failed |= "error" in result
            print(json.dumps(result), flush=True)
    return int(failed)


def _tokenize_line(
    line: str, number: int, defaults: dict[str, Any], tokenizer: Tokenizer, limits: PromptLimits
) -> dict[str, Any]:
    from llama.prompt.request import Request
    from llama.text.tokenizer import encode_within

    try:
        decoded(line, f"line {number}", sys.stdin.encoding)
        try:
            inputs = json.loads(line)
        except (ValueError, RecursionError):
            inputs = None
        if not isinstance(inputs, dict):
            raise InvalidInput(
                f"line {number} is not a JSON object; write one JSON object of inputs per line"
            )
        for name in inputs.keys() - defaults.keys():
            print(f"line {number}: the unknown input {name} is ignored", file=sys.stderr)
        request = Request.from_inputs({**defaults, **inputs}, limits)
        token_ids = encode_within(limits, request.prompt, tokenizer)
        return {"token_ids": token_ids, "text": tokenizer.render(request.prompt)}
    except LlamaError as error:
        return {"error": str(error)}
