"""The id of a request, from the client to the servers and the logs, and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import pytest
from gateways import MODEL, Gateway
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script
from llama.gateway.prediction import Prediction, PredictionRequest
from llama.gateway.storage.rows import insert_values, prediction_of

StartGateway = Callable[..., Gateway]

ID = {"x-request-id": "trace-1"}


def sent_ids(cog: FakeCog) -> list[tuple[str, str]]:
    """The ids of each prediction that a server was asked for: the prediction's own, and that of the request."""
    return [
        (json.loads(received.body)["id"], received.headers["x-request-id"])
        for received in cog.received
        if received.path == "/predictions"
    ]


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "llama")
    return caplog


def logged_ids(records: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [vars(record)["request_id"] for record in records.records if vars(record).get("event") == event]


def test_an_id_goes_from_the_client_to_the_server_and_into_the_log(
    cog: FakeCog, gateway: Gateway, records: pytest.LogCaptureFixture
) -> None:
    path = f"/v1/models/{MODEL}/predictions"
    headers = {**ID, "Prefer": "wait"}
    response = gateway.client.post(path, json={"input": {"prompt": "Hi"}}, headers=headers)
    assert response.headers["x-request-id"] == "trace-1"
    assert sent_ids(cog) == [(response.json()["id"], "trace-1")]
    until(lambda: logged_ids(records, "prediction") == logged_ids(records, "request") == ["trace-1"])


def test_all_choices_of_a_request_have_its_id(cog: FakeCog, gateway: Gateway) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "n": 3}
    assert gateway.client.post("/v1/chat/completions", json=body, headers=ID).status_code == 200
    predictions, requests = zip(*sent_ids(cog), strict=True)
    assert len(set(predictions)) == 3
    assert set(requests) == {"trace-1"}


def test_an_id_that_could_forge_a_line_or_a_header_is_replaced(cog: FakeCog, gateway: Gateway) -> None:
    path = f"/v1/models/{MODEL}/predictions"
    response = gateway.client.post(path, json={"input": {}}, headers={"x-request-id": 'a" b'})
    assert response.headers["x-request-id"].startswith("req_")
    until(lambda: [request for _, request in sent_ids(cog)] == [response.headers["x-request-id"]])


def test_a_waiting_prediction_keeps_the_id_over_a_restart(
    cog: FakeCog, gateways: StartGateway, records: pytest.LogCaptureFixture
) -> None:
    cog.rules.script = Script(hold_after=1)
    gateway = gateways(cog.url, places=1)
    gateway.wait_for(gateway.create(), "processing")
    path = f"/v1/models/{MODEL}/predictions"
    waiting = gateway.client.post(path, json={"input": {"prompt": "Hi"}}, headers=ID).json()
    cog.rules.script = Script()
    gateway.restart()
    gateway.wait_until_ready()
    assert gateway.wait_for(waiting)["status"] == "succeeded"
    assert sent_ids(cog)[-1] == (waiting["id"], "trace-1")
    until(lambda: logged_ids(records, "prediction")[-1] == "trace-1")


def test_a_stored_prediction_without_an_id_can_be_read() -> None:
    values = insert_values(Prediction(PredictionRequest(1, {"prompt": "Hi"}, MODEL, request_id="trace-1")))
    row = {
        **values, "started_at": None, "completed_at": None, "output": None, "logs": None, "error": None,
        "metrics": "{}",
    }  # fmt: skip
    assert prediction_of(row).request.request_id == "trace-1"  # type: ignore[arg-type]
    old = {name: value for name, value in json.loads(values["request"]).items() if name != "request_id"}
    assert prediction_of({**row, "request": json.dumps(old)}).request.request_id is None  # type: ignore[arg-type]


def test_a_prediction_that_begins_again_has_another_id_on_the_server(gateways: StartGateway) -> None:
    with FakeCog(Script(die_after=0)) as cog:
        gateway = gateways(cog.url)
        created = gateway.create()
        until(lambda: not gateway.inside.servers.any_ready)
        cog.rules.script = Script()
        cog.start_again()
        assert gateway.wait_for(created)["status"] == "succeeded"
        assert [prediction for prediction, _ in sent_ids(cog)] == [created["id"], f"{created['id']}-2"]


def test_a_busy_server_gets_the_same_id_again(gateways: StartGateway) -> None:
    with FakeCog(false_conflicts=2) as cog:
        gateway = gateways(cog.url)
        created = gateway.create(prefer="wait")
        assert {prediction for prediction, _ in sent_ids(cog)} == {created["id"]}
