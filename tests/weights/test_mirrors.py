"""Mirrors and redirects: plain servers, which never receive the hub's token."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import httpx2
import pytest
from pulling import FILES, NAMES, QUICK, SHARD, SHARDS, TOKEN, contents, run
from pydantic import SecretStr
from weights_server import (
    Server,
    cut_after,
    redirect,
    status,
)

from llama.errors import BadSettings, DownloadFailed
from llama.settings import Settings
from llama.weights.folder import pull
from llama.weights.http import _check_redirects


def test_redirects_are_followed_and_no_server_receives_the_token(
    server: Server, settings: Settings, folder: Path
) -> None:
    with Server() as other:
        other.files = {"/signed": SHARDS[0]}
        server.first[SHARD] = [redirect("/moved")] * 2
        server.first["/moved"] = [redirect(f"{other.url}/signed?Signature=abc")] * 2
        pull(folder, settings, QUICK)
    assert contents(folder) == FILES
    assert server.tokens() == other.tokens() == {None}


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("javascript:1", "127.0.0.1 redirects to an invalid URL"),
        ("ftp://127.0.0.1/a", "the server redirects to ftp://, which is not supported"),
        (SHARD, "too many redirects from 127.0.0.1"),
    ],
)
def test_a_broken_redirect_is_reported_at_once(
    server: Server, settings: Settings, folder: Path, location: str, text: str
) -> None:
    server.first[SHARD] = [redirect(location)] * 30
    with pytest.raises(DownloadFailed, match=f"^E3007 DownloadFailed: {NAMES[0]}: {text}"):
        pull(folder, settings, QUICK)


@pytest.mark.parametrize(
    ("schemes", "allowed"),
    [
        (["https", "https"], True),
        (["http", "https"], True),
        (["https", "http"], False),
        (["http", "https", "http"], False),
        (["https"], True),
    ],
)
def test_a_redirect_from_https_to_http_is_refused(schemes: list[str], allowed: bool) -> None:
    *history, last = (
        httpx2.Response(200, request=httpx2.Request("GET", f"{scheme}://host.example/a"))
        for scheme in schemes
    )
    last.history = history
    with (
        nullcontext()
        if allowed
        else pytest.raises(DownloadFailed, match="^E3007 DownloadFailed: a.json: host")
    ):
        _check_redirects("a.json", last)


def test_an_expired_signature_is_renewed(server: Server, settings: Settings, folder: Path) -> None:
    with Server() as other:
        other.files = {"/signed": SHARDS[0]}
        other.steps["/signed"] = [cut_after(50_000), status(403)]
        server.first[SHARD] = [redirect(f"{other.url}/signed?Signature=abc")] * 4
        pull(folder, settings, QUICK)
    assert contents(folder) == FILES


def test_no_message_contains_a_signature(server: Server, settings: Settings, folder: Path) -> None:
    server.first[SHARD] = [redirect("/gone?Signature=s3cret")]
    result = run("pull", str(folder), HF_TOKEN=TOKEN, LLAMA_WEIGHTS_MANIFEST=str(settings.weights_manifest))
    assert result.returncode == 1
    assert f"E3007 DownloadFailed: {NAMES[0]}: HTTP 404 from 127.0.0.1; " in result.stderr
    assert not re.search(f"{TOKEN}|s3cret|Traceback", result.stdout + result.stderr)


@pytest.mark.parametrize("token", ["hf_a b", "hf_a\nb", "hf_ä"])
def test_a_malformed_token_is_refused_and_not_shown(settings: Settings, folder: Path, token: str) -> None:
    with pytest.raises(BadSettings, match="^E3000 BadSettings: HF_TOKEN contains characters") as got:
        pull(folder, settings.model_copy(update={"hf_token": SecretStr(token)}), QUICK)
    assert token not in str(got.value)


def test_a_base_url_replaces_the_servers_of_the_manifest(
    server: Server, settings: Settings, folder: Path
) -> None:
    with Server() as mirror:
        mirror.files = {f"/bucket/llama/{name}": data for name, data in FILES.items()}
        base = f"{mirror.url}/bucket/llama/"
        assert pull(folder, settings.model_copy(update={"weights_base_url": base}), QUICK) == len(FILES)
    assert contents(folder) == FILES
    assert server.requests == []
    assert mirror.tokens() == {None}


@pytest.mark.parametrize("base", ["s3://bucket", "bucket", "https://", "http://host/#fragment"])
def test_a_base_url_that_is_not_valid_is_refused(settings: Settings, folder: Path, base: str) -> None:
    with pytest.raises(BadSettings, match="^E3000 BadSettings: LLAMA_WEIGHTS_BASE_URL"):
        pull(folder, settings.model_copy(update={"weights_base_url": base}), QUICK)
