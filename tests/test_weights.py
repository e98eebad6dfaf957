"""Pulling, verifying and locking weights, against a real HTTP server on loopback."""

from __future__ import annotations

import email.utils
import hashlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save
from weights_server import (
    Handler,
    Server,
    Step,
    cut_after,
    head_of,
    other_bytes,
    other_range,
    redirect,
    serve,
    slowly,
    stall_after,
    status,
    without_length,
    without_ranges,
)

from llama.errors import (
    BadManifest,
    BadSettings,
    DamagedWeights,
    DiskFull,
    DownloadFailed,
    LlamaError,
    WeightsNotFound,
)
from llama.settings import Settings
from llama.weights.disk import PACKED
from llama.weights.folder import folder_to_serve, lock, pull, verify, weights_folder
from llama.weights.manifest import Entry, read_manifest
from llama.weights.progress import LogProgress
from llama.weights.retry import RetryPolicy

TOKEN = "hf_secret0123456789"
QUICK = RetryPolicy(attempts=3, first_delay=0.01, timeout=2)

SHARDS = [
    save({f"model.layers.{n}.weight": np.full((64, 500), n, dtype=np.float32)}, {"format": "pt"})
    for n in range(2)
]
NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"weight_map": {f"model.layers.{n}.weight": name for n, name in enumerate(NAMES)}}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.model": bytes(range(256)) * 8,
    "LICENSE.txt": b"You may.\n",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    **dict(zip(NAMES, SHARDS, strict=True)),
}
SHARD = f"/{NAMES[0]}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy_and_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "LLAMA_WEIGHTS", "LLAMA_WEIGHTS_MANIFEST", "LLAMA_WEIGHTS_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        server.files = {f"/{name}": data for name, data in FILES.items()}
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def write_manifest(path: Path, url: str, hashes: bool = False, names: tuple[str, ...] = tuple(FILES)) -> Path:
    lines = [f"{url}/{n}{f'#sha256={sha256(FILES[n])}' if hashes else ''} {n}" for n in names]
    path.write_text("\n".join([*lines, ""]), "utf-8")
    return path


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    """The server's files without hashes, and a token."""
    manifest = write_manifest(tmp_path / "weights.txt", server.url)
    return Settings(weights_manifest=manifest, HF_TOKEN=TOKEN)


@pytest.fixture
def hashed(server: Server, tmp_path: Path) -> Settings:
    manifest = write_manifest(tmp_path / "hashed.txt", server.url, hashes=True)
    return Settings(weights_manifest=manifest, HF_TOKEN=TOKEN)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama", "weights", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- whole ---


def test_everything_comes_and_a_second_pull_brings_nothing(
    server: Server, settings: Settings, folder: Path
) -> None:
    assert pull(folder, settings, QUICK) == len(FILES)
    assert contents(folder) == FILES
    server.requests.clear()
    assert pull(folder, settings, QUICK) == 0
    assert all(server.downloads(f"/{name}") == [] for name in FILES)


def test_with_hashes_in_the_manifest_a_whole_folder_asks_no_server(
    server: Server, hashed: Settings, folder: Path
) -> None:
    pull(folder, hashed, QUICK)
    server.requests.clear()
    assert pull(folder, hashed, QUICK) == 0
    assert server.requests == []


@pytest.mark.parametrize("damaged", [SHARDS[0][:-1] + b"\1", SHARDS[0][:5000], b""])
def test_a_wrong_file_under_the_right_name_is_replaced(
    hashed: Settings, folder: Path, damaged: bytes
) -> None:
    folder.mkdir()
    (folder / NAMES[0]).write_bytes(damaged)
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES


def test_destinations_in_folders_are_made(server: Server, tmp_path: Path, folder: Path) -> None:
    manifest = tmp_path / "manifest"
    manifest.write_text(f"{server.url}/config.json one/two/config.json\n", "utf-8")
    pull(folder, Settings(weights_manifest=manifest), QUICK)
    assert (folder / "one" / "two" / "config.json").read_bytes() == FILES["config.json"]


