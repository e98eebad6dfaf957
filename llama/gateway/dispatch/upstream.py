"""Runs one prediction on one server, and applies the server's events to the prediction.

Knows the protocol of Cog's server. Knows nothing about queues or other servers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import httpx2

from llama.errors import InvalidInput
from llama.gateway.prediction import Outcome, Prediction, Status

_CODE = re.compile(r"E(\d)\d{3} \w+: .*", re.DOTALL)


class Busy(Exception):
    """All places of the server are taken."""


class Unavailable(Exception):
    """The server does not respond, has ended, is loading, or has failed on its own account."""


async def run_on_server(client: httpx2.AsyncClient, url: str, host: str, prediction: Prediction) -> Outcome:
    """Run a prediction and return how it ended. Cancelling this call cancels it on the server.

    Raises Busy or Unavailable; the prediction keeps the pieces that it has got.
    """
    try:
        content = json.dumps({"input": prediction.request.inputs}, allow_nan=False)
    except ValueError:
        return Outcome(Status.FAILED, str(InvalidInput("an input is not a finite number; correct it")))
    try:
        # No limit on the size of an event, because the last one repeats the whole answer.
        async with client.sse(
            f"{url}/predictions",
            method="POST",
            content=content,
            headers={"Host": host, "Content-Type": "application/json"},
            max_event_size=None,
        ) as source:
            if (refusal := await _refusal(source.response)) is not None:
                return refusal
            async for event in source:
                if event.event == "completed":
                    return _outcome(json.loads(event.data), prediction)
                _apply(event.event, json.loads(event.data), prediction)
    except httpx2.HTTPError as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"not an event of Cog's server: {error!r}") from error
    raise Unavailable("the stream ended without its last event")


async def _refusal(response: httpx2.Response) -> Outcome | None:
    """The outcome of a prediction that the server refused, or None if it accepted it."""
    if response.status_code == 200:
        return None
    if response.status_code == 409:
        raise Busy
    body = (await response.aread()).decode(errors="replace")
    if response.status_code not in (400, 413, 422):
        raise Unavailable(f"HTTP {response.status_code}")
    return Outcome(Status.FAILED, str(InvalidInput(_reasons(body))))


def _reasons(body: str) -> str:
    """What Cog's server says about invalid inputs, on one line."""
    try:
        details = json.loads(body)["detail"]
        return "; ".join(f"{detail['loc'][-1]}: {detail['msg']}" for detail in details)
    except (ValueError, KeyError, TypeError, IndexError):
        return f"the server refused the inputs: {' '.join(body.split())[:500]}"


def _apply(name: str, data: Mapping[str, Any], prediction: Prediction) -> None:
    if name == "output":
        prediction.add_piece(data["chunk"])
    elif name == "metric":
        prediction.metrics[data["name"]] = data["value"]
    elif name == "log":
        prediction.add_logs(data["data"])
    elif name == "start":
        prediction.start()


def _outcome(data: Mapping[str, Any], prediction: Prediction) -> Outcome:
    prediction.metrics.update(data.get("metrics") or {})
    logs, status, error = data.get("logs"), data["status"], data.get("error") or ""
    if status == Status.SUCCEEDED:
        return Outcome(Status.SUCCEEDED, logs=logs)
    found = _CODE.search(error)
    if status != Status.FAILED or found is None or found[1] == "2":
        # Not the fault of the caller: the worker was killed, the engine failed, or the server is ending.
        if not prediction.pieces:
            raise Unavailable(error or f"the server ended the prediction as {status}")
        error = error or "the server ended the prediction before its end"
    # Without the words that Cog's server puts before an error.
    return Outcome(Status.FAILED, found[0] if found else error, logs)
