"""Replicate's API of predictions: create, get, list and cancel.

Translates between HTTP and `Predictions`. Bodies are read in `replicate/request.py` and written in
`replicate/view.py`.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response

from llama.gateway.gateway import Gateway
from llama.gateway.http.disconnect import while_connected
from llama.gateway.model_card import version_of
from llama.gateway.prediction import Prediction, PredictionRequest
from llama.gateway.problems import Problem, not_found
from llama.gateway.replicate.request import (
    Creation,
    cancel_after_seconds,
    missing_version,
    read_creation,
    version_id,
    wait_seconds,
)
from llama.gateway.replicate.view import created_body, prediction_body
from llama.gateway.routes.dependencies import BaseUrl, CurrentGateway, CurrentKey, base_url, json_body
from llama.gateway.storage.keys import Key

router = APIRouter()


@router.post("/predictions")
async def create_prediction(request: Request, gateway: CurrentGateway, key: CurrentKey) -> Response:
    creation = await _creation(request, gateway)
    if creation.version is None:
        raise missing_version()
    return await _create(request, gateway, key, creation, named=creation.version)


@router.post("/models/{owner}/{name}/predictions")
async def create_prediction_of_model(
    owner: str, name: str, request: Request, gateway: CurrentGateway, key: CurrentKey
) -> Response:
    if f"{owner}/{name}" != gateway.settings.model:
        raise not_found()
    return await _create(request, gateway, key, await _creation(request, gateway))


@router.post("/models/{version}/predictions")
async def create_prediction_of_version(
    version: str, request: Request, gateway: CurrentGateway, key: CurrentKey
) -> Response:
    """LiteLLM's path for `owner/name:version`. Replicate has no such path."""
    return await _create(request, gateway, key, await _creation(request, gateway), named=version)


@router.post("/deployments/{owner}/{name}/predictions")
async def create_prediction_of_deployment(
    owner: str, name: str, request: Request, gateway: CurrentGateway, key: CurrentKey
) -> Response:
    deployment = f"{owner}/{name}"
    if deployment not in gateway.settings.deployments:
        raise not_found()
    return await _create(request, gateway, key, await _creation(request, gateway), deployment=deployment)


@router.get("/predictions")
async def list_predictions(
    request: Request, gateway: CurrentGateway, key: CurrentKey, base: BaseUrl
) -> Response:
    query = request.query_params
    if query.get("source") == "web":  # no prediction is created on a web site
        return _json({"next": None, "previous": None, "results": []})
    after, before = (_time(query.get(name), name) for name in ("created_after", "created_before"))
    try:
        page = await gateway.predictions.page(
            key.id, cursor=query.get("cursor"), created_after=after, created_before=before
        )
    except (ValueError, OverflowError) as error:
        raise Problem(400, "Bad request", "The cursor is invalid; use `next` or `previous`.") from error
    filters = {name: query[name] for name in ("created_after", "created_before", "source") if name in query}

    def link(cursor: str | None) -> str | None:
        return cursor and f"{base}/v1/predictions?{urlencode({**filters, 'cursor': cursor})}"

    results = [prediction_body(prediction, base) for prediction in page.predictions]
    return _json({"next": link(page.next), "previous": link(page.previous), "results": results})


@router.get("/predictions/{prediction_id}")
async def get_prediction(
    prediction_id: str, gateway: CurrentGateway, key: CurrentKey, base: BaseUrl
) -> Response:
    return _json(prediction_body(await _find(gateway, key, prediction_id), base))


@router.post("/predictions/{prediction_id}/cancel")
async def cancel_prediction(
    prediction_id: str, gateway: CurrentGateway, key: CurrentKey, base: BaseUrl
) -> Response:
    prediction = await _find(gateway, key, prediction_id)
    await gateway.predictions.cancel(prediction)
    return _json(prediction_body(prediction, base))


async def _find(gateway: Gateway, key: Key, prediction_id: str) -> Prediction:
    prediction = await gateway.predictions.find(key.id, prediction_id)
    if prediction is None:
        raise not_found()
    return prediction


async def _creation(request: Request, gateway: Gateway) -> Creation:
    return read_creation(
        await json_body(request), version_of(gateway.servers.schema), gateway.settings.webhook_networks
    )


async def _create(
    request: Request,
    gateway: Gateway,
    key: Key,
    creation: Creation,
    *,
    named: str | None = None,
    deployment: str | None = None,
) -> Response:
    """Create a prediction. `named` is the version that the client named; None means the model's own."""
    settings, base = gateway.settings, base_url(request)
    named = settings.model if named is None else named
    wait = wait_seconds(request.headers.getlist("prefer"))
    asked = PredictionRequest(
        key_id=key.id,
        inputs=creation.inputs,
        model=settings.model,
        version=version_id(named, settings, version_of(gateway.servers.schema)),
        deployment=deployment,
        webhook=creation.webhook,
        base_url=base,
        seconds=cancel_after_seconds(request.headers.get("cancel-after")),
        request_id=request.state.request_id,
    )
    (prediction,) = await gateway.predictions.create([asked])
    if wait is None:
        return _json(created_body(prediction, base), 201)
    # Clients give up soon after the time that they named, and some of them then create a second prediction.
    ending = prediction.wait_until_ended(wait - min(1.0, wait / 2))
    ended = await while_connected(request.receive, ending)
    return _json(created_body(prediction, base), 201 if ended else 202)


def _time(text: str | None, name: str) -> float | None:
    """Read a time of a query. A plus sign that was not escaped arrives as a blank."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise Problem(
            400, "Bad request", f"`{name}` must be a time such as 2025-01-31T12:00:00Z.", param=name
        ) from error


def _json(body: dict[str, Any], status: int = 200) -> Response:
    # Faster than FastAPI's own encoder, and nothing in these bodies needs it.
    return Response(json.dumps(body), status, media_type="application/json")
