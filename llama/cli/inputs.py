"""Reads the model's inputs, which commands take as `-i NAME=VALUE`, and lists them in the help.

Knows where `predict.py` is; its `Predictor.run` defines the inputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from llama.cli.terminal import decoded
from llama.errors import BadSettings, InvalidInput
from llama.settings import ROOT

_EXAMPLES = {
    "number": "a number, such as 0.7",
    "integer": "a whole number, such as 20",
    "boolean": "true or false",
    "array": 'an array, such as [{"role": "user", "content": "Hi!"}]',
}


def published_run() -> Callable[..., object]:
    """`Predictor.run`, whose signature is the published schema. Raises BadSettings if it is not installed."""
    if not (ROOT / "predict.py").is_file():
        raise BadSettings(f"{ROOT} has no predict.py; install from a clone with `pip install -e .`")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from predict import Predictor

    run: Callable[..., object] = Predictor.run
    return run


def _options() -> dict[str, Any]:
    """The schemas of the inputs that `-i` sets, by name: all except the prompt, which is an argument."""
    from llama.serving.schema import input_properties

    return {name: schema for name, schema in input_properties(published_run()).items() if name != "prompt"}


def _complete_name(incomplete: str) -> Iterator[tuple[str, str]]:
    """For shell completion: the inputs whose names begin with `incomplete`, with their descriptions."""
    for name, schema in _options().items():
        if name.startswith(incomplete):
            yield f"{name}=", schema["description"]


InputOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="NAME=VALUE",
        help="Set an input of the model, such as temperature=0. Repeat the option for several inputs.",
        autocompletion=_complete_name,
    ),
]


class CommandWithInputs(TyperCommand):
    """A command with the option `-i`: its help also lists the names that the option takes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        super().format_help(ctx, formatter)
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, schema in _options().items():
            grid.add_row(name, f"{schema['description']} ({_type_and_default(schema)})")
        title = "Inputs (-i NAME=VALUE): write strings as they are, other types as JSON"
        Console(highlight=False, markup=False).print(
            Panel(grid, title=title, title_align="left", border_style="dim")
        )


def _type_and_default(schema: dict[str, Any]) -> str:
    default = schema["default"]
    return schema["type"] if default is None else f"{schema['type']}, default {json.dumps(default)}"


def read_inputs(pairs: list[str] | None) -> dict[str, Any]:
    """The published defaults, overridden by NAME=VALUE pairs. Raises InvalidInput."""
    from llama.serving.schema import input_defaults

    inputs, options = input_defaults(published_run()), _options()
    for pair in pairs or ():
        name, separator, value = decoded(pair, "-i").partition("=")
        if name == "prompt":
            raise InvalidInput(
                "-i cannot set prompt; pass it to `complete` as the argument or to `predict` as --prompt, or "
                "type it in `chat`"
            )
        if not separator or name not in options:
            near = get_close_matches(name, options, n=1)
            raise InvalidInput(
                f"-i takes NAME=VALUE, where NAME is one of {', '.join(options)}"
                f"{f'; did you mean {near[0]}?' if near else ''}"
            )
        kind = options[name]["type"]
        try:
            inputs[name] = value if kind == "string" else json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"-i {name}: the value is not JSON; write {_EXAMPLES[kind]}") from error
    return inputs


def check_inputs(inputs: dict[str, Any]) -> None:
    """Raise a UserError for inputs that no model can answer, before a model is loaded."""
    from llama.prompt.limits import PromptLimits
    from llama.prompt.request import Request

    Request.from_inputs(inputs, PromptLimits(context=sys.maxsize, longest_piece=1))
