"""`python -m llama`: the model and its rules from a terminal.

Translates arguments and prints; every rule is the package's own.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import signal
import subprocess
import sys
import time
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn

from llama import ROOT
from llama.cli.operations import add_plan, add_weights, tokenize
from llama.errors import InvalidInput, LlamaError, PromptRequired
from llama.serving.process import end_by_exception_on_signals, forgiving_streams, leave, undecodable

if TYPE_CHECKING:
    from llama.generation import Llama

_OUTPUT_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def main() -> NoReturn:
    """Run a command and end with its exit code, or with the usual one of what ended it."""
    forgiving_streams()
    arguments = _parser().parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llama").setLevel(logging.INFO)
    end_by_exception_on_signals()
    leave(_exit_code(arguments))


def _exit_code(arguments: argparse.Namespace) -> int:
    try:
        code = int(arguments.command(arguments) or 0)
        sys.stdout.flush()
    except LlamaError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except SystemExit as error:  # a signal's code, or a message
        if isinstance(error.code, int | None):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _OUTPUT_FAULTS:
            raise
        print(
            f"the output cannot be written ({error.strerror}); free some space or write it elsewhere",
            file=sys.stderr,
        )
        return 1
    return code


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
    from llama.serving.schema import input_defaults, input_properties, published_run

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


def _complete(arguments: argparse.Namespace) -> None:
    inputs = _read_inputs(arguments.inputs)
    inputs["prompt"] = _read_prompt() if arguments.prompt is None else arguments.prompt
    _check(inputs)
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


def _check(inputs: dict[str, Any]) -> None:
    """Refuse what no model could answer, before one is loaded."""
    from llama.prompt.limits import PromptLimits
    from llama.prompt.request import Request

    Request.from_inputs(inputs, PromptLimits(context=sys.maxsize, longest_piece=1))


def _chat(arguments: argparse.Namespace) -> None:
    inputs = _read_inputs(arguments.inputs)
    if sys.stdin is None:
        raise PromptRequired("standard input is closed; open it, or use complete")
    _check({**inputs, "messages": [*(inputs["messages"] or []), {"role": "user", "content": "Hi!"}]})
    from llama.cli.chat import Chat

    llama = _load()
    try:
        Chat(llama, inputs).run()
    finally:
        llama.close()


def _schema(_: argparse.Namespace) -> None:
    from llama.serving.schema import published_run, write_schema

    print(write_schema(published_run(), ROOT))


def _predict(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    from llama.serving.server import CogServer, ServerFailed, print_setup

    inputs = {k: v for k, v in _read_inputs(arguments.inputs).items() if v is not None}
    _prepare_server()
    with CogServer(output=subprocess.PIPE) as server:
        Thread(target=print_setup, args=(server.process.stdout,), daemon=True).start()
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


def _prepare_server() -> None:
    """Check the settings, find the weights and write the schema. The embedded model is converted here at its
    first use, where that can be watched: the server's own log may not be shown."""
    from llama.serving.schema import published_run, write_schema
    from llama.settings import Settings
    from llama.weights.folder import weights_folder

    settings = Settings.from_environment()
    if not settings.pull:
        weights_folder(settings)
    write_schema(published_run(), ROOT)
    print("starting the server ...", file=sys.stderr)


def _serve(arguments: argparse.Namespace) -> int:
    from llama.serving.server import CogServer, ServerFailed, listening_fault

    if fault := listening_fault(arguments.host, arguments.port):
        sys.exit(
            f"cannot listen on {arguments.host}:{arguments.port} ({fault}); name another port with --port "
            "(make serve PORT=...)"
        )
    _prepare_server()
    with CogServer(output=None, host=arguments.host, port=arguments.port, grace=None) as server:
        try:
            server.wait_until_ready()
        except ServerFailed as error:
            print(error, file=sys.stderr)
        else:
            print(_invitation(arguments.host, arguments.port), file=sys.stderr)
        return int(server.process.wait())


def _invitation(host: str, port: int) -> str:
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    return (
        f"ready on {url}, Ctrl-C ends it. Try it from another terminal:\n"
        f"  curl -N {url}/predictions -H 'Accept: text/event-stream' \\\n"
        "    -H 'Content-Type: application/json' \\\n"
        """    -d '{"input": {"prompt": "Write a haiku about llamas"}}'"""
    )
