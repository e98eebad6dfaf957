"""The members of OpenAI's request bodies that this gateway does not implement.

A member that changes nothing is accepted: hints, labels, and values that mean "off". Anything else is refused
by name, because a client that asked for a tool or a JSON schema cannot use an answer without it. Knows names
and values; knows nothing about the members that are implemented.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llama.errors import json_type
from llama.gateway.problems import Problem

WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "store",
        "user",
    }
)
"""Members that are accepted with any value and have no effect."""

ACCEPTED_VALUES: Mapping[str, tuple[Any, ...]] = {
    # These two come before the members that refer to them, so that errors name these.
    "tools": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
}
"""Unsupported members, and the values of them that are accepted because they change nothing."""

CHAT_VALUES: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    **ACCEPTED_VALUES,
    "audio": (),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
# In text completions, `logprobs` is the number of log probabilities, so 0 does not mean "off".
TEXT_VALUES: Mapping[str, tuple[Any, ...]] = {
    **ACCEPTED_VALUES,
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "an array",
    "model_type": "an object",
    "string_type": "a string",
}
_EXPECTED_OF = {"stop": "a string or an array of strings", "prompt": "a string or an array of strings"}
_FORMATS = ("json_object", "json_schema")
_QUOTED_UP_TO = 2**63


def invalid(param: str, detail: str, code: str = "invalid_value") -> Problem:
    """A request whose parameter `param` cannot be used."""
    return Problem(400, "Invalid request", detail, code=code, param=param)


def unsupported(param: str, detail: str) -> Problem:
    """A request for something that this gateway cannot do."""
    return invalid(param, detail, code="unsupported_parameter")


def unknown(param: str) -> Problem:
    """A member that OpenAI's API does not have."""
    param = param[:100]
    return invalid(param, f"Unrecognized request argument supplied: {param}", code="unknown_parameter")


def implemented(body: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return the members that are not null and not accepted without effect.

    `values` are the unsupported members with their accepted values. Raises Problem for any other value.
    """
    for name, accepted in values.items():
        value = body.get(name)
        if value is not None and value not in accepted:
            detail = f"Unsupported parameter: {_named(name, value)} is not supported with this model."
            raise unsupported(name, detail)
    ignored = WITHOUT_EFFECT | values.keys()
    return {name: value for name, value in body.items() if value is not None and name not in ignored}


def _named(name: str, value: Any) -> str:
    # The words by which langchain-openai recognizes that it should not ask for a JSON schema.
    if name == "response_format" and isinstance(value, dict) and value.get("type") in _FORMATS:
        return f"'{name}' of type '{value['type']}'"
    return f"'{name}'"


def explain(error: ValidationError) -> Problem:
    """Describe the first fault of a body in OpenAI's words. It quotes numbers, but never a text."""
    first = error.errors(include_url=False)[0]
    member, kind, value = str(first["loc"][0]), first["type"], first["input"]
    param = member + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:]
    )
    if kind == "missing":
        return invalid(param, f"Missing required parameter: '{param}'.", code="missing_required_parameter")
    if kind == "value_error":  # raised by a validator of the body, in words for the client
        return invalid(param, f"Invalid '{param}': {first['msg'].removeprefix('Value error, ')}")
    if expected := _EXPECTED.get(kind):
        expected = _EXPECTED_OF.get(param, expected)
        detail = f"Invalid type for '{param}': expected {expected}, but got {json_type(value)}."
        return invalid(param, detail, code="invalid_type")
    got = f", but it is {value!r}" if _is_short_number(value) else ""
    return invalid(param, f"Invalid '{param}': it {first['msg'].removeprefix('Input ')}{got}.")


def _is_short_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= _QUOTED_UP_TO)
