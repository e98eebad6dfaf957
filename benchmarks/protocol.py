"""The protocol between the benchmark and a peer in a child process: one line of JSON in each direction.

It is the same for every peer. It needs only the standard library, because a peer may run in an interpreter
that has none of our dependencies. Knows requests and times; knows nothing about models.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Protocol

Times = list[list[float]]
"""For each request, the arrival time of each of its tokens, in seconds after the start of the run."""


@dataclass(frozen=True, slots=True)
class Request:
    """One greedy request."""

    prompt: list[int]
    """Token ids."""
    new_tokens: int
    """The exact number of tokens to generate."""
    at: float = 0.0
    """When the request arrives, in seconds after the start of the run."""
    leave_after: int | None = None
    """The number of tokens after which the caller disconnects, if it does."""


class Peer(Protocol):
    """An engine that has loaded the model."""

    versions: dict[str, str]
    """The versions of the packages that it uses, by name."""

    def run(self, requests: Sequence[Request]) -> Times:
        """Answer all requests, and return when the last one has ended.

        Raises NotImplementedError if it does not support the requests.
        """

    def close(self) -> None:
        """End everything that was started."""


class Clock:
    """Returns the seconds since the start of the run."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._started

    def wait_until(self, at: float) -> None:
        time.sleep(max(at - self(), 0.0))


def in_threads(answer: Callable[[Request, Clock], list[float]], requests: Sequence[Request]) -> Times:
    """Answer each request on its own thread, starting when the request arrives."""
    clock = Clock()

    def one(request: Request) -> list[float]:
        clock.wait_until(request.at)
        return answer(request, clock)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, requests))


def serve(load: Callable[[str], Peer]) -> None:
    """Run a peer: load the model that the only argument names, then answer lines until the input ends.

    After an error, the last answer gives the reason, and the process ends.
    """
    # Libraries may print to stdout, so it becomes stderr, and the answers use a copy of the original stdout.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
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
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"failed": _summary(error)}), file=answers)
        # Threads of a library may still run, and would keep the process alive.
        answers.flush()
        os._exit(1)


def _summary(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def to_line(requests: Sequence[Request]) -> str:
    """Return the line from which `serve` reads these requests."""
    return json.dumps([asdict(request) for request in requests]) + "\n"
