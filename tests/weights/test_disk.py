"""Full disks, killed pulls, and two pulls at once."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pulling import FILES, NAMES, QUICK, SHARD, contents
from server_clients import until
from weights_server import (
    Server,
    slowly,
    without_length,
)

from llama import ROOT
from llama.errors import (
    DiskFull,
    DownloadFailed,
)
from llama.settings import Settings
from llama.weights.folder import pull
from llama.weights.progress import LogProgress


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


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(
    hashed: Settings, small_disk: Path
) -> None:
    with pytest.raises(
        DiskFull, match="^E3008 DiskFull: .* must be downloaded, but the disk of .* free; free another"
    ):
        pull(small_disk, hashed, QUICK)
    assert contents(small_disk) == {}


def test_complete_files_are_kept_if_the_disk_fills_up(
    server: Server, hashed: Settings, small_disk: Path
) -> None:
    server.first[SHARD] = [without_length]  # its size is not known beforehand
    server.first[f"/{NAMES[1]}"] = [without_length]
    with pytest.raises(
        DiskFull, match="^E3008 DiskFull: the disk of .* is full; free some space and run the command again"
    ):
        pull(small_disk, hashed, QUICK)
    assert all(FILES[name] == data for name, data in contents(small_disk).items() if name in FILES)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    pull(small_disk, hashed, QUICK)
    assert contents(small_disk) == FILES


def test_a_failed_write_is_a_full_disk_and_a_second_pull_resumes(
    server: Server, hashed: Settings, folder: Path
) -> None:
    """A limit on the size of files needs no root, unlike a small disk."""
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


def test_a_folder_that_cannot_be_created_is_one_line(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadFailed, match="^E3007 .*cannot be read or written"):
        pull(tmp_path / "file" / "weights", settings, QUICK)


def start(*arguments: str, settings: Settings) -> subprocess.Popen[str]:
    environment = {**os.environ, "LLAMA_WEIGHTS_MANIFEST": str(settings.weights_manifest)}
    command = [sys.executable, "-m", "llama", "weights", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_pulls_at_once_download_every_file_once(server: Server, hashed: Settings, folder: Path) -> None:
    server.steps[SHARD] = [slowly(20, 0.15)]
    first = start("pull", str(folder), settings=hashed)
    until(lambda: server.downloads(SHARD), timeout=20)
    second = start("pull", str(folder), settings=hashed)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert "another process is writing to" in outputs[1][1]
    assert contents(folder) == FILES
    assert all(len(server.downloads(f"/{name}")) == 1 for name in FILES)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_pull_is_resumed_by_the_next(
    server: Server, hashed: Settings, folder: Path, number: signal.Signals
) -> None:
    server.steps[SHARD] = [slowly(100, 0.05)]
    process = start("pull", str(folder), settings=hashed)
    until(lambda: any(path.stat().st_size for path in folder.glob(f"{NAMES[0]}.*.part")), timeout=20)
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    assert not (folder / NAMES[0]).exists()
    server.requests.clear()
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES
    assert re.fullmatch(r"bytes=[1-9]\d*-", server.downloads(SHARD)[0])


def test_progress_is_logged_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="llama")
    shown = LogProgress(4_000_000_000, 0, every=0.05)
    shown.show(1_000_000_000)  # too soon
    time.sleep(0.06)
    shown.show(2_000_000_000)
    shown.show(2_000_000_000)  # too soon again
    (line,) = caplog.messages
    assert re.fullmatch(r"2\.0 of 4\.0 GB, \d+ MB/s, 0 min left", line)
