"""The fake of Cog's server behaves as the real one does towards the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx2
import pytest
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script


def events(cog: FakeCog, **inputs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    with (
        httpx2.Client(base_url=cog.url, trust_env=False, timeout=60) as client,
        client.sse("/predictions", method="POST", json={"input": inputs}) as source,
    ):
        assert source.response.status_code == 200
        for event in source:
            yield event.event, json.loads(event.data)


def post(cog: FakeCog, **inputs: Any) -> httpx2.Response:
    return httpx2.post(f"{cog.url}/predictions", json={"input": inputs}, timeout=60, trust_env=False)


def status(cog: FakeCog) -> str:
    return str(httpx2.get(f"{cog.url}/health-check", trust_env=False).json()["status"])


def test_a_stream_has_the_events_of_cogs_server_in_order() -> None:
    with FakeCog(Script(["Hi", " there"])) as cog:
        seen = list(events(cog, prompt="one two three"))
    names = [data.get("name", name) for name, data in seen]
    assert names == [
        "start",
        "input_token_count",
        *("output_token_count", "output") * 2,
        *("input_token_count", "output_token_count", "finish_reason"),
        "completed",
    ]
    completed = seen[-1][1]
    assert completed["status"] == "succeeded"
    assert completed["output"] == ["Hi", " there"]
    assert completed["metrics"]["input_token_count"] == 3
    assert (cog.counts.succeeded, cog.counts.pieces, cog.counts.running) == (1, 2, 0)


def test_an_error_has_the_prefix_of_cogs_server() -> None:
    with FakeCog(Script([], error="E1001 PromptRequired: blank")) as cog:
        *_, (_, at_once) = events(cog)
        cog.rules.script = Script(["Hi"], error="E2001 GenerationFailed: broken")
        *_, (_, later) = events(cog)
    assert at_once["error"].startswith("Prediction failed: Async prediction failed: PromptRequired: E1001 ")
    assert "output" not in at_once
    assert later["error"] == "Prediction failed: Generator iteration error: E2001 GenerationFailed: broken"
    assert later["output"] == ["Hi"]


def test_a_prediction_is_refused_if_no_place_is_free_or_the_script_says_so() -> None:
    with FakeCog(Script(hold_after=1), places=1) as cog:
        running = events(cog)
        until(lambda: next(running)[0] == "output")
        assert status(cog) == "BUSY"
        assert post(cog).status_code == 409
        cog.release()
        assert [name for name, _ in running][-1] == "completed"
        cog.rules.false_conflicts = 1
        cog.rules.script = Script()
        assert post(cog).status_code == 409
        assert post(cog).status_code == 200


def test_invalid_inputs_and_a_server_that_starts_are_refused() -> None:
    with FakeCog() as cog:
        assert post(cog, temperature=99).json()["detail"][0]["loc"] == ["body", "input", "temperature"]
        assert post(cog, seed=None).status_code == 422
        cog.rules.health = "STARTING"
        assert status(cog) == "STARTING"
        assert post(cog).status_code == 503


def test_a_dropped_connection_cancels_the_prediction() -> None:
    with FakeCog(Script(hold_after=1)) as cog:
        with closing(events(cog)) as running:  # type: ignore[type-var]
            until(lambda: next(running)[0] == "output")
        until(lambda: cog.counts.cancelled == 1)
        assert cog.counts.running == 0


def test_a_dead_server_drops_its_streams_and_refuses_connections_until_it_starts_again() -> None:
    with FakeCog(Script(die_after=2)) as cog:
        seen = list[str]()
        with pytest.raises(httpx2.TransportError):
            seen.extend(name for name, _ in events(cog))
        with pytest.raises(httpx2.ConnectError):
            status(cog)
        cog.start_again()
        assert status(cog) == "READY"


def test_a_draining_server_refuses_connections_and_ends_its_streams() -> None:
    with FakeCog(Script(hold_after=1)) as cog:
        running = events(cog)
        until(lambda: next(running)[0] == "output")
        cog.drain()
        with pytest.raises(httpx2.ConnectError):
            status(cog)
        cog.release()
        assert [name for name, _ in running][-1] == "completed"
