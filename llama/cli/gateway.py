"""The commands `gateway` and `up`: the gateway, alone or with a server behind it."""

from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated

import typer

from llama.cli.serve import listening_address, prepare_server, without_prefix
from llama.cli.terminal import command, fail
from llama.errors import BadSettings
from llama.settings import Settings

if TYPE_CHECKING:
    from llama.gateway.dispatch.addresses import Addresses
    from llama.gateway.gateway import Gateway
    from llama.gateway.http.tls import Certificate

logger = logging.getLogger(__name__)

_EMBEDDED_MODEL_NOTICE = "A small test model answers, often wrongly."
_ADVICE = "It does better with an empty system prompt and temperature 0, which you can set in Settings."

HostOption = Annotated[
    str,
    typer.Option(
        help="The address to listen on. It must be a loopback address unless clients need a key: see "
        "`keys add`."
    ),
]
PortOption = Annotated[int, typer.Option(help="The port to listen on. Use 0 to choose a free one.")]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-certificate",
        help="The file with the certificate and its chain, in PEM format, to serve HTTPS. A renewed file is "
        "used without a restart.",
    ),
]
KeyOption = Annotated[
    Path | None, typer.Option("--tls-key", help="The file with the certificate's private key, in PEM format.")
]


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
    certificate: CertificateOption = None,
    key: KeyOption = None,
) -> None:
    """Serve a page and Replicate's and OpenAI's APIs in front of one or several servers.

    Servers are started with `serve` or by Cog. Give either --server or --servers.
    docs/gateway.md explains keys, and docs/reference.md the settings, which begin with LLAMA_GATEWAY_.
    """
    from llama.gateway.dispatch.addresses import Addresses

    if bool(server) == bool(servers):
        given = "both --server and --servers are" if server else "no server is"
        raise BadSettings(f"{given} given; give either --server URL or --servers FILE")
    tls = _certificate(certificate, key)
    prepared = _prepare(Addresses(server or (), servers), host, port, tls)
    prepared.run(
        lambda: f"{prepared.page_note} Ctrl-C stops the gateway.\n{prepared.key_note}",
        reloads=servers is not None,
    )


@command
def up(
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    certificate: CertificateOption = None,
    key: KeyOption = None,
) -> int | None:
    """Start a server and a gateway in front of it. Ctrl-C stops both.

    LLAMA_WEIGHTS names the folder of the model. Without it, a small test model answers.
    """
    from llama.gateway.dispatch.addresses import Addresses
    from llama.serving.server import CogServer, ServerFailed, free_port, print_setup, url_of

    server_port = free_port()
    addresses = Addresses([url_of("127.0.0.1", server_port)])
    is_embedded = Settings.from_environment().weights is None
    notice = f"{_EMBEDDED_MODEL_NOTICE} {_ADVICE}" if is_embedded else None
    tls = _certificate(certificate, key)
    prepared = _prepare(addresses, host, port, tls, make_target="up", notice=notice)
    environment, ready = prepare_server(), Event()
    with CogServer(environment, output=subprocess.PIPE, port=server_port) as server:
        Thread(target=print_setup, args=(server.process.stdout, ready), daemon=True).start()
        try:
            server.wait_until_ready()
        except ServerFailed as error:
            return fail(without_prefix(str(error)))
        ready.set()
        ending, died = Event(), Event()
        Thread(target=_end_with, args=(server.process, ending, died), daemon=True).start()
        try:
            prepared.run(lambda: _snippets(prepared, is_embedded=is_embedded))
        except SystemExit:
            if not died.is_set():
                raise
        finally:
            ending.set()
    return fail("the server has ended; run `python -m llama serve` to see its log") if died.is_set() else None


