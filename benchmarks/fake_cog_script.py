"""What the fake of Cog's server is told to do, and what it remembers. Knows nothing about HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True)
class Script:
    """What the server does with a prediction, in this order."""

    pieces: Sequence[str] = ("The", " capital", " of", " France", " is", " Paris", ".")
    gap: float = 0
    """Seconds before every piece."""
    hold_after: int | None = None
    """After this many pieces, wait until `FakeCog.release()` is called."""
    die_after: int | None = None
    """After this many pieces, the server dies: see `FakeCog.die`."""
    hang: bool = False
    """Accept the request and never respond."""
    error: str | None = None
    """Fail after the pieces with this error, such as "E1001 PromptRequired: prompt is blank"."""
    raw: bytes = b""
    """Bytes to send before the pieces, such as an event that the real server never sends."""
    logs: str = ""
    finish_reason: str = "stop"


@dataclass
class Received:
    """One request that the server received."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def inputs(self) -> Body:
        inputs: Body = json.loads(self.body)["input"]
        return inputs


@dataclass
class Served:
    """One prediction that the server accepted."""

    inputs: Body
    pieces: int = 0
    """How many pieces it has sent."""
    status: str = "running"
    """Or succeeded, failed, cancelled (its connection was dropped), or lost (the server died)."""


@dataclass
class Counts:
    """What has happened to the predictions of a server."""

    running: int = 0
    most_running: int = 0
    pieces: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    """How many were stopped because their connection was dropped."""
    lost: int = 0
    """How many were running when the server died."""


@dataclass
class Rules:
    """How the server behaves. Tests may change every field while it runs."""

    script: Script | Callable[[Body], Script] = field(default_factory=Script)
    """The same for all predictions, or a function of a prediction's inputs."""
    places: int = 32
    health: str | None = None
    """A status to report. None: READY, or BUSY if no place is free. Predictions are refused with 503 in
    the states in which Cog's server does so."""
    false_conflicts: int = 0
    """This many of the next predictions are refused with 409 although places are free."""
    refusal: int = 0
    """An HTTP status with which all predictions are refused; 0 refuses none."""
    title: str = "Cog"
    """The title in the schema. Another one makes it the schema of another version."""
    schema: str | None = None
    """What `/openapi.json` responds instead of the schema."""
    frozen: bool = False
    """Accept all requests, health checks included, and never respond."""
