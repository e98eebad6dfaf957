"""Replicate's API over HTTP: what a client gets back when it creates, gets, lists and cancels predictions."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import httpx2
import pytest
from gateways import MODEL, Gateway
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script
from llama.gateway.settings import PUBLISHED_VERSIONS

PIECES = ["The", " capital", " of", " France", " is", " Paris", "."]
MEMBERS = set("id model version input output data_removed error logs source status created_at urls".split())  # noqa: SIM905
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
Gateways = Callable[..., Gateway]


def version_id(gateway: Gateway) -> str:
    return str(gateway.client.get(f"/v1/models/{MODEL}/versions").json()["results"][0]["id"])


def test_a_create_without_preference_responds_at_once_with_a_starting_prediction(
    gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    response = gateway.client.post(f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": "Hi"}})
    created = response.json()
    assert response.status_code == 201
    assert set(created) >= MEMBERS
    assert (created["status"], created["output"], created["error"]) == ("starting", [], None)
    assert re.fullmatch("[a-z0-9]{26}", created["id"])
    assert (created["model"], created["version"], created["source"]) == (MODEL, "hidden", "api")
    assert created["input"] == {"prompt": "Hi"}
    assert not {"started_at", "completed_at", "metrics", "deployment", "deadline"} & set(created)
    assert TIME.fullmatch(created["created_at"])
    assert set(created["urls"]) == {"get", "cancel", "stream", "web"}
    page = created["urls"].pop("web")
    assert page == f"{gateway.url}/#/predictions/{created['id']}"
    assert all(url.startswith(f"{gateway.url}/v1/") for url in created["urls"].values())
    until(lambda: len(gateway.get(created)["output"]) == 3)
    cog.release()
    ended = gateway.wait_for(created)
    assert (ended["status"], ended["output"]) == ("succeeded", PIECES)
    assert TIME.fullmatch(ended["started_at"])
    assert TIME.fullmatch(ended["completed_at"])
    assert ended["metrics"]["predict_time"] <= ended["metrics"]["total_time"]
    assert ended["metrics"]["output_token_count"] == len(PIECES)
    assert ended["metrics"]["finish_reason"] == "stop"


def test_a_poll_shows_the_output_so_far_and_it_only_grows(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    created = gateway.create()
    until(lambda: len(gateway.get(created)["output"]) == 3)
    running = gateway.get(created)
    assert (running["status"], running["output"]) == ("processing", PIECES[:3])
    assert "metrics" not in running
    cog.release()
    assert gateway.wait_for(created)["output"] == PIECES


def test_a_create_that_waits_has_the_whole_output(gateway: Gateway) -> None:
    response = gateway.client.post(
        f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": "Hi"}}, headers={"Prefer": "wait"}
    )
    assert response.status_code == 201
    assert response.json()["status"] == "succeeded"
    assert response.json()["output"] == PIECES


def test_after_its_wait_a_running_prediction_is_shown_as_starting_and_empty(
    gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script(PIECES, hold_after=3, logs="working\n")
    response = gateway.client.post(
        f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": "Hi"}}, headers={"Prefer": "wait=1"}
    )
    created = response.json()
    assert response.status_code == 202
    assert (created["status"], created["output"], created["logs"]) == ("starting", [], "")
    assert "started_at" not in created
    until(lambda: gateway.get(created)["output"] == PIECES[:3])
    cog.release()
    assert gateway.wait_for(created)["status"] == "succeeded"


def test_a_create_waits_for_less_time_than_its_client_does(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(hold_after=0)
    gateway.client.timeout = httpx2.Timeout(1.5)  # what Replicate's Python client sets for wait=1
    assert gateway.create(prefer="wait=1")["status"] == "starting"


def test_a_prediction_can_be_created_with_every_form_of_version(gateway: Gateway) -> None:
    latest = version_id(gateway)
    forms = {
        latest: latest,
        f"{MODEL}:{latest}": latest,
        MODEL: "hidden",
        PUBLISHED_VERSIONS[0]: PUBLISHED_VERSIONS[0],
        f"{MODEL}:{PUBLISHED_VERSIONS[1]}": PUBLISHED_VERSIONS[1],
    }
    for named, shown in forms.items():
        body = {"version": named, "input": {"prompt": "Hi"}}
        response = gateway.client.post("/v1/predictions", json=body, headers={"Prefer": "wait"})
        assert response.status_code == 201, response.text
        assert response.json()["version"] == shown
        assert response.json()["output"] == PIECES


def test_an_unknown_version_is_a_422_and_a_missing_one_is_named(gateway: Gateway) -> None:
    refused = gateway.client.post("/v1/predictions", json={"version": "0" * 64, "input": {}})
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["title"] == "Invalid version or not permitted"
    missing = gateway.client.post("/v1/predictions", json={"input": {}})
    assert missing.status_code == 422
    assert missing.json()["detail"] == "- version: version is required\n"


def test_litellms_path_for_a_version_creates_a_prediction_with_a_list_of_stops(
    gateway: Gateway, cog: FakeCog
) -> None:
    body = {"input": {"prompt": "Hi", "stop_sequences": ["a,b", "c"], "stream": True, "seed": None}}
    response = gateway.client.post(f"/v1/models/{version_id(gateway)}/predictions", json=body)
    assert response.status_code == 201
    assert gateway.wait_for(response.json())["status"] == "succeeded"
    assert cog.predictions == [{"prompt": "Hi", "stop_sequences": "a\\,b,c"}]


def test_a_deployment_creates_predictions_that_name_it(cog: FakeCog, gateways: Gateways) -> None:
    gateway = gateways(cog.url, deployments="acme/llama")
    response = gateway.client.post("/v1/deployments/acme/llama/predictions", json={"input": {"prompt": "Hi"}})
    assert response.status_code == 201
    assert response.json()["deployment"] == "acme/llama"
    assert gateway.wait_for(response.json())["deployment"] == "acme/llama"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/meta/none/predictions",
        "/v1/models/none/llama-2-70b-chat/predictions",
        "/v1/deployments/acme/none/predictions",
        "/v1/predictions/aaaaaaaaaaaaaaaaaaaaaaaaaa/cancel",
        "/v1/predictions/..%2Fhealth-check/cancel",
    ],
)
def test_an_unknown_model_deployment_or_prediction_is_a_404(gateway: Gateway, path: str) -> None:
    response = gateway.client.post(path, json={"input": {"prompt": "Hi"}})
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == {
        "title": "Not found",
        "detail": "The requested resource could not be found.",
        "status": 404,
    }


@pytest.mark.parametrize("number", ["1e999", "-1e400", "1" * 400 + ".5"])
@pytest.mark.parametrize("member", ["repetition_penalty", "no_such_input"])
def test_a_number_that_is_too_large_is_not_json(gateway: Gateway, member: str, number: str) -> None:
    body = f'{{"input": {{"prompt": "Hi", "{member}": [{{"deep": {number}}}]}}}}'
    response = gateway.client.post(f"/v1/models/{MODEL}/predictions", content=body)
    assert response.status_code == 400
    assert response.json()["detail"] == "The body of the request contains a number that is too large."
    assert gateway.client.get("/v1/predictions").json()["results"] == []


def test_invalid_inputs_are_refused_before_a_prediction_exists(gateway: Gateway, cog: FakeCog) -> None:
    body = {"input": {"prompt": 5, "temperature": 9}}
    response = gateway.client.post(f"/v1/models/{MODEL}/predictions", json=body)
    assert response.status_code == 422
    assert [error["field"] for error in response.json()["invalid_fields"]] == [
        "input.prompt",
        "input.temperature",
    ]
    assert gateway.client.get("/v1/predictions").json()["results"] == []
    assert cog.predictions == []


def test_a_body_is_json_whatever_its_content_type_says(gateway: Gateway) -> None:
    response = gateway.client.post(
        f"/v1/models/{MODEL}/predictions",
        content='{"input": {"prompt": "Hi"}}',
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert response.status_code == 201
    broken = gateway.client.post(f"/v1/models/{MODEL}/predictions", content='{"input": ')
    assert broken.status_code == 400
    assert broken.json()["status"] == 400


def test_the_first_error_of_a_prediction_is_a_text_and_its_output_is_null(
    gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script([], error="E1001 PromptRequired: the prompt is blank")
    ended = gateway.create(prefer="wait")
    assert ended["status"] == "failed"
    assert "E1001 PromptRequired" in ended["error"]
    assert ended["output"] is None
    cog.rules.script = Script(["Hi"], error="E2001 GenerationFailed: broken")
    assert gateway.create(prefer="wait")["output"] == ["Hi"]


def test_a_cancel_returns_the_whole_object_with_the_pieces_so_far(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    created = gateway.create()
    until(lambda: len(gateway.get(created)["output"]) == 3)
    # Replicate's JavaScript client names a content type although it sends no body.
    cancel = f"/v1/predictions/{created['id']}/cancel"
    response = gateway.client.post(cancel, headers={"Content-Type": "application/json"})
    assert response.status_code == 200
    canceled = response.json()
    assert (canceled["status"], canceled["output"], canceled["error"]) == ("canceled", PIECES[:3], None)
    assert canceled["metrics"]["total_time"] >= 0
    until(lambda: cog.counts.cancelled == 1)
    again = gateway.client.post(cancel, content="{not JSON")
    assert (again.status_code, again.json()) == (200, canceled)


def test_a_cancel_of_an_ended_prediction_changes_nothing(gateway: Gateway) -> None:
    ended = gateway.create(prefer="wait")
    response = gateway.client.post(f"/v1/predictions/{ended['id']}/cancel")
    assert (response.status_code, response.json()) == (200, ended)


def test_a_prediction_is_cancelled_after_the_time_that_its_client_named(
    gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script(hold_after=1)
    url, body = f"/v1/models/{MODEL}/predictions", {"input": {"prompt": "Hi"}}
    created = gateway.client.post(url, json=body, headers={"Cancel-After": "5s"}).json()
    times = [datetime.fromisoformat(created[name]) for name in ("created_at", "deadline")]
    assert times[1] - times[0] == timedelta(seconds=5)
    assert gateway.wait_for(created)["status"] == "canceled"
    refused = gateway.client.post(url, json=body, headers={"Cancel-After": "1s"})
    assert refused.status_code == 422


def test_the_list_has_the_newest_first_and_absolute_links_to_all_pages(gateway: Gateway) -> None:
    ids = [gateway.create()["id"] for _ in range(103)]
    first = gateway.client.get("/v1/predictions").json()
    assert [prediction["id"] for prediction in first["results"]] == ids[:2:-1]
    assert first["previous"] is None
    assert first["next"].startswith(f"{gateway.url}/v1/predictions?")
    second = gateway.client.get(first["next"]).json()
    assert [prediction["id"] for prediction in second["results"]] == ids[2::-1]
    assert second["next"] is None
    back = gateway.client.get(second["previous"]).json()
    assert [prediction["id"] for prediction in back["results"]] == ids[:2:-1]


def test_the_list_can_be_limited_to_a_time_and_its_links_keep_the_limits(gateway: Gateway) -> None:
    old, middle, new = [gateway.create(prefer="wait") for _ in range(3)]

    def listed(**query: str) -> list[str]:
        response = gateway.client.get("/v1/predictions", params=query)
        assert response.status_code == 200, response.text
        return [prediction["id"] for prediction in response.json()["results"]]

    before_new = datetime.fromisoformat(new["created_at"]) - timedelta(milliseconds=1)
    assert listed(created_after=before_new.isoformat()) == [new["id"]]
    assert listed(created_before=before_new.isoformat()) == [middle["id"], old["id"]]
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert listed(created_after=tomorrow.isoformat()) == []
    assert len(listed(created_before=tomorrow.isoformat(), source="api")) == 3
    assert listed(source="web") == []
    # The plus sign of a time zone that was not escaped
    assert gateway.client.get("/v1/predictions?created_after=2024-01-01T00:00:00+00:00").is_success


@pytest.mark.parametrize(
    "query",
    ["cursor=x", "cursor=before-x", f"cursor=before-{10**30}", "created_after=soon", "created_before=9999"],
)
def test_an_invalid_query_of_the_list_is_a_400(gateway: Gateway, query: str) -> None:
    response = gateway.client.get(f"/v1/predictions?{query}")
    assert response.status_code == 400
    assert response.json()["title"] == "Bad request"


def test_deleted_data_is_null_and_the_prediction_stays(cog: FakeCog, gateways: Gateways) -> None:
    gateway = gateways(cog.url, retention=0.5)
    ended = gateway.create(prefer="wait")
    until(lambda: gateway.get(ended)["data_removed"])
    removed = gateway.get(ended)
    assert (removed["output"], removed["input"], removed["logs"]) == (None, {}, "")
    assert (removed["status"], removed["metrics"]) == ("succeeded", ended["metrics"])
    assert "stream" not in removed["urls"]
    assert gateway.client.get(ended["urls"]["stream"]).status_code == 404


def test_two_keys_cannot_see_each_others_predictions(gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    created = gateway.create()
    other = gateway.add_key("other")
    with gateway.client_of(other) as client:
        assert client.get("/v1/predictions").json()["results"] == []
        assert client.get(f"/v1/predictions/{created['id']}").status_code == 404
        assert client.post(f"/v1/predictions/{created['id']}/cancel").status_code == 404
        secret = client.get("/v1/webhooks/default/secret").json()
        assert secret != gateway.client.get("/v1/webhooks/default/secret").json()
    until(lambda: len(gateway.get(created)["output"]) == 3)
    cog.release()
    assert gateway.wait_for(created)["status"] == "succeeded"


def test_the_urls_of_a_response_have_the_host_that_the_client_used(gateway: Gateway) -> None:
    host = {"Host": "gateway.example:8443"}
    created = gateway.client.post(
        f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": "Hi"}}, headers=host
    ).json()
    assert created["urls"]["get"] == f"http://gateway.example:8443/v1/predictions/{created['id']}"
    assert gateway.get(created)["urls"]["get"].startswith(gateway.url)


def test_a_create_responds_at_once_while_all_places_are_taken(cog: FakeCog, gateways: Gateways) -> None:
    cog.rules.script = Script(hold_after=1)
    gateway = gateways(cog.url, places=1)
    first = gateway.create()
    until(lambda: gateway.get(first)["output"])
    second = gateway.create(prefer="wait=1")
    assert (second["status"], gateway.get(second)["status"]) == ("starting", "starting")
    cog.rules.script = Script(PIECES)
    cog.release()
    assert gateway.wait_for(second)["output"] == PIECES


def test_a_client_that_gives_up_waiting_does_not_cancel_its_prediction(
    gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script(PIECES, hold_after=3)
    with pytest.raises(httpx2.TimeoutException):
        gateway.client.post(
            f"/v1/models/{MODEL}/predictions",
            json={"input": {"prompt": "Hi"}},
            headers={"Prefer": "wait"},
            timeout=1,
        )
    (prediction,) = gateway.client.get("/v1/predictions").json()["results"]
    until(lambda: len(gateway.get(prediction)["output"]) == 3)
    cog.release()
    assert gateway.wait_for(prediction)["output"] == PIECES


def test_every_path_works_with_v1_without_it_and_with_it_twice(gateway: Gateway) -> None:
    created = gateway.create(prefer="wait")
    for prefix in ("", "/v1", "/v1/v1"):
        response = gateway.client.get(f"{prefix}/predictions/{created['id']}/")
        assert response.json() == created
