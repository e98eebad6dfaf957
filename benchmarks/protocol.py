"""How the benchmark talks to a peer in a process of its own: one line of JSON each way.

The same for every peer, and the standard library only, since a peer may run in an interpreter that has
nothing else of ours. Knows requests and times; knows nothing of models.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Protocol

Times = list[list[float]]
"""For each request the arrival of each of its tokens, in seconds after the run began."""


@dataclass(frozen=True, slots=True)
class Request:
    """One greedy request."""

    prompt: list[int]
    """Token ids."""
    new_tokens: int
    """Exactly so many are generated."""
    at: float = 0.0
    """Seconds after the run begins."""
    leave_after: int | None = None
    """The caller leaves when it has so many tokens."""


class Peer(Protocol):
    """An engine that is loaded and can answer."""

    versions: dict[str, str]
    """What it runs on, by the name of the package."""

    def run(self, requests: Sequence[Request]) -> Times:
        """Answer all; returns when the last has ended. Raises NotImplementedError for what it cannot do."""

    def close(self) -> None:
        """End what was started."""


class Clock:
    """Seconds since the run began."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._started

    def wait_until(self, at: float) -> None:
        time.sleep(max(at - self(), 0.0))


def in_threads(answer: Callable[[Request, Clock], list[float]], requests: Sequence[Request]) -> Times:
    """Answer each request on a thread of its own, when it is due."""
    clock = Clock()

    def one(request: Request) -> list[float]:
        clock.wait_until(request.at)
        return answer(request, clock)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, requests))


def serve(load: Callable[[str], Peer]) -> None:
    """A peer's main: load what the only argument names, then answer lines of requests until they end."""
    # Libraries print what they like; the answers have a way of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = load(sys.argv[1])
    print(json.dumps(peer.versions), file=answers)
    try:
        for line in sys.stdin:
            requests = [Request(**request) for request in json.loads(line)]
            try:
                print(json.dumps(peer.run(requests)), file=answers)
            except NotImplementedError as error:
                print(json.dumps({"cannot": str(error)}), file=answers)
    finally:
        peer.close()


def to_line(requests: Sequence[Request]) -> str:
    """What `serve` reads."""
    return json.dumps([asdict(request) for request in requests]) + "\n"
