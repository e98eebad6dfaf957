"""Replicate's event stream of a prediction: `output`, `error` and `done` events, and comments while it is
silent.

Every event has an id, because Replicate's Python client drops events before the first id. Ids are
`{creation time in ms}:{index}`, so they are the same for every reader, and a reader can resume after any.
Knows the format. Knows nothing about HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable
from functools import partial

from llama.gateway.prediction import Prediction, Status

# Replicate's Python client ends a line wherever `str.splitlines` does. What follows would be lost.
_LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_PING = b": ping\n\n"


async def events(prediction: Prediction, start: int = 0, silence: float = 10.0) -> AsyncIterator[bytes]:
    """Yield the events from index `start` on, as many as are ready at a time, until the prediction ends
    or is postponed.

    Yields a comment whenever there was no event for `silence` seconds.
    """
    stamp, index = _stamp(prediction), start
    async for pieces in prediction.follow(start, silence):
        yield _outputs(stamp, index, pieces) if pieces else _PING
        index += len(pieces)
    if not prediction.status.ended:
        return  # the reader connects again and finds the prediction after the restart
    yield "".join(_last_events(prediction, stamp, start)).encode()


def index_after(prediction: Prediction, last_event_id: str) -> int:
    """Return the index of the event after the one with this id; 0 if it is not an id of this prediction."""
    stamp, _, number = last_event_id.partition(":")
    if stamp != _stamp(prediction) or not re.fullmatch("[0-9]{1,9}", number):
        return 0
    index = int(number) + 1
    return index if index <= _end(prediction) else 0


def nothing_left(prediction: Prediction, start: int) -> bool:
    """Whether a reader that resumes at this index has seen the last event."""
    return prediction.status.ended and start >= _end(prediction)


def _end(prediction: Prediction) -> int:
    """The number of events so far: the pieces and, once it has ended, the last one or two."""
    if not prediction.status.ended:
        return len(prediction.pieces)
    return len(prediction.pieces) + (2 if prediction.status is Status.FAILED else 1)


def _outputs(stamp: str, index: int, pieces: Iterable[str]) -> bytes:
    data = partial(_LINE_BREAK.sub, "\ndata: ")
    return "".join(
        [
            f"event: output\nid: {stamp}:{number}\ndata: {data(piece)}\n\n"
            for number, piece in enumerate(pieces, index)
        ]
    ).encode("utf-8", "replace")


def _last_events(prediction: Prediction, stamp: str, start: int) -> list[str]:
    """The events after the pieces, from index `start` on."""
    count = len(prediction.pieces)
    events = list[tuple[str, dict[str, str]]]()
    if prediction.status is Status.FAILED:
        events.append(("error", {"detail": prediction.error or "the prediction failed"}))
    reason = {Status.FAILED: "error", Status.CANCELED: "canceled"}.get(prediction.status)
    events.append(("done", {"reason": reason} if reason else {}))
    return [
        f"event: {name}\nid: {stamp}:{number}\ndata: {json.dumps(data)}\n\n"
        for number, (name, data) in enumerate(events, count)
        if number >= start
    ]


def _stamp(prediction: Prediction) -> str:
    return str(int(prediction.created_at * 1000))
