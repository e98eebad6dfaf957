from __future__ import annotations

import traceback

import pytest

from llama.errors import BadSettings
from llama.gateway.settings import GatewaySettings


def test_white_space_around_the_key_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_GATEWAY_KEY", " a secret\r\n")
    key = GatewaySettings.from_environment().key
    assert key is not None
    assert key.get_secret_value() == "a secret"


@pytest.mark.parametrize("key", [" ", "\n", "top-secr\u00e9t", "top-secr\net", "top-secr\x7fet"])
def test_a_key_that_no_client_can_send_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("LLAMA_GATEWAY_KEY", key)
    with pytest.raises(BadSettings, match="^E3000 BadSettings: LLAMA_GATEWAY_KEY is ") as refused:
        GatewaySettings.from_environment()
    assert "top-secr" not in "".join(traceback.format_exception(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org",
        "http://10.0.0.1:8000/",
        "https://[::1]/a/b-%C3%A9",
        "https://xn--bcher-kva.example",
    ],
)
def test_a_public_url_can_have_a_path(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("LLAMA_GATEWAY_PUBLIC_URL", url)
    assert GatewaySettings.from_environment().public_url == url


@pytest.mark.parametrize(
    "url",
    [
        "example.org",
        "ftp://example.org",
        "https://",
        "https://b\u00fccher.example",
        "https://example.org/\u0447\u0430\u0442",
        "https://example.org/a;b",
        "https://example.org/a b",
        "https://example.org/\x7f",
        "https://example.org\n",
        "https://example.org/?a",
        "https://example.org#a",
    ],
)
def test_a_public_url_that_no_header_can_contain_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("LLAMA_GATEWAY_PUBLIC_URL", url)
    with pytest.raises(BadSettings, match="^E3000 BadSettings: LLAMA_GATEWAY_PUBLIC_URL is "):
        GatewaySettings.from_environment()
