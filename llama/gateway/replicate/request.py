"""Reads what a client of Replicate's API sends: the body and the headers of a create.

Returns typed objects, or raises Problem in Replicate's words. Knows nothing about queues or servers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama.gateway.model_card import ModelVersion, is_version
from llama.gateway.prediction import Webhook
from llama.gateway.problems import Problem
from llama.gateway.settings import GatewaySettings, Network
from llama.gateway.stop_sequences import join_stops
from llama.gateway.webhooks.outgoing import check_url

ALL_EVENTS = frozenset({"start", "output", "logs", "completed"})
MAX_WAIT = 60.0  # seconds
_MIN_CANCEL_AFTER = 5  # seconds
_MAX_ERRORS = 20
_MAX_EVENTS = 20  # each of the four may be repeated
_MAX_ITEMS = 4096
"""How long a list in the inputs can be. The model's context has as many tokens, and each message takes at
least one. Checking a longer list would delay all other requests."""
_WAIT = re.compile(r'\s*wait\s*(?:=\s*"?([0-9]{1,9})"?\s*)?(?:;.*)?', re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"([0-9]{1,9})|(?=[0-9])(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,9})s)?")
_JSON_TYPES = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True)

    input: dict[str, Any]
    version: str | None = None
    webhook: str | None = None
    webhook_completed: str | None = None
    webhook_events_filter: list[Literal["start", "output", "logs", "completed"]] | None = Field(
        None, max_length=_MAX_EVENTS, fail_fast=True
    )


@dataclass(frozen=True)
class Creation:
    """The body of a create."""

    inputs: dict[str, Any]
    """The inputs in the form that a server accepts."""
    version: str | None
    """What the body names as its version."""
    webhook: Webhook | None


def read_creation(body: object, version: ModelVersion | None, networks: Sequence[Network]) -> Creation:
    """Read a body. If `version` is None, only the server checks the inputs. Raises Problem 422."""
    try:
        parsed = _Body.model_validate(body)
    except ValidationError as error:
        raise _invalid([_body_error(details) for details in error.errors()]) from error
    if too_long := [*_lists_that_are_too_long(parsed.input)]:
        raise _invalid(too_long)
    inputs = _server_inputs(parsed.input)
    if version is not None:
        errors = list(islice(version.input_validator.iter_errors(inputs), _MAX_ERRORS))
        if errors:
            raise _invalid(_input_error(error) for error in sorted(errors, key=lambda e: [*map(str, e.path)]))
    return Creation(inputs, parsed.version, _webhook(parsed, networks))


def version_id(named: str, settings: GatewaySettings, version: ModelVersion | None) -> str:
    """Return the id of the version that a client named, or "hidden" if it named only the model.

    Takes `id`, `owner/name:id` and `owner/name`. Raises Problem 422 for another version.
    """
    if named == settings.model:
        return "hidden"
    bare = named.removeprefix(f"{settings.model}:")
    if is_version(bare, settings.versions, version):
        return bare
    raise Problem(
        422,
        "Invalid version or not permitted",
        "The specified version does not exist (or perhaps you don't have permission to use it?)",
    )


def missing_version() -> Problem:
    return _invalid([_error("required", "version", "version is required")])


def wait_seconds(headers: Iterable[str]) -> float | None:
    """Return the seconds of the preference `wait` in `Prefer` headers; None without it.

    A preference that cannot be read is ignored, as RFC 7240 says.
    """
    for preference in ",".join(headers).split(","):
        match = _WAIT.fullmatch(preference)
        if match and match[1] is None:
            return MAX_WAIT
        if match and int(match[1]) > 0:
            return min(float(match[1]), MAX_WAIT)
    return None


def cancel_after_seconds(header: str | None) -> float | None:
    """Return the seconds of a `Cancel-After` header, such as `30`, `90s`, `5m` or `1h30m45s`.

    Raises Problem 422 if it cannot be read, or is less than 5 seconds.
    """
    if header is None:
        return None
    match = _DURATION.fullmatch(header.strip())
    number, hours, minutes, seconds = (int(group or 0) for group in match.groups()) if match else (0, 0, 0, 0)
    total = number + hours * 3600 + minutes * 60 + seconds
    if total < _MIN_CANCEL_AFTER:
        description = "must be a duration of at least 5 seconds, such as 30, 30s, 5m or 1h30m45s"
        raise _invalid([_error("invalid_value", "Cancel-After", description)])
    return float(total)


def _lists_that_are_too_long(inputs: dict[str, Any]) -> Iterable[dict[str, str]]:
    for name in ("messages", "stop_sequences"):  # the only inputs that may be lists
        if isinstance(inputs.get(name), list) and len(inputs[name]) > _MAX_ITEMS:
            yield _error("array_max_items", f"input.{name}", f"Must have at most {_MAX_ITEMS} items")


def _server_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    # Cog refuses a null even where an input is optional. `stream` is LiteLLM's, which streams by polling.
    kept = {name: value for name, value in inputs.items() if value is not None and name != "stream"}
    stops = kept.get("stop_sequences")
    if isinstance(stops, list) and all(isinstance(stop, str) for stop in stops):
        kept["stop_sequences"] = join_stops(stops)
    return kept


def _webhook(body: _Body, networks: Sequence[Network]) -> Webhook | None:
    name = "webhook" if body.webhook is not None else "webhook_completed"
    url = getattr(body, name)
    if url is None:
        return None
    try:
        check_url(url, networks)
    except ValueError as error:
        raise _invalid([_error("invalid_value", name, str(error))]) from error
    if name == "webhook_completed":  # the old name, for the end only
        return Webhook(url, frozenset({"completed"}))
    return Webhook(url, frozenset(body.webhook_events_filter or ALL_EVENTS))


def _invalid(errors: Iterable[dict[str, str]]) -> Problem:
    errors = list(errors)
    detail = "".join(f"- {error['field']}: {error['description']}\n" for error in errors)
    return Problem(422, "Input validation failed", detail, members={"invalid_fields": errors})


def _error(kind: str, field: str, description: str) -> dict[str, str]:
    return {"type": kind, "field": field, "description": description}


def _body_error(details: Any) -> dict[str, str]:
    field = ".".join(map(str, details["loc"])) or "body"
    if details["type"] == "missing":
        return _error("required", field, f"{field} is required")
    if field == "body":
        return _error("invalid_type", field, "must be a JSON object with the member `input`")
    return _error("invalid_type", field, details["msg"])


def _input_error(error: Any) -> dict[str, str]:
    """One error of jsonschema in the words of Replicate's own validator. It does not quote the input."""
    field = ".".join(["input", *map(str, error.path)])
    limit = error.validator_value
    match error.validator:
        case "required":
            missing = next(name for name in limit if name not in error.instance)
            return _error("required", field, f"{missing} is required")
        case "type":
            given = _JSON_TYPES.get(type(error.instance), "unknown")
            return _error("invalid_type", field, f"Invalid type. Expected: {limit}, given: {given}")
        case "minimum":
            return _error("number_gte", field, f"Must be greater than or equal to {limit:g}")
        case "maximum":
            return _error("number_lte", field, f"Must be less than or equal to {limit:g}")
        case "enum":
            allowed = ", ".join(map(str, limit))
            return _error("enum", field, f"Must be one of the following: {allowed}")
    return _error(str(error.validator), field, f"does not match the schema's `{error.validator}`")
