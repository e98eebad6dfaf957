"""What OpenAI's clients are told when a prediction fails.

Maps the codes of `llama/errors.py` to statuses and codes of OpenAI's API. Knows nothing about HTTP.
"""

from __future__ import annotations

import re

from llama.errors import BudgetUsedUp
from llama.gateway.prediction import Prediction, Status
from llama.gateway.problems import Problem, over_budget

_LINE = re.compile(r"(E[0-9]{4}) [A-Za-z]+: .*")
_INVALID = {
    "E1001": "invalid_value",
    "E1002": "context_length_exceeded",
    "E1005": "invalid_value",
    "E1101": "invalid_value",
    "E1103": "unsupported_value",
}
# litellm recognizes a prompt that is too long by the first words, and langchain-openai by the last ones.
_TOO_LONG = "This model's maximum context length is exceeded: the prompt is too long."
_TEMPORARY = ("E2002", "E4")
"""The beginnings of the codes after which the same request may succeed soon."""


def failure(prediction: Prediction, *, is_chat: bool) -> Problem:
    """Return the problem of a prediction that failed or was cancelled."""
    if prediction.status is Status.CANCELED:
        return Problem(
            500,
            "Cancelled",
            "The completion was cancelled before its end.",
            code="cancelled",
            headers={"x-should-retry": "false"},  # it was cancelled on purpose, so a retry is not wanted
        )
    found = _LINE.search(prediction.error or "")
    line, code = (found[0], found[1]) if found else (prediction.error or "The completion failed.", "")
    if code.startswith("E1"):
        return Problem(
            400,
            "Invalid request",
            f"{_TOO_LONG} {line}" if code == "E1002" else line,
            code=_INVALID.get(code, "invalid_value"),
            param=_param(code, is_chat=is_chat),
        )
    if code == BudgetUsedUp.code:
        return over_budget(line)
    if code.startswith(_TEMPORARY):
        return Problem(503, "Service unavailable", line, code="service_unavailable")
    return Problem(500, "Internal server error", line, code="server_error")


def _param(code: str, *, is_chat: bool) -> str | None:
    if code in ("E1001", "E1002", "E1005"):
        return "messages" if is_chat else "prompt"
    return "min_tokens" if code == "E1101" else None
