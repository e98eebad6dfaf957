"""`python -m llama`: the model and its rules from a terminal.

Translates arguments and prints; every rule is the package's own.
"""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
from typing import Any, NoReturn

from llama.cli.answer import chat, complete
from llama.cli.plan import add_plan
from llama.cli.serve import predict, schema, serve
from llama.cli.terminal import end_by_exception_on_signals, forgiving_streams, leave
from llama.cli.tokenize import tokenize
from llama.cli.weights import add_weights
from llama.errors import LlamaError

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
        if isinstance(error.__context__, SystemExit):  # a signal that also closed the terminal
            return int(error.__context__.code or 0)
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

    add_inputs(add("chat", chat, "talk to the model; Ctrl-C stops an answer, Ctrl-D or `exit` leaves"))
    answering = add("complete", complete, "answer one prompt")
    answering.add_argument("prompt", nargs="?", help="read from standard input when left out")
    add_inputs(answering)
    add("tokenize", tokenize, "read inputs as JSON objects, one a line, and print their token ids")
    add("schema", schema, "write .cog/openapi_schema.json, as `cog build` does")
    predicting = add("predict", predict, "answer one prompt through Cog's server, started for it")
    predicting.add_argument("--prompt", required=True)
    add_inputs(predicting)
    serving = add("serve", serve, "run Cog's server until it is stopped")
    serving.add_argument("--host", default="127.0.0.1")
    serving.add_argument("--port", type=int, default=5000)
    add_plan(add("plan", None, "what fits which GPUs; exit code 1 when nothing does"))
    add_weights(add("weights", None, "pull, verify, lock and pack the weights"))
    return parser
