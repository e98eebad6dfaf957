"""Turns a prediction into the columns of its row, and a row into a prediction."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from llama.gateway.prediction import Prediction, PredictionRequest, Status, Webhook


def insert_values(prediction: Prediction) -> dict[str, Any]:
    """The columns of a new prediction."""
    request = dict(vars(prediction.request))  # `asdict` would copy the inputs
    inputs, key_id, webhook = (request.pop(name) for name in ("inputs", "key_id", "webhook"))
    request["webhook"] = webhook and {"url": webhook.url, "events": sorted(webhook.events)}
    return {
        "id": prediction.id,
        "stream_token": prediction.stream_token,
        "key_id": key_id,
        "created_at": prediction.created_at,
        "status": prediction.status,
        "request": json.dumps(request),
        "inputs": json.dumps(inputs),
        "webhook_due": webhook is not None and "completed" in webhook.events,
    }


def metrics_values(prediction: Prediction) -> str:
    return json.dumps(prediction.metrics)


def prediction_of(row: sqlite3.Row) -> Prediction:
    """The prediction of a row of the table `predictions`."""
    request = json.loads(row["request"])
    webhook = request.pop("webhook")
    prediction = Prediction(
        PredictionRequest(
            key_id=row["key_id"],
            inputs=json.loads(row["inputs"] or "{}"),
            webhook=Webhook(webhook["url"], frozenset(webhook["events"])) if webhook else None,
            **request,
        )
    )
    prediction.id, prediction.stream_token = row["id"], row["stream_token"]
    prediction.set_created_at(row["created_at"])
    prediction.started_at = row["started_at"]
    prediction.completed_at, prediction.status = row["completed_at"], Status(row["status"])
    prediction.pieces, prediction.logs = json.loads(row["output"] or "[]"), row["logs"] or ""
    prediction.error, prediction.metrics = row["error"], json.loads(row["metrics"])
    prediction.data_removed = row["inputs"] is None
    return prediction
