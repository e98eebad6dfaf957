"""`python -m llama keys` as a person and a script run it, on a real database."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama import ROOT
from llama.gateway.access.auth import Keys
from llama.gateway.storage.storage import Storage
from llama.gateway.storage.store import Store

KEY = re.compile(r"llama_[A-Za-z0-9_-]{43}\n")


def run(database: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama", "keys", *arguments],
        cwd=ROOT,
        env={**os.environ, "LLAMA_GATEWAY_DATABASE": str(database)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "gateway.sqlite3"


def test_add_prints_the_key_alone_so_that_a_shell_can_catch_it(database: Path) -> None:
    added = run(database, "add", "ann", "--requests-per-minute", "60", "--at-once", "4")
    assert added.returncode == 0
    assert KEY.fullmatch(added.stdout)
    assert "cannot be shown again" in added.stderr
    key = added.stdout.strip()
    assert key not in added.stderr
    assert key.encode() not in database.read_bytes()  # only a hash is stored
    listed = run(database, "list")
    assert key not in listed.stdout


def test_a_running_gateway_accepts_an_added_key_and_refuses_a_revoked_one(database: Path) -> None:
    storage = Storage(database)

    async def names(*secrets: str) -> list[str]:
        keys = Keys(storage, environment_key=None, loopback=False)
        await keys.load()
        return [(await keys.identify(f"Bearer {secret}")).name for secret in secrets]

    try:
        ann, bob = (run(database, "add", name).stdout.strip() for name in ("ann", "bob"))
        assert asyncio.run(names(ann, bob)) == ["ann", "bob"]
        assert run(database, "revoke", "ann").returncode == 0
        assert asyncio.run(names(bob)) == ["bob"]
        with pytest.raises(Exception, match="valid authentication token"):
            asyncio.run(names(ann))
    finally:
        storage.close()


def test_list_shows_names_limits_and_dates(database: Path) -> None:
    run(database, "add", "ann", "--requests-per-minute", "60", "--at-once", "4")
    run(database, "add", "a-much-longer-name@example.com")
    run(database, "revoke", "ann")
    listed = run(database, "list")
    head, *rows = (re.split(r"\s{2,}", line) for line in listed.stdout.splitlines())
    assert head[:3] == ["NAME", "PER MINUTE", "AT ONCE"]
    assert head[3:] == ["TOKENS/MONTH", "DOLLARS/MONTH", "CREATED (UTC)", "REVOKED (UTC)"]
    assert [row[:5] for row in rows] == [
        ["ann", "60", "4", "no limit", "no limit"],
        ["a-much-longer-name@example.com", *["no limit"] * 4],
    ]
    assert [len(row) for row in rows] == [7, 6]  # only the first is revoked
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", date) for row in rows for date in row[5:])


def test_only_add_creates_a_database_and_says_so(database: Path) -> None:
    for arguments in (["list"], ["limit", "ann", "--at-once", "1"], ["revoke", "ann"]):
        refused = run(database, *arguments)
        assert refused.returncode == 1
        assert f"there is no database {database}" in refused.stderr
        assert not database.exists()
    first, second = run(database, "add", "ann"), run(database, "add", "bob")
    assert f"The database {database} is new." in first.stderr
    assert "is new" not in second.stderr


def test_list_without_keys_says_how_to_add_one(database: Path) -> None:
    database.parent.mkdir()
    Store(database).close()
    listed = run(database, "list")
    assert (listed.returncode, listed.stdout) == (0, "")
    assert "keys add NAME" in listed.stderr


def test_the_gateways_own_names_are_neither_listed_nor_given(database: Path) -> None:
    storage = Storage(database)
    try:
        asyncio.run(Keys(storage, environment_key="s3cret", loopback=True).load())
    finally:
        storage.close()
    assert run(database, "list").stdout == ""
    for command in ("add", "revoke"):
        for name in ("environment", "local"):
            refused = run(database, command, name)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert refused.stderr.startswith(f"E3000 BadSettings: the name {name} is reserved for ")


@pytest.mark.parametrize("name", ["", "a b", "-x", ".x", "é", "a\nb", "a/b", "x" * 65])
def test_a_name_must_be_plain(database: Path, name: str) -> None:
    refused = run(database, "add", "--", name)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("E3000 BadSettings: the name is ")
    assert refused.stderr.count("\n") == 1


def test_a_name_is_given_once_until_its_key_is_revoked(database: Path) -> None:
    first = run(database, "add", "ann").stdout
    refused = run(database, "add", "ann")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("E3000 BadSettings: a key named ann exists; ")
    assert run(database, "revoke", "ann").returncode == 0
    second = run(database, "add", "ann")
    assert second.returncode == 0
    assert second.stdout != first


def test_an_unknown_key_cannot_be_revoked(database: Path) -> None:
    run(database, "add", "bob")
    refused = run(database, "revoke", "ann")
    assert refused.returncode == 1
    assert refused.stderr.startswith("E3000 BadSettings: no key named ann is in use; ")


@pytest.mark.parametrize("option", ["--requests-per-minute", "--at-once"])
def test_a_limit_is_at_least_one(database: Path, option: str) -> None:
    refused = run(database, "add", "ann", option, "0")
    assert refused.returncode == 2
    assert refused.stdout == ""


def test_a_file_that_is_no_database_is_refused_on_one_line(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("These are notes, and they are longer than the header of a database file would be. " * 9)
    refused = run(file, "list")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"E3000 BadSettings: the database {file} ")
    assert refused.stderr.count("\n") == 1
    assert file.read_text().startswith("These are notes")
