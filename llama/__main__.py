"""`python -m llama`: the model and its rules from a terminal.

Translates arguments and prints; every rule is the package's own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llama import ROOT
from llama.errors import InvalidInput, LlamaError
from llama.operations import add_plan, add_weights, tokenize

if TYPE_CHECKING:
    from llama.generation import Llama


def main() -> int:
    arguments = _parser().parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llama").setLevel(logging.INFO)
    try:
        return int(arguments.command(arguments) or 0)
    except LlamaError as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llama", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(name: str, command: Any, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(command=command)
        return sub

    def add_inputs(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "-i",
            metavar="NAME=VALUE",
            dest="inputs",
            action="append",
            default=[],
            help="any input of the model",
        )

    add_inputs(add("chat", _chat, "talk to the model; Ctrl-C stops an answer, Ctrl-D ends"))
    complete = add("complete", _complete, "answer one prompt")
    complete.add_argument("prompt", nargs="?", help="read from standard input when left out")
    add_inputs(complete)
    add("tokenize", tokenize, "read inputs as JSON objects, one a line, and print their token ids")
    add("schema", _schema, "write .cog/openapi_schema.json, as `cog build` does")
    predict = add("predict", _predict, "answer one prompt through Cog's server, started for it")
    predict.add_argument("--prompt", required=True)
    add_inputs(predict)
    serve = add("serve", _serve, "run Cog's server until it is stopped")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=5000)
    add_plan(add("plan", None, "what fits which GPUs; exit code 1 when nothing does"))
    add_weights(add("weights", None, "pull, verify, lock and pack the weights"))
    return parser


def _read_inputs(pairs: list[str]) -> dict[str, Any]:
    """The published defaults with NAME=VALUE pairs over them."""
    from llama.schema import input_defaults, input_properties, published_run

    run = published_run()
    inputs, properties = input_defaults(run), input_properties(run)
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or name not in properties:
            raise InvalidInput(f"-i {pair}: write NAME=VALUE with a name among {', '.join(properties)}")
        try:
            inputs[name] = value if properties[name]["type"] == "string" else json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(
                f"-i {name} takes JSON of type {properties[name]['type']}; correct it"
            ) from error
    return inputs


def _load() -> Llama:
    from llama.generation import Llama
    from llama.settings import Settings

    return Llama.load(Settings.from_environment())


def _answer(llama: Llama, inputs: dict[str, Any]) -> Iterator[str]:
    from llama.cancellation import Cancellation
    from llama.metrics import NoScope

    prediction = llama.prepare(inputs)
    log = logging.getLogger("llama").info
    return llama.stream(prediction, scope=NoScope(), log=log, cancellation=Cancellation())


def _print_stream(pieces: Iterator[str], said: list[str]) -> None:
    """Print an answer as it comes; `said` has all of it that anyone has seen, however it ends."""
    for piece in pieces:
        said.append(piece)
        print(piece, end="", flush=True)
    print()


def _complete(arguments: argparse.Namespace) -> None:
    inputs = _read_inputs(arguments.inputs)
    inputs["prompt"] = (
        sys.stdin.read().removeprefix("\ufeff") if arguments.prompt is None else arguments.prompt
    )
    llama = _load()
    try:
        _print_stream(_answer(llama, inputs), [])
    finally:
        llama.close()


def _chat(arguments: argparse.Namespace) -> None:
    inputs = _read_inputs(arguments.inputs)
    llama = _load()
    messages: list[dict[str, str]] = inputs["messages"] or []
    try:
        while (user := _ask()) is not None:
            if not user.strip():
                continue
            answer = _turn(llama, {**inputs, "messages": [*messages, {"role": "user", "content": user}]})
            if answer:
                messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    finally:
        llama.close()


def _ask() -> str | None:
    """The user's next turn; None at the end of input."""
    try:
        return input("> ").removeprefix("\ufeff")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _turn(llama: Llama, inputs: dict[str, Any]) -> str:
    """Stream an answer; Ctrl-C ends it, and what was said stays said."""
    said = list[str]()
    try:
        _print_stream(_answer(llama, inputs), said)
    except KeyboardInterrupt:
        print()
    except LlamaError as error:
        print(error, file=sys.stderr)
    return "".join(said)


def _schema(_: argparse.Namespace) -> None:
    from llama.schema import published_run, write_schema

    print(write_schema(published_run(), ROOT))


def _predict(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    from llama.schema import published_run, write_schema
    from llama.server import CogServer, ServerFailed

    inputs = {k: v for k, v in _read_inputs(arguments.inputs).items() if v is not None}
    write_schema(published_run(), ROOT)
    print("starting the server ...", file=sys.stderr)
    with CogServer() as server:
        try:
            server.wait_until_ready()
        except ServerFailed as error:
            sys.exit(str(error))
        first = None
        for event, data in server.stream({**inputs, "prompt": arguments.prompt}):
            if event == "output":
                first = first or time.monotonic() - started
                print(data["chunk"], end="", flush=True)
            elif event == "completed" and data.get("error"):
                sys.exit(str(data["error"]))
    print()
    if first is not None:
        print(f"first token {first:.1f} s after the start", file=sys.stderr)


def _serve(arguments: argparse.Namespace) -> None:
    from llama.schema import published_run, write_schema
    from llama.server import is_free, server_command, server_environment

    if not is_free(arguments.host, arguments.port):
        sys.exit(f"cannot listen on {arguments.host}:{arguments.port}; name another port with --port")
    write_schema(published_run(), ROOT)
    command = server_command(arguments.host)
    os.chdir(ROOT)
    os.execvpe(command[0], command, server_environment(arguments.port))


if __name__ == "__main__":
    sys.exit(main())
