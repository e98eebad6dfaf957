"""What the gateway knows about its model, in the words of Replicate's and OpenAI's catalogs.

The version's id is a hash of the schema that the server publishes, so it changes when the inputs change.
Knows bodies. Knows nothing about HTTP, and does not know which server published the schema.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from referencing.jsonschema import EMPTY_REGISTRY

_COG_VERSION = "0.23.1"  # for a schema without a usable version
_MINIMUM_COG_VERSION = (0, 3, 9)  # Replicate's Python client fails with older ones
RELEASED_AT = datetime(2023, 7, 18, tzinfo=UTC)  # the release of Llama 2; a time that never changes
_DESCRIPTION = "A language model for dialogues, served by this gateway"

_NOTHING_ELSE = EMPTY_REGISTRY
"""By default, the validator would fetch the URLs that a schema refers to."""
_SAMPLES = (None, True, 0, 0.5, "x", ["x"], {"x": "x"})

_versions_by_schema = dict[int, tuple[dict[str, Any], "ModelVersion"]]()
"""By the id of the schema's object, which is kept, so that no other object can get the same id."""
_MAX_SCHEMAS = 4
_MAX_REASON = 200  # characters


@dataclass(frozen=True)
class ModelVersion:
    """The version of the model that the servers run."""

    id: str
    schema: dict[str, Any]
    """The server's OpenAPI document."""
    input_validator: Any = field(repr=False)
    """A jsonschema validator of the inputs."""

    def body(self, named: str | None = None) -> dict[str, Any]:
        """Replicate's object of this version, under the id that the client used for it."""
        return {
            "id": named or self.id,
            "created_at": timestamp(RELEASED_AT.timestamp()),
            "cog_version": _cog_version(self.schema),
            "openapi_schema": self.schema,
        }


def version_of(schema: dict[str, Any] | None) -> ModelVersion | None:
    """Return the version with this OpenAPI document; None if no server has published one yet."""
    if schema is None:
        return None
    if id(schema) not in _versions_by_schema:  # a request asks several times, and a schema is long
        if len(_versions_by_schema) >= _MAX_SCHEMAS:
            _versions_by_schema.clear()
        _versions_by_schema[id(schema)] = (schema, _version_of(json.dumps(schema)))
    return _versions_by_schema[id(schema)][1]


def check_schema(schema: Any) -> None:
    """Raises ValueError if the gateway cannot use this OpenAPI document: if it does not describe a prompt, or
    if inputs cannot be validated with it or clients cannot get it as JSON."""
    try:
        inputs = schema["components"]["schemas"]["Input"]
        names = ["prompt", *inputs["properties"]]
        inputs["properties"]["prompt"], schema.get("info", {}).items()
        Draft202012Validator.check_schema(inputs)
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
        version = _version_of(json.dumps(schema))
        version.body()
        for value in ({}, *({name: sample} for name in names for sample in _SAMPLES)):
            list(version.input_validator.iter_errors(value))
    except Exception as error:  # whatever is wrong with it, such as a pattern or a reference to itself
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise ValueError(f"{type(error).__name__}: {reason}") from error


def is_version(name: str, accepted: Collection[str], version: ModelVersion | None) -> bool:
    """Whether a client can use `name` as a version's id. `accepted`: the ids beside the version's own."""
    return name in accepted or (version is not None and name == version.id)


@lru_cache(maxsize=4)
def _version_of(text: str) -> ModelVersion:
    schema = json.loads(text)
    # `cog build` writes the same schema in another order, and whole numbers without a fraction.
    canonical = json.dumps(json.loads(text, parse_float=_number), sort_keys=True, separators=(",", ":"))
    input_schema = {"$ref": "#/components/schemas/Input", "components": schema["components"]}
    validator = Draft202012Validator(input_schema, registry=_NOTHING_ELSE)
    return ModelVersion(hashlib.sha256(canonical.encode()).hexdigest(), schema, validator)


def _number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


def _cog_version(schema: dict[str, Any]) -> str:
    version = str(schema.get("info", {}).get("version", ""))
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    usable = numbers is not None and tuple(map(int, numbers.groups())) >= _MINIMUM_COG_VERSION
    return version if usable else _COG_VERSION


def model_body(name: str, base: str, version: ModelVersion | None, run_count: int) -> dict[str, Any]:
    """One object that is both Replicate's and OpenAI's description of the model."""
    owner, short_name = name.split("/")
    return {
        **openai_card(name),
        "url": f"{base}/v1/models/{name}",
        "owner": owner,
        "name": short_name,
        "description": _DESCRIPTION,
        "visibility": "public",
        "github_url": None,
        "paper_url": None,
        "license_url": None,
        "run_count": run_count,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": version.body() if version else None,
    }


def openai_card(name: str) -> dict[str, Any]:
    """OpenAI's description of the model."""
    return {
        "id": name,
        "object": "model",
        "created": int(RELEASED_AT.timestamp()),
        "owned_by": name.partition("/")[0],
    }


def timestamp(seconds: float) -> str:
    """Write a Unix time as RFC 3339 in UTC, with a Z at the end."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
