"""OpenAI's API: chat completions and text completions, whole or streamed.

Translates between HTTP and `Choices`. Bodies are read in `openai/request.py` and written in
`openai/response.py`. The models are in `catalog.py`, because their paths are also Replicate's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from llama.gateway.gateway import Gateway
from llama.gateway.http.disconnect import ClientLeft, while_connected
from llama.gateway.http.openai_paths import NOT_OFFERED
from llama.gateway.model_card import version_of
from llama.gateway.openai.choices import Choices, Update
from llama.gateway.openai.model import find_model
from llama.gateway.openai.request import ChatBody, CompletionRequest, TextBody
from llama.gateway.openai.response import PING, Chunks, Completion, error_event, to_json
from llama.gateway.prediction import PredictionRequest
from llama.gateway.problems import Problem
from llama.gateway.routes.dependencies import CurrentGateway, CurrentKey, base_url, json_body
from llama.gateway.storage.keys import Key

router = APIRouter()


@router.post("/chat/completions")
async def create_chat_completion(request: Request, gateway: CurrentGateway, key: CurrentKey) -> Response:
    return await _complete(request, gateway, key, ChatBody.parse(await json_body(request)))


@router.post("/completions")
async def create_completion(request: Request, gateway: CurrentGateway, key: CurrentKey) -> Response:
    return await _complete(request, gateway, key, TextBody.parse(await json_body(request)))


async def _complete(request: Request, gateway: Gateway, key: Key, body: ChatBody | TextBody) -> Response:
    model = find_model(body.model, gateway.settings, version_of(gateway.servers.schema))
    asked = body.request(gateway.settings.places)
    predictions = [
        PredictionRequest(
            key_id=key.id,
            inputs=inputs,
            model=gateway.settings.model,
            version=model.version,
            deployment=model.deployment,
            base_url=base_url(request),
            needs_client=True,
            request_id=request.state.request_id,
        )
        for inputs in asked.inputs
    ]
    choices = await Choices.create(gateway.predictions, predictions, asked)
    respond = _streamed if asked.stream else _whole
    try:
        return await respond(request, choices, asked, gateway.ping_interval)
    except BaseException:  # the client has left, or one of the choices failed
        await choices.cancel()
        raise


async def _whole(request: Request, choices: Choices, asked: CompletionRequest, _: float) -> Response:
    await while_connected(request.receive, choices.wait())
    body = Completion(asked.model, asked.is_chat).body(choices.all(), choices.usage())
    return Response(to_json(body), media_type="application/json")


async def _streamed(
    request: Request, choices: Choices, asked: CompletionRequest, ping_interval: float
) -> Response:
    """Wait for the first piece, because a failure before it can still become an HTTP status."""
    updates = choices.updates(ping_interval)
    first = await while_connected(request.receive, _first(updates))
    completion = Completion(asked.model, asked.is_chat)
    chunks = Chunks(completion, len(asked.inputs), include_usage=asked.include_usage)
    return CompletionStream(choices, _events(choices, chunks, first, updates))


async def _first(updates: AsyncGenerator[Update, None]) -> Update:
    async for update in updates:
        if update.text or update.ended:
            return update
    raise AssertionError("the last update of a choice has `ended` set")


async def _events(
    choices: Choices, chunks: Chunks, first: Update, updates: AsyncGenerator[Update, None]
) -> AsyncGenerator[bytes, None]:
    def event(update: Update) -> bytes:
        if update.ended:
            return chunks.last(update.index, choices.finish_reason(update.index))
        return chunks.text(update.index, update.text) if update.text else PING

    yield chunks.first() + event(first)
    try:
        async with aclosing(updates):
            async for update in updates:
                yield event(update)
    except Problem as problem:
        yield error_event(problem)
    else:
        yield chunks.end(choices.usage())


class CompletionStream(Response):
    """Sends the events of a stream. When the client leaves, its predictions are cancelled.

    Starlette's StreamingResponse writes the same, but starts several tasks per stream.
    """

    def __init__(self, choices: Choices, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._choices, self._events = choices, events

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientLeft):
                await while_connected(receive, self._send(send))
        finally:
            await self._choices.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refuse(request: Request) -> Response:
    path = request.url.path
    detail = f"{request.method} /v1{path} is not offered: {NOT_OFFERED[path.split('/')[1]]}."
    raise Problem(404, "Not found", detail, code="not_found")


for _name in NOT_OFFERED:
    for _path in (f"/{_name}", f"/{_name}/{{rest:path}}"):
        router.add_api_route(_path, _refuse, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
