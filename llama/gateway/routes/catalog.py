"""What both APIs say about the model, and what Replicate's says about deployments and the account.

There is one model with one version, which also has the ids that Replicate published. The bodies of the model
are in `model_card.py`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from llama.gateway.gateway import Gateway
from llama.gateway.model_card import (
    RELEASED_AT,
    ModelVersion,
    is_version,
    model_body,
    openai_card,
    timestamp,
    version_of,
)
from llama.gateway.problems import Problem, not_found
from llama.gateway.routes.dependencies import BaseUrl, CurrentGateway, CurrentKey

_HARDWARE = {"name": "The operator's own servers", "sku": "own"}
_COLLECTION = {
    "name": "Language models",
    "slug": "language-models",
    "description": "The language models of this gateway",
}

router = APIRouter()


def _page(results: list[Any]) -> dict[str, Any]:
    return {"next": None, "previous": None, "results": results}


def _known_version(gateway: Gateway) -> ModelVersion:
    version = version_of(gateway.servers.schema)
    if version is None:
        raise Problem(
            503,
            "Model not ready",
            "No server has been ready yet, so the model's inputs are unknown. Start a server and try again.",
            code="model_not_ready",
        )
    return version


def _model(gateway: Gateway, base: str) -> dict[str, Any]:
    version, run_count = version_of(gateway.servers.schema), gateway.predictions.created
    return model_body(gateway.settings.model, base, version, run_count)


def _check_model(gateway: Gateway, owner: str, name: str) -> None:
    if f"{owner}/{name}" != gateway.settings.model:
        raise not_found()


@router.get("/models")
async def list_models(gateway: CurrentGateway, base: BaseUrl) -> dict[str, Any]:
    """One body for both APIs: OpenAI's clients read `data`, Replicate's read `results`."""
    cards = [openai_card(name) for name in (gateway.settings.model, *gateway.settings.aliases)]
    return {"object": "list", "data": cards, **_page([_model(gateway, base)])}


@router.api_route("/models", methods=["QUERY"])
async def query_models(request: Request, gateway: CurrentGateway, base: BaseUrl) -> dict[str, Any]:
    """Search the models. The body is the text to search for; some clients send it as a JSON string."""
    text = (await request.body()).decode("utf-8", "replace").strip('"')
    return _page(_matching(text, _model(gateway, base)))


@router.get("/search")
async def search(gateway: CurrentGateway, base: BaseUrl, query: str = "") -> dict[str, Any]:
    found = _matching(query, _model(gateway, base))
    models = [{"model": model, "metadata": {}} for model in found]
    return {"query": query, "models": models, "collections": [], "pages": []}


def _matching(text: str, model: dict[str, Any]) -> list[dict[str, Any]]:
    """The model, if each word of the text is in its name or its description."""
    described = f"{model['id']} {model['description']}".lower()
    return [model] if all(word in described for word in text.lower().split()) else []


@router.get("/models/{name}")
async def get_model_by_short_name(name: str, gateway: CurrentGateway, base: BaseUrl) -> dict[str, Any]:
    """OpenAI's clients may leave out the owner, or use an alias."""
    if name in gateway.settings.aliases:
        return {**_model(gateway, base), "id": name}
    owner = gateway.settings.model.partition("/")[0]
    return await get_model(owner, name, gateway, base)


@router.get("/models/{owner}/{name}")
async def get_model(owner: str, name: str, gateway: CurrentGateway, base: BaseUrl) -> dict[str, Any]:
    """`name` may contain a version, which OpenAI's clients also use as a model's name."""
    name, _, version = name.partition(":")
    if f"{owner}/{name}" != gateway.settings.model:
        raise Problem(404, "Not found", "This model does not exist.", code="model_not_found", param="model")
    if version and not is_version(version, gateway.settings.versions, version_of(gateway.servers.schema)):
        raise Problem(404, "Not found", "This version does not exist.", code="model_not_found", param="model")
    return _model(gateway, base)


@router.get("/models/{owner}/{name}/versions")
async def list_versions(owner: str, name: str, gateway: CurrentGateway) -> dict[str, Any]:
    _check_model(gateway, owner, name)
    return _page([_known_version(gateway).body()])


@router.get("/models/{owner}/{name}/versions/{version}")
async def get_version(owner: str, name: str, version: str, gateway: CurrentGateway) -> dict[str, Any]:
    _check_model(gateway, owner, name)
    latest = _known_version(gateway)
    if version == "undefined":  # what LangChain.js asks for if the program named no version
        return latest.body()
    if not is_version(version, gateway.settings.versions, latest):
        raise not_found()
    return latest.body(version)


@router.get("/models/{owner}/{name}/examples")
async def list_examples(owner: str, name: str, gateway: CurrentGateway) -> dict[str, Any]:
    _check_model(gateway, owner, name)
    return _page([])


@router.get("/deployments")
async def list_deployments(gateway: CurrentGateway) -> dict[str, Any]:
    return _page([_deployment(gateway, name) for name in gateway.settings.deployments])


@router.get("/deployments/{owner}/{name}")
async def get_deployment(owner: str, name: str, gateway: CurrentGateway) -> dict[str, Any]:
    if f"{owner}/{name}" not in gateway.settings.deployments:
        raise not_found()
    return _deployment(gateway, f"{owner}/{name}")


def _deployment(gateway: Gateway, full_name: str) -> dict[str, Any]:
    owner, name = full_name.split("/")
    version, servers = version_of(gateway.servers.schema), max(1, len(gateway.servers.all))
    return {
        "owner": owner,
        "name": name,
        "current_release": {
            "number": 1,
            "model": gateway.settings.model,
            "version": version.id if version else "hidden",
            "created_at": timestamp(RELEASED_AT.timestamp()),
            "created_by": _account("organization", owner),
            "configuration": {
                "hardware": _HARDWARE["sku"],
                "min_instances": servers,
                "max_instances": servers,
            },
        },
    }


def _account(kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, "username": name, "name": name, "github_url": None}


@router.get("/account")
async def get_account(key: CurrentKey) -> dict[str, Any]:
    return _account("user", key.name)


@router.get("/hardware")
async def list_hardware() -> list[dict[str, str]]:
    return [_HARDWARE]


@router.get("/collections")
async def list_collections() -> dict[str, Any]:
    return _page([_COLLECTION])


@router.get("/collections/{slug}")
async def get_collection(slug: str, gateway: CurrentGateway, base: BaseUrl) -> dict[str, Any]:
    if slug != _COLLECTION["slug"]:
        raise not_found()
    return {**_COLLECTION, "models": [_model(gateway, base)]}


@router.get("/webhooks/default/secret")
async def get_webhook_secret(key: CurrentKey) -> dict[str, str]:
    """What the webhooks of this key's predictions are signed with."""
    return {"key": key.webhook_secret}
