"""One prediction: what was asked for, its state, and its pieces of text.

Both APIs, the queue and the store use this object. Knows nothing about HTTP, servers or files.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Any, Literal

_CODE = re.compile(r"E\d{4}\b")


class Status(StrEnum):
    """The state of a prediction, in Replicate's words."""

    STARTING = "starting"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def ended(self) -> bool:
        return self not in (Status.STARTING, Status.PROCESSING)


@dataclass(frozen=True)
class Webhook:
    """Where to send a prediction, and after which events: start, output, logs and completed."""

    url: str
    events: frozenset[str]


@dataclass(frozen=True)
class PredictionRequest:
    """What a client asked for."""

    key_id: int
    inputs: dict[str, Any]
    """The inputs of the predictor, as they are sent to a server."""
    model: str
    version: str = "hidden"
    """The id of the version that the client named, or "hidden"."""
    deployment: str | None = None
    webhook: Webhook | None = None
    base_url: str = ""
    """The gateway's address as this client sees it, without a slash at the end."""
    seconds: float | None = None
    """The prediction is cancelled this many seconds after its creation."""
    needs_client: bool = False
    """Whether the answer is useful only to the connection that asked for it, as in OpenAI's API."""
    request_id: str | None = None
    """The `x-request-id` of the HTTP request, which is also in the logs."""

    @property
    def api(self) -> Literal["replicate", "openai"]:
        """The API that the client used."""
        return "openai" if self.needs_client else "replicate"


@dataclass(frozen=True)
class Outcome:
    """How a prediction ended."""

    status: Status
    error: str | None = None
    logs: str | None = None
    """None keeps the logs so far."""
    ended_at: float = field(default_factory=time.time)

    @property
    def error_code(self) -> str | None:
        """The code at the start of the error, such as "E1002"."""
        found = _CODE.match(self.error or "")
        return found[0] if found else None

    def seconds(self, prediction: Prediction) -> float:
        """Return the seconds from the creation of the prediction to this end."""
        return max(0.0, self.ended_at - prediction.created_at)


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens."""

    input: int = 0
    output: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.input + other.input, self.output + other.output)


class Prediction:
    """One prediction. Times are Unix times in seconds."""

    def __init__(self, request: PredictionRequest) -> None:
        self.request = request
        self.id = secrets.token_hex(13)
        self.stream_token = secrets.token_urlsafe(32)
        """The unguessable last part of the stream's URL, which needs no key."""
        # Rounded to what responses show, because clients pass it back as `created_before`.
        self.created_at = round(time.time(), 6)
        self._born = time.monotonic()
        self.started_at: float | None = None
        self.was_started = False
        """Whether any server has begun to work on it. After the loss of that server, `started_at` is None."""
        self.completed_at: float | None = None
        self.first_piece_at: float | None = None
        self.last_piece_at: float | None = None
        """When the first and the last piece arrived, by the monotonic clock."""
        self.server: str | None = None
        """The URL of the last server that it was given to."""
        self.status = Status.STARTING
        self.pieces: list[str] = []
        self.logs = ""
        self.error: str | None = None
        self.metrics: dict[str, float | str] = {}
        self.lost_servers = 0
        """How many servers failed while they worked on it."""
        self.data_removed = False
        """Whether the inputs, the output and the logs were deleted."""
        self.postponed = False
        """Whether it will not run before the gateway is restarted. Its readers must not wait for it then."""
        self._changed = asyncio.Event()

    @property
    def day(self) -> date:
        """The day in UTC on which it is counted."""
        return datetime.fromtimestamp(self.created_at, UTC).date()

    @property
    def tokens(self) -> Tokens:
        """Its tokens, as its server has reported them so far."""
        found = self.metrics
        return Tokens(int(found.get("input_token_count", 0)), int(found.get("output_token_count", 0)))

    @property
    def age(self) -> float:
        """Seconds since its creation. A change of the system's clock does not matter."""
        return time.monotonic() - self._born

    def set_created_at(self, created_at: float) -> None:
        """Set when it was created, before this gateway started."""
        self.created_at = created_at
        self._born = time.monotonic() - max(0.0, time.time() - created_at)

    @property
    def time_to_first_piece(self) -> float | None:
        """Seconds from its creation to the first piece; None if there is none, or if an earlier run of the
        gateway got it."""
        return None if self.first_piece_at is None else self.first_piece_at - self._born

    @property
    def deadline(self) -> float | None:
        seconds = self.request.seconds
        return None if seconds is None else self.created_at + seconds

    def start(self) -> None:
        """A server has begun to work on it."""
        self.status, self.was_started = Status.PROCESSING, True
        self.started_at = self.started_at or time.time()
        self._notify()

    def restart(self) -> None:
        """The server was lost before the first piece, and another one will begin again."""
        assert not self.pieces
        self.status, self.started_at = Status.STARTING, None
        self.metrics, self.logs = {}, ""

    def add_piece(self, piece: str) -> None:
        """Append a piece of the answer."""
        self.last_piece_at = time.monotonic()
        if self.first_piece_at is None:
            self.first_piece_at = self.last_piece_at
        # Replicate's clients take a piece that begins like a URL for the address of a file.
        if piece.startswith(("https:", "data:")):
            self.pieces += [piece[0], piece[1:]]
        elif piece:
            self.pieces.append(piece)
        self._notify()

    def add_logs(self, text: str) -> None:
        self.logs += text
        self._notify()

    def end(self, outcome: Outcome) -> None:
        """Make the outcome visible to all readers. Call it after the outcome was stored."""
        self.status, self.error, self.completed_at = outcome.status, outcome.error, outcome.ended_at
        if outcome.logs is not None:
            self.logs = outcome.logs
        self._notify()

    def postpone(self) -> None:
        """End the waiting of its readers, because the gateway stops before a server starts it."""
        self.postponed = True
        self._notify()

    async def follow(self, start: int = 0, silence: float = 10.0) -> AsyncIterator[list[str]]:
        """Yield the pieces from index `start` on as they arrive, several at a time, until the end or until it
        is postponed.

        An empty list means that nothing has happened for `silence` seconds.
        """
        while True:
            ended, changed = self.status.ended or self.postponed, self._changed
            if new := self.pieces[start:]:
                start += len(new)
                yield new
            elif ended:
                return
            elif not await _within(changed, silence):
                yield []

    async def changed(self, timeout: float | None = None) -> bool:
        """Wait for the next change. Returns False if there was none within `timeout` seconds."""
        return await _within(self._changed, timeout)

    async def wait_until_ended(self, timeout: float | None = None) -> bool:
        """Wait for the end. Returns False if it is postponed or takes longer than `timeout` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not (self.status.ended or self.postponed):
                    await self._changed.wait()
        return self.status.ended

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _within(event: asyncio.Event, seconds: float | None) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
