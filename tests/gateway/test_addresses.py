from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from llama.errors import BadSettings
from llama.gateway.dispatch.addresses import Addresses, ServerAddress, read_servers


class Names:
    """A resolver whose names can change."""

    def __init__(self, **names: list[str]) -> None:
        self.names = names

    async def __call__(self, name: str) -> list[str]:
        try:
            return self.names[name]
        except KeyError:
            raise OSError("no such name") from None


def current(addresses: Addresses) -> list[ServerAddress]:
    return asyncio.run(addresses.current())


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:5000", "http://[::1]:5000", "http://localhost:5000", "https://llama.example.com/base"],
)
def test_an_ip_address_localhost_or_an_https_name_is_one_server(url: str) -> None:
    (address,) = current(Addresses([url + "/"], resolver=Names()))
    assert address.url == url


@pytest.mark.parametrize("name", ["llama.example.com.", "my_server", "a" * 63, ".".join(["a" * 49] * 5)])
def test_a_name_that_dns_or_a_container_may_have_is_accepted(name: str) -> None:
    (address,) = current(Addresses([f"https://{name}/a..b"], resolver=Names()))
    assert address.host == name


def test_a_name_with_several_addresses_is_several_servers() -> None:
    names = Names(llama=["10.0.0.1", "10.0.0.2"])
    assert current(Addresses(["http://llama:5000"], resolver=names)) == [
        ServerAddress("http://10.0.0.1:5000", "llama:5000"),
        ServerAddress("http://10.0.0.2:5000", "llama:5000"),
    ]


def test_the_ipv6_address_of_a_machine_that_has_both_is_not_a_second_server() -> None:
    names = Names(both=["10.0.0.1", "fd00::1"], six=["fd00::2"])
    found = current(Addresses(["http://both:1", "http://six:2"], resolver=names))
    assert [address.url for address in found] == ["http://10.0.0.1:1", "http://[fd00::2]:2"]


def test_a_server_that_is_named_twice_counts_once() -> None:
    names = Names(llama=["10.0.0.1"])
    addresses = Addresses(["http://llama:1", "http://llama:1", "http://llama:1/"], resolver=names)
    assert len(current(addresses)) == 1


def test_a_name_that_changes_is_followed_and_one_that_fails_keeps_its_addresses() -> None:
    names = Names(llama=["10.0.0.1"])
    addresses = Addresses(["http://llama:1", "http://unknown:1"], resolver=names)
    assert [address.url for address in current(addresses)] == ["http://10.0.0.1:1"]
    names.names["llama"] = ["10.0.0.2"]
    assert [address.url for address in current(addresses)] == ["http://10.0.0.2:1"]
    del names.names["llama"]
    assert [address.url for address in current(addresses)] == ["http://10.0.0.2:1"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:5000",
        "ftp://host",
        "http://",
        "http://host:0",
        "http://host:99999",
        "http://host/?q=1",
        "http://a:b@host",
        "http://two names",
        "http://ho\tst",
        "http://..:80",
        "http://a..b",
        "http://.host",
        "http://host..",
        "http://" + "a" * 64,
        "http://" + ".".join(["a" * 50] * 5),
        "http://host/a/../b",
        "http://host/%2e%2E/b",
    ],
)
def test_what_cannot_be_an_address_is_refused(text: str) -> None:
    with pytest.raises(BadSettings, match="write it like http://127.0.0.1:5000"):
        Addresses([text])


@pytest.mark.parametrize("text", ["http://ann:secret@host", "http://:secret@host", "http:/ann:secret@host"])
def test_a_password_in_an_address_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(BadSettings, match="no user name or password") as raised:
        Addresses([text])
    assert "secret" not in str(raised.value)


def test_a_file_has_one_address_per_line_with_comments(tmp_path: Path) -> None:
    file = tmp_path / "servers.txt"
    file.write_text("# ours\nhttp://10.0.0.1:5000\n\n  http://10.0.0.2:5000/  \r\n")
    assert read_servers(file) == ["http://10.0.0.1:5000", "http://10.0.0.2:5000"]


@pytest.mark.parametrize("content", [b"", b"# none\n", b"nonsense\n", b"\xff\xfe\x00"])
def test_a_file_without_addresses_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "servers.txt"
    file.write_bytes(content)
    with pytest.raises(BadSettings):
        read_servers(file)
    with pytest.raises(BadSettings, match="cannot be read"):
        read_servers(tmp_path / "missing.txt")


def test_the_old_list_stays_if_the_new_file_is_invalid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "servers.txt"
    file.write_text("http://10.0.0.1:5000\n")
    addresses = Addresses((), file)
    file.write_text("http://10.0.0.2:5000\n")
    addresses.reload()
    assert [address.url for address in current(addresses)] == ["http://10.0.0.2:5000"]
    file.write_text("")
    with caplog.at_level(logging.ERROR):
        addresses.reload()
    assert "the old list of servers is kept" in caplog.text
    assert [address.url for address in current(addresses)] == ["http://10.0.0.2:5000"]
