"""Which addresses an outgoing request reaches, over real HTTP and TLS on loopback."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network

import httpx2
import pytest
import trustme

from llama.gateway.webhooks.outgoing import (
    AddressRefused,
    Network,
    Outgoing,
    WebhookResolver,
    check_url,
    is_allowed,
    resolve_host,
)

LOOPBACK: tuple[Network, ...] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))


class Receiver(ThreadingHTTPServer):
    """Answers every POST with `status` and `headers`, and remembers what it got."""

    daemon_threads = True

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((address, port), Handler)
        self.port = int(self.server_address[1])
        self.status, self.headers, self.delay = 200, dict[str, str](), 0.0
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.names: list[str | None] = []
        """The names that TLS clients asked for."""

    def use(self, certificate: trustme.LeafCert) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        context.sni_callback = lambda _, name, __: self.names.append(name)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, *_: object) -> None:
        """A client that leaves during the handshake is no error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))
        time.sleep(self.server.delay)
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running(receiver: Receiver) -> Iterator[Receiver]:
    threading.Thread(target=receiver.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield receiver
    finally:
        receiver.shutdown()
        receiver.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running(Receiver()) as receiver:
        yield receiver


def resolving(*answers: Sequence[str]) -> WebhookResolver:
    """A resolver that gives each answer once, and the last one from then on."""
    left = list(answers)

    async def resolver(host: str, port: int) -> Sequence[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolver


def post(outgoing: Outgoing, url: str) -> int:
    return asyncio.run(outgoing.post(url, b"{}", {"x-test": "1"}))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(ip_address(address), ())


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
        *("198.18.0.1", "192.0.2.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *(
            "::1",
            "::",
            "::7f00:1",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "fec0::1",
            "ff0e::1",
            "2001:db8::1",
        ),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1"),  # NAT64
        *("2002:7f00:1::", "2002:a9fe:a9fe::1"),  # 6to4
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:0:7f00:1::"),  # Teredo
    ],
)
def test_other_addresses_are_refused_however_they_are_written(address: str) -> None:
    assert not is_allowed(ip_address(address), ())


def test_a_listed_network_is_allowed_and_nothing_beside_it() -> None:
    networks = (ip_network("10.0.0.0/24"), ip_network("fd00::/64"))
    for address in ("10.0.0.9", "::ffff:10.0.0.9", "fd00::9", "8.8.8.8"):
        assert is_allowed(ip_address(address), networks), address
    for address in ("10.0.1.9", "::ffff:10.0.1.9", "fd00:1::9", "127.0.0.1"):
        assert not is_allowed(ip_address(address), networks), address


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "absolute URL"),
        ("/path", "absolute URL"),
        ("example.com/hook", "absolute URL"),
        ("//example.com", "absolute URL"),
        ("ftp://example.com", "absolute URL"),
        ("file:///etc/passwd", "absolute URL"),
        ("http://", "absolute URL"),
        ("http:///x", "absolute URL"),
        ("http://exa\nmple.com", "valid URL"),
        ("http://[::1", "valid URL"),
        ("http://example.com:x/", "valid URL"),
        ("https://" + "a" * 70_000, "valid URL"),
        ("http://a b/", "valid host name"),
        ("http://a..b/", "valid host name"),
        ("http://example.com:0/", "port"),
        ("http://example.com:70000/", "port"),
        ("https://user:pass@example.com/", "password"),
        ("https://user@example.com/", "password"),
        ("http://127.0.0.1/", "public"),
        ("http://127.1:8000/", "public"),
        ("http://2130706433/", "public"),
        ("http://0x7f.0.0.1/", "public"),
        ("http://0177.0.0.1/", "valid URL"),
        ("http://10.0.0.1./", "public"),
        ("http://[::1]:80/", "public"),
        ("http://[::ffff:10.0.0.1]/", "public"),
        ("http://[fe80::1%25eth0]/", "public"),
        ("http://localhost/", "public"),
        ("http://LOCALHOST.:5000/", "public"),
        ("http://a.localhost/", "public"),
        ("http://169.254.169.254/latest/meta-data", "public"),
    ],
)
def test_a_wrong_url_is_refused_at_once(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "http://example.com:8080/hook?id=1#x",
        "https://bücher.example/",
        "https://8.8.8.8/",
        "https://[2606:4700::1111]:8443/",
        "http://receiver:9000/",  # such as the name of a container; its address is checked later
    ],
)
def test_a_url_with_a_public_host_is_accepted(url: str) -> None:
    check_url(url)


def test_localhost_is_accepted_with_its_network() -> None:
    for url in ("http://localhost:9000/", "http://127.0.0.1:9000/", "http://[::1]/"):
        check_url(url, LOOPBACK)


