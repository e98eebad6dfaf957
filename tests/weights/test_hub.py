"""Pulling weights from a small hub on loopback. Every pull is a process, because huggingface_hub reads
HF_ENDPOINT when it is imported."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from pulling import FILES, NAMES, SHARDS, TOKEN, contents, sha256
from server_clients import until
from small_hub import COMMIT, REPOSITORY, XET_TOKEN, SmallHub, xorb
from weights_server import cut_after, other_bytes, slowly, status

from llama import ROOT
from llama.errors import BadManifest
from llama.weights.hub_location import HubLocation, hub_location

XET, CDN = NAMES  # one shard is offered by Xet, the other one by the CDN alone
XORB, BLOB = f"/xorb/{XET}", f"/lfs/{CDN}"
URL = f"https://huggingface.co/{REPOSITORY}/resolve/{COMMIT}"


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    with SmallHub() as hub:
        for name, data in FILES.items():
            hub.add(name, data, large=name in (CDN, "tokenizer.model"), xet=name == XET)
        yield hub


class Puller:
    """Runs `weights pull` with a manifest of hub URLs."""

    def __init__(self, hub: SmallHub, tmp_path: Path) -> None:
        self.folder, self.manifest = tmp_path / "weights", tmp_path / "manifest"
        foreign = ("HF_", "TRANSFORMERS_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN,
            "LLAMA_WEIGHTS_MANIFEST": str(self.manifest),
        }
        self.write_manifest(*FILES)

    def write_manifest(self, *names: str, hashes: bool = False) -> None:
        lines = [f"{URL}/{n}{f'#sha256={sha256(FILES[n])}' if hashes else ''} {n}\n" for n in names]
        self.manifest.write_text("".join(lines), "utf-8")

    def start(
        self, environment: Mapping[str, str] | None = None, limit: int | None = None
    ) -> subprocess.Popen[str]:
        """`limit` is the largest size of a file that the process may write."""
        return subprocess.Popen(
            [sys.executable, "-m", "llama", "weights", "pull", str(self.folder)],
            cwd=ROOT,
            env={**self.environment, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,  # noqa: PLW1509
        )

    def run(
        self, environment: Mapping[str, str] | None = None, limit: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(environment, limit)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def staged(self) -> list[str]:
        """The files that a pull has left in its staging folder."""
        return [path.name for path in (self.folder / ".hub").rglob("*") if path.is_file()]


@pytest.fixture
def puller(hub: SmallHub, tmp_path: Path) -> Puller:
    return Puller(hub, tmp_path)


@pytest.mark.parametrize(
    ("url", "location"),
    [
        (f"{URL}/a/b.json", HubLocation(REPOSITORY, COMMIT, "a/b.json")),
        ("https://huggingface.co/o/n/resolve/refs%2Fpr%2F1/a%20b.json", ("o/n", "refs/pr/1", "a b.json")),
        (
            f"https://HuggingFace.co:443/{REPOSITORY}/resolve/main/a.json?download=true",
            (REPOSITORY, "main", "a.json"),
        ),
        ("https://huggingface.co/gpt2/resolve/main/a.json", ("gpt2", "main", "a.json")),
        ("https://mirror.example/o/n/resolve/main/a.json", None),
    ],
)
def test_a_url_of_the_hub_is_recognised(
    url: str, location: HubLocation | tuple[str, str, str] | None
) -> None:
    expected = HubLocation(*location) if isinstance(location, tuple) else location
    assert hub_location(url, "a.json") == expected


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co/o/n/blob/main/a.json",
        "https://huggingface.co/datasets/o/n/resolve/main/a.json",
        "https://huggingface.co/o/n/resolve/main/../a.json",
        "https://huggingface.co/o/n/resolve/main/%2E%2E/a.json",
        "https://huggingface.co/o/n/resolve/main//a.json",
        "https://huggingface.co/o/n/resolve/main/a.json?x=y",
        "http://huggingface.co/o/n/resolve/main/a.json",
        "https://huggingface.co:444/o/n/resolve/main/a.json",
    ],
)
def test_a_url_of_the_hub_that_names_no_file_is_refused(url: str) -> None:
    with pytest.raises(
        BadManifest, match="^E3006 BadManifest: the URL of a.json does not name a file"
    ) as info:
        hub_location(url, "a.json")
    assert url not in str(info.value)


def test_small_files_large_files_and_files_in_xet_are_downloaded(hub: SmallHub, puller: Puller) -> None:
    result = puller.run()
    assert result.returncode == 0, result.stderr
    assert contents(puller.folder) == FILES
    assert len(result.stdout.splitlines()) == 1
    assert f"downloaded {XET}, SHA-256 verified" in result.stderr
    assert not re.search(r"s3cret|\dB/s|%\||Traceback|Warning", result.stderr)
    assert puller.staged() == []
    # hf-xet is installed and used where the hub offers it.
    assert XORB in {path for path, _ in hub.storage.requests}
    assert f"/lfs/{XET}" not in {path for path, _ in hub.storage.requests}
    assert BLOB in {path for path, _ in hub.storage.requests}
    # Nothing is reported to the hub.
    asked = {path for path, _ in (*hub.requests, *hub.storage.requests)}
    assert not {path for path in asked if "telemetry" in path or "agent" in path}
    # The hub's token does not leave the hub.
    assert {headers.get("authorization") for _, headers in hub.requests} == {f"Bearer {TOKEN}"}
    assert hub.storage.tokens() == {None, f"Bearer {XET_TOKEN}"}

    hub.requests.clear()
    hub.storage.requests.clear()
    assert puller.run().returncode == 0
    assert hub.storage.requests == []
    (puller.folder / CDN).write_bytes(bytes(len(FILES[CDN])))  # the right size, and wrong contents
    assert puller.run().returncode == 0
    assert contents(puller.folder) == FILES
    puller.write_manifest(*FILES, hashes=True)
    hub.requests.clear()
    assert puller.run().returncode == 0
    assert hub.requests == []


def test_a_destination_may_differ_from_the_path_on_the_hub(hub: SmallHub, puller: Puller) -> None:
    hub.add("original/params.json", b"{}")
    lines = [f"{URL}/original/params.json {folder}/config.json\n" for folder in ("one", "two/three")]
    puller.manifest.write_text("".join(lines), "utf-8")
    assert puller.run().returncode == 0
    assert (puller.folder / "one" / "config.json").read_bytes() == b"{}"
    assert (puller.folder / "two" / "three" / "config.json").read_bytes() == b"{}"
    assert not (puller.folder / "original").exists()


def test_faults_of_the_network_are_retried(hub: SmallHub, puller: Puller) -> None:
    hub.steps["config.json"] = [status(503), status(429, Retry_After="0")]
    hub.storage.steps[BLOB] = [cut_after(50_000), status(503)]
    hub.storage.steps["/lfs/tokenizer.model"] = [status(403)]  # as after the signature of a URL has expired
    hub.storage.steps[XORB] = [cut_after(50_000)]
    result = puller.run()
    assert result.returncode == 0, result.stderr
    assert contents(puller.folder) == FILES
    assert f"{CDN}: HTTP 503 from 127.0.0.1; retrying in 1 s" in result.stderr
    assert "tokenizer.model: HTTP 403 from 127.0.0.1; retrying in 1 s" in result.stderr


def test_wrong_bytes_are_found_and_the_other_files_are_kept(hub: SmallHub, puller: Puller) -> None:
    hub.storage.steps[BLOB] = [other_bytes]
    hub.storage.files[XORB] = xorb(bytes(len(SHARDS[0])))
    result = puller.run()
    assert result.returncode == 1
    faults = [line for line in result.stderr.splitlines() if line.startswith("E3009 DamagedWeights: ")]
    assert sorted(fault.split()[2] for fault in faults) == [f"{XET}:", f"{CDN}:"]
    assert all(re.search("the downloaded file has the SHA-256 .* instead of .*; pull", f) for f in faults)
    assert contents(puller.folder) == {name: data for name, data in FILES.items() if name not in NAMES}
    hub.storage.files[XORB] = xorb(SHARDS[0])
    assert puller.run().returncode == 0
    assert contents(puller.folder) == FILES


def test_another_version_than_the_manifests_is_refused_before_it_is_downloaded(
    hub: SmallHub, puller: Puller
) -> None:
    puller.write_manifest(*FILES, hashes=True)
    hub.add(CDN, SHARDS[0], large=True)
    result = puller.run()
    assert f"E3009 DamagedWeights: {CDN}: the hub has a file with the SHA-256 " in result.stderr
    assert hub.storage.requests == []


def test_nothing_is_reported_to_the_hub_if_transformers_was_imported_first(
    hub: SmallHub, puller: Puller
) -> None:
    puller.write_manifest("config.json")
    code = "import llama.model.config, sys; from llama.cli.main import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "weights", "pull", str(puller.folder)]
    subprocess.run(command, cwd=ROOT, env=puller.environment, capture_output=True, check=True, timeout=60)
    assert {path.rpartition("/")[2] for path, _ in hub.requests} == {"config.json"}
    assert not any("torch/" in headers["user-agent"] for _, headers in hub.requests)


EACH = """
import pathlib, sys
from llama.errors import LlamaError
from llama.settings import Settings
from llama.weights.folder import pull
for name in sys.argv[2:]:
    manifest = pathlib.Path(name)
    manifest.write_text(f"{sys.argv[1]}/{name} {name}")
    try:
        pull(pathlib.Path("weights"), Settings(weights_manifest=manifest))
    except LlamaError as error:
        print(error)
