"""What the routes of both APIs take from a request: the gateway, the key, the base URL and the body."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from pydantic_core import from_json

from llama.gateway.gateway import Gateway
from llama.gateway.http.base_url import base_url_of
from llama.gateway.problems import Problem
from llama.gateway.storage.keys import Key

_LARGE_NUMBER = re.compile(rb"[0-9][eE]|[0-9]{300}")
"""What every number has that is too large for a float."""


# Every dependency is a coroutine function: FastAPI would run a plain function in a thread, which takes far
# longer than the function itself.
async def gateway(request: Request) -> Gateway:
    return cast("Gateway", request.app.state.gateway)


async def current_key(request: Request) -> Key:
    """The key that the middleware found."""
    return cast("Key", request.state.key)


def base_url(request: Request) -> str:
    """The gateway's address as the client sees it, without a slash at the end."""
    return base_url_of(request.scope, request.app.state.gateway.settings)


async def _base_url(request: Request) -> str:
    return base_url(request)


async def json_body(request: Request) -> Any:
    """The body as JSON, whatever its content type says: curl sends JSON as a form unless told otherwise.

    Raises Problem 400 if it is not JSON, as `NaN` and lone surrogates are not, or if it contains a number
    that is too large for a float.
    """
    try:
        content = await request.body()
        body = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise _invalid_json(f"The body of the request is not valid JSON: {error}") from error
    if _LARGE_NUMBER.search(content):
        try:
            json.dumps(body, allow_nan=False)  # 1e999 was read as infinity
        except ValueError as error:
            raise _invalid_json("The body of the request contains a number that is too large.") from error
    return body


def _invalid_json(detail: str) -> Problem:
    return Problem(400, "Bad request", detail, code="invalid_json")


CurrentGateway = Annotated[Gateway, Depends(gateway)]
CurrentKey = Annotated[Key, Depends(current_key)]
BaseUrl = Annotated[str, Depends(_base_url)]