def _end_with(server: subprocess.Popen[bytes], ending: Event, died: Event) -> None:
    """If the server ends before `ending` is set, set `died` and send SIGTERM to this process."""
    server.wait()
    if not ending.is_set():
        died.set()
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class _Prepared:
    """A gateway that can run, and where it will listen."""

    gateway: Gateway
    address: str
    port: int
    url: str
    certificate: Certificate | None

    def run(self, message: Callable[[], str], *, reloads: bool = False) -> None:
        """Serve until a signal ends it; if `reloads`, SIGHUP reads the list of servers again instead.
        `message` is called when the gateway listens, because the keys are known only then. Its result is
        printed, or logged as JSON."""
        from llama.gateway.start import run

        as_json = self.gateway.settings.log_format == "json"
        announce = logger.info if as_json else functools.partial(print, file=sys.stderr)
        run(
            self.gateway,
            self.address,
            self.port,
            lambda: announce(message()),
            reloads=reloads,
            certificate=self.certificate,
        )

    @property
    def page_note(self) -> str:
        """The address of the page, for a person who has just started the gateway."""
        page = self.gateway.settings.public_url or self.url
        others = " The gateway listens on all addresses of this machine." if self._listens_on_all else ""
        return f"Open {page} in a browser.{others}"

    @property
    def _listens_on_all(self) -> bool:
        return self.address in ("0.0.0.0", "::")

    @property
    def key_note(self) -> str:
        """Who can use the gateway. Its keys must have been loaded."""
        if self.gateway.keys.needed:
            return f"Clients need a key; `{sys.executable} -m llama keys add NAME` prints a new one."
        return (
            "There is no key, so only this machine can use the gateway, and clients can send any key. To "
            f"share it, run `{sys.executable} -m llama keys add NAME` and start it again with --host 0.0.0.0."
        )


def _certificate(certificate: Path | None, key: Path | None) -> Certificate | None:
    """Read the certificate and its key. Raises BadSettings if only one is given, or one cannot be used."""
    from llama.gateway.http.tls import Certificate

    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        given, missing = ("--tls-key", "--tls-certificate") if key else ("--tls-certificate", "--tls-key")
        raise BadSettings(
            f"HTTPS needs a certificate and its key, but only {given} is set; set {missing}, too"
        )
    return Certificate(certificate, key)


def _prepare(
    addresses: Addresses,
    host: str,
    port: int,
    certificate: Certificate | None,
    make_target: str | None = None,
    notice: str | None = None,
) -> _Prepared:
    """Check the settings and the address, and open the database. `make_target` is the make target that runs
    this command, if there is one. The page shows `notice`, unless the settings have another one.

    Raises BadSettings if one of them cannot be used.
    """
    from llama.gateway.start import prepare, read_settings
    from llama.serving.server import free_port, url_of

    settings = read_settings()
    if notice is not None and "notice" not in settings.model_fields_set:
        settings = settings.model_copy(update={"notice": notice})
    try:
        address = listening_address(host, port, make_target)
    except ValueError as error:
        raise BadSettings(str(error)) from error
    port = port or free_port()
    url = url_of(address, port).replace("127.0.0.1", "localhost")
    if certificate is not None:
        url = url.replace("http:", "https:", 1)
    return _Prepared(prepare(settings, addresses, address), address, port, url, certificate)


def _snippets(prepared: _Prepared, *, is_embedded: bool) -> str:
    url, model = prepared.url, prepared.gateway.settings.model
    warning = f"{_EMBEDDED_MODEL_NOTICE} Set LLAMA_WEIGHTS to serve another one.\n" if is_embedded else ""
    key = "YOUR_KEY" if prepared.gateway.keys.needed else "any"
    return f"""\
{prepared.page_note} Ctrl-C stops the server and the gateway.
{warning}{prepared.key_note}

With OpenAI's client (pip install openai):

    from openai import OpenAI

    client = OpenAI(base_url="{url}/v1", api_key="{key}")
    question = [{{"role": "user", "content": "What is the capital of France?"}}]
    answer = client.chat.completions.create(model="{model}", messages=question, temperature=0)
    print(answer.choices[0].message.content)

With Replicate's client (pip install "replicate<2"):

    from replicate.client import Client

    client = Client(base_url="{url}", api_token="{key}")
    inputs = {{"prompt": "What is the capital of France?", "system_prompt": "", "temperature": 0}}
    for piece in client.stream("{model}", input=inputs):
        print(piece, end="", flush=True)
"""
