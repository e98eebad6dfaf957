"""The typer app that all commands belong to, and its entry point.

To add a command, write a function in a module of this folder and register it here.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import llama
from llama.cli.answer import complete
from llama.cli.chat import chat
from llama.cli.gateway import gateway, up
from llama.cli.inputs import CommandWithInputs
from llama.cli.keys import keys
from llama.cli.plan import plan
from llama.cli.serve import predict, schema, serve
from llama.cli.terminal import end_by_exception_on_signals, exit_code, forgiving_streams, leave
from llama.cli.tokenize import tokenize
from llama.cli.usage import usage
from llama.cli.weights import weights

app = typer.Typer(
    help="Run Llama 2 Chat: answer prompts, chat, serve the model, and prepare its weights. The settings are "
    "environment variables, which docs/reference.md lists.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # A shell completes the installed command. It cannot complete `python -m llama`.
    add_completion=Path(sys.argv[0]).name != "__main__.py",
)


def main() -> NoReturn:
    """Run the command that the arguments name, and end the process with its exit code."""
    forgiving_streams()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llama").setLevel(logging.INFO)
    end_by_exception_on_signals()
    leave(exit_code(app))


def _print_version(requested: bool) -> None:
    if requested:
        print(f"llama-2-70b-chat {llama.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options that stand before a command."""


app.command(cls=CommandWithInputs)(chat)
app.command(cls=CommandWithInputs)(complete)
app.command(cls=CommandWithInputs)(predict)
app.command()(serve)
app.command()(gateway)
app.command()(up)
app.add_typer(keys, name="keys")
app.command()(usage)
app.command()(tokenize)
app.command()(plan)
app.add_typer(weights, name="weights")
app.command()(schema)
