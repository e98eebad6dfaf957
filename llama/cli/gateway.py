"""The commands `gateway` and `up`: the gateway, alone or with a server behind it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated

import typer

from llama.cli.serve import prepare_server, without_prefix
from llama.cli.terminal import command, fail
from llama.errors import BadSettings

if TYPE_CHECKING:
    from llama.gateway.addresses import Addresses
    from llama.gateway.settings import GatewaySettings

HostOption = Annotated[
    str, typer.Option(help="The address to listen on. Other addresses than 127.0.0.1 need a key.")
]
PortOption = Annotated[int, typer.Option(help="The port to listen on. Use 0 to choose a free one.")]


@command
def gateway(
    server: Annotated[
        list[str] | None,
        typer.Option(
            help="The address of a server, such as http://127.0.0.1:5000. Repeat it for several servers. A "
            "DNS name with several addresses stands for several servers."
        ),
    ] = None,
    servers: Annotated[
        Path | None,
        typer.Option(help="A file with one address per line. SIGHUP makes the gateway read it again."),
    ] = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
) -> int | None:
    """Serve Replicate's and OpenAI's APIs in front of one or several servers."""
    from llama.gateway.addresses import Addresses

    if bool(server) == bool(servers):
        raise BadSettings("the gateway needs its servers; give either --server URL or --servers FILE")
    addresses = Addresses(server or (), servers)

    def announce(url: str, settings: GatewaySettings) -> None:
        print(f"the gateway listens on {url}; Ctrl-C stops it. {_key_note(settings)}", file=sys.stderr)

    return _run(addresses, host, port, announce)


@command
def up(host: HostOption = "127.0.0.1", port: PortOption = 8000) -> int | None:
    """Start a server and a gateway in front of it. Ctrl-C ends both."""
    from llama.gateway.addresses import Addresses
    from llama.serving.server import CogServer, ServerFailed, print_setup

    environment = prepare_server()
    ready = Event()
    with CogServer(environment, output=subprocess.PIPE) as server:
        Thread(target=print_setup, args=(server.process.stdout, ready), daemon=True).start()
        try:
            server.wait_until_ready()
        except ServerFailed as error:
            return fail(without_prefix(str(error)))
        ready.set()
        addresses = Addresses([str(server.client.base_url)])
        return _run(addresses, host, port, lambda url, settings: print(_snippets(url, settings)))


def _run(
    addresses: Addresses, host: str, port: int, announce: Callable[[str, GatewaySettings], None]
) -> int | None:
    """Run a gateway until a signal ends it. `announce` gets its URL when it listens."""
    from llama.gateway.settings import GatewaySettings
    from llama.gateway.start import prepare, run
    from llama.serving.server import check_listening, free_port, numeric_address, url_of

    settings = GatewaySettings.from_environment()
    try:
        address = numeric_address(host)
        check_listening(address, port)
    except ValueError as error:
        return fail(
            f"cannot listen on {host}:{port} ({error}); choose another address or port with --host and "
            "--port (make up PORT=...)"
        )
    port = port or free_port()
    url = url_of(address, port).replace("127.0.0.1", "localhost")
    run(prepare(settings, addresses, address), address, port, lambda: announce(url, settings))
    return None


def _key_note(settings: GatewaySettings) -> str:
    from llama.gateway.start import needs_key

    if needs_key(settings):
        return "Clients need a key."
    return (
        "There is no key, so it serves this machine only, and clients can send any key. "
        "`python -m llama keys add NAME` adds one."
    )


def _snippets(url: str, settings: GatewaySettings) -> str:
    return f"""\
ready on {url}; Ctrl-C stops the server and the gateway. {_key_note(settings)}

With OpenAI's client (pip install openai):

    from openai import OpenAI

    client = OpenAI(base_url="{url}/v1", api_key="any")
    question = [{{"role": "user", "content": "What is the capital of France?"}}]
    answer = client.chat.completions.create(model="{settings.model}", messages=question)
    print(answer.choices[0].message.content)

With Replicate's client (pip install "replicate<2"):

    from replicate.client import Client

    client = Client(base_url="{url}", api_token="any")
    for piece in client.stream("{settings.model}", input={{"prompt": "What is the capital of France?"}}):
        print(piece, end="", flush=True)
"""
