"""The commands `predict`, `serve` and `schema`: Cog's own server on this machine, without Docker."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread
from typing import Annotated

import typer

from llama.cli.inputs import InputOptions, check_inputs, published_run, read_inputs
from llama.cli.loading import settings_to_load
from llama.cli.terminal import command, decoded, fail
from llama.settings import ROOT, Settings, expanded


@command
def predict(
    prompt: Annotated[str, typer.Option(help="The prompt.")], inputs: InputOptions = None
) -> int | None:
    """Start Cog's server, answer one prompt through it, and stop it."""
    started = time.monotonic()
    import httpx2

    from llama.serving.server import CogServer, ServerFailed, print_setup

    values = {**read_inputs(inputs), "prompt": decoded(prompt, "the prompt")}
    check_inputs(values)
    environment = prepare_server()
    answering = Event()
    with CogServer(environment, output=subprocess.PIPE) as server:
        Thread(target=print_setup, args=(server.process.stdout, answering), daemon=True).start()
        first = None
        try:
            server.wait_until_ready()
            for event, data in server.stream({k: v for k, v in values.items() if v is not None}):
                if event == "output":
                    answering.set()
                    first = first or time.monotonic() - started
                    print(data["chunk"], end="", flush=True)
                elif event == "completed" and data.get("error"):
                    return fail(without_prefix(data["error"]))
        except ServerFailed as error:
            return fail(without_prefix(str(error)))
        except httpx2.HTTPStatusError as error:
            return fail(f"the server refused the prediction: {error.response.text}")
        except httpx2.TransportError:
            return fail("the server ended during the answer; run `python -m llama serve` to see its log")
    print()
    if first is not None:
        print(f"first token {first:.1f} s after the start of the command", file=sys.stderr)
    return None


def prepare_server() -> dict[str, str]:
    """Check the settings, find the weights and write the schema. Returns environment variables to pass to the
    server."""
    from llama.serving.schema import write_schema

    settings = settings_to_load()
    write_schema(published_run(), ROOT)
    print("starting the server and loading the model ...", file=sys.stderr)
    return _absolute_paths(settings)


def _absolute_paths(settings: Settings) -> dict[str, str]:
    """The variables that hold paths, made absolute: the server runs in the repository's folder, but this
    command may run in any folder."""
    variables = ((f"LLAMA_{name.upper()}", getattr(settings, name)) for name in settings.model_fields_set)
    return {
        variable: str(expanded(path, variable).absolute())
        for variable, path in variables
        if isinstance(path, Path)
    }


@command
def serve(
    host: Annotated[
        str, typer.Option(help="The address to listen on. Use 0.0.0.0 to listen on all addresses.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on. Use 0 to choose a free one.")] = 5000,
) -> int:
    """Run Cog's server. Ctrl-C stops it after the running answers end; a second Ctrl-C stops it at once."""
    from llama.serving.server import (
        CogServer,
        ServerFailed,
        free_port,
        url_of,
    )

    try:
        address = listening_address(host, port, "serve")
    except ValueError as error:
        return fail(str(error))
    port = port or free_port()
    environment = prepare_server()
    with CogServer(environment, output=None, address=address, port=port, grace=None) as server:
        try:
            server.wait_until_ready()
        except ServerFailed as error:
            fail(without_prefix(str(error)))
        else:
            url = url_of(address, port).replace("127.0.0.1", "localhost")
            print(_invitation(url), file=sys.stderr)
        try:
            return int(server.process.wait())
        except BaseException:  # Ctrl-C, or a signal
            if server.process.poll() is None:
                print(
                    "stopping after the running answers have finished; press Ctrl-C again to stop now",
                    file=sys.stderr,
                )
            raise


def listening_address(host: str, port: int, make_target: str | None) -> str:
    """Resolve a host to the IP address to listen on. Raises ValueError if it is not possible to listen there.
    The message also names the make target that runs this command, if there is one."""
    from llama.serving.server import check_listening, numeric_address

    try:
        address = numeric_address(host)
        check_listening(address, port)
    except ValueError as error:
        with_make = f" (make {make_target} PORT=...)" if make_target else ""
        raise ValueError(
            f"cannot listen on {host}:{port} ({error}); choose another address or port with --host and "
            f"--port{with_make}"
        ) from error
    return address


def without_prefix(error: str) -> str:
    """An error without the words that Cog's server puts before it."""
    found = re.search(r"E\d{4} \w+: .*", error, re.DOTALL)
    return found[0] if found else error


def _invitation(url: str) -> str:
    return (
        f"ready on {url}; Ctrl-C stops the server. Try it from another terminal:\n"
        f"  curl {url}/predictions -H 'Content-Type: application/json' \\\n"
        """    -d '{"input": {"prompt": "Write a haiku about llamas"}}'\n"""
        "Add -N and -H 'Accept: text/event-stream' to stream the answer."
    )


@command
def schema() -> None:
    """Write .cog/openapi_schema.json, as `cog build` does, and print its path."""
    from llama.serving.schema import write_schema

    print(write_schema(published_run(), ROOT))