def test_an_empty_file_comes(server: Server, tmp_path: Path, folder: Path) -> None:
    server.files["/empty.txt"] = b""
    manifest = tmp_path / "manifest"
    manifest.write_text(f"{server.url}/empty.txt empty.txt\n", "utf-8")
    pull(folder, Settings(weights_manifest=manifest), QUICK)
    assert contents(folder) == {"empty.txt": b""}


# --- servers in trouble: the pull itself gets over it ---


@pytest.mark.parametrize(
    ("steps", "ranges"),
    [
        pytest.param([cut_after(50_000)], ["", "bytes=50000-"], id="cut once"),
        pytest.param(
            [cut_after(20_000)] * 5, ["", *(f"bytes={n}0000-" for n in (2, 4, 6, 8, 10))], id="cut often"
        ),
        pytest.param([cut_after(0)] * 2, ["", "", ""], id="cut at once"),
        pytest.param([cut_after(50_000), without_ranges], ["", "bytes=50000-"], id="no ranges"),
        pytest.param([cut_after(50_000), other_range], ["", "bytes=50000-", ""], id="another range"),
        pytest.param([cut_after(50_000), status(416)], ["", "bytes=50000-", ""], id="no such range"),
        pytest.param([status(503), status(500), serve], ["", "", ""], id="5xx"),
        pytest.param([status(429, Retry_After="0"), serve], ["", ""], id="429"),
    ],
)
@pytest.mark.parametrize("with_hashes", [True, False])
def test_one_pull_gets_over(
    server: Server,
    settings: Settings,
    hashed: Settings,
    folder: Path,
    steps: list[Step],
    ranges: list[str],
    with_hashes: bool,
) -> None:
    server.steps[SHARD] = list(steps)
    pull(folder, hashed if with_hashes else settings, QUICK)
    assert contents(folder) == FILES
    assert server.downloads(SHARD) == ranges


def test_a_server_that_falls_silent_is_asked_again(server: Server, settings: Settings, folder: Path) -> None:
    end = threading.Event()
    server.steps[SHARD] = [stall_after(50_000, end)]
    pull(folder, settings, RetryPolicy(attempts=2, first_delay=0.01, timeout=0.3))
    end.set()
    assert contents(folder) == FILES
    assert server.downloads(SHARD) == ["", "bytes=50000-"]


@pytest.mark.parametrize("code", [429, 503])
@pytest.mark.parametrize("as_a_date", [False, True])
def test_the_servers_own_retry_after_is_obeyed(
    server: Server, settings: Settings, folder: Path, code: int, as_a_date: bool
) -> None:
    wanted = email.utils.formatdate(time.time() + 2, usegmt=True) if as_a_date else "1"
    server.first[SHARD] = [status(code, Retry_After=wanted)]
    began = time.monotonic()
    pull(folder, settings, QUICK)
    assert 0.9 < time.monotonic() - began < 5
    assert contents(folder) == FILES


def test_a_server_without_lengths_serves(server: Server, hashed: Settings, folder: Path) -> None:
    server.first[SHARD] = [without_length, without_length]
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES


def test_a_server_that_tells_neither_length_nor_hash_is_not_believed(
    server: Server, settings: Settings, folder: Path
) -> None:
    server.first[SHARD] = [without_length]
    with pytest.raises(
        DownloadFailed, match=f"{re.escape(NAMES[0])}: its server tells neither length nor hash"
    ):
        pull(folder, settings, QUICK)
    assert contents(folder) == {}


# --- servers that do not get well: one line, nothing under the final name, and a second run ends it ---


