"""Runs one prediction on one server, and applies the server's events to the prediction.

Knows what the events mean. Knows nothing about HTTP, queues or other servers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from llama.errors import InvalidInput
from llama.gateway.dispatch.cog_client import CogClient, Refused, Unavailable
from llama.gateway.prediction import Outcome, Prediction, Status

_CODE = re.compile(r"E(\d)\d{3} \w+: .*", re.DOTALL)


async def run_on_server(client: CogClient, url: str, host: str, prediction: Prediction) -> Outcome:
    """Run a prediction and return how it ended. Cancelling this call cancels it on the server.

    Raises Busy or Unavailable; the prediction keeps the pieces that it has got.
    """
    try:
        body = json.dumps({"input": prediction.request.inputs}, allow_nan=False)
    except ValueError:
        return Outcome(Status.FAILED, str(InvalidInput("an input is not a finite number; correct it")))
    outcome = None
    try:
        async with aclosing(client.predict(url, host, body)) as arriving:
            async for events in arriving:
                for name, data in events:
                    if name == "completed":
                        outcome = _outcome(data, prediction)
                    else:
                        _apply(name, data, prediction)
    except Refused as refused:
        return Outcome(Status.FAILED, str(InvalidInput(_reasons(str(refused)))))
    except (KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"not an event of Cog's server: {error!r}") from error
    assert outcome is not None  # `completed` is the last event
    return outcome


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
