"""The URL of a prediction's event stream. It needs no key: its last part cannot be guessed.

A reader that leaves does not cancel the prediction. The middleware lets pages of all origins read a stream.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from llama.gateway.problems import not_found
from llama.gateway.replicate.sse import events, index_after, nothing_left
from llama.gateway.routes.dependencies import CurrentGateway

# No proxy may buffer or compress the events.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

router = APIRouter()


@router.get("/stream/{token}")
async def stream(token: str, request: Request, gateway: CurrentGateway) -> Response:
    prediction = await gateway.predictions.find_stream(token)
    if prediction is None:
        raise not_found()
    if request.method == "HEAD":
        return Response(media_type="text/event-stream", headers=_HEADERS)
    start = index_after(prediction, request.headers.get("last-event-id", ""))
    if nothing_left(prediction, start):
        return Response(status_code=204)  # a browser connects again after every other status
    return StreamingResponse(
        events(prediction, start, gateway.ping_interval), media_type="text/event-stream", headers=_HEADERS
    )
