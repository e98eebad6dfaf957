"""The manifest of weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pulling import QUICK
from weights_server import (
    Server,
)

from llama.errors import (
    BadManifest,
)
from llama.settings import Settings
from llama.weights.folder import pull
from llama.weights.hub_location import hub_location
from llama.weights.manifest import read_manifest


def test_blank_lines_and_several_spaces_are_accepted(tmp_path: Path) -> None:
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
        ("https://h/a.json", "expected 2 fields, got 1"),
        ("# a comment", "expected 2 fields, got 3"),
        ("https://h/a.json a.json more", "expected 2 fields, got 3"),
        ("ftp://h/a.json a.json", "is not valid"),
        ("https:///a.json a.json", "is not valid"),
        ("https://[h/a.json a.json", "is not valid"),
        ("https://h:port/a.json a.json", "is not valid"),
        ("https://h/a.json#sha256=abc a.json", "fragment"),
        ("https://h/a.json#md5=abc a.json", "fragment"),
        ("https://h/a.json /etc/a.json", "not a valid path inside"),
        ("https://h/a.json ../a.json", "not a valid path inside"),
        ("https://h/a.json b/../../a.json", "not a valid path inside"),
        ("https://h/a.json b//a.json", "not a valid path inside"),
        ("https://h/a.json .hidden.json", "not a valid path inside"),
        ("https://h/a.json C:\\a.json", "not a valid path inside"),
        ("https://h/a.json a\x1b[31m.json", "not a valid path inside"),
        ("https://h/a.bin a.bin", "is of a type that is never read"),
        ("https://h/a.pt a.pt", "is of a type that is never read"),
        ("https://h/a.pkl a.pkl", "is of a type that is never read"),
        ("https://h/a.py modeling.py", "is of a type that is never read"),
        ("https://h/a.safetensors a.safetensors.bin", "is of a type that is never read"),
        ("https://h/a.json config.json", "listed twice"),
    ],
)
def test_an_invalid_line_is_named_and_nothing_is_downloaded(
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
    with pytest.raises(BadManifest, match="lists no files"):
        read_manifest(tmp_path / "empty")


@pytest.mark.parametrize("link", ["config.json", "sub"])
def test_a_symbolic_link_out_of_the_folder_is_refused(
    server: Server, tmp_path: Path, folder: Path, link: str
) -> None:
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


def test_the_manifest_of_this_repository_lists_the_complete_70b_model() -> None:
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
    locations = [hub_location(entry.url, entry.destination) for entry in entries]
    assert {location and location.repository for location in locations} == {"meta-llama/Llama-2-70b-chat-hf"}
    assert [location and location.path for location in locations] == [entry.destination for entry in entries]


def test_the_manifest_of_this_repository_names_a_commit_and_no_branch() -> None:
    locations = [
        hub_location(entry.url, entry.destination) for entry in read_manifest(Settings().weights_manifest)
    ]
    (revision,) = {location.revision for location in locations if location is not None}
    assert re.fullmatch("[0-9a-f]{40}", revision)
