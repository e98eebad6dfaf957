"""Verifying and locking a folder of weights, and the cache of hashes."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pulling import FILES, INDEX, NAMES, QUICK, SHARD, SHARDS, contents, run, sha256
from weights_server import (
    Handler,
    Server,
    cut_after,
    head_of,
)

from llama import ROOT
from llama.errors import (
    BadManifest,
    DownloadFailed,
)
from llama.settings import Settings
from llama.weights.folder import lock, pull, verify
from llama.weights.manifest import read_manifest, write_hashes
from llama.weights.retry import RetryPolicy

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
        "config.json is missing; run `weights pull`",
        "tokenizer.model has the SHA-256 [0-9a-f]{64} instead of [0-9a-f]{64}; delete it and run `weights pull`",
        "LICENSE.txt is empty; delete it and run `weights pull`",
        "model.safetensors.index.json has the SHA-256 [0-9a-f]{64} instead of [0-9a-f]{64}; delete it and run `weights pull`",
        f"{NAMES[0]} has {size - 8} bytes, but its header describes {size}; delete it and run `weights pull`",
        f"{NAMES[1]} has no valid safetensors header .*; delete it and run `weights pull`",
        "model-00003-of-00003.safetensors is missing, but model.safetensors.index.json names it; pull .*",
    ]
    lines = result.stderr.splitlines()
    assert len(lines) == len(expected)
    for line, wanted in zip(lines, expected, strict=True):
        assert re.fullmatch(f"E3009 DamagedWeights: {wanted}", line)


def test_verify_prints_one_line_for_a_valid_folder(hashed: Settings, folder: Path) -> None:
    pull(folder, hashed, QUICK)
    result = run("verify", str(folder), LLAMA_WEIGHTS_MANIFEST=str(hashed.weights_manifest))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{folder} is valid: 6 files, 6 checked by SHA-256\n"


def test_verify_checks_the_served_folder_by_default_and_names_it_if_it_is_missing(
    hashed: Settings, folder: Path
) -> None:
    manifest = str(hashed.weights_manifest)
    result = run("verify", LLAMA_WEIGHTS=str(folder), LLAMA_WEIGHTS_MANIFEST=manifest)
    assert result.returncode == 1
    assert result.stderr.startswith(f"E3001 WeightsNotFound: {folder} does not exist or is not a folder; ")


def test_lock_writes_the_hashes_that_verify_and_pull_use(
    server: Server, settings: Settings, folder: Path
) -> None:
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
    assert verify(folder, settings).faults == []
    text = manifest.read_text("utf-8")
    assert lock(folder, settings).faults == []
    assert manifest.read_text("utf-8") == text


@pytest.mark.parametrize("fault", ["missing", "cut", "hash"])
def test_lock_writes_nothing_if_there_is_a_fault(
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
    assert f"E3009 DamagedWeights: {NAMES[0]} " in result.stderr
    assert manifest.read_text("utf-8") == text
    assert sorted(p.name for p in manifest.parent.glob(f"{manifest.name}*")) == [manifest.name]


def test_the_weights_commands_import_no_model_code() -> None:
    code = "import sys, llama.weights.folder, llama.weights.download; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# --- hashes, retries, links and proxies ---


def test_a_file_is_hashed_again_only_if_it_has_changed(
    server: Server, hashed: Settings, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="llama")
    pull(folder, hashed, QUICK)
    caplog.clear()
    assert pull(folder, hashed, QUICK) == 0
    assert not any("checking its SHA-256" in line for line in caplog.messages)
    # A change is noticed by the size or the modification time, and the file is downloaded again.
    (folder / NAMES[0]).write_bytes(b"x" * len(FILES[NAMES[0]]))
    assert pull(folder, hashed, QUICK) == 1
    assert contents(folder) == FILES


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"config.json": 5}', '{"config.json": [1, 2, 3]}'])
def test_a_damaged_cache_of_hashes_is_ignored(hashed: Settings, folder: Path, damage: str) -> None:
    pull(folder, hashed, QUICK)
    (folder / ".sha256-cache").write_text(damage)
    assert pull(folder, hashed, QUICK) == 0
    assert contents(folder) == FILES


def test_a_part_of_another_file_with_a_similar_name_is_kept(
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


def test_the_unit_of_a_range_may_be_capitalised(server: Server, hashed: Settings, folder: Path) -> None:
    def capitalised(handler: Handler, body: bytes) -> None:
        code, headers, start = head_of(handler, body)
        headers["Content-Range"] = headers["Content-Range"].replace("bytes", "Bytes")
        handler.answer(code, headers, body[start:])

    server.steps[SHARD] = [cut_after(100), capitalised]
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES
    assert len(server.downloads(SHARD)) == 2


def test_delays_vary_at_random() -> None:
    policy = RetryPolicy(first_delay=1.0)
    delays = {policy._delay(1, 0.0) for _ in range(50)}
    assert len(delays) > 40
    assert 0.75 <= min(delays) <= max(delays) <= 1.25
    assert policy._delay(1, 30.0) == 30.0


def test_verify_follows_the_links_of_a_snapshot_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "b").write_text("{}")
    (snapshot / "x.json").symlink_to("../../blobs/b")
    (snapshot / "gone.json").symlink_to("../../blobs/none")
    manifest = tmp_path / "manifest"
    settings = Settings(weights_manifest=manifest)
    manifest.write_text(f"https://h.example/x.json#sha256={sha256(b'{}')} x.json\n")
    assert verify(snapshot, settings).faults == []
    with manifest.open("a") as file:
        file.write("https://h.example/gone.json gone.json\n")
    (fault,) = verify(snapshot, settings).faults
    assert "gone.json is missing" in str(fault)


def test_lock_writes_through_a_link_and_never_replaces_a_device(
    server: Server, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    pull(folder, settings, QUICK)
    link = tmp_path / "link.txt"
    link.symlink_to(settings.weights_manifest)
    lock(folder, settings.model_copy(update={"weights_manifest": link}))
    assert link.is_symlink()
    assert all(entry.sha256 for entry in read_manifest(settings.weights_manifest))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BadManifest, match="^E3006 .*pipe cannot be written .not a regular file"):
        write_hashes(pipe, [], {})
    assert pipe.is_fifo()


def test_a_folder_may_begin_with_a_tilde(server: Server, settings: Settings, tmp_path: Path) -> None:
    manifest, home = str(settings.weights_manifest), str(tmp_path)
    result = run("pull", "~/inside", LLAMA_WEIGHTS_MANIFEST=manifest, HOME=home)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "inside") == FILES
    result = run("pull", "~nobody-here/x", LLAMA_WEIGHTS_MANIFEST=manifest)
    assert result.stderr.startswith("E3000 BadSettings: FOLDER is ~nobody-here/x, but that home directory is")


def test_a_link_to_itself_and_an_overlong_name_are_reported(settings: Settings, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(BadManifest, match="^E3006 BadManifest: .* cannot be resolved"):
        pull(loop, settings, QUICK)
    folder = tmp_path / "w"
    folder.mkdir()
    index = {"weight_map": {"a": f"{'x' * 300}.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert any("xxx.safetensors is missing" in str(fault) for fault in verify(folder, settings).faults)


def test_lock_names_the_manifest_that_it_has_written(
    server: Server, settings: Settings, folder: Path
) -> None:
    pull(folder, settings, QUICK)
    manifest = settings.weights_manifest
    result = run("lock", str(folder), LLAMA_WEIGHTS_MANIFEST=str(manifest))
    assert result.stdout.splitlines()[-1] == f"{manifest} now has the SHA-256 of {len(FILES)} files"


def test_a_proxy_that_refuses_the_connection_is_reported(tmp_path: Path) -> None:
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
