"""The format of the gateway's log: text for a person, or JSON with one object per line for a log collector.

Knows the fields of a line. None of them contains a prompt, an answer, a key, a cookie, a stream token or a
query string. Knows nothing about when lines are written.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from llama.gateway.prediction import Outcome, Prediction

REQUESTS = logging.getLogger("llama.gateway.requests")
"""The log of HTTP requests, which is written only as JSON: in a terminal, it would hide all other lines."""

PREDICTIONS = logging.getLogger("llama.gateway.predictions")
"""The log of predictions that have ended."""

_TEXT_ONLY = "color_message"
"""uvicorn's second copy of a message, for terminals."""


class JsonLines(JsonFormatter):
    """Writes a record as one JSON object: time, level, logger, message, and the record's own fields."""

    def __init__(self) -> None:
        super().__init__(
            ["asctime", "levelname", "name", "message"],
            rename_fields={
                "asctime": "time",
                "levelname": "level",
                "name": "logger",
                "exc_info": "exception",
            },
            reserved_attrs=[*RESERVED_ATTRS, _TEXT_ONLY],
        )

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802
        """ISO 8601 in UTC, with milliseconds."""
        time = datetime.fromtimestamp(record.created, UTC)
        return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def configure(log_format: Literal["text", "json"]) -> None:
    """Set the format of everything that this process logs. Call it after the root logger has its handlers."""
    as_json = log_format == "json"
    REQUESTS.setLevel(logging.INFO if as_json else logging.WARNING)
    if as_json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())


def log_end(prediction: Prediction, outcome: Outcome, key: str | None) -> None:
    """Write the line of a prediction that has ended. `key` is the name of its key."""
    if not PREDICTIONS.isEnabledFor(logging.INFO):
        return
    tokens, seconds, code = prediction.tokens, outcome.seconds(prediction), outcome.error_code
    fields: dict[str, Any] = {
        "event": "prediction",
        "prediction": prediction.id,
        "request_id": prediction.request.request_id,
        "key": key,
        "api": prediction.request.api,
        "status": outcome.status,
        "error": code,
        "input_tokens": tokens.input,
        "output_tokens": tokens.output,
        "seconds": round(seconds, 3),
        "seconds_waiting": round(
            max(0.0, (prediction.started_at or outcome.ended_at) - prediction.created_at), 3
        ),
        "time_to_first_token": _rounded(prediction.time_to_first_piece),
        "server": prediction.server,
    }
    PREDICTIONS.info(
        "prediction %s of %s %s%s: %d + %d tokens in %.2f s",
        prediction.id,
        key,
        outcome.status,
        f" ({code})" if code else "",
        tokens.input,
        tokens.output,
        seconds,
        extra=fields,
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
