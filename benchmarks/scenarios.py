"""The requests that every peer gets, and the figures that are computed from its times.

Every measurement uses new prompts. Within a round, every peer is measured once, so that a slow phase of the
machine affects all of them. Knows requests and times; knows nothing about the engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from statistics import fmean, median, quantiles
from typing import Any

import psutil

from benchmarks.attempts import Attempts, log
from benchmarks.process import PeerProcess
from benchmarks.protocol import Request, Times
from benchmarks.tables import counted
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, prompt

CONCURRENCY = (1, 8, 32)
ARRIVAL_INTERVAL = 0.05  # seconds
LONG_PROMPT = 2000
HISTORY = 1500
MIXED = {"long_prompt_tokens": 3000, "short_prompts": 15, "short_prompt_tokens": 100, "new_tokens": 128}
"""One long prompt and several short ones that arrive together. With this number of new tokens, decoding takes
longer than reading the prompts, and the long request and the short ones are decoded together."""
_IDLE = 10.0  # percent: a lower CPU usage counts as idle
_IDLE_TIMEOUT = 5.0  # seconds to wait for an idle CPU

_seeds = count()
Row = dict[str, Any]


def fresh(tokens: int = PROMPT_TOKENS, **request: Any) -> Request:
    """Return a request with a prompt that was not used before."""
    return Request(prompt(tokens, next(_seeds)), **{"new_tokens": NEW_TOKENS, **request})


def ask(peer: PeerProcess, requests: Sequence[Request]) -> Times:
    """Wait until the CPU is idle, then send the requests to a peer. Raises CannotDo or PeerFailed."""
    wait_until_idle(peer.spec.name)
    return peer.run(requests)


def wait_until_idle(name: str) -> None:
    """Wait for a few seconds until the CPU is idle, before the engine `name` is measured.

    vLLM's processes poll for work for one second after their last request, which would slow down the next
    peer.
    """
    deadline = time.monotonic() + _IDLE_TIMEOUT
    while (busy := psutil.cpu_percent(interval=0.1)) > _IDLE:
        if time.monotonic() > deadline:
            log(f"{name}: the CPU is not idle ({busy:.0f}% used by other programs)")
            break


def warm_up(peer: PeerProcess) -> None:
    for batch in CONCURRENCY:
        ask(peer, [fresh(16, new_tokens=4) for _ in range(batch)])


def throughput(attempts: Attempts, peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """Measure `batch` requests that arrive together. Return one row per peer."""
    return in_rounds(attempts, peers, counted(batch, "request"), lambda peer: _together(peer, batch))


def side_by_side(attempts: Attempts, peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """Measure the same as `throughput` in more rounds, so that small differences become visible."""
    title = f"comparison of servers, {counted(batch, 'request')}"
    return in_rounds(attempts, peers, title, lambda peer: _together(peer, batch), rounds=8, seconds=30.0)


def arriving(attempts: Attempts, peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """Measure `batch` requests that arrive one after the other. Return one row per peer."""

    def measure(peer: PeerProcess) -> Row:
        requests = [fresh(at=index * ARRIVAL_INTERVAL) for index in range(batch)]
        return figures(requests, ask(peer, requests))

    title = f"{counted(batch, 'request')}, {ARRIVAL_INTERVAL * 1000:.0f} ms apart"
    return in_rounds(attempts, peers, title, measure)


def mixed(attempts: Attempts, peers: Sequence[PeerProcess]) -> dict[str, Row]:
    """Measure the requests of `MIXED`. Return one row per peer."""

    def measure(peer: PeerProcess) -> Row:
        new_tokens = MIXED["new_tokens"]
        long = fresh(MIXED["long_prompt_tokens"], new_tokens=new_tokens)
        short = [
            fresh(MIXED["short_prompt_tokens"], new_tokens=new_tokens) for _ in range(MIXED["short_prompts"])
        ]
        times = ask(peer, [long, *short])
        return {
            **figures([long, *short], times),
            "time_to_first_token_of_long": times[0][0],
            "time_to_first_token_of_short": fmean(mine[0] for mine in times[1:]),
        }

    return in_rounds(attempts, peers, "mixed lengths", measure, rounds=3, at_least=1)


def _together(peer: PeerProcess, batch: int) -> Row:
    requests = [fresh() for _ in range(batch)]
    return figures(requests, ask(peer, requests))


def in_rounds(
    attempts: Attempts,
    peers: Sequence[PeerProcess],
    title: str,
    measure: Callable[[PeerProcess], Row],
    *,
    rounds: int = 4,
    at_least: int = 2,
    seconds: float = 12.0,
) -> dict[str, Row]:
    """Measure all peers once per round, in reverse order in every other round. Return medians by peer.

    After `at_least` rounds, a peer that has used more than `seconds` in total is not measured again. If a
    peer fails or does not support the requests, its row has the medians of the rounds before, if any.
    """
    rows: dict[str, list[Row]] = {peer.spec.name: [] for peer in peers}
    left = list(peers)
    for number in range(1, rounds + 1):
        for peer in left[:: 1 if number % 2 else -1]:
            name = peer.spec.name
            row = attempts.attempt(name, title, measure, peer)
            if row is None:
                left.remove(peer)
                continue
            rows[name].append(row)
            log(f"{title}, round {number}: {name} {row['tokens_per_second']:.1f} tokens/s")
            if number >= at_least and sum(row["seconds"] for row in rows[name]) > seconds:
                left.remove(peer)
    return {name: medians(turns) for name, turns in rows.items() if turns}


def figures(requests: Sequence[Request], times: Times) -> Row:
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


def medians(turns: list[Row]) -> Row:
    speeds = [turn["tokens_per_second"] for turn in turns]
    return {
        **{name: median(turn[name] for turn in turns) for name in turns[0]},
        "slowest": min(speeds),
        "fastest": max(speeds),
        "rounds": len(turns),
    }


def long_prompt_beside(peer: PeerProcess, streams: int) -> Row:
    """Measure the time between tokens of `streams` answers, before and while a long prompt is read.

    Tokens that a caller receives together count as one.
    """
    arrival = 2.0
    beside = [fresh(new_tokens=600) for _ in range(streams)]
    long = fresh(LONG_PROMPT, new_tokens=2, at=arrival)
    times = ask(peer, [*beside, long])
    read = times[-1][0]
    before, during = list[float](), list[float]()
    for mine in times[:-1]:
        for earlier, later in pairwise(sorted(set(mine))):
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
        cold.append(ask(peer, [history])[0][0])
        turn = Request([*history.prompt, *fresh(65).prompt[1:]], new_tokens=8)
        warm.append(ask(peer, [turn])[0][0])
    return {"history_tokens": HISTORY, "cold": median(cold), "next_turn": median(warm), "rounds": rounds}


def soak(peer: PeerProcess, total: int = 2000, at_once: int = 200) -> Row:
    """Measure the resident memory after many short requests. A tenth of the callers disconnect early."""
    memory = []
    for _ in range(total // at_once):
        requests = [
            fresh(16, new_tokens=8, leave_after=2 if index % 10 == 0 else None) for index in range(at_once)
        ]
        times = ask(peer, requests)
        assert all(
            len(mine) == 8 or request.leave_after for request, mine in zip(requests, times, strict=True)
        )
        memory.append(peer.resident_memory)
    return {"requests": total, "memory_after_first_200": memory[0], "memory_after_last": memory[-1]}
