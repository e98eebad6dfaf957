"""The inputs of the model as `-i NAME=VALUE`, and the settings, as the commands take them.

Knows where `predict.py` is, whose `Predictor.run` defines the inputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from llama.errors import InvalidInput
from llama.settings import ROOT, Settings


def published_run() -> Callable[..., object]:
    """`Predictor.run`, whose signature is the published schema."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from predict import Predictor

    run: Callable[..., object] = Predictor.run
    return run


def _complete_name(incomplete: str) -> Iterator[tuple[str, str]]:
    """For the shell: the inputs whose names begin so, with their descriptions."""
    from llama.serving.schema import input_properties

    for name, schema in input_properties(published_run()).items():
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

        from llama.serving.schema import input_properties

        super().format_help(ctx, formatter)
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, schema in input_properties(published_run()).items():
            if name != "prompt":
                grid.add_row(name, f"{schema['description']} ({_type_and_default(schema)})")
        title = "Inputs: -i NAME=VALUE. A string is taken as it is, any other type is JSON."
        Console(highlight=False, markup=False).print(
            Panel(grid, title=title, title_align="left", border_style="dim")
        )


def _type_and_default(schema: dict[str, Any]) -> str:
    default = schema["default"]
    return schema["type"] if default is None else f"{schema['type']}, default {json.dumps(default)}"


def read_inputs(pairs: list[str] | None) -> dict[str, Any]:
    """The published defaults, overridden by NAME=VALUE pairs. Raises InvalidInput."""
    from llama.serving.schema import input_defaults, input_properties

    run = published_run()
    inputs, properties = input_defaults(run), input_properties(run)
    for pair in pairs or ():
        name, separator, value = pair.partition("=")
        if not separator or name not in properties:
            raise InvalidInput(
                f"-i {pair} does not set an input; write NAME=VALUE, where NAME is one of "
                f"{', '.join(properties)}"
            )
        kind = properties[name]["type"]
        try:
            inputs[name] = value if kind == "string" else json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(
                f"-i {name}: the value is not JSON; write a JSON value of type {kind}"
            ) from error
    return inputs


def check_inputs(inputs: dict[str, Any]) -> None:
    """Raise a UserError for inputs that no model can answer, before a model is loaded."""
    from llama.prompt.limits import PromptLimits
    from llama.prompt.request import Request

    Request.from_inputs(inputs, PromptLimits(context=sys.maxsize, longest_piece=1))


def settings_to_load() -> Settings:
    """The settings, after a check that the weights folder exists, unless setup will download the weights.

    The embedded model is converted here at its first use, so that the user sees why the start takes longer.
    """
    from llama.weights.folder import weights_folder

    settings = Settings.from_environment()
    if not settings.pull:
        weights_folder(settings)
    return settings
