"""A gateway that serves HTTPS itself: its certificate, the limits of its connections, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from gateways import KEY, MODEL, port_of
from server_clients import PATIENCE, until

from benchmarks.fake_cog import FakeCog, Script
from llama import ROOT
from llama.errors import BadSettings
from llama.gateway.dispatch.addresses import Addresses
from llama.gateway.gateway import Gateway
from llama.gateway.http.protocol import Limits
from llama.gateway.http.tls import Certificate
from llama.gateway.settings import GatewaySettings
from llama.gateway.start import GatewayServer


@dataclass(frozen=True)
class Files:
    """A certificate for loopback and its key."""

    certificate: Path
    key: Path

    def issue(self, authority: trustme.CA) -> None:
        issued = authority.issue_cert("localhost", "127.0.0.1")
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(self.key)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> Files:
    made = Files(tmp_path / "certificate.pem", tmp_path / "key.pem")
    made.issue(authority)
    return made


@pytest.fixture
def trust(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


class Secured:
    """A gateway with a certificate, in a thread, on the event loop that the command uses."""

    def __init__(
        self, cog: FakeCog, database: Path, files: Files, trust: ssl.SSLContext, limits: Limits
    ) -> None:
        self._trust = trust
        self._started = threading.Event()
        settings = GatewaySettings.model_validate({"key": KEY, "database": database})
        self._gateway = Gateway(settings, Addresses([cog.url]), grace=1, ping_interval=0.05)
        self.server = GatewayServer(
            self._gateway,
            "127.0.0.1",
            0,
            self._started.set,
            grace=1,
            limits=limits,
            certificate=Certificate(files.certificate, files.key),
        )
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._started.wait(PATIENCE)
        self.port = port_of(self.server)
        self.url = f"https://127.0.0.1:{self.port}"
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx2.Client(
            base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False, verify=trust
        )

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            runner.run(self.server.serve())

    def connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        return self._trust.wrap_socket(plain, server_hostname="127.0.0.1")

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def end(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


Start = Callable[..., Secured]


@pytest.fixture
def start(cog: FakeCog, tmp_path: Path, files: Files, trust: ssl.SSLContext) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(**limits: Any) -> Secured:
            secured = Secured(cog, tmp_path / "gateway.sqlite3", files, trust, Limits(**limits))
            stack.callback(secured.end)
            until(lambda: secured.client.get("/readyz").status_code == 200)
            return secured

        yield start


# --- what clients see


def test_predictions_and_their_streams_have_https_urls(start: Start, cog: FakeCog) -> None:
    cog.rules.script = Script(["Bonjour", " Paris"])
    secured = start()
    path = f"/v1/models/{MODEL}/predictions"
    created = secured.client.post(path, json={"input": {"prompt": "Hi"}}).json()
    assert {url.partition("/v1/")[0] for url in created["urls"].values() if "/v1/" in url} == {secured.url}
    with secured.client.stream("GET", created["urls"]["stream"]) as response:
        text = response.read().decode()
    assert text.index("Bonjour") < text.index("Paris") < text.index("event: done")


def test_a_large_answer_arrives_complete(start: Start, cog: FakeCog) -> None:
    cog.rules.script = Script(["x" * 100_000] * 50)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    answer = start().client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "x" * 5_000_000


def test_old_versions_of_tls_are_refused(files: Files) -> None:
    context = Certificate(files.certificate, files.key).context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_the_cookie_of_a_login_is_sent_over_https_only(start: Start) -> None:
    secured = start()
    response = secured.client.post("/page/login", json={"key": KEY}, headers={"Origin": secured.url})
    assert response.status_code == 204
    assert "secure" in response.headers["set-cookie"].lower().split("; ")


# --- clients that do not behave


def test_a_plain_request_to_the_port_is_dropped_and_others_are_served(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    secured = start()
    with socket.create_connection(("127.0.0.1", secured.port), timeout=PATIENCE) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        with suppress(ConnectionResetError):
            assert b"HTTP/1.1" not in connection.recv(65536)
    assert secured.client.get("/healthz").status_code == 200
    assert "Traceback" not in capsys.readouterr().err


def test_clients_that_do_not_finish_the_handshake_hold_up_neither_others_nor_the_end(start: Start) -> None:
    secured = start()
    with ExitStack() as stack:
        for hello in (b"", b"\x16\x03\x01\x02\x00"):  # the second is the beginning of a TLS record
            connection = socket.create_connection(("127.0.0.1", secured.port), timeout=PATIENCE)
            stack.enter_context(connection).sendall(hello)
        assert secured.client.get("/healthz").status_code == 200
        secured.end()


def test_a_large_head_is_refused(start: Start) -> None:
    with start().connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 70_000 + b"\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "head"])
def test_a_request_that_does_not_come_whole_is_dropped(start: Start, sent: bytes) -> None:
    secured = start(request=0.3)
    with secured.connect() as connection:
        connection.sendall(sent)
        with suppress(ConnectionResetError):
            assert connection.recv(65536) == b""


def test_a_completion_that_is_not_read_is_cancelled(start: Start, cog: FakeCog) -> None:
    secured = start(reading=0.3)
    cog.rules.script = Script(["x" * 100_000] * 300, hold_after=300)
    body = f'{{"model": "{MODEL}", "stream": true, "messages": [{{"role": "user", "content": "Hi"}}]}}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"

    def statuses() -> list[str]:
        return [found["status"] for found in secured.client.get("/v1/predictions").json()["results"]]

    with secured.connect() as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: statuses() == ["canceled"])


# --- certificates


def served_certificate(secured: Secured) -> bytes | None:
    with secured.connect() as connection:
        return connection.getpeercert(binary_form=True)


def test_a_renewed_certificate_is_used_without_a_restart(
    start: Start, files: Files, authority: trustme.CA
) -> None:
    secured = start()
    old = served_certificate(secured)
    files.issue(authority)
    until(lambda: served_certificate(secured) != old)
    assert secured.client.get("/healthz").status_code == 200


def test_the_old_certificate_is_used_until_the_renewed_files_match(
    start: Start, files: Files, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    secured = start()
    old = served_certificate(secured)
    new = Files(files.certificate.with_suffix(".new"), files.key.with_suffix(".new"))
    new.issue(authority)
    new.certificate.replace(files.certificate)
    until(lambda: "does not belong to the certificate" in caplog.text)
    assert "the old certificate stays in use" in caplog.text
    assert served_certificate(secured) == old
    new.key.replace(files.key)
    until(lambda: served_certificate(secured) != old)


def test_a_renewal_that_keeps_the_size_and_the_time_of_the_files_is_noticed(
    files: Files, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    """As a hook that corrects the owner of a file does, which the gateway could not read before."""

    def issue() -> None:
        files.issue(authority)
        for path in (files.certificate, files.key):
            path.write_bytes(path.read_bytes().ljust(10_000, b"\n"))
            os.utime(path, (0, 0))

    issue()
    certificate = Certificate(files.certificate, files.key)
    issue()
    with caplog.at_level("INFO"):
        certificate.reload_if_changed()
    assert "was renewed" in caplog.text


def test_a_file_that_vanishes_while_it_is_read_leaves_the_old_certificate(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    class Vanishing(type(files.key)):  # type: ignore[misc]
        """A key that its renewal moves away after the gateway has looked at it."""

        def read_bytes(self) -> bytes:
            content: bytes = super().read_bytes()
            if vanishes:
                self.unlink()
            return content

    vanishes = False
    certificate = Certificate(files.certificate, Vanishing(files.key))
    vanishes = True
    files.key.touch()
    certificate.reload_if_changed()
    assert "the old certificate stays in use" in caplog.text


def encrypt(key: Path) -> None:
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


SPOILERS: dict[str, tuple[Callable[[Files], object], str]] = {
    "no certificate": (lambda files: files.certificate.unlink(), "correct --tls-certificate or"),
    "no key": (lambda files: files.key.unlink(), "correct --tls-key or"),
    "not PEM": (lambda files: files.certificate.write_bytes(b"\x30\x82"), "no certificate in PEM format"),
    "swapped": (lambda files: shutil.copy(files.certificate, files.key), "no key in PEM format"),
    "cut off": (lambda files: files.key.write_bytes(files.key.read_bytes()[:100]), "cannot be used"),
    "of another": (lambda files: trustme.CA().private_key_pem.write_to_path(files.key), "does not belong"),
    "encrypted": (lambda files: encrypt(files.key), "is encrypted; give --tls-key a key without"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILERS.values(), ids=SPOILERS)
def test_files_that_cannot_be_used_are_refused_with_the_reason(
    files: Files, spoil: Callable[[Files], object], message: str
) -> None:
    spoil(files)
    with pytest.raises(BadSettings, match=message):
        Certificate(files.certificate, files.key)


# --- the command


def command(*arguments: str | Path) -> list[str]:
    gateway = [sys.executable, "-m", "llama", "gateway", "--port", "0"]
    return [*gateway, *map(str, arguments)]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "LLAMA_GATEWAY_DATABASE": str(tmp_path / "gateway.sqlite3")}


def test_the_command_prints_an_https_address_and_serves_it(
    cog: FakeCog, files: Files, trust: ssl.SSLContext, tmp_path: Path
) -> None:
    arguments = command("--server", cog.url, "--tls-certificate", files.certificate, "--tls-key", files.key)
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(tmp_path), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        url = next(word for line in process.stderr for word in line.split() if word.startswith("https:"))
        assert httpx2.get(f"{url}/readyz", verify=trust, trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_a_certificate_without_its_key_is_refused_on_one_line(files: Files, tmp_path: Path) -> None:
    arguments = command("--server", "http://127.0.0.1:1", "--tls-certificate", files.certificate)
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("E3000 BadSettings: ")
    assert "only --tls-certificate is set; set --tls-key, too" in done.stderr
    assert done.stderr.count("\n") == 1
