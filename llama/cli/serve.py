"""`predict`, `serve` and `schema`: Cog's own server on this machine, without Docker.

Translates arguments and prints.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from threading import Event, Thread

from llama.cli.inputs import published_run, read_inputs, settings_to_load
from llama.settings import ROOT


def predict(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    from llama.serving.server import CogServer, ServerFailed, print_setup

    inputs = {k: v for k, v in read_inputs(arguments.inputs).items() if v is not None}
    _prepare_server()
    answering = Event()
    with CogServer(output=subprocess.PIPE) as server:
        Thread(target=print_setup, args=(server.process.stdout, answering), daemon=True).start()
        try:
            server.wait_until_ready()
        except ServerFailed as error:
            sys.exit(_own_words(str(error)))
        first = None
        for event, data in server.stream({**inputs, "prompt": arguments.prompt}):
            if event == "output":
                answering.set()
                first = first or time.monotonic() - started
                print(data["chunk"], end="", flush=True)
            elif event == "completed" and data.get("error"):
                sys.exit(_own_words(data["error"]))
    print()
    if first is not None:
        print(f"first token {first:.1f} s after the command's start", file=sys.stderr)


def _prepare_server() -> None:
    """Check the settings, find the weights and write the schema, before the server is started."""
    from llama.serving.schema import write_schema

    settings_to_load()
    write_schema(published_run(), ROOT)
    print("starting the server and loading the model ...", file=sys.stderr)


def serve(arguments: argparse.Namespace) -> int:
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
            print(_own_words(str(error)), file=sys.stderr)
        else:
            print(_invitation(arguments.host, arguments.port), file=sys.stderr)
        try:
            return int(server.process.wait())
        except BaseException:  # Ctrl-C, or a signal
            if server.process.poll() is None:
                print("stopping when running answers have ended; Ctrl-C again stops now", file=sys.stderr)
            raise


def _own_words(error: str) -> str:
    """An error without what Cog's server puts before it."""
    found = re.search(r"E\d{4} \w+: .*", error, re.DOTALL)
    return found[0] if found else error


def _invitation(host: str, port: int) -> str:
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    return (
        f"ready on {url}, Ctrl-C ends it. Try it from another terminal (it streams with -N and "
        "-H 'Accept: text/event-stream'):\n"
        f"  curl {url}/predictions -H 'Content-Type: application/json' \\\n"
        """    -d '{"input": {"prompt": "Write a haiku about llamas"}}'"""
    )


def schema(_: argparse.Namespace) -> None:
    from llama.serving.schema import write_schema

    print(write_schema(published_run(), ROOT))
