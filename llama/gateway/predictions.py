"""All predictions of the gateway: creates, finds, lists and cancels them.

This is what both APIs call. Knows nothing about HTTP.
"""

from __future__ import annotations

from llama.gateway.prediction import Prediction, PredictionRequest
from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """Some predictions, newest first. The cursors are opaque texts for `Predictions.page`, or None at either end."""

    predictions: list[Prediction]
    next: str | None
    previous: str | None


class Predictions:
    async def create(self, request: PredictionRequest) -> Prediction:
        """Store a prediction and queue it. Raises Problem: 429 if the queue of its key is full, 503 if it
        cannot be stored."""
        raise NotImplementedError

    async def find(self, key_id: int, prediction_id: str) -> Prediction | None:
        """Return a key's prediction; None if there is none with this id, or if it belongs to another key."""
        raise NotImplementedError

    async def find_stream(self, stream_token: str) -> Prediction | None:
        """Return the prediction with this stream token, while its data exists."""
        raise NotImplementedError

    async def page(
        self,
        key_id: int,
        *,
        cursor: str | None = None,
        created_after: float | None = None,
        created_before: float | None = None,
    ) -> Page:
        """Return at most 100 of a key's predictions. Raises ValueError if the cursor is invalid."""
        raise NotImplementedError

    async def cancel(self, prediction: Prediction) -> None:
        """Cancel a prediction, and return when it has ended. Does nothing if it has ended already."""
        raise NotImplementedError
