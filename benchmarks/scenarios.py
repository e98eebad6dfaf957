"""What is asked of every peer, and what is made of its times.

Every turn has prompts that no peer has seen. Peers take turns within a round, so that a machine that
slows down does so for all of them. Knows requests and times; knows nothing of what answers.
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
from benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, prompt

CONCURRENCY = (1, 8, 32)
ARRIVAL_INTERVAL = 0.05  # seconds
LONG_PROMPT = 2000
HISTORY = 1500
_QUIET, _PATIENCE = 10.0, 5.0  # percent of the processor; seconds

_seeds = count()
Row = dict[str, Any]


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fresh(tokens: int = PROMPT_TOKENS, **request: Any) -> Request:
    """A request with a prompt of its own."""
    return Request(prompt(tokens, next(_seeds)), **{"new_tokens": NEW_TOKENS, **request})


def _ask(peer: PeerProcess, requests: Sequence[Request]) -> Times:
    """One turn, on a quiet machine: vLLM's processes look for work for a whole second after their last, at
    the expense of whose turn is next. Raises CannotDo."""
    deadline = time.monotonic() + _PATIENCE
    while (busy := psutil.cpu_percent(interval=0.1)) > _QUIET:
        if time.monotonic() > deadline:
            log(f"{peer.spec.name}: the machine is not quiet ({busy:.0f} % busy with other work)")
            break
    return peer.run(requests)


def warm_up(peer: PeerProcess) -> None:
    for batch in CONCURRENCY:
        _ask(peer, [fresh(16, new_tokens=4) for _ in range(batch)])


def throughput(peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """`batch` requests that arrive at once, by peer."""
    return _in_rounds(peers, f"{batch} at once", lambda: [fresh() for _ in range(batch)])


def side_by_side(peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """The same in so many rounds that small differences show."""
    turns = f"side by side, {batch} at once"
    return _in_rounds(peers, turns, lambda: [fresh() for _ in range(batch)], rounds=12, seconds=120.0)


def arriving(peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """`batch` requests that arrive one by one."""
    return _in_rounds(
        peers,
        f"{batch}, one every {ARRIVAL_INTERVAL * 1000:.0f} ms",
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
    """Peers take turns, every other round in reverse; who has taken so many seconds in two turns or more is
    left out of the later ones."""
    rows: dict[str, list[Row]] = {peer.spec.name: [] for peer in peers}
    left = list(peers)
    for number in range(1, rounds + 1):
        for peer in left[:: 1 if number % 2 else -1]:
            turn = requests()
            try:
                figures = _figures(turn, _ask(peer, turn))
            except CannotDo as reason:
                log(f"{title}: not with {peer.spec.name} ({reason})")
                left.remove(peer)
                continue
            rows[peer.spec.name].append(figures)
            log(f"{title}, round {number}: {peer.spec.name} {figures['tokens_per_second']:.1f} tokens/s")
            if number > 1 and sum(row["seconds"] for row in rows[peer.spec.name]) > seconds:
                left.remove(peer)
    return {name: _medians(turns) for name, turns in rows.items() if turns}


def _figures(requests: Sequence[Request], times: Times) -> Row:
    """Of one turn. The clock of each request starts when it arrives."""
    seconds = max(mine[-1] for mine in times)
    return {
        "seconds": seconds,
        "tokens_per_second": sum(request.new_tokens for request in requests) / seconds,
        # The mean: prompts are read several in a step, and the median would be whichever step it fell into.
        "time_to_first_token": fmean(
            mine[0] - request.at for request, mine in zip(requests, times, strict=True)
        ),
        # Over the whole answer: tokens may be handed over several at a time.
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
    """Time between tokens of `streams` answers, before and while a long prompt is read."""
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
    """Time to first token of a dialogue's turn, the history in the cache or not."""
    cold, warm = list[float](), list[float]()
    for _ in range(rounds):
        history = fresh(HISTORY, new_tokens=8)
        cold.append(_ask(peer, [history])[0][0])
        turn = Request([*history.prompt, *fresh(65).prompt[1:]], new_tokens=8)
        warm.append(_ask(peer, [turn])[0][0])
    return {"history_tokens": HISTORY, "cold": median(cold), "next_turn": median(warm), "rounds": rounds}


def soak(peer: PeerProcess, total: int = 2000, at_once: int = 200) -> Row:
    """Resident memory after many short requests, a tenth of whose callers leave early."""
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
