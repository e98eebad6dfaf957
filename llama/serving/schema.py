"""Generates `.cog/openapi_schema.json` for `Predictor.run`, as `cog build` does.

Cog's server reads this file but does not create it, so a run without Docker needs this module. The document
has the same structure as that of Cog's generator (pkg/schema in Cog's source). Knows signatures and OpenAPI.
"""

from __future__ import annotations

import inspect
import json
import os
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cog

from llama.errors import BadSettings

_JSON_TYPES: dict[Any, str] = {
    bool: "boolean",
    float: "number",
    int: "integer",
    str: "string",
    dict: "object",
}
_REF = "#/components/schemas/"


def openapi_schema(run: Callable[..., object]) -> dict[str, Any]:
    """Return the OpenAPI 3.0.2 document of a streaming `run` method that yields text."""
    schemas = {
        "Input": _object("Input", input_properties(run)),
        "Output": {
            "title": "Output",
            "type": "array",
            "items": {"type": "string"},
            "x-cog-array-type": "iterator",
            "x-cog-array-display": "concatenate",
        },
        "PredictionRequest": _object(
            "PredictionRequest", {"id": _titled("Id", "string"), "input": {"$ref": _REF + "Input"}}
        ),
        "PredictionResponse": _object("PredictionResponse", _response_properties()),
        "Status": {
            "title": "Status",
            "description": "An enumeration.",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
            "type": "string",
        },
        "HTTPValidationError": _object(
            "HTTPValidationError",
            {"detail": {"title": "Detail", "type": "array", "items": {"$ref": _REF + "ValidationError"}}},
        ),
        "ValidationError": _validation_error(),
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": cog.__version__},
        "paths": _paths(),
        "components": {"schemas": schemas},
    }


def write_schema(run: Callable[..., object], root: Path) -> Path:
    """Write the document to `root/.cog/openapi_schema.json`, where Cog's server reads it.

    Returns the path. An identical file is left as it is. Raises BadSettings if the file cannot be written.
    """
    path = root / ".cog" / "openapi_schema.json"
    text = json.dumps(openapi_schema(run), indent=2) + "\n"
    with suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == text:
            return path
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise BadSettings(
            f"{path} cannot be written ({error.strerror}); give this user write access to {path.parent}, or "
            "run `python -m llama schema` once as a user who has it"
        ) from error
    return path


def input_defaults(run: Callable[..., object]) -> dict[str, Any]:
    """Return the published default of every input, by name."""
    return {name: parameter.default.default for name, parameter in _inputs(run)}


def input_properties(run: Callable[..., object]) -> dict[str, Any]:
    """Return the JSON schema of every input, by name, in the order of the signature."""
    hints = typing.get_type_hints(run)
    properties = {}
    for order, (name, parameter) in enumerate(_inputs(run)):
        field = parameter.default
        schema, nullable = _type_schema(hints[name])
        properties[name] = {
            "title": " ".join(part[:1].upper() + part[1:] for part in name.split("_")),
            **schema,
            "default": field.default,
            "description": field.description,
            "x-order": order,
            **({"nullable": True} if nullable else {}),
            **({"minimum": field.ge} if field.ge is not None else {}),
            **({"maximum": field.le} if field.le is not None else {}),
            **({"deprecated": True} if field.deprecated else {}),
        }
    return properties


def _inputs(run: Callable[..., object]) -> list[tuple[str, inspect.Parameter]]:
    return [item for item in inspect.signature(run).parameters.items() if item[0] != "self"]


def _type_schema(hint: Any) -> tuple[dict[str, Any], bool]:
    """Return the JSON schema of an annotation, and whether it allows None."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _type_schema(inner)[0], True
    if typing.get_origin(hint) is list:
        return {"type": "array", "items": _type_schema(arguments[0])[0]}, False
    return {"type": _JSON_TYPES[hint]}, False


def _titled(title: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"title": title, "type": kind, **more}


def _object(title: str, properties: dict[str, Any]) -> dict[str, Any]:
    return {"title": title, "type": "object", "properties": properties}


def _response_properties() -> dict[str, Any]:
    times = ("created_at", "started_at", "completed_at")
    return {
        "input": {"$ref": _REF + "Input"},
        "output": {"$ref": _REF + "Output"},
        "id": _titled("Id", "string"),
        "version": _titled("Version", "string"),
        **{name: _titled(name.replace("_", " ").title(), "string", format="date-time") for name in times},
        **{name: _titled(name.title(), "string") for name in ("status", "error", "logs")},
        "metrics": _titled("Metrics", "object"),
    }


def _validation_error() -> dict[str, Any]:
    location = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    return {
        **_object(
            "ValidationError",
            {
                "loc": _titled("Location", "array", items=location),
                "msg": _titled("Message", "string"),
                "type": _titled("Error Type", "string"),
            },
        ),
        "required": ["loc", "msg", "type"],
    }


def _paths() -> dict[str, Any]:
    ok = {"200": _response({})}
    invalid = {"422": _response({"$ref": _REF + "HTTPValidationError"}, "Validation Error")}
    predict = {
        "summary": "Predict",
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": {"content": _json({"$ref": _REF + "PredictionRequest"})},
        "responses": {"200": _response({"$ref": _REF + "PredictionResponse"}), **invalid},
        "x-cog-streaming": True,
    }
    cancel = {
        "summary": "Cancel",
        "operationId": "cancel_predictions__prediction_id__cancel_post",
        "parameters": [
            {
                "required": True,
                "schema": _titled("Prediction Id", "string"),
                "name": "prediction_id",
                "in": "path",
            }
        ],
        "responses": {**ok, **invalid},
    }
    return {
        "/": {"get": {"summary": "Root", "operationId": "root__get", "responses": ok}},
        "/health-check": {
            "get": {
                "summary": "Healthcheck",
                "operationId": "healthcheck_health_check_get",
                "responses": ok,
            }
        },
        "/predictions": {"post": predict},
        "/predictions/{prediction_id}/cancel": {"post": cancel},
    }


def _response(schema: dict[str, Any], description: str = "Successful Response") -> dict[str, Any]:
    return {"description": description, "content": _json(schema)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