@pytest.mark.parametrize(
    ("steps", "error", "line"),
    [
        pytest.param(
            [other_bytes],
            DamagedWeights,
            "came with sha256 [0-9a-f]{64} instead of [0-9a-f]{64}; pull again",
            id="corrupt",
        ),
        pytest.param(
            [cut_after(9)] + [cut_after(0)] * 3,
            DownloadFailed,
            "the connection to 127.0.0.1 was cut, 3 times in a row; pull again later",
            id="short",
        ),
        pytest.param(
            [status(503)] * 3, DownloadFailed, "HTTP 503 from 127.0.0.1, 3 times in a row", id="503"
        ),
        pytest.param(
            [status(404)], DownloadFailed, "HTTP 404 from 127.0.0.1; correct the manifest", id="404"
        ),
        pytest.param(
            [status(401)],
            DownloadFailed,
            "HTTP 401 from 127.0.0.1; accept the model's licence on its page and set HF_TOKEN",
            id="401",
        ),
        pytest.param([status(403)], DownloadFailed, "accept the model's licence", id="403"),
        pytest.param([redirect("ftp://example.com/a")], DownloadFailed, "redirects to ftp", id="no HTTP"),
        pytest.param(
            [status(200, Content_Encoding="gzip")], DownloadFailed, "sends it compressed", id="compressed"
        ),
    ],
)
def test_a_fault_is_one_line_and_a_second_run_finishes(
    server: Server, hashed: Settings, folder: Path, steps: list[Step], error: type[LlamaError], line: str
) -> None:
    server.steps[SHARD] = list(steps)
    with pytest.raises(
        error, match=f"^{error.code} {error.__name__}: {re.escape(NAMES[0])}.*{line}|redirects"
    ) as got:
        pull(folder, hashed, QUICK)
    assert "\n" not in str(got.value)
    assert not (folder / NAMES[0]).exists()
    assert contents(folder).items() >= {k: v for k, v in FILES.items() if k != NAMES[0]}.items()
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_is_refused_is_known_before_anything_is_written(
    server: Server, settings: Settings, folder: Path, code: int
) -> None:
    server.first[SHARD] = [status(code)]
    with pytest.raises(DownloadFailed, match=f"HTTP {code}"):
        pull(folder, settings, QUICK)
    assert contents(folder) == {}


def test_no_server_at_all_is_one_line(tmp_path: Path, folder: Path) -> None:
    with Server() as gone:
        manifest = write_manifest(tmp_path / "manifest", gone.url)
    with pytest.raises(DownloadFailed, match="^E3007 .*no connection to 127.0.0.1"):
        pull(folder, Settings(weights_manifest=manifest), QUICK)


def test_a_second_run_goes_on_where_the_first_was_cut(
    server: Server, settings: Settings, folder: Path
) -> None:
    server.steps[SHARD] = [cut_after(50_000)] + [status(503)] * 2
    with pytest.raises(DownloadFailed):
        pull(folder, settings, QUICK)
    server.requests.clear()
    pull(folder, settings, QUICK)
    assert server.downloads(SHARD) == ["bytes=50000-"]
    assert contents(folder) == FILES


def test_a_file_that_has_changed_is_not_glued_to_an_old_part(
    server: Server, settings: Settings, folder: Path
) -> None:
    server.steps[SHARD] = [cut_after(50_000)] + [status(503)] * 2
    with pytest.raises(DownloadFailed):
        pull(folder, settings, QUICK)
    server.requests.clear()
    server.files[SHARD] = SHARDS[1]
    pull(folder, settings, QUICK)
    assert server.downloads(SHARD) == [""]
    assert contents(folder) == {**FILES, NAMES[0]: SHARDS[1]}


def test_a_file_that_changes_during_the_pull_is_fetched_from_its_beginning(
    server: Server, settings: Settings, folder: Path
) -> None:
    def change() -> None:
        server.files[SHARD] = SHARDS[1]

    server.steps[SHARD] = [cut_after(50_000, change)]
    pull(folder, settings, QUICK)
    assert contents(folder) == {**FILES, NAMES[0]: SHARDS[1]}


