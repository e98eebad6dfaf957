"""The benchmark with engines that hang, end, raise errors or give invalid answers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from benchmarks.attempts import Attempts
from benchmarks.process import CannotDo, Limits, PeerFailed, PeerProcess, Spec
from benchmarks.protocol import Request
from benchmarks.scenarios import Row, figures, in_rounds

REQUESTS = [Request([1, 2, 3], new_tokens=4), Request([1, 2], new_tokens=4)]
PATIENT = Limits(load=300, run=300)
IMPATIENT = Limits(load=300, run=0.2)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def fake(model: str, folder: Path, limits: Limits = PATIENT) -> PeerProcess:
    spec = Spec(model, "fake_peer", model, {"PYTHONPATH": str(Path(__file__).parent)})
    return PeerProcess(spec, folder / "peers.log", limits)


def measured(peer: PeerProcess) -> Row:
    return figures(REQUESTS, peer.run(REQUESTS))


def running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_an_engine_answers_one_list_of_requests_after_the_other(stack: ExitStack, tmp_path: Path) -> None:
    peer = stack.enter_context(fake("answers@1", tmp_path))
    assert peer.versions == {"fake": "1.0"}
    assert peer.run(REQUESTS) == peer.run(REQUESTS) == [[0.5, 1.0, 1.5, 2.0]] * 2


@pytest.mark.parametrize(
    ("mode", "limits", "reason"),
    [
        ("hangs", IMPATIENT, "no answer within 0.2 s"),
        ("dies", PATIENT, "its process ended"),
        ("raises", PATIENT, "ValueError: no such tensor"),
        ("garbage", PATIENT, "the times in its answer do not fit the requests"),
    ],
)
def test_an_engine_that_fails_in_a_run_is_killed_and_the_reason_is_reported(
    mode: str, limits: Limits, reason: str, stack: ExitStack, tmp_path: Path
) -> None:
    peer = stack.enter_context(fake(f"{mode}@1", tmp_path, limits))
    with pytest.raises(PeerFailed, match=re.escape(reason)):
        peer.run(REQUESTS)
    with pytest.raises(PeerFailed):
        peer.run(REQUESTS)


@pytest.mark.parametrize(
    ("mode", "limits", "reason"),
    [
        ("hangs", Limits(load=0.2), "no answer within 0.2 s"),
        ("dies", PATIENT, "its process ended"),
        ("raises", PATIENT, "ValueError: no such tensor"),
    ],
)
def test_an_engine_that_fails_while_it_loads_is_killed_and_the_reason_is_reported(
    mode: str, limits: Limits, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(PeerFailed, match=re.escape(reason)), fake(f"{mode}@0", tmp_path, limits):
        pass


def test_the_child_processes_of_an_engine_that_hangs_are_killed(stack: ExitStack, tmp_path: Path) -> None:
    peer = stack.enter_context(fake("hangs@2", tmp_path, Limits(load=300, run=5)))
    peer.run(REQUESTS)
    with pytest.raises(PeerFailed):
        peer.run(REQUESTS)
    child = int((tmp_path / "peers.log").read_text().partition("child ")[2].split()[0])
    deadline = time.monotonic() + 60
    while running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_engine_that_does_not_support_some_requests_answers_the_next_ones(
    stack: ExitStack, tmp_path: Path
) -> None:
    peer = stack.enter_context(fake("cannot@1", tmp_path))
    with pytest.raises(CannotDo, match="too many requests"):
        peer.run(REQUESTS)
    assert len(peer.run(REQUESTS)) == 2


@pytest.mark.parametrize("mode", ["dies", "raises", "garbage"])
def test_an_engine_that_fails_is_not_measured_again_and_the_others_are(
    mode: str, stack: ExitStack, tmp_path: Path
) -> None:
    attempts = Attempts()
    good, bad = (stack.enter_context(fake(model, tmp_path)) for model in ("answers@1", f"{mode}@3"))
    first = in_rounds(attempts, [good, bad], "8 requests", measured)
    second = in_rounds(attempts, [good, bad], "32 requests", measured)
    assert {name: row["rounds"] for name, row in first.items()} == {"answers@1": 4, f"{mode}@3": 2}
    assert list(second) == ["answers@1"]
    assert {name: row["scenario"] for name, row in attempts.left_out.items()} == {f"{mode}@3": "8 requests"}


def test_an_engine_that_cannot_do_a_scenario_is_measured_in_the_next(
    stack: ExitStack, tmp_path: Path
) -> None:
    attempts = Attempts()
    peer = stack.enter_context(fake("cannot@1", tmp_path))
    assert in_rounds(attempts, [peer], "mixed lengths", measured) == {}
    assert in_rounds(attempts, [peer], "32 requests", measured)["cannot@1"]["rounds"] == 4
    assert attempts.left_out == {}


def test_figures_that_cannot_be_computed_leave_the_engine_out() -> None:
    attempts = Attempts()
    assert attempts.attempt("an engine", "soak", lambda: 1 / 0) is None
    assert attempts.left_out == {"an engine": {"scenario": "soak", "reason": "division by zero"}}
    assert attempts.attempt("an engine", "next turn", lambda: 1) is None


def test_excluded_engines_are_not_started() -> None:
    attempts = Attempts({"llama.cpp, bf16": "it cannot be limited"})
    assert attempts.attempt("llama.cpp, bf16", "start", lambda: 1) is None
    assert json.loads(json.dumps(attempts.left_out)) == {
        "llama.cpp, bf16": {"scenario": "start", "reason": "it cannot be limited"}
    }
