"""A fake OpenAI server, for measuring other gateways: the same text for every chat, at a fixed pace.

It sends as many pieces at the same times as `fake_cog.py`. Knows streamed chat completions only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

_ID = "chatcmpl-fake"


def _chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    chunk = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "llama",
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def make_app(pieces: int, gap: float) -> Starlette:
    async def answer() -> AsyncIterator[bytes]:
        started = time.perf_counter()
        yield _chunk({"role": "assistant", "content": ""})
        for number in range(pieces):
            await asyncio.sleep(started + (number + 1) * gap - time.perf_counter())
            yield _chunk({"content": f" word{number}"})
        yield _chunk({}, "stop")
        yield b"data: [DONE]\n\n"

    async def chat(request: Request) -> StreamingResponse:
        await request.json()
        return StreamingResponse(answer(), media_type="text/event-stream")

    async def models(_: Request) -> JSONResponse:
        card: dict[str, Any] = {"id": "llama", "object": "model", "created": 1, "owned_by": "fake"}
        return JSONResponse({"object": "list", "data": [card]})

    return Starlette(
        routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fake_openai", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--pieces", type=int, default=64, help="pieces of every answer")
    parser.add_argument("--gap", type=float, default=0.02, help="seconds before every piece")
    arguments = parser.parse_args()
    app = make_app(arguments.pieces, arguments.gap)
    uvicorn.run(app, port=arguments.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
