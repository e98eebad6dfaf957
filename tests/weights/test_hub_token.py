"""Where the hub's token goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pulling import FILES, NAMES, QUICK, SHARD, SHARDS, TOKEN, contents, run
from pydantic import SecretStr
from weights_server import (
    Server,
    cut_after,
    redirect,
    status,
)

from llama.errors import (
    BadSettings,
)
from llama.settings import Settings
from llama.weights.folder import pull

# --- the token ---


def test_the_token_follows_a_redirect_on_its_host_only(
    server: Server, settings: Settings, folder: Path
) -> None:
    with Server() as other, Server("localhost") as third:
        other.files = {"/signed": SHARDS[0]}
        third.files = {"/signed": SHARDS[1]}
        server.first[SHARD] = [redirect("/moved")] * 2
        server.first["/moved"] = [redirect(f"{other.url}/signed?Signature=abc")] * 2
        server.first[f"/{NAMES[1]}"] = [redirect(f"{third.url}/signed")] * 2
        pull(folder, settings, QUICK)
    assert contents(folder) == FILES
    assert server.tokens() == {f"Bearer {TOKEN}"}
    assert other.tokens() == third.tokens() == {None}


def test_the_token_does_not_come_back_from_a_redirect_abroad_with_another_name(
    server: Server, settings: Settings, folder: Path
) -> None:
    port = server.url.rpartition(":")[2]
    server.first[SHARD] = [redirect(f"http://localhost:{port}/elsewhere")] * 2
    server.files["/elsewhere"] = SHARDS[0]
    pull(folder, settings, QUICK)
    assert {h.get("authorization") for p, h in server.requests if p == "/elsewhere"} == {None}


def test_a_signature_that_has_run_out_is_fetched_anew(
    server: Server, settings: Settings, folder: Path
) -> None:
    with Server() as other:
        other.files = {"/signed": SHARDS[0]}
        other.steps["/signed"] = [cut_after(50_000), status(403)]
        server.first[SHARD] = [redirect(f"{other.url}/signed?Signature=abc")] * 4
        pull(folder, settings, QUICK)
    assert contents(folder) == FILES


def test_token_and_signatures_are_in_no_message(server: Server, settings: Settings, folder: Path) -> None:
    with Server() as other:
        location = f"{other.url}/signed?Signature=s3cret"
        server.first[SHARD] = [redirect(location)] * 10
        result = run(
            "pull", str(folder), HF_TOKEN=TOKEN, LLAMA_WEIGHTS_MANIFEST=str(settings.weights_manifest)
        )
    assert result.returncode == 1
    assert "E3007 DownloadFailed: " in result.stderr
    assert f"Bearer {TOKEN}" in server.tokens()
    assert not re.search(f"{TOKEN}|s3cret|Traceback", result.stdout + result.stderr)


@pytest.mark.parametrize("token", ["hf_a b", "hf_a\nb", "hf_ä"])
def test_a_token_that_is_none_is_refused_and_not_shown(settings: Settings, folder: Path, token: str) -> None:
    with pytest.raises(BadSettings, match="^E3000 BadSettings: HF_TOKEN has characters") as got:
        pull(folder, settings.model_copy(update={"hf_token": SecretStr(token)}), QUICK)
    assert token not in str(got.value)


def test_a_base_url_takes_the_place_of_the_manifests_hosts_and_gets_no_token(
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
def test_a_base_url_that_is_none_is_refused(settings: Settings, folder: Path, base: str) -> None:
    with pytest.raises(BadSettings, match="^E3000 BadSettings: LLAMA_WEIGHTS_BASE_URL"):
        pull(folder, settings.model_copy(update={"weights_base_url": base}), QUICK)
