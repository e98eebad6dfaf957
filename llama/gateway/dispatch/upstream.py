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
from llama.gateway.metrics.recorder import Metrics
from llama.gateway.prediction import Outcome, Prediction, Status

_MAX_METRIC = 2**53
_COUNTS = ("input_token_count", "output_token_count")
_CODE = re.compile(r"E(\d)\d{3} \w+: .*", re.DOTALL)


async def run_on_server(
    client: CogClient, url: str, host: str, prediction: Prediction, metrics: Metrics
) -> Outcome:
    """Run a prediction and return how it ended. Cancelling this call cancels it on the server.

    Raises Busy or Unavailable; the prediction keeps the pieces that it has got.
    """
    try:
        body = json.dumps(
            {"id": _id_for_server(prediction), "input": prediction.request.inputs}, allow_nan=False
        )
    except ValueError:
        return Outcome(Status.FAILED, str(InvalidInput("an input is not a finite number; correct it")))
    outcome = None
    try:
        async with aclosing(client.predict(url, host, body, prediction.request.request_id)) as arriving:
            async for events in arriving:
                for name, data in events:
                    if name == "completed":
                        outcome = _outcome(data, prediction)
                    else:
                        _apply(name, data, prediction, metrics)
    except Refused as refused:
        return Outcome(Status.FAILED, str(InvalidInput(_reasons(str(refused)))))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unavailable(f"not an event of Cog's server: {type(error).__name__}") from error
    assert outcome is not None  # `completed` is the last event
    return outcome


def _id_for_server(prediction: Prediction) -> str:
    """The id under which the server logs the prediction.

    If a server is lost, it may not have noticed, and may get the same prediction again. Two predictions with
    one id would be mixed up: Cog's server cancels the newer one when the connection of the older one breaks.
    """
    lost = prediction.lost_servers
    return f"{prediction.id}-{lost + 1}" if lost else prediction.id


def _reasons(body: str) -> str:
    """What Cog's server says about invalid inputs, on one line."""
    try:
        details = json.loads(body)["detail"]
        return "; ".join(f"{detail['loc'][-1]}: {detail['msg']}" for detail in details)
    except (ValueError, KeyError, TypeError, IndexError):
        return f"the server refused the inputs: {' '.join(body.split())[:500]}"


def _apply(name: str, data: Mapping[str, Any], prediction: Prediction, metrics: Metrics) -> None:
    if name == "output":
        if piece := _text(data["chunk"]):
            metrics.piece(prediction)
            prediction.add_piece(piece)
    elif name == "metric":
        prediction.metrics[_text(data["name"])] = _metric(data["name"], data["value"])
    elif name == "log":
        prediction.add_logs(_text(data["data"]))
    elif name == "start":
        metrics.started(prediction)
        prediction.start()


def _outcome(data: Mapping[str, Any], prediction: Prediction) -> Outcome:
    for name, value in (data.get("metrics") or {}).items():
        prediction.metrics[_text(name)] = _metric(name, value)
    logs, status, error = _text(data.get("logs") or ""), data["status"], _text(data.get("error") or "")
    if status == Status.SUCCEEDED:
        return Outcome(Status.SUCCEEDED, logs=logs)
    found = _CODE.search(error)
    if status != Status.FAILED or found is None or found[1] == "2":
        # Not the fault of the caller: the worker was killed, the engine failed, or the server is ending.
        if not prediction.pieces:
            # What the server sent is not logged, because it may quote a prompt.
            known = status if status in tuple(Status) else "unknown"
            raise Unavailable(
                f"the prediction ended as {known}, {found[0].split(':')[0] if found else 'no code'}"
            )
        error = error or "the server stopped the prediction early"
    # Leave out what Cog's server puts before an error.
    return Outcome(Status.FAILED, found[0] if found else error, logs)


def _text(value: Any) -> str:
    """Check that a value is a text that can be stored and sent. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("not a text")
    value.encode()  # lone surrogates
    return value


def _metric(name: str, value: Any) -> float | str:
    """Check the value of a metric. Raises ValueError if it is not a text, or not a number from 0 to 2**53. A
    count must be a number."""
    if isinstance(value, int | float) and 0 <= value <= _MAX_METRIC:
        return value
    if name in _COUNTS:  # they are added up
        raise ValueError("not a number")
    return _text(value)