"""


def test_a_refusal_says_what_to_do(hub: SmallHub, puller: Puller, tmp_path: Path) -> None:
    licence = (
        "from 127.0.0.1; accept the model's licence on its page and set HF_TOKEN to a token that may read"
    )
    expected = {
        "gated.json": ((403, "GatedRepo"), f"HTTP 403 {licence}"),
        "private.json": ((401, "GatedRepo"), f"HTTP 401 {licence}"),
        "unknown.json": ((401, ""), f"HTTP 401 {licence}"),
        "repository.json": (
            (404, "RepoNotFound"),
            "127.0.0.1 does not have this repository (HTTP 404); correct",
        ),
        "revision.json": (
            (404, "RevisionNotFound"),
            "127.0.0.1 does not have this revision (HTTP 404); correct",
        ),
        "file.json": ((404, "EntryNotFound"), "127.0.0.1 does not have this file (HTTP 404); correct"),
        "teapot.json": ((418, ""), "HTTP 418 from 127.0.0.1; correct the manifest"),
    }
    hub.refused = {name: refusal for name, (refusal, _) in expected.items()}
    result = subprocess.run(
        [sys.executable, "-c", EACH, URL, *expected],
        cwd=tmp_path,
        env=puller.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for line, (name, (_, text)) in zip(result.stdout.splitlines(), expected.items(), strict=True):
        assert line.startswith(f"E3007 DownloadFailed: {name}: {text}")
    assert TOKEN not in result.stdout + result.stderr
    assert result.stderr == ""


def test_an_environment_that_cannot_be_used_is_reported(hub: SmallHub, puller: Puller) -> None:
    for environment, text in (
        ({"HF_HOME": __file__}, f"E3007 DownloadFailed: {XET}: hf-xet cannot write to its folder ("),
        ({"HF_HUB_OFFLINE": "1"}, "E3007 DownloadFailed: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"),
        ({"HF_ENDPOINT": "hub.example"}, "E3000 BadSettings: HF_ENDPOINT is not a URL; "),
        ({"HF_ENDPOINT": "http://127.0.0.1:abc"}, "E3000 BadSettings: HF_ENDPOINT is not a URL; "),
        (
            {"HF_HUB_ETAG_TIMEOUT": "abc"},
            "E3000 BadSettings: huggingface_hub cannot use one of the HF_ environment variables (",
        ),
        (
            {"HF_ENDPOINT": "http://hub.example"},
            "E3000 BadSettings: HF_ENDPOINT is http://hub.example, and HF",
        ),
        ({}, "E3007 DownloadFailed: config.json: 127.0.0.1 does not respond like a Hugging Face hub"),
    ):
        if not environment:
            hub.steps["config.json"] = [status(200, ETag="any")]  # a response that is not a hub's
        result = puller.run(environment)
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith(text)


def test_the_staging_folder_is_never_a_link(hub: SmallHub, puller: Puller, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.incomplete").touch()
    puller.folder.mkdir()
    (puller.folder / ".hub").symlink_to(other)
    puller.write_manifest("config.json")
    assert puller.run().returncode == 0
    assert (other / "x.incomplete").exists()


def test_a_complete_folder_is_served_offline(hub: SmallHub, puller: Puller) -> None:
    puller.write_manifest(*FILES, hashes=True)
    puller.run()
    assert puller.run({"HF_HUB_OFFLINE": "1"}).returncode == 0


@pytest.mark.parametrize(
    ("path", "number", "code"),
    [(BLOB, signal.SIGINT, 130), (BLOB, signal.SIGTERM, 143), (XORB, signal.SIGINT, 130)],
)
def test_a_signal_ends_a_pull_during_a_large_file(
    hub: SmallHub, puller: Puller, path: str, number: signal.Signals, code: int
) -> None:
    hub.storage.steps[path] = [slowly(100, 0.3)]
    process = puller.start()
    until(lambda: path in {path for path, _ in hub.storage.requests}, timeout=20)
    time.sleep(0.5)
    process.send_signal(number)
    began = time.monotonic()
    output, errors = process.communicate(timeout=10)
    assert time.monotonic() - began < 2
    assert process.returncode == code, errors
    assert "Traceback" not in output + errors
    assert not (puller.folder / path.rpartition("/")[2]).exists()
    result = puller.run()
    assert result.returncode == 0, result.stderr
    assert contents(puller.folder) == FILES
    assert puller.staged() == []


@pytest.mark.parametrize("name", [CDN, XET])
def test_a_full_disk_ends_a_pull(puller: Puller, name: str) -> None:
    puller.write_manifest(name)
    result = puller.run(limit=60_000)
    assert result.returncode == 1
    assert re.search("^E3008 DiskFull: the disk of .* is full; free some space", result.stderr, re.MULTILINE)
    assert not (puller.folder / name).exists()


def test_a_full_disk_prints_no_signed_url_of_another_file(hub: SmallHub, puller: Puller) -> None:
    hub.storage.steps[BLOB] = [slowly(100, 0.3)]
    puller.write_manifest(XET, CDN)
    result = puller.run(limit=60_000)
    assert "E3008 DiskFull: " in result.stderr
    assert "Signature" not in result.stderr
    assert not list(puller.folder.glob("*.safetensors"))


def test_huggingface_hub_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, llama, llama.cli.main, llama.weights.download; print('huggingface_hub' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
