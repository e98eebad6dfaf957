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
