"""Which key a request is made with, while keys come and go in a real database."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from llama.gateway.access.auth import Keys
from llama.gateway.problems import Problem
from llama.gateway.storage.keys import KeyLimits, hash_of
from llama.gateway.storage.storage import Storage
from llama.gateway.storage.store import Store

T = TypeVar("T")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A gateway's keys, and the database as the command line sees it."""

    def __init__(self, keys: Keys, storage: Storage, command_line: Store, clock: Clock) -> None:
        self.keys, self.storage, self.command_line, self.clock = keys, storage, command_line, clock

    async def name(self, authorization: str | None) -> str:
        return (await self.keys.identify(authorization)).name

    async def refusal(self, authorization: str | None) -> str:
        with pytest.raises(Problem) as raised:
            await self.keys.identify(authorization)
        assert raised.value.status == 401
        return raised.value.detail


Play = Callable[..., None]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Run an async scene with freshly loaded keys. `kind` is the class of the gateway's storage."""
    path = tmp_path / "gateway.sqlite3"

    def run(
        scene: Callable[[Scene], Awaitable[None]],
        *,
        key: str | None = None,
        loopback: bool = True,
        kind: type[Storage] = Storage,
    ) -> None:
        async def with_keys() -> None:
            storage, command_line, clock = kind(path), Store(path), Clock()
            try:
                keys = Keys(storage, environment_key=key, loopback=loopback, clock=clock)
                await keys.load()
                await scene(Scene(keys, storage, command_line, clock))
            finally:
                command_line.close()
                storage.close()

        asyncio.run(with_keys())

    return run


def test_without_any_key_every_request_on_loopback_is_local(play: Play) -> None:
    async def scene(s: Scene) -> None:
        assert await s.keys.is_open()
        assert {await s.name(None), await s.name("Bearer anything"), await s.name("nonsense")} == {"local"}

    play(scene)


def test_without_any_key_a_gateway_that_others_can_reach_refuses_all(play: Play) -> None:
    async def scene(s: Scene) -> None:
        assert not await s.keys.is_open()
        assert await s.refusal(None) == "You did not pass an authentication token"
        assert await s.refusal("Bearer x") == "You did not pass a valid authentication token"

    play(scene, loopback=False)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Token", "TOKEN"])
def test_both_schemes_are_accepted_in_any_case(play: Play, scheme: str) -> None:
    async def scene(s: Scene) -> None:
        assert await s.name(f"{scheme} s3cret") == "environment"
        assert await s.name(f"  {scheme}   s3cret ") == "environment"

    play(scene, key="s3cret")


@pytest.mark.parametrize(
    ("authorization", "detail"),
    [
        (None, "an authentication token"),
        ("", "an authentication token"),
        ("Bearer", "an authentication token"),
        ("Bearer  ", "an authentication token"),
        ("s3cret", "an authentication token"),
        ("Bearer wrong", "a valid authentication token"),
        ("Bearer S3CRET", "a valid authentication token"),
        ("Bearer s3cret x", "a valid authentication token"),
        ("Basic s3cret", "a valid authentication token"),
        ("Bearer local", "a valid authentication token"),
        ("Bearer é€", "a valid authentication token"),
    ],
)
def test_a_missing_key_and_a_wrong_one_have_replicates_two_texts(
    play: Play, authorization: str | None, detail: str
) -> None:
    async def scene(s: Scene) -> None:
        assert await s.refusal(authorization) == f"You did not pass {detail}"

    play(scene, key="s3cret")


def test_the_problem_has_openais_code_and_never_the_key(play: Play) -> None:
    async def scene(s: Scene) -> None:
        with pytest.raises(Problem) as raised:
            await s.keys.identify("Bearer hunter2")
        body = raised.value.for_both()
        assert body["error"]["code"] == "invalid_api_key"
        assert body["title"] == "Unauthenticated"
        assert "hunter2" not in str(body)

    play(scene, key="s3cret")


def test_a_key_added_while_the_gateway_runs_works_within_a_second_and_closes_it(play: Play) -> None:
    async def scene(s: Scene) -> None:
        assert await s.name(None) == "local"
        s.command_line.keys.add("ann", hash_of("k1"), KeyLimits(7, 2))
        s.clock.now += 1.0
        key = await s.keys.identify("Bearer k1")
        assert (key.name, key.limits.requests_per_minute, key.limits.at_once) == ("ann", 7, 2)
        assert not await s.keys.is_open()
        await s.refusal(None)

    play(scene)


