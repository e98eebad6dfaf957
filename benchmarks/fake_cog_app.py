"""A fake of Cog's server as an ASGI application, with answers from a script instead of a model.

It implements the part of coglet 0.23 that the gateway uses: `/health-check`, `/openapi.json`, and
`POST /predictions` as a stream of events. `fake_cog.py` runs it.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from typing import Any

from benchmarks.fake_cog_script import Body, Counts, Received, Rules, Script, Served

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@functools.cache
def real_schema() -> Body:
    """Return the schema of `predict.py`, which the real server publishes."""
    from llama.serving.schema import openapi_schema
    from predict import Predictor

    return openapi_schema(Predictor.run)


class CogApp:
    """The server as an ASGI application. All methods run in one event loop."""

    def __init__(self, rules: Rules | None = None, on_death: Callable[[], None] = lambda: None) -> None:
        self.rules, self._on_death = rules or Rules(), on_death
        self.received, self.served = list[Received](), list[Served]()
        self.counts = Counts()
        self.dead = False
        self._released = asyncio.Event()
        self._ids = itertools.count(1)

    def release(self) -> None:
        """Let all held predictions go on."""
        self._released.set()
        self._released = asyncio.Event()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        request = Received(scope["method"], scope["path"], headers)
        while (message := await receive())["type"] == "http.request":
            request.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.received.append(request)
        if self.rules.frozen:
            await _disconnected(receive)
            return
        match request.method, request.path:
            case "GET", "/health-check":
                await _respond(send, 200, self._health())
            case "GET", "/openapi.json":
                schema = real_schema()
                info = {**schema["info"], "title": self.rules.title}
                await _respond(send, 200, self.rules.schema or {**schema, "info": info})
            case "POST", "/predictions":
                await self._predict(request, receive, send)
            case _:
                await _respond(send, 404, "")

    def _health(self) -> Body:
        free = self.counts.running < self.rules.places
        status = self.rules.health or ("READY" if free else "BUSY")
        failed = status == "SETUP_FAILED"
        setup = {"status": "failed" if failed else "succeeded", "logs": "E3001 WeightsNotFound: none\n"}
        return {"status": status, "setup": setup, "version": {"coglet": "0.23.1"}}

    async def _predict(self, request: Received, receive: Receive, send: Send) -> None:
        status, answer = self._refusal(request)
        if status:
            await _respond(send, status, answer)
            return
        script = self.rules.script
        if callable(script):
            script = script(request.inputs)
        served = Served(request.inputs)
        self.served.append(served)
        self.counts.running += 1
        self.counts.most_running = max(self.counts.most_running, self.counts.running)
        work = asyncio.ensure_future(self._stream(script, served, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if served.status == "running":
                self._end(served, "lost" if self.dead else "cancelled")
        finally:
            for task in (work, gone):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def _end(self, served: Served, status: str) -> None:
        served.status = status
        self.counts.running -= 1
        setattr(self.counts, status, getattr(self.counts, status) + 1)

    def _refusal(self, request: Received) -> tuple[int, Body | str]:
        """Return the status and the body with which a prediction is refused, or 0."""
        if self.rules.health in ("STARTING", "SETUP_FAILED", "DEFUNCT"):
            return 503, {"error": "Setup has not completed", "status": "failed"}
        if self.rules.refusal:
            return self.rules.refusal, ""
        try:
            inputs = json.loads(request.body)["input"]
        except (ValueError, TypeError, KeyError) as error:
            return 400, f"Failed to parse the request body as JSON: {error}"
        if detail := list(_invalid(inputs)):
            return 422, {"detail": detail}
        if self.rules.false_conflicts:
            self.rules.false_conflicts -= 1
        elif self.counts.running < self.rules.places:
            return 0, ""
        return 409, {"error": "At capacity - all prediction slots busy", "status": "failed"}

    async def _stream(self, script: Script, served: Served, send: Send) -> None:
        if script.hang:
            await asyncio.Event().wait()
        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        async for events in self._events(script, served):
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self, script: Script, served: Served) -> AsyncIterator[bytes]:
        prediction_id, started = f"pred_{next(self._ids):016x}", time.perf_counter()
        metrics: Body = {"input_token_count": len(str(served.inputs.get("prompt", "")).split())}
        yield _event("start", {"id": prediction_id, "status": "processing"})
        if not _fails_at_once(script):
            yield _metric("input_token_count", metrics["input_token_count"])
        if script.raw:
            yield script.raw
        if script.logs:
            yield _event("log", {"source": "stdout", "data": script.logs})
        for index, piece in enumerate(script.pieces):
            await self._pause(script, index, started)
            metrics["output_token_count"] = index + 1
            served.pieces += 1
            self.counts.pieces += 1
            yield _metric("output_token_count", index + 1) + _event(
                "output", {"chunk": piece, "index": index}
            )
        await self._pause(script, len(script.pieces), started, last=True)
        end: Body = {"id": prediction_id, "logs": script.logs, "output": list(script.pieces)}
        if script.error is None:
            self._end(served, "succeeded")
            metrics["finish_reason"] = script.finish_reason
            end["status"] = "succeeded"
        else:
            self._end(served, "failed")
            end |= {"status": "failed", "error": _error(script)}
        if _fails_at_once(script):
            del metrics["input_token_count"], end["output"]
        for name, value in metrics.items():
            yield _metric(name, value)
        metrics["predict_time"] = time.perf_counter() - started
        yield _event("completed", {**end, "metrics": metrics})

    async def _pause(self, script: Script, pieces: int, started: float, last: bool = False) -> None:
        """Do what the script says between two pieces."""
        if script.hold_after == pieces:
            await self._released.wait()
        if script.die_after == pieces:
            self._on_death()
            await asyncio.Event().wait()
        if script.gap and not last:
            # By the clock, so that late pieces do not delay the later ones.
            await asyncio.sleep(started + (pieces + 1) * script.gap - time.perf_counter())


_SSE_HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _respond(send: Send, status: int, body: Body | str) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    kind = b"text/plain; charset=utf-8" if isinstance(body, str) else b"application/json"
    headers = [(b"content-type", kind), (b"content-length", str(len(text.encode())).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _event(name: str, data: Body) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode()


def _metric(name: str, value: Any) -> bytes:
    return _event("metric", {"mode": "replace", "name": name, "value": value})


def _fails_at_once(script: Script) -> bool:
    """Whether the prediction is refused by the model's code, before it counts any token."""
    return script.error is not None and not script.pieces


def _error(script: Script) -> str:
    error = script.error or ""
    if not _fails_at_once(script):
        return f"Prediction failed: Generator iteration error: {error}"
    return f"Prediction failed: Async prediction failed: {error.split(':')[0].split(' ')[-1]}: {error}"


@functools.cache
def _input_validator() -> Any:
    from jsonschema import Draft7Validator

    properties = real_schema()["components"]["schemas"]["Input"]["properties"]
    return Draft7Validator({"type": "object", "properties": properties})


def _invalid(inputs: Any) -> Iterator[Body]:
    """Yield what Cog's server says about inputs that break the schema. It ignores unknown inputs."""
    for error in _input_validator().iter_errors(inputs):
        yield {"loc": ["body", "input", *error.path], "msg": error.message, "type": "value_error"}
