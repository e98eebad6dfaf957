"""What `docs/clients.md` says about parameters, defaults and errors, compared with the gateway."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateways import MODEL, Gateway

from benchmarks.fake_cog import FakeCog
from llama import ROOT
from llama.errors import EngineError, GatewayError, LlamaError, UserError
from llama.gateway.openai.errors import failure
from llama.gateway.openai.members import CHAT_VALUES, TEXT_VALUES, WITHOUT_EFFECT
from llama.gateway.openai.request import DEFAULT_TEXT_TOKENS, MAX_STOP_CHARACTERS, MAX_STOPS, ChatBody
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status
from llama.gateway.problems import over_budget, throttled
from llama.gateway.settings import GatewaySettings
from llama.serving.schema import input_properties
from predict import Predictor

GUIDE = (ROOT / "docs" / "clients.md").read_text("utf-8")


def section(title: str) -> str:
    _, _, rest = GUIDE.partition(f" {title}\n")
    assert rest, title
    return re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str, first_cell: str) -> list[list[str]]:
    """The rows of the table whose header begins with this cell."""
    _, _, rest = text.partition(f"| {first_cell} |")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# --- parameters


@pytest.mark.parametrize(("column", "values"), [(1, CHAT_VALUES), (2, TEXT_VALUES)], ids=["chat", "text"])
def test_the_guide_has_every_parameter_that_is_not_supported(
    column: int, values: dict[str, tuple[object]]
) -> None:
    documented = {}
    for row in rows(section("Parameters that are not supported"), "parameter"):
        for name in codes(row[0]):
            if row[column] != "not a parameter here (refused)":
                documented[name] = tuple(map(json.loads, codes(row[column])))
                assert documented[name] or row[column] == "no value (refused)"
    assert documented == values


def test_the_guide_has_every_parameter_that_is_accepted_without_effect() -> None:
    _, _, sentence = section("Parameters that are not supported").partition("have no effect: ")
    assert set(codes(sentence.partition(". ")[0])) == WITHOUT_EFFECT


def test_the_guide_has_the_defaults_of_both_apis() -> None:
    inputs, body = input_properties(Predictor.run), ChatBody.model_fields
    assert rows(section("Defaults"), "parameter") == [
        ["`temperature`", f"{body['temperature'].default:g}", str(inputs["temperature"]["default"])],
        ["`top_p`", f"{body['top_p'].default:g}", str(inputs["top_p"]["default"])],
        ["system prompt", "none", f"`{json.dumps(inputs['system_prompt']['default'])}`"],
        [
            "maximum length",
            f"the rest of the context; {DEFAULT_TEXT_TOKENS} tokens in `/v1/completions`",
            "512 tokens",
        ],
    ]
    stops = f"`stop` may have up to {MAX_STOPS} sequences of up to {MAX_STOP_CHARACTERS} characters each."
    assert stops in GUIDE
    assert f"`LLAMA_GATEWAY_PLACES` ({GatewaySettings().places})" in GUIDE


# --- errors


def error_codes(*bases: type[LlamaError]) -> set[str]:
    return {error.code for base in bases for error in base.__subclasses__()}


def failed(outcome: Outcome) -> Prediction:
    prediction = Prediction(PredictionRequest(key_id=1, inputs={}, model=MODEL))
    prediction.status, prediction.error = outcome.status, outcome.error
    return prediction


def test_the_guide_has_the_status_and_the_code_of_every_error() -> None:
    documented = set()
    for errors, status, code in rows(section("Errors and limits"), "error"):
        outcomes = [Outcome(Status.FAILED, f"{error} Name: what happened") for error in codes(errors)]
        for outcome in outcomes or [Outcome(Status.CANCELED)]:
            problem = failure(failed(outcome), is_chat=True)
            assert (problem.openai_status, problem.code) == (int(status), codes(code)[0]), errors
        documented |= set(codes(errors))
    assert documented == error_codes(UserError, EngineError, GatewayError)


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
PREDICTIONS = f"/v1/models/{MODEL}/predictions"
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "invalid JSON": ("POST", "/v1/predictions", {"content": "{"}),
    "invalid JSON for OpenAI": ("POST", "/v1/chat/completions", {"content": "{"}),
    "invalid value": ("POST", "/v1/chat/completions", {"json": {**CHAT, "n": 1000}}),
    "tools": ("POST", "/v1/chat/completions", {"json": {**CHAT, "tools": [{}]}}),
    "wrong key": ("GET", "/v1/models", {"headers": {"Authorization": "Bearer wrong"}}),
    "unknown prediction": ("GET", "/v1/predictions/none", {}),
    "unknown endpoint": ("POST", "/v1/embeddings", {"json": {}}),
    "unknown model": ("POST", "/v1/chat/completions", {"json": {**CHAT, "model": "none"}}),
    "another site": ("POST", "/page/login", {"json": {}, "headers": {"Origin": "http://other.example"}}),
    "large body": ("POST", "/v1/models", {"content": b" " * 1_000_001}),
    "invalid input": ("POST", PREDICTIONS, {"json": {"input": {"prompt": 1}}}),
    "unknown version": ("POST", "/v1/predictions", {"json": {"version": "0" * 64, "input": {}}}),
}


def names(response: httpx2.Response) -> set[str]:
    """The title and the code of a refusal. Each API has one of them, and some paths have both."""
    body = response.json()
    return {body.get("title"), body.get("error", {}).get("code")} - {None}


def test_the_guide_has_the_titles_and_the_codes_of_refused_requests(
    gateway: Gateway, gateways: Callable[..., Gateway], cog: FakeCog, tmp_path: Path
) -> None:
    seen: dict[str, set[str]] = {}
    for method, path, request in REFUSED.values():
        response = gateway.client.request(method, path, **request)
        seen.setdefault(str(response.status_code), set()).update(names(response))
    without_key = gateways(cog.url, key=None, database=tmp_path / "without-key.sqlite3")
    response = without_key.client.get("/v1/models", headers={"Host": "other.example"})
    seen[str(response.status_code)] |= names(response)
    for problem in (throttled("", 1), over_budget("")):
        seen[str(problem.status)] = {problem.title, str(problem.code)}

    table = rows(section("Errors and limits"), "status")
    documented: dict[str, set[str]] = {}
    for row in table:
        documented.setdefault(row[0], set()).update(codes(row[1]) + codes(row[2]))
    assert seen == {status: expected for status, expected in documented.items() if status != "503"}
