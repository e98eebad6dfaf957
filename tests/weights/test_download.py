"""Pulling weights from a plain HTTP server on loopback, and the faults that such a server can have."""

from __future__ import annotations

import email.utils
import json
import re
import threading
import time
from pathlib import Path

import httpx2
import pytest
from pulling import FILES, NAMES, QUICK, SHARD, SHARDS, contents, write_manifest
from weights_server import (
    Server,
    Step,
    cut_after,
    other_bytes,
    other_range,
    redirect,
    serve,
    stall_after,
    status,
    without_length,
    without_ranges,
)

from llama.errors import (
    BadSettings,
    DamagedWeights,
    DownloadFailed,
    LlamaError,
    WeightsNotFound,
)
from llama.settings import Settings
from llama.weights.file_checks import PACKED
from llama.weights.folder import folder_to_serve, lock, pull, weights_folder
from llama.weights.http import retry_after
from llama.weights.retry import RetryPolicy

# --- without faults ---


def test_all_files_are_downloaded_and_a_second_pull_downloads_none(
    server: Server, settings: Settings, folder: Path
) -> None:
    assert pull(folder, settings, QUICK) == len(FILES)
    assert contents(folder) == FILES
    server.requests.clear()
    assert pull(folder, settings, QUICK) == 0
    assert all(server.downloads(f"/{name}") == [] for name in FILES)


