"""What the gateway says about its model, versions, deployments and accounts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gateways import KEY, MODEL, Gateway

from benchmarks.fake_cog import FakeCog, Script, real_schema
from llama.gateway.settings import PUBLISHED_VERSIONS

Gateways = Callable[..., Gateway]


def get(gateway: Gateway, path: str) -> Any:
    response = gateway.client.get(path)
    assert response.status_code == 200, response.text
    return response.json()


def test_one_list_of_models_serves_the_clients_of_both_apis(gateway: Gateway) -> None:
    body = get(gateway, "/v1/models")
    assert body["object"] == "list"
    assert body["data"] == [{"id": MODEL, "object": "model", "created": 1689638400, "owned_by": "meta"}]
    assert (body["next"], body["previous"]) == (None, None)
    assert [f"{model['owner']}/{model['name']}" for model in body["results"]] == [MODEL]


@pytest.mark.parametrize("path", ["meta/llama-2-70b-chat", "meta%2Fllama-2-70b-chat", "llama-2-70b-chat"])
def test_one_body_describes_the_model_to_the_clients_of_both_apis(gateway: Gateway, path: str) -> None:
    model = get(gateway, f"/v1/models/{path}")
    assert model["id"] == "meta/llama-2-70b-chat"
    assert model["object"] == "model"
    assert model["url"] == f"{gateway.url}/v1/models/{MODEL}"
    assert (model["owner"], model["name"], model["visibility"]) == ("meta", "llama-2-70b-chat", "public")
    assert model["run_count"] == 0
    optional = {"github_url", "paper_url", "license_url", "cover_image_url", "default_example"}
    assert all(model[name] is None for name in optional)
    assert model["latest_version"]["openapi_schema"] == real_schema()


def test_a_models_name_may_contain_one_of_its_versions(gateway: Gateway) -> None:
    assert get(gateway, f"/v1/models/{MODEL}:{PUBLISHED_VERSIONS[0]}")["id"] == MODEL
    for name in (f"{MODEL}:{'0' * 64}", "meta/none", "gpt-4"):
        refused = gateway.client.get(f"/v1/models/{name}")
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "model_not_found"
        assert refused.json()["status"] == 404


def test_predictions_are_counted_and_the_count_survives_a_restart(gateway: Gateway, cog: FakeCog) -> None:
    for _ in range(3):
        gateway.create(prefer="wait")
    cog.rules.script, cog.rules.places = Script(hold_after=1), 1
    for _ in range(2):  # one runs and one waits
        gateway.create()
    assert get(gateway, f"/v1/models/{MODEL}")["run_count"] == 5
    gateway.restart()
    gateway.wait_until_ready()
    assert get(gateway, f"/v1/models/{MODEL}")["run_count"] == 5


def test_a_version_has_all_that_replicates_clients_require(gateway: Gateway) -> None:
    (version,) = get(gateway, f"/v1/models/{MODEL}/versions")["results"]
    assert len(version["id"]) == 64
    assert version["cog_version"] == "0.23.1"
    assert version["created_at"].endswith("Z")
    schemas = version["openapi_schema"]["components"]["schemas"]
    assert schemas["Output"]["x-cog-array-type"] == "iterator"
    assert schemas["Output"]["x-cog-array-display"] == "concatenate"
    inputs = schemas["Input"]["properties"]
    assert min(inputs, key=lambda name: inputs[name]["x-order"]) == "prompt"
    assert get(gateway, f"/v1/models/{MODEL}/versions/{version['id']}") == version
    assert get(gateway, f"/v1/models/{MODEL}")["latest_version"] == version


def test_published_versions_keep_their_ids_and_undefined_is_the_latest(gateway: Gateway) -> None:
    latest = get(gateway, f"/v1/models/{MODEL}")["latest_version"]
    published = get(gateway, f"/v1/models/{MODEL}/versions/{PUBLISHED_VERSIONS[0]}")
    assert published == {**latest, "id": PUBLISHED_VERSIONS[0]}
    assert get(gateway, f"/v1/models/{MODEL}/versions/undefined") == latest


def test_before_a_server_was_ready_versions_are_unknown_and_the_model_is_known(tmp_path: Path) -> None:
    with Gateway(["http://127.0.0.1:9"], tmp_path / "gateway.sqlite3") as gateway:
        assert get(gateway, f"/v1/models/{MODEL}")["latest_version"] is None
        for path in ("versions", f"versions/{PUBLISHED_VERSIONS[0]}", "versions/undefined"):
            response = gateway.client.get(f"/v1/models/{MODEL}/{path}")
            assert response.status_code == 503
            assert "No server has been ready yet" in response.json()["detail"]


def test_the_schema_is_known_after_a_restart_without_servers(gateway: Gateway, cog: FakeCog) -> None:
    before = get(gateway, f"/v1/models/{MODEL}/versions")
    cog.die()
    gateway.restart()
    assert get(gateway, f"/v1/models/{MODEL}/versions") == before


def test_deployments_have_a_release_of_the_model(cog: FakeCog, gateways: Gateways) -> None:
    gateway = gateways(cog.url, deployments="acme/llama,acme/other")
    listed = get(gateway, "/v1/deployments")["results"]
    assert [deployment["name"] for deployment in listed] == ["llama", "other"]
    deployment = get(gateway, "/v1/deployments/acme/llama")
    assert deployment == listed[0]
    release = deployment["current_release"]
    assert (release["number"], release["model"]) == (1, MODEL)
    assert release["version"] == get(gateway, f"/v1/models/{MODEL}")["latest_version"]["id"]
    assert release["created_by"] == {
        "type": "organization",
        "username": "acme",
        "name": "acme",
        "github_url": None,
    }
    assert release["configuration"] == {"hardware": "own", "min_instances": 1, "max_instances": 1}


def test_the_account_and_the_webhook_secret_are_the_keys_own(gateway: Gateway) -> None:
    account = get(gateway, "/v1/account")
    assert account["type"] == "user"
    assert account["username"] == account["name"]
    assert KEY not in account.values()
    secret = get(gateway, "/v1/webhooks/default/secret")["key"]
    assert secret.count("_") == 1  # Replicate's Python client splits at it
    assert secret.startswith("whsec_")


def test_collections_hardware_examples_and_searches_have_their_shapes(gateway: Gateway) -> None:
    collection = get(gateway, "/v1/collections/language-models")
    assert [model["name"] for model in collection["models"]] == ["llama-2-70b-chat"]
    assert get(gateway, "/v1/collections")["results"][0]["slug"] == "language-models"
    assert get(gateway, "/v1/hardware")[0].keys() == {"name", "sku"}
    assert get(gateway, f"/v1/models/{MODEL}/examples")["results"] == []
    assert len(get(gateway, "/v1/search?query=llama+chat")["models"]) == 1
    assert get(gateway, "/v1/search?query=diffusion")["models"] == []
    for text in ("Llama 2 70b", '"llama"'):
        found = gateway.client.request("QUERY", "/v1/models", content=text)
        assert [model["id"] for model in found.json()["results"]] == [MODEL]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/trainings", 404),
        ("POST", "/v1/files", 404),
        ("GET", "/v1/files/abc", 404),
        ("GET", "/v1/deployments/acme/none", 404),
        ("GET", "/v1/collections/none", 404),
        ("GET", "/v1/models/meta/none/versions", 404),
        ("GET", "/v1/models/meta/none/examples", 404),
        ("GET", f"/v1/models/{MODEL}/versions/{'0' * 64}", 404),
        ("POST", f"/v1/models/{MODEL}/versions/{'0' * 64}/trainings", 404),
        ("POST", "/v1/models", 405),
        ("PATCH", f"/v1/models/{MODEL}", 405),
        ("DELETE", f"/v1/models/{MODEL}", 405),
        ("DELETE", f"/v1/models/{MODEL}/versions/abc", 405),
        ("POST", "/v1/deployments", 405),
        ("DELETE", "/v1/predictions", 405),
    ],
)
def test_what_the_gateway_does_not_have_is_a_problem(
    gateway: Gateway, method: str, path: str, status: int
) -> None:
    response = gateway.client.request(method, path)
    assert response.status_code == status
    assert response.json()["status"] == status
    assert {"title", "detail"} <= set(response.json())


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/v1/models", f"/v1/models/{MODEL}", "/v1/predictions"]
)
def test_head_has_the_headers_of_get_and_no_body(gateway: Gateway, path: str) -> None:
    head, get = gateway.client.head(path), gateway.client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_on_a_stream_ends_at_once(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(["Hello", " there"], gap=60)
    head = gateway.client.head(gateway.create()["urls"]["stream"])
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].partition(";")[0] == "text/event-stream"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/predictions", {"GET", "HEAD", "POST"}),
        ("PUT", "/models", {"GET", "HEAD", "QUERY"}),
        ("GET", "/chat/completions", {"POST"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
    ],
)
def test_a_method_that_is_not_allowed_is_told_which_are(
    gateway: Gateway, method: str, path: str, allowed: set[str]
) -> None:
    refused = gateway.client.request(method, f"/v1{path}")
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == allowed
    assert f"{method} /v1{path}" in refused.text