def test_a_damaged_part_is_found_out_and_fetched_again(
    server: Server, hashed: Settings, folder: Path
) -> None:
    server.steps[SHARD] = [cut_after(50_000)] + [status(503)] * 2
    with pytest.raises(DownloadFailed):
        pull(folder, hashed, QUICK)
    (part,) = folder.glob("*.part")
    part.write_bytes(bytes(50_000))
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES


def test_the_hash_that_a_hub_sends_is_what_a_file_is_held_to(
    server: Server, settings: Settings, folder: Path
) -> None:
    server.files["/blob"] = bytes(len(SHARDS[0]))
    to_blob = redirect("/blob", X_Linked_ETag=f'"{sha256(SHARDS[0])}"')
    server.first[SHARD] = [to_blob] * 2
    with pytest.raises(DamagedWeights, match=f"instead of {sha256(SHARDS[0])}"):
        pull(folder, settings, QUICK)
    server.files["/blob"] = SHARDS[0]
    server.first[SHARD] = [to_blob] * 2
    pull(folder, settings, QUICK)
    assert contents(folder) == FILES


def test_a_file_of_the_right_size_with_another_hash_than_the_hubs_is_replaced(
    server: Server, settings: Settings, folder: Path
) -> None:
    pull(folder, settings, QUICK)
    (folder / NAMES[0]).write_bytes(bytes(len(SHARDS[0])))  # as another downloader may have left it
    server.files["/blob"] = SHARDS[0]
    server.first[SHARD] = [redirect("/blob", X_Linked_ETag=f'"{sha256(SHARDS[0])}"')] * 2
    assert pull(folder, settings, QUICK) == 1
    assert contents(folder) == FILES


@pytest.mark.parametrize("name", [NAMES[0], "config.json"])
def test_a_proxys_page_takes_no_files_place(
    server: Server, settings: Settings, folder: Path, name: str
) -> None:
    pull(folder, settings, QUICK)
    server.files[f"/{name}"] = b"<html>Please sign in</html>"
    with pytest.raises(DamagedWeights, match=f"^E3009 DamagedWeights: {re.escape(name)} came as no"):
        pull(folder, settings, QUICK)
    assert contents(folder) == FILES


def test_packed_weights_are_neither_pulled_over_nor_locked(
    server: Server, settings: Settings, folder: Path
) -> None:
    pull(folder, settings, QUICK)
    (folder / "config.json").write_text(json.dumps({PACKED: "nf4"}))
    before = contents(folder)
    for command in (lambda: pull(folder, settings, QUICK), lambda: lock(folder, settings.weights_manifest)):
        with pytest.raises(BadSettings, match="holds packed weights, not the manifest's"):
            command()
    assert contents(folder) == before


def test_setup_pulls_where_it_is_told_to(server: Server, settings: Settings, folder: Path) -> None:
    with pytest.raises(WeightsNotFound, match="or set LLAMA_PULL to 1"):
        folder_to_serve(settings.model_copy(update={"weights": folder}))
    told = settings.model_copy(update={"weights": folder, "pull": True})
    with pytest.raises(WeightsNotFound):
        weights_folder(told)  # which only looks
    assert folder_to_serve(told) == folder
    assert contents(folder) == FILES


def test_another_version_on_the_hub_is_refused_before_it_is_fetched(
    server: Server, hashed: Settings, folder: Path
) -> None:
    server.files["/blob"] = SHARDS[1]
    server.first[SHARD] = [redirect("/blob", X_Linked_ETag=f'"{sha256(SHARDS[1])}"')]
    with pytest.raises(DamagedWeights, match="the server has another file"):
        pull(folder, hashed, QUICK)
    assert server.downloads("/blob") == []


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
        pull(folder, settings.model_copy(update={"hf_token": type(settings.hf_token)(token)}), QUICK)
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


# --- the manifest ---


