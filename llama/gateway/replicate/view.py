"""A prediction as Replicate's API shows it.

Knows the object's members and what clients do with them. Knows nothing about requests.
"""

from __future__ import annotations

from typing import Any

from llama.gateway.model_card import timestamp
from llama.gateway.prediction import Prediction, Status


def prediction_body(prediction: Prediction, base: str | None = None) -> dict[str, Any]:
    """Return Replicate's object of a prediction as it is now.

    `base` is the gateway's address in its URLs: by default, the address that the creator used.
    """
    request = prediction.request
    body: dict[str, Any] = {
        "id": prediction.id,
        "model": request.model,
        "version": request.version,
        "input": request.inputs,
        "logs": prediction.logs,
        "output": _output(prediction),
        "data_removed": prediction.data_removed,
        "error": prediction.error,
        "source": "api",
        "status": prediction.status.value,
        "created_at": timestamp(prediction.created_at),
        "urls": _urls(prediction, request.base_url if base is None else base),
    }
    times = {
        "started_at": prediction.started_at,
        "completed_at": prediction.completed_at,
        "deadline": prediction.deadline,
    }
    body |= {name: timestamp(time) for name, time in times.items() if time is not None}
    if request.deployment is not None:
        body["deployment"] = request.deployment
    if prediction.status.ended:
        body["metrics"] = _metrics(prediction)
    return body


def created_body(prediction: Prediction, base: str) -> dict[str, Any]:
    """Return the object for the response to a create.

    A prediction that runs is shown as `starting` and without output: clients take the output of a
    `processing` prediction for the whole answer, and skip the pieces that this response contains.
    """
    body = prediction_body(prediction, base)
    if not prediction.status.ended:
        body |= {"status": Status.STARTING.value, "output": [], "logs": ""}
        body.pop("started_at", None)
    return body


def _output(prediction: Prediction) -> list[str] | None:
    nothing = prediction.data_removed or prediction.status is Status.FAILED
    return None if nothing and not prediction.pieces else list(prediction.pieces)


def _urls(prediction: Prediction, base: str) -> dict[str, str]:
    # No value may be null: Replicate's Python client accepts only strings.
    get = f"{base}/v1/predictions/{prediction.id}"
    urls = {"get": get, "cancel": f"{get}/cancel", "web": f"{base}/#/predictions/{prediction.id}"}
    if not prediction.data_removed:
        urls["stream"] = f"{base}/v1/stream/{prediction.stream_token}"
    return urls


def _metrics(prediction: Prediction) -> dict[str, float | str]:
    ended_at = prediction.completed_at or prediction.created_at
    started_at = prediction.started_at or ended_at
    return {
        "predict_time": max(0.0, ended_at - started_at),
        "total_time": max(0.0, ended_at - prediction.created_at),
        **prediction.metrics,
    }
