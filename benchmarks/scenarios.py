"""The requests that every peer gets, and the figures that are computed from its times.

Every measurement uses new prompts. Within a round, every peer is measured once, so that a slow phase of the
machine affects all of them. Knows requests and times; knows nothing about the engines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from statistics import fmean, median, quantiles
from typing import Any

import psutil

from benchmarks.process import CannotDo, PeerProcess
from benchmarks.protocol import Request, Times
from benchmarks.tables import counted
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, prompt

CONCURRENCY = (1, 8, 32)
ARRIVAL_INTERVAL = 0.05  # seconds
LONG_PROMPT = 2000
HISTORY = 1500
_IDLE = 10.0  # percent: a lower CPU usage counts as idle
_IDLE_TIMEOUT = 5.0  # seconds to wait for an idle CPU

_seeds = count()
Row = dict[str, Any]


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fresh(tokens: int = PROMPT_TOKENS, **request: Any) -> Request:
    """Return a request with a prompt that was not used before."""
    return Request(prompt(tokens, next(_seeds)), **{"new_tokens": NEW_TOKENS, **request})


def _ask(peer: PeerProcess, requests: Sequence[Request]) -> Times:
    """Wait until the CPU is idle, then send the requests to a peer. Raises CannotDo.

    vLLM's processes poll for work for one second after their last request, which would slow down the next
    peer.
    """
    deadline = time.monotonic() + _IDLE_TIMEOUT
    while (busy := psutil.cpu_percent(interval=0.1)) > _IDLE:
        if time.monotonic() > deadline:
            log(f"{peer.spec.name}: the CPU is not idle ({busy:.0f}% used by other programs)")
            break
    return peer.run(requests)


def warm_up(peer: PeerProcess) -> None:
    for batch in CONCURRENCY:
        _ask(peer, [fresh(16, new_tokens=4) for _ in range(batch)])


def throughput(peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """Measure `batch` requests that arrive together. Return one row per peer."""
    return _in_rounds(peers, counted(batch, "request"), lambda: [fresh() for _ in range(batch)])


def side_by_side(peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """Measure the same as `throughput` in more rounds, so that small differences become visible."""
    title = f"comparison of servers, {counted(batch, 'request')}"
    return _in_rounds(peers, title, lambda: [fresh() for _ in range(batch)], rounds=12, seconds=120.0)


def arriving(peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """Measure `batch` requests that arrive one after the other. Return one row per peer."""
    return _in_rounds(
        peers,
        f"{counted(batch, 'request')}, {ARRIVAL_INTERVAL * 1000:.0f} ms apart",
        lambda: [fresh(at=index * ARRIVAL_INTERVAL) for index in range(batch)],
    )


def _in_rounds(
    peers: Sequence[PeerProcess],
    title: str,
    requests: Callable[[], list[Request]],
    *,
    rounds: int = 4,
    seconds: float = 25.0,
) -> dict[str, Row]:
    """Measure all peers once per round, in reverse order in every other round. Return medians by peer.

    After the second round, a peer that has used more than `seconds` in total is left out.
    """
    rows: dict[str, list[Row]] = {peer.spec.name: [] for peer in peers}
    left = list(peers)
    for number in range(1, rounds + 1):
        for peer in left[:: 1 if number % 2 else -1]:
            turn = requests()
            try:
                figures = _figures(turn, _ask(peer, turn))
            except CannotDo as reason:
                log(f"{title}: {peer.spec.name} skipped ({reason})")
                left.remove(peer)
                continue
            rows[peer.spec.name].append(figures)
            log(f"{title}, round {number}: {peer.spec.name} {figures['tokens_per_second']:.1f} tokens/s")
            if number > 1 and sum(row["seconds"] for row in rows[peer.spec.name]) > seconds:
                left.remove(peer)
    return {name: _medians(turns) for name, turns in rows.items() if turns}


def _figures(requests: Sequence[Request], times: Times) -> Row:
    """Return the figures of one measurement. The time of each request counts from its arrival."""
    seconds = max(mine[-1] for mine in times)
    return {
        "seconds": seconds,
        "tokens_per_second": sum(request.new_tokens for request in requests) / seconds,
        # The mean: a step reads several prompts, so the median would depend on how they fall into steps.
        "time_to_first_token": fmean(
            mine[0] - request.at for request, mine in zip(requests, times, strict=True)
        ),
        # The average over the whole answer: several tokens may arrive together.
        "time_between_tokens": median(
            (mine[-1] - mine[0]) / (request.new_tokens - 1)
            for request, mine in zip(requests, times, strict=True)
        ),
    }


def _medians(turns: list[Row]) -> Row:
    speeds = [turn["tokens_per_second"] for turn in turns]
    return {
        **{name: median(turn[name] for turn in turns) for name in turns[0]},
        "slowest": min(speeds),
        "fastest": max(speeds),
        "rounds": len(turns),
    }


def long_prompt_beside(peer: PeerProcess, streams: int) -> Row:
    """Measure the time between tokens of `streams` answers, before and while a long prompt is read."""
    arrival = 2.0
    beside = [fresh(new_tokens=600) for _ in range(streams)]
    long = fresh(LONG_PROMPT, new_tokens=2, at=arrival)
    times = _ask(peer, [*beside, long])
    read = times[-1][0]
    before, during = list[float](), list[float]()
    for mine in times[:-1]:
        for earlier, later in pairwise(mine):
            if arrival <= earlier and later <= read:
                during.append(later - earlier)
            elif later < arrival and earlier > arrival / 2:
                before.append(later - earlier)
    return {
        "streams": streams,
        "prompt_tokens": LONG_PROMPT,
        "time_to_first_token": read - arrival,
        "median_before": median(before),
        "median_during": median(during),
        "p99_during": quantiles(during, n=100)[98],
        "longest_during": max(during),
    }


def next_turn(peer: PeerProcess, rounds: int = 3) -> Row:
    """Measure the time to first token of a dialogue's turn, with and without its history in the cache."""
    cold, warm = list[float](), list[float]()
    for _ in range(rounds):
        history = fresh(HISTORY, new_tokens=8)
        cold.append(_ask(peer, [history])[0][0])
        turn = Request([*history.prompt, *fresh(65).prompt[1:]], new_tokens=8)
        warm.append(_ask(peer, [turn])[0][0])
    return {"history_tokens": HISTORY, "cold": median(cold), "next_turn": median(warm), "rounds": rounds}


def soak(peer: PeerProcess, total: int = 2000, at_once: int = 200) -> Row:
    """Measure the resident memory after many short requests. A tenth of the callers disconnect early."""
    memory = []
    for _ in range(total // at_once):
        requests = [
            fresh(16, new_tokens=8, leave_after=2 if index % 10 == 0 else None) for index in range(at_once)
        ]
        times = _ask(peer, requests)
        assert all(
            len(mine) == 8 or request.leave_after for request, mine in zip(requests, times, strict=True)
        )
        memory.append(peer.resident_memory)
    return {"requests": total, "memory_after_first_200": memory[0], "memory_after_last": memory[-1]}