def test_blank_lines_and_wide_spaces_are_let_pass(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    path.write_text(
        f"\n https://h/a.json#sha256={'a' * 64} \t a.json  \n\r\n\nhttps://h/b?c=d b.txt\n", "utf-8"
    )
    assert [(e.url, e.destination, e.sha256) for e in read_manifest(path)] == [
        ("https://h/a.json", "a.json", "a" * 64),
        ("https://h/b?c=d", "b.txt", None),
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("https://h/a.json", "1 fields"),
        ("# a comment", "3 fields"),
        ("https://h/a.json a.json more", "3 fields"),
        ("ftp://h/a.json a.json", "is not one"),
        ("https:///a.json a.json", "is not one"),
        ("https://[h/a.json a.json", "is not one"),
        ("https://h:port/a.json a.json", "is not one"),
        ("https://h/a.json#sha256=abc a.json", "fragment"),
        ("https://h/a.json#md5=abc a.json", "fragment"),
        ("https://h/a.json /etc/a.json", "not a path inside"),
        ("https://h/a.json ../a.json", "not a path inside"),
        ("https://h/a.json b/../../a.json", "not a path inside"),
        ("https://h/a.json b//a.json", "not a path inside"),
        ("https://h/a.json .hidden.json", "not a path inside"),
        ("https://h/a.json C:\\a.json", "not a path inside"),
        ("https://h/a.json a\x1b[31m.json", "not a path inside"),
        ("https://h/a.bin a.bin", "a kind that is not read"),
        ("https://h/a.pt a.pt", "a kind that is not read"),
        ("https://h/a.pkl a.pkl", "a kind that is not read"),
        ("https://h/a.py modeling.py", "a kind that is not read"),
        ("https://h/a.safetensors a.safetensors.bin", "a kind that is not read"),
        ("https://h/a.json config.json", "there twice"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_fetched(
    server: Server, tmp_path: Path, folder: Path, line: str, fault: str
) -> None:
    manifest = tmp_path / "manifest"
    manifest.write_text(f"{server.url}/config.json config.json\n\n{line}\n", "utf-8")
    with pytest.raises(BadManifest, match=f"^E3006 BadManifest: .* line 3: .*{fault}"):
        pull(folder, Settings(weights_manifest=manifest), QUICK)
    assert server.requests == []


def test_a_missing_or_empty_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadManifest, match="cannot be read"):
        read_manifest(tmp_path / "none")
    (tmp_path / "empty").write_text("\n", "utf-8")
    with pytest.raises(BadManifest, match="names no file"):
        read_manifest(tmp_path / "empty")


@pytest.mark.parametrize("link", ["config.json", "sub"])
def test_a_link_out_of_the_folder_is_refused(server: Server, tmp_path: Path, folder: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder.mkdir()
    (folder / link).symlink_to(outside / "config.json" if link == "config.json" else outside)
    manifest = tmp_path / "manifest"
    destination = link if link == "config.json" else "sub/config.json"
    manifest.write_text(f"{server.url}/config.json {destination}\n", "utf-8")
    with pytest.raises(BadManifest, match="^E3006 .*symbolic link"):
        pull(folder, Settings(weights_manifest=manifest), QUICK)
    assert list(outside.iterdir()) == []


def test_the_repositorys_manifest_is_the_whole_70b() -> None:
    entries = read_manifest(Settings().weights_manifest)
    shards = [e.destination for e in entries if e.destination.endswith(".safetensors")]
    assert shards == [f"model-{n:05d}-of-00015.safetensors" for n in range(1, 16)]
    others = {e.destination for e in entries} - set(shards)
    assert others == {
        "LICENSE.txt",
        "USE_POLICY.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    base = "https://huggingface.co/meta-llama/Llama-2-70b-chat-hf/resolve/main/"
    assert all(e.url == base + e.destination for e in entries)


# --- disks and processes ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    hashed: Settings, small_disk: Path
) -> None:
    with pytest.raises(DiskFull, match="^E3008 DiskFull: .*to come and the disk of .*; free"):
        pull(small_disk, hashed, QUICK)
    assert contents(small_disk) == {}


def test_a_disk_that_fills_up_keeps_what_has_come(server: Server, hashed: Settings, small_disk: Path) -> None:
    server.first[SHARD] = [without_length]  # its size is not known beforehand
    server.first[f"/{NAMES[1]}"] = [without_length]
    with pytest.raises(DiskFull, match="^E3008 DiskFull: the disk of .* is full; free some and try again"):
        pull(small_disk, hashed, QUICK)
    assert all(FILES[name] == data for name, data in contents(small_disk).items() if name in FILES)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    pull(small_disk, hashed, QUICK)
    assert contents(small_disk) == FILES


def test_a_write_that_fails_is_a_full_disk_and_a_second_run_goes_on(
    server: Server, hashed: Settings, folder: Path
) -> None:
    """Without root: the kernel refuses to let a file grow beyond a limit."""
    environment = {**os.environ, "LLAMA_WEIGHTS_MANIFEST": str(hashed.weights_manifest)}
    limited = subprocess.run(
        [sys.executable, "-m", "llama", "weights", "pull", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert limited.returncode == 1
    assert limited.stderr.splitlines()[-1].startswith("E3008 DiskFull: the disk of ")
    assert not (folder / NAMES[0]).exists()
    server.requests.clear()
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES
    ranges = [*server.downloads(SHARD), *server.downloads(f"/{NAMES[1]}")]
    assert "bytes=60000-" in ranges


def test_a_folder_that_may_not_be_made_is_one_line(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadFailed, match="^E3007 .*cannot be written"):
        pull(tmp_path / "file" / "weights", settings, QUICK)


def start(*arguments: str, settings: Settings) -> subprocess.Popen[str]:
    environment = {**os.environ, "LLAMA_WEIGHTS_MANIFEST": str(settings.weights_manifest)}
    command = [sys.executable, "-m", "llama", "weights", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_pulls_at_once_fetch_every_file_once(server: Server, hashed: Settings, folder: Path) -> None:
    server.steps[SHARD] = [slowly(20, 0.15)]
    first = start("pull", str(folder), settings=hashed)
    wait_until(lambda: server.downloads(SHARD))
    second = start("pull", str(folder), settings=hashed)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert "another process is at work" in outputs[1][1]
    assert contents(folder) == FILES
    assert all(len(server.downloads(f"/{name}")) == 1 for name in FILES)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_is_killed_is_taken_up_by_the_next(
    server: Server, hashed: Settings, folder: Path, number: signal.Signals
) -> None:
    server.steps[SHARD] = [slowly(100, 0.05)]
    process = start("pull", str(folder), settings=hashed)
    wait_until(lambda: any(path.stat().st_size for path in folder.glob(f"{NAMES[0]}.*.part")))
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    assert not (folder / NAMES[0]).exists()
    server.requests.clear()
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES
    assert re.fullmatch(r"bytes=[1-9]\d*-", server.downloads(SHARD)[0])


def test_a_log_has_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="llama")
    shown = LogProgress(4_000_000_000, 0, every=0.05)
    shown.show(1_000_000_000)  # too soon
    time.sleep(0.06)
    shown.show(2_000_000_000)
    shown.show(2_000_000_000)  # too soon again
    (line,) = caplog.messages
    assert re.fullmatch(r"2\.0 of 4\.0 GB, \d+ MB/s, 0 min left", line)


# --- verify and lock ---


def test_verify_reports_all_faults_at_once(hashed: Settings, folder: Path) -> None:
    pull(folder, hashed, QUICK)
    (folder / "config.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"other")
    (folder / "LICENSE.txt").write_bytes(b"")
    (folder / NAMES[0]).write_bytes(SHARDS[0][:-8])
    (folder / NAMES[1]).write_bytes(b"no safetensors")
    index = {"weight_map": {**INDEX["weight_map"], "a": "model-00003-of-00003.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    result = run("verify", str(folder), LLAMA_WEIGHTS_MANIFEST=str(hashed.weights_manifest))
    assert result.returncode == 1
    assert result.stdout == ""
    size = len(SHARDS[0])
    expected = [
        "config.json: missing; pull again",
        "tokenizer.model: its sha256 is [0-9a-f]{64} and not [0-9a-f]{64}; delete it and pull again",
        "LICENSE.txt: empty; delete it and pull again",
        "model.safetensors.index.json: its sha256 is [0-9a-f]{64} and not [0-9a-f]{64}; delete it and pull again",
        f"{NAMES[0]}: {size - 8} bytes, and its header says {size}; delete it and pull again",
        f"{NAMES[1]}: no sound safetensors header .*; delete it and pull again",
        "model-00003-of-00003.safetensors: missing, and model.safetensors.index.json names it; pull .*",
    ]
    lines = result.stderr.splitlines()
    assert len(lines) == len(expected)
    for line, wanted in zip(lines, expected, strict=True):
        assert re.fullmatch(f"E3009 DamagedWeights: {wanted}", line)


def test_verify_of_a_sound_folder_is_one_line(hashed: Settings, folder: Path) -> None:
    pull(folder, hashed, QUICK)
    result = run("verify", str(folder), LLAMA_WEIGHTS_MANIFEST=str(hashed.weights_manifest))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{folder} is well: 6 files, 6 by their sha256\n"


def test_verify_takes_the_folder_that_is_served_and_names_one_that_is_not_there(
    hashed: Settings, folder: Path
) -> None:
    manifest = str(hashed.weights_manifest)
    result = run("verify", LLAMA_WEIGHTS=str(folder), LLAMA_WEIGHTS_MANIFEST=manifest)
    assert result.returncode == 1
    assert result.stderr.startswith(f"E3001 WeightsNotFound: {folder} is not a folder; ")


def test_lock_writes_what_verify_and_pull_go_by(server: Server, settings: Settings, folder: Path) -> None:
    pull(folder, settings, QUICK)
    manifest = settings.weights_manifest
    manifest.chmod(0o640)
    before = read_manifest(manifest)
    result = run("lock", str(folder), LLAMA_WEIGHTS_MANIFEST=str(manifest))
    assert (result.returncode, result.stderr) == (0, "")
    after = read_manifest(manifest)
    assert [(e.url, e.destination) for e in after] == [(e.url, e.destination) for e in before]
    assert [e.sha256 for e in after] == [sha256(FILES[e.destination]) for e in after]
    assert manifest.stat().st_mode & 0o777 == 0o640
    assert verify(folder, after).faults == []
    text = manifest.read_text("utf-8")
    assert lock(folder, manifest).faults == []
    assert manifest.read_text("utf-8") == text


@pytest.mark.parametrize("fault", ["missing", "cut", "hash"])
def test_lock_writes_nothing_while_anything_is_wrong(
    server: Server, settings: Settings, hashed: Settings, folder: Path, fault: str
) -> None:
    pull(folder, settings, QUICK)
    manifest = hashed.weights_manifest if fault == "hash" else settings.weights_manifest
    path = folder / NAMES[0]
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(SHARDS[0][:-4] if fault == "cut" else SHARDS[1])
    text = manifest.read_text("utf-8")
    result = run("lock", str(folder), LLAMA_WEIGHTS_MANIFEST=str(manifest))
    assert result.returncode == 1
    assert f"E3009 DamagedWeights: {NAMES[0]}: " in result.stderr
    assert manifest.read_text("utf-8") == text
    assert sorted(p.name for p in manifest.parent.glob(f"{manifest.name}*")) == [manifest.name]


def test_the_weights_commands_load_no_model_code() -> None:
    code = "import sys, llama.weights.folder, llama.weights.download; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# --- what a real machine brings ---


def test_a_file_is_hashed_once_for_as_long_as_it_stays_the_same(
    server: Server, hashed: Settings, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="llama")
    pull(folder, hashed, QUICK)
    caplog.clear()
    assert pull(folder, hashed, QUICK) == 0
    assert not any("looking at its sha256" in line for line in caplog.messages)
    # A change of the contents is seen by size or by time, and the file is fetched again.
    (folder / NAMES[0]).write_bytes(b"x" * len(FILES[NAMES[0]]))
    assert pull(folder, hashed, QUICK) == 1
    assert contents(folder) == FILES


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"config.json": 5}', '{"config.json": [1, 2, 3]}'])
def test_a_damaged_list_of_hashes_is_not_believed(hashed: Settings, folder: Path, damage: str) -> None:
    pull(folder, hashed, QUICK)
    (folder / ".sha256-cache").write_text(damage)
    assert pull(folder, hashed, QUICK) == 0
    assert contents(folder) == FILES


def test_the_part_of_another_file_that_is_named_alike_is_kept(
    server: Server, settings: Settings, folder: Path
) -> None:
    folder.mkdir()
    server.files["/model.safetensors"] = FILES[NAMES[0]]
    settings.weights_manifest.write_text(f"{server.url}/model.safetensors model.safetensors\n")
    kept = folder / "model.safetensors.index.json.0123456789ab.part"
    gone = folder / "model.safetensors.0123456789ab.part"
    for path in (kept, gone):
        path.write_bytes(b"some bytes")
    pull(folder, settings, QUICK)
    assert kept.exists()
    assert not gone.exists()


def test_the_unit_of_a_range_may_be_in_capitals(server: Server, hashed: Settings, folder: Path) -> None:
    def in_capitals(handler: Handler, body: bytes) -> None:
        code, headers, start = head_of(handler, body)
        headers["Content-Range"] = headers["Content-Range"].replace("bytes", "Bytes")
        handler.answer(code, headers, body[start:])

    server.steps[SHARD] = [cut_after(100), in_capitals]
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES
    assert len(server.downloads(SHARD)) == 2


def test_delays_are_spread() -> None:
    policy = RetryPolicy(first_delay=1.0)
    delays = {policy._delay(1, 0.0) for _ in range(50)}
    assert len(delays) > 40
    assert 0.75 <= min(delays) <= max(delays) <= 1.25
    assert policy._delay(1, 30.0) == 30.0


def test_a_snapshot_of_the_hubs_cache_is_verified_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "b").write_text("{}")
    (snapshot / "x.json").symlink_to("../../blobs/b")
    (snapshot / "gone.json").symlink_to("../../blobs/none")
    entries = [Entry("https://h.example/x.json", "x.json", sha256(b"{}"))]
    assert verify(snapshot, entries).faults == []
    entries.append(Entry("https://h.example/gone.json", "gone.json"))
    (fault,) = verify(snapshot, entries).faults
    assert "gone.json: missing" in str(fault)


def test_lock_says_where_it_has_written(server: Server, settings: Settings, folder: Path) -> None:
    pull(folder, settings, QUICK)
    manifest = settings.weights_manifest
    result = run("lock", str(folder), LLAMA_WEIGHTS_MANIFEST=str(manifest))
    assert result.stdout.splitlines()[-1] == f"{manifest} has the sha256 of all {len(FILES)} files now"


def test_a_proxy_that_refuses_is_said_to(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        (tmp_path / "weights.txt").write_text("https://h.example/a.json a.json\n")
        settings = Settings(weights_manifest=tmp_path / "weights.txt")
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("NO_PROXY")
            patch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_port}")
            with pytest.raises(DownloadFailed, match="the proxy that the environment names"):
                pull(tmp_path / "w", settings, QUICK)
        proxy.shutdown()