def test_the_request_goes_to_the_resolved_address_with_the_name_as_its_host(receiver: Receiver) -> None:
    outgoing = Outgoing(LOOPBACK, resolving(["127.0.0.1"]))
    status = post(outgoing, f"http://hooks.example:{receiver.port}/a%20b?token=1#part")
    path, headers, body = receiver.requests[0]
    assert (status, path, body) == (200, "/a%20b?token=1", b"{}")
    assert headers["host"] == f"hooks.example:{receiver.port}"
    assert headers["x-test"] == "1"


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["::ffff:127.0.0.1"]]
)
def test_a_name_with_any_private_address_reaches_nothing(receiver: Receiver, addresses: list[str]) -> None:
    with pytest.raises(AddressRefused):
        post(Outgoing((), resolving(addresses)), f"http://hooks.example:{receiver.port}/")
    assert receiver.requests == []


def test_a_name_that_resolves_differently_the_second_time_reaches_the_first_address(
    receiver: Receiver,
) -> None:
    with running(Receiver("127.0.0.2", receiver.port)) as inner:
        rebinding = Outgoing((ip_network("127.0.0.1/32"),), resolving(["127.0.0.1"], ["127.0.0.2"]))
        assert post(rebinding, f"http://hooks.example:{receiver.port}/") == 200
        with pytest.raises(AddressRefused):
            post(rebinding, f"http://hooks.example:{receiver.port}/")
    assert (len(receiver.requests), len(inner.requests)) == (1, 0)


def test_a_literal_address_that_is_private_is_refused_without_resolving(receiver: Receiver) -> None:
    with pytest.raises(ValueError, match="public"):
        post(Outgoing(), f"http://127.0.0.1:{receiver.port}/")
    assert receiver.requests == []


def test_the_next_address_is_tried_when_one_refuses_the_connection(receiver: Receiver) -> None:
    outgoing = Outgoing(LOOPBACK, resolving(["127.0.0.3", "127.0.0.1"]))
    assert post(outgoing, f"http://hooks.example:{receiver.port}/") == 200


def test_a_connection_that_all_addresses_refuse_is_an_error() -> None:
    with running(Receiver()) as gone:
        pass
    with pytest.raises(httpx2.ConnectError):
        post(Outgoing(LOOPBACK, resolving(["127.0.0.1", "127.0.0.2"])), f"http://hooks.example:{gone.port}/")


def test_redirects_are_not_followed(receiver: Receiver) -> None:
    receiver.status, receiver.headers = 307, {"Location": f"http://127.0.0.1:{receiver.port}/inner"}
    assert post(Outgoing(LOOPBACK), f"http://127.0.0.1:{receiver.port}/outer") == 307
    assert [path for path, _, _ in receiver.requests] == ["/outer"]


def test_a_receiver_that_does_not_answer_is_left_after_the_timeout(receiver: Receiver) -> None:
    receiver.delay = 5
    with pytest.raises((TimeoutError, httpx2.TimeoutException)):
        post(Outgoing(LOOPBACK, timeout=0.3), f"http://127.0.0.1:{receiver.port}/")


def test_the_systems_resolver_reports_unknown_and_impossible_names_alike() -> None:
    assert "127.0.0.1" in asyncio.run(resolve_host("127.0.0.1", 80))
    for name in ("does-not-exist.invalid", "a" * 300):
        with pytest.raises(socket.gaierror):
            asyncio.run(resolve_host(name, 80))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_tls_verifies_the_name_of_the_url_and_not_the_address(authority: trustme.CA) -> None:
    secure = Receiver()
    secure.use(authority.issue_cert("hooks.example"))
    with running(secure):
        outgoing = Outgoing(LOOPBACK, resolving(["127.0.0.1"]), trusting(authority))
        assert post(outgoing, f"https://hooks.example:{secure.port}/") == 200
        with pytest.raises(httpx2.ConnectError, match="(?i)certificate"):
            post(outgoing, f"https://other.example:{secure.port}/")
    assert secure.names == ["hooks.example", "other.example"]
    assert len(secure.requests) == 1


def test_a_connection_is_not_used_again_for_another_name_at_its_address(authority: trustme.CA) -> None:
    secure = Receiver()
    secure.use(authority.issue_cert("hooks.example"))

    async def both(outgoing: Outgoing) -> None:
        await outgoing.post(f"https://hooks.example:{secure.port}/", b"", {})
        await outgoing.post(f"https://other.example:{secure.port}/", b"", {})

    with running(secure), pytest.raises(httpx2.ConnectError, match="(?i)certificate"):
        asyncio.run(both(Outgoing(LOOPBACK, resolving(["127.0.0.1"]), trusting(authority))))
    assert len(secure.requests) == 1


def test_an_address_as_host_is_verified_as_an_address(authority: trustme.CA) -> None:
    secure = Receiver()
    secure.use(authority.issue_cert("127.0.0.1"))
    with running(secure):
        assert post(Outgoing(LOOPBACK, tls=trusting(authority)), f"https://127.0.0.1:{secure.port}/") == 200


def test_a_certificate_of_an_unknown_authority_is_refused_by_default(authority: trustme.CA) -> None:
    secure = Receiver()
    secure.use(authority.issue_cert("hooks.example"))
    with running(secure), pytest.raises(httpx2.ConnectError, match="(?i)certificate"):
        post(Outgoing(LOOPBACK, resolving(["127.0.0.1"])), f"https://hooks.example:{secure.port}/")
    assert secure.requests == []
