"""One streamed answer through each of the APIs that are compared, and when its text arrived.

Knows URLs and streams of events. Reads the bytes with little work, because it shares the machine with what it
measures. Knows nothing about what is behind an address.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import httpx2

MODEL = "meta/llama-2-70b-chat"
_TEXT_OF_COG = re.compile(rb"^event: output", re.MULTILINE)
_TEXT_OF_OPENAI = re.compile(rb'"content": ?"[^"]')


class Failed(Exception):
    """An answer failed; the message is what the server said."""


class Refused(Failed):
    """A server refused a request."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


@dataclass(frozen=True)
class Reading:
    """One answer. Times are in seconds of `time.perf_counter`."""

    asked: float
    first: float
    """When the first piece of text arrived."""
    ended: float
    text: str


def client(url: str, key: str | None = None) -> httpx2.AsyncClient:
    """Return a client of a server, with a key if one is needed."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx2.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False)


@dataclass(frozen=True)
class Question:
    """What is asked, in the words of both APIs."""

    prompt: str
    max_tokens: int | None = None
    """The exact number of tokens of the answer, if the server has a model."""

    def inputs(self) -> dict[str, Any]:
        exact = {"max_new_tokens": self.max_tokens, "min_new_tokens": self.max_tokens}
        inputs = {"prompt": self.prompt, "system_prompt": "", "temperature": 0}
        return {**inputs, **exact} if self.max_tokens else inputs

    def chat(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": MODEL, "stream": True, "temperature": 0}
        body["messages"] = [{"role": "user", "content": self.prompt}]
        return {**body, "max_tokens": self.max_tokens} if self.max_tokens else body


async def ask_cog(cog: httpx2.AsyncClient, question: Question) -> Reading:
    """Ask Cog's server, which in a burst of requests can refuse some of them although places are free."""
    asked = time.perf_counter()
    request = {"json": {"input": question.inputs()}, "headers": {"Accept": "text/event-stream"}}
    while True:
        try:
            body, first = await _read(cog, "POST", "/predictions", _TEXT_OF_COG, **request)
            break
        except Refused as error:
            if error.status != httpx2.codes.CONFLICT:
                raise
            await asyncio.sleep(0.005)
    text = "".join(json.loads(data)["chunk"] for name, data in _events(body) if name == "output")
    return Reading(asked, first, time.perf_counter(), text)


async def ask_replicate(gateway: httpx2.AsyncClient, question: Question) -> Reading:
    """Create a prediction in Replicate's API, and read the URL of its stream."""
    asked = time.perf_counter()
    response = await gateway.post(
        f"/v1/models/{MODEL}/predictions", json={"input": question.inputs(), "stream": True}
    )
    if not response.is_success:
        raise Refused(response.status_code, response.text)
    body, first = await _read(gateway, "GET", response.json()["urls"]["stream"], _TEXT_OF_COG)
    text = list[str]()
    for name, data in _events(body):
        if name == "error":
            raise Failed(data)
        text += [data] if name == "output" else []
    return Reading(asked, first, time.perf_counter(), "".join(text))


async def ask_openai(server: httpx2.AsyncClient, question: Question) -> Reading:
    """Ask for a streamed chat completion in OpenAI's API."""
    asked = time.perf_counter()
    body, first = await _read(server, "POST", "/v1/chat/completions", _TEXT_OF_OPENAI, json=question.chat())
    text = list[str]()
    for _, data in _events(body):
        if data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise Failed(data)
        text += [choice["delta"].get("content") or "" for choice in event["choices"]]
    return Reading(asked, first, time.perf_counter(), "".join(text))


Ask = Callable[[httpx2.AsyncClient, Question], Any]
"""`ask_cog`, `ask_replicate` or `ask_openai`."""


async def _read(
    server: httpx2.AsyncClient, method: str, url: str, text: re.Pattern[bytes], **request: Any
) -> tuple[bytes, float]:
    """Read a stream to its end. Returns its bytes, and when the first text had arrived."""
    body, first = bytearray(), 0.0
    async with server.stream(method, url, **request) as response:
        async for chunk in response.aiter_raw():
            body += chunk
            if not first and text.search(body):
                first = time.perf_counter()
        if not response.is_success:
            raise Refused(response.status_code, body.decode(errors="replace"))
    return bytes(body), first


def _events(body: bytes) -> Iterable[tuple[str, str]]:
    """The names and data of the events of a whole stream."""
    for event in body.decode().replace("\r\n", "\n").split("\n\n"):
        name, data = "message", list[str]()
        for line in event.split("\n"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
        if data:
            yield name, "\n".join(data)