def test_a_complete_folder_needs_no_request_if_the_manifest_has_hashes(
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


def test_the_folders_of_a_destination_are_created(server: Server, tmp_path: Path, folder: Path) -> None:
    manifest = tmp_path / "manifest"
    manifest.write_text(f"{server.url}/config.json one/two/config.json\n", "utf-8")
    pull(folder, Settings(weights_manifest=manifest), QUICK)
    assert (folder / "one" / "two" / "config.json").read_bytes() == FILES["config.json"]


def test_an_empty_file_is_downloaded(server: Server, tmp_path: Path, folder: Path) -> None:
    server.files["/empty.txt"] = b""
    manifest = tmp_path / "manifest"
    manifest.write_text(f"{server.url}/empty.txt empty.txt\n", "utf-8")
    pull(folder, Settings(weights_manifest=manifest), QUICK)
    assert contents(folder) == {"empty.txt": b""}


# --- faults that the pull recovers from ---


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
def test_one_pull_recovers_from(
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


def test_a_request_is_repeated_if_the_server_stops_sending(
    server: Server, settings: Settings, folder: Path
) -> None:
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


def test_a_server_that_sends_no_lengths_is_accepted_if_the_hash_is_known(
    server: Server, hashed: Settings, folder: Path
) -> None:
    server.first[SHARD] = [without_length, without_length]
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES


def test_a_file_with_neither_a_length_nor_a_hash_is_refused(
    server: Server, settings: Settings, folder: Path
) -> None:
    server.first[SHARD] = [without_length]
    with pytest.raises(
        DownloadFailed, match=f"{re.escape(NAMES[0])}: the server sent neither a length nor a hash"
    ):
        pull(folder, settings, QUICK)
    assert contents(folder) == {}


# --- faults that end the pull: one line, nothing under the final name, and a second pull completes it ---


@pytest.mark.parametrize(
    ("steps", "error", "line"),
    [
        pytest.param(
            [other_bytes],
            DamagedWeights,
            "the downloaded file has the SHA-256 [0-9a-f]{64} instead of [0-9a-f]{64}; pull again",
            id="corrupt",
        ),
        pytest.param(
            [cut_after(9)] + [cut_after(0)] * 3,
            DownloadFailed,
            "the connection to 127.0.0.1 was interrupted, 3 times in a row; pull again later",
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
            "HTTP 401 from 127.0.0.1, to which no token is sent; make the file readable",
            id="401",
        ),
        pytest.param(
            [status(403)], DownloadFailed, "HTTP 403 from 127.0.0.1, to which no token is sent", id="403"
        ),
        pytest.param([redirect("ftp://example.com/a")], DownloadFailed, "redirects to ftp", id="no HTTP"),
        pytest.param(
            [status(200, Content_Encoding="gzip")],
            DownloadFailed,
            "sent the file compressed",
            id="compressed",
        ),
    ],
)
def test_a_fault_is_one_line_and_a_second_pull_completes_the_folder(
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
def test_a_refused_file_is_reported_before_anything_is_written(
    server: Server, settings: Settings, folder: Path, code: int
) -> None:
    server.first[SHARD] = [status(code)]
    with pytest.raises(DownloadFailed, match=f"HTTP {code}"):
        pull(folder, settings, QUICK)
    assert contents(folder) == {}


def test_an_unreachable_server_is_reported_on_one_line(tmp_path: Path, folder: Path) -> None:
    with Server() as gone:
        manifest = write_manifest(tmp_path / "manifest", gone.url)
    with pytest.raises(DownloadFailed, match="^E3007 .*cannot connect to 127.0.0.1"):
        pull(folder, Settings(weights_manifest=manifest), QUICK)


def test_a_second_pull_resumes_an_interrupted_file(server: Server, settings: Settings, folder: Path) -> None:
    server.steps[SHARD] = [cut_after(50_000)] + [status(503)] * 2
    with pytest.raises(DownloadFailed):
        pull(folder, settings, QUICK)
    server.requests.clear()
    pull(folder, settings, QUICK)
    assert server.downloads(SHARD) == ["bytes=50000-"]
    assert contents(folder) == FILES


def test_a_part_of_another_version_is_not_resumed(server: Server, settings: Settings, folder: Path) -> None:
    server.steps[SHARD] = [cut_after(50_000)] + [status(503)] * 2
    with pytest.raises(DownloadFailed):
        pull(folder, settings, QUICK)
    server.requests.clear()
    server.files[SHARD] = SHARDS[1]
    pull(folder, settings, QUICK)
    assert server.downloads(SHARD) == [""]
    assert contents(folder) == {**FILES, NAMES[0]: SHARDS[1]}


def test_a_file_that_changes_during_the_pull_is_downloaded_from_its_beginning(
    server: Server, settings: Settings, folder: Path
) -> None:
    def change() -> None:
        server.files[SHARD] = SHARDS[1]

    server.steps[SHARD] = [cut_after(50_000, change)]
    pull(folder, settings, QUICK)
    assert contents(folder) == {**FILES, NAMES[0]: SHARDS[1]}


def test_a_damaged_part_is_downloaded_again(server: Server, hashed: Settings, folder: Path) -> None:
    server.steps[SHARD] = [cut_after(50_000)] + [status(503)] * 2
    with pytest.raises(DownloadFailed):
        pull(folder, hashed, QUICK)
    (part,) = folder.glob("*.part")
    part.write_bytes(bytes(50_000))
    pull(folder, hashed, QUICK)
    assert contents(folder) == FILES


@pytest.mark.parametrize("name", [NAMES[0], "config.json"])
def test_an_error_page_of_a_proxy_does_not_replace_a_file(
    server: Server, settings: Settings, folder: Path, name: str
) -> None:
    pull(folder, settings, QUICK)
    server.files[f"/{name}"] = b"<html>Please sign in</html>"
    with pytest.raises(
        DamagedWeights, match=f"^E3009 DamagedWeights: {re.escape(name)}: the downloaded file .* not? valid"
    ):
        pull(folder, settings, QUICK)
    assert contents(folder) == FILES


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("5", 5.0),
        ("soon", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 -1200", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_a_retry_after_that_cannot_be_read_counts_as_none(header: str, seconds: float) -> None:
    assert retry_after(httpx2.Headers({"Retry-After": header})) == seconds


def test_a_packed_folder_is_neither_pulled_into_nor_locked(
    server: Server, settings: Settings, folder: Path
) -> None:
    pull(folder, settings, QUICK)
    (folder / "config.json").write_text(json.dumps({PACKED: "nf4"}))
    before = contents(folder)
    for command in (lambda: pull(folder, settings, QUICK), lambda: lock(folder, settings)):
        with pytest.raises(BadSettings, match="contains packed weights, not the files of the manifest"):
            command()
    assert contents(folder) == before


def test_setup_pulls_if_llama_pull_is_set(server: Server, settings: Settings, folder: Path) -> None:
    with pytest.raises(WeightsNotFound, match="or set LLAMA_PULL to 1"):
        folder_to_serve(settings.model_copy(update={"weights": folder}))
    to_pull = settings.model_copy(update={"weights": folder, "pull": True})
    with pytest.raises(WeightsNotFound):
        weights_folder(to_pull)  # this function does not pull
    assert folder_to_serve(to_pull) == folder
    assert contents(folder) == FILES
