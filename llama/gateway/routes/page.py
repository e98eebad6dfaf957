"""The page at `/`, and what only the page asks for: its files, its session, the key's usage and Markdown.

Everything else that the page does uses Replicate's API. The page's address may have a path prefix that a
proxy removes, so it contains relative URLs only.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

from fastapi import APIRouter, Request, Response

from llama.gateway.access.budgets import has_budget
from llama.gateway.access.sessions import SECONDS
from llama.gateway.gateway import Gateway
from llama.gateway.http.authentication import key_of
from llama.gateway.http.disconnect import while_connected
from llama.gateway.http.same_origin import check_same_origin
from llama.gateway.page.files import INDEX, PageFile
from llama.gateway.page.renderer import MAX_CHARACTERS, MarkdownRenderer, TooComplex, TooManyTexts
from llama.gateway.problems import Problem, not_found, throttled
from llama.gateway.routes.dependencies import CurrentGateway, CurrentKey, base_url, json_body
from llama.gateway.storage.keys import Key
from llama.gateway.storage.usage_table import Column
from llama.gateway.usage_report import PricedUsage, total, with_prices

router = APIRouter()


@router.get("/")
async def get_page(request: Request) -> Response:
    return _file(request, INDEX)


@router.get("/page/static/{name:path}")
async def get_page_file(name: str, request: Request) -> Response:
    # The page's relative URLs do not work at this address.
    if name == INDEX:
        raise not_found()
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    file: PageFile | None = request.app.state.page.get(name)
    if file is None:
        raise not_found()
    # Browsers then ask at every use whether there is a new version.
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    known = request.headers.get("if-none-match", "").split(",")
    if file.etag in (tag.strip().removeprefix("W/") for tag in known):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers={**headers, "Content-Type": file.media_type})


@router.get("/favicon.ico")
async def get_favicon() -> Response:
    """Browsers request this icon at every address except the page's own, which names another icon."""
    return Response(status_code=204, headers={"Cache-Control": "max-age=86400"})


@router.get("/page/session")
async def get_session(request: Request, gateway: CurrentGateway) -> dict[str, Any]:
    prices = gateway.settings.prices
    return {
        "key": await _key_name(request, gateway),
        "needs_key": not await gateway.keys.is_open(),
        "model": gateway.settings.model,
        "notice": gateway.settings.notice,
        "prices": {"input": float(prices.input), "output": float(prices.output)},
    }


async def _key_name(request: Request, gateway: Gateway) -> str | None:
    try:
        return (await key_of(request.scope, gateway)).name
    except Problem as problem:
        if problem.status in (401, 403):
            return None
        raise


@router.post("/page/login")
async def log_in(request: Request, gateway: CurrentGateway) -> Response:
    # Another site must not log in a browser with its own key: it could then read what the user asks.
    check_same_origin(request.scope, gateway.settings)
    token = await gateway.sessions.log_in((await _text(request, "key")).strip())
    response = Response(status_code=204)
    if token is not None:
        response.set_cookie(gateway.sessions.cookie, token, max_age=SECONDS, **_cookie_attributes(request))
    return response


@router.post("/page/logout")
async def log_out(request: Request, gateway: CurrentGateway) -> Response:
    check_same_origin(request.scope, gateway.settings)
    response = Response(status_code=204)
    response.delete_cookie(gateway.sessions.cookie, **_cookie_attributes(request))
    return response


def _cookie_attributes(request: Request) -> dict[str, Any]:
    """The attributes of a cookie for the address at which the browser shows the page."""
    scheme, _, address = base_url(request).partition("://")
    host, _, path = address.partition("/")
    origin = request.headers.get("origin", "").lower()
    # The page may be open at another address than LLAMA_GATEWAY_PUBLIC_URL, or a proxy may end TLS silently.
    if origin.startswith(("http://", "https://")) and origin != f"{scheme}://{host}".lower():
        scheme, path = origin.partition("://")[0], ""
    return {"secure": scheme.lower() == "https", "path": f"/{path}", "httponly": True, "samesite": "strict"}


@router.post("/page/markdown")
async def render_markdown(request: Request, key: CurrentKey) -> dict[str, str]:
    text = await _text(request, "text")
    if len(text) > MAX_CHARACTERS:
        detail = f"`text` has {len(text)} characters, but at most {MAX_CHARACTERS} can be rendered."
        raise Problem(413, "Request entity too large", detail, code="text_too_long", param="text")
    renderer: MarkdownRenderer = request.app.state.markdown
    try:
        return {"html": await while_connected(request.receive, renderer.html_of(text, key.id))}
    except TooComplex as error:
        detail = "The Markdown in `text` takes too long to render. Show it as plain text."
        raise _invalid(detail, "text_too_complex", "text") from error
    except TooManyTexts as error:
        detail = "Too many texts of this key wait to be rendered. Show this one as plain text, or try again."
        raise throttled(detail, 2) from error


async def _text(request: Request, name: str) -> str:
    """Return a member of the body. Raises Problem 422 if it is not a string."""
    body = await json_body(request)
    text = body.get(name) if isinstance(body, dict) else None
    if not isinstance(text, str):
        detail = f"The body must be a JSON object whose member `{name}` is a string."
        raise _invalid(detail, "invalid_type", name)
    return text


def _invalid(detail: str, code: str, param: str) -> Problem:
    return Problem(422, "Input validation failed", detail, code=code, param=param)


@router.get("/page/usage")
async def get_usage(gateway: CurrentGateway, key: CurrentKey, since: str | None = None) -> dict[str, Any]:
    first = _day(since)
    columns = (Column.DAY, Column.MODEL)
    sums = await gateway.storage.run(lambda store: store.usage.sums(columns, key_id=key.id, since=first))
    lines = with_prices(sums, gateway.settings.prices)
    return {
        "since": first.isoformat(),
        "rows": [{"day": line.of[0], "model": line.of[1], **_numbers(line)} for line in lines],
        "total": _numbers(total(lines)),
        "budget": await _budget(gateway, key),
    }


def _day(text: str | None) -> date:
    """Read the day from which usage is wanted. The default is the first day of this month in UTC."""
    if text is None:
        return datetime.now(UTC).date().replace(day=1)
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        detail = "`since` must be a day such as 2025-01-31."
        raise Problem(400, "Bad request", detail, code="invalid_value", param="since") from error


def _numbers(line: PricedUsage) -> dict[str, float]:
    return {
        "predictions": line.predictions,
        "input_tokens": line.input_tokens,
        "output_tokens": line.output_tokens,
        "seconds": line.seconds,
        "price": float(line.price),
    }


async def _budget(gateway: Gateway, key: Key) -> dict[str, float | None] | None:
    if not has_budget(key):
        return None
    spent, limits = await gateway.budgets.spent(key, gateway.predictions.unfinished), key.limits
    return {
        "tokens": limits.monthly_tokens,
        "dollars": None if limits.monthly_dollars is None else float(limits.monthly_dollars),
        "tokens_used": spent.tokens,
        "dollars_used": float(spent.dollars),
    }