def test_a_revoked_key_stops_working_within_a_second(play: Play) -> None:
    async def scene(s: Scene) -> None:
        s.command_line.keys.add("ann", hash_of("k1"))
        s.command_line.keys.add("bob", hash_of("k2"))
        s.clock.now += 1.0
        ann = await s.keys.identify("Bearer k1")
        s.command_line.keys.revoke("ann")
        s.clock.now += 1.0
        await s.refusal("Bearer k1")
        assert await s.name("Bearer k2") == "bob"
        found = s.keys.by_id(ann.id)  # what runs still needs its limits and its secret
        assert found is not None
        assert found.webhook_secret == ann.webhook_secret

    play(scene)


def test_revoking_the_last_key_does_not_open_the_gateway(play: Play) -> None:
    async def scene(s: Scene) -> None:
        s.command_line.keys.add("ann", hash_of("k1"))
        s.command_line.keys.revoke("ann")
        s.clock.now += 1.0
        assert not await s.keys.is_open()
        await s.refusal(None)

    play(scene)


def test_a_name_can_be_used_again_after_its_key_was_revoked(play: Play) -> None:
    async def scene(s: Scene) -> None:
        old = s.command_line.keys.add("ann", hash_of("k1"))
        s.command_line.keys.revoke("ann")
        new = s.command_line.keys.add("ann", hash_of("k2"))
        s.clock.now += 1.0
        assert (await s.keys.identify("Bearer k2")).id == new.id != old.id
        await s.refusal("Bearer k1")

    play(scene)


def test_the_environments_key_can_change_and_stay_the_same_row(play: Play) -> None:
    ids: list[int] = []

    async def with_first(s: Scene) -> None:
        ids.append((await s.keys.identify("Bearer first")).id)

    async def with_second(s: Scene) -> None:
        ids.append((await s.keys.identify("Bearer second")).id)
        await s.refusal("Bearer first")

    play(with_first, key="first")
    play(with_second, key="second")
    assert ids[0] == ids[1]


def test_the_environments_key_ends_with_its_variable(play: Play) -> None:
    async def without(s: Scene) -> None:
        assert not await s.keys.is_open()
        await s.refusal("Bearer first")
        assert await s.name("Bearer k1") == "ann"

    async def before(s: Scene) -> None:
        assert await s.name("Bearer first") == "environment"
        s.command_line.keys.add("ann", hash_of("k1"))

    play(before, key="first")
    play(without)


def test_the_database_is_read_at_most_once_a_second(play: Play) -> None:
    class Counting(Storage):
        reads = 0

        async def run(self, function: Callable[[Store], T]) -> T:
            type(self).reads += 1
            return await super().run(function)

    async def scene(s: Scene) -> None:
        before = Counting.reads
        await asyncio.gather(*(s.name("Bearer s3cret") for _ in range(100)))
        assert Counting.reads == before
        s.clock.now += 1.0
        await asyncio.gather(*(s.name("Bearer s3cret") for _ in range(100)))
        assert Counting.reads == before + 1

    play(scene, key="s3cret", loopback=False, kind=Counting)


def test_while_the_database_does_not_respond_the_last_known_keys_are_used(
    play: Play, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(Storage):
        released: asyncio.Event | None = None

        async def run(self, function: Callable[[Store], T]) -> T:
            if self.released is not None:
                await self.released.wait()
            return await super().run(function)

    async def scene(s: Scene) -> None:
        assert isinstance(s.storage, Hanging)
        s.storage.released = asyncio.Event()
        s.clock.now += 1.0
        async with asyncio.timeout(30):  # this one waits a second
            assert await s.name("Bearer s3cret") == "environment"
        s.command_line.keys.add("new", hash_of("new"))
        monkeypatch.setattr("llama.gateway.access.auth._PATIENCE", 60.0)
        s.clock.now += 60.0
        for _ in range(3):
            async with asyncio.timeout(30):  # these do not wait
                await s.refusal("Bearer new")
        assert caplog.text.count("does not respond") == 1
        s.storage.released.set()
        async with asyncio.timeout(30):
            while s.keys.find("new") is None:
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.ERROR):
        play(scene, key="s3cret", loopback=False, kind=Hanging)


def test_while_the_database_cannot_be_read_the_last_known_keys_are_used(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Storage):
        fails = False

        async def run(self, function: Callable[[Store], T]) -> T:
            if self.fails:
                raise sqlite3.OperationalError("disk I/O error")
            return await super().run(function)

    async def scene(s: Scene) -> None:
        assert isinstance(s.storage, Failing)
        for outages in (1, 2):
            s.storage.fails = True
            for _ in range(3):
                s.clock.now += 1.0
                assert await s.name("Bearer s3cret") == "environment"
                await s.refusal("Bearer wrong")
            assert caplog.text.count("disk I/O error") == outages
            s.storage.fails = False
            s.clock.now += 1.0
            await s.name("Bearer s3cret")

    with caplog.at_level(logging.ERROR):
        play(scene, key="s3cret", loopback=False, kind=Failing)
