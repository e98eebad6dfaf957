"""What `/metrics` shows, who may read it, and that it never disturbs the gateway."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from gateways import Gateway
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from scrapes import METRICS_KEY, ONLY_ON_LINUX, Scrape, busy_gateway, chat, scrape, script_of
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script
from llama import ROOT
from llama.gateway.metrics.recorder import Metrics
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status

StartGateway = Callable[..., Gateway]


@pytest.fixture
def measured(cog: FakeCog, gateways: StartGateway) -> Gateway:
    """A gateway in front of `cog`, whose metrics can be read."""
    cog.rules.script = script_of
    return gateways(cog.url, metrics_key=METRICS_KEY)


# --- what it counts


def test_predictions_are_counted_by_status_api_and_error_code(measured: Gateway) -> None:
    for prompt in ("succeed", "succeed", "fail", "refuse", "odd"):
        measured.create(prompt=prompt, prefer="wait")
    measured.client.post("/v1/chat/completions", json=chat("succeed"))
    found = scrape(measured)
    assert found.value("predictions_ended_total", status="succeeded", api="replicate") == 2
    assert found.value("predictions_ended_total", status="failed", api="replicate") == 3
    assert found.value("predictions_ended_total", status="succeeded", api="openai") == 1
    assert found.value("predictions_ended_total", status="canceled", api="openai") == 0
    assert found.value("failures_total", code="E2001") == 1
    assert found.value("failures_total", code="E1002") == 1
    assert found.value("failures_total", code="other") == 1
    assert found.value("failures_total", code="E4001") == 0


def test_usage_is_counted_by_key_and_survives_a_restart(cog: FakeCog, gateways: StartGateway) -> None:
    gateway = gateways(cog.url, metrics_key=METRICS_KEY)
    key = gateway.add_key("ann")
    with gateway.client_of(key) as client:
        for _ in range(3):
            gateway.create(client=client, prompt="one two", prefer="wait")
    labels = {"key": "ann", "model": gateway.settings.model}
    unused = {**labels, "key": "environment"}
    gateway.restart()
    gateway.wait_until_ready()
    found = scrape(gateway)
    assert found.value("usage_predictions_total", **labels) == 3
    assert found.value("usage_input_tokens_total", **labels) == 6
    assert found.value("usage_output_tokens_total", **labels) == 21
    assert found.value("usage_dollars_total", **labels) == pytest.approx((6 * 0.65 + 21 * 2.75) / 1e6)
    assert found.value("usage_predictions_total", **unused) == 0
    assert found.value("predictions_ended_total", status="succeeded", api="replicate") == 0


def test_a_revoked_key_and_its_successor_of_the_same_name_have_one_sum(measured: Gateway) -> None:
    for _ in range(2):
        with measured.client_of(measured.add_key("ann")) as client:
            measured.create(client=client, prompt="succeed", prefer="wait")
        measured.revoke("ann")
    labels = {"key": "ann", "model": measured.settings.model}
    assert scrape(measured).value("usage_predictions_total", **labels) == 2


def test_refused_requests_are_counted_by_status_and_code(measured: Gateway) -> None:
    assert measured.client.get("/v1/nothing").status_code == 404
    assert measured.client.get("/v1/stream/unknown").status_code == 404
    assert measured.client.delete("/v1/account").status_code == 405
    assert measured.client_of("wrong").get("/v1/account").status_code == 401
    assert measured.client.post("/v1/chat/completions", content=b"{").status_code == 400
    found = scrape(measured)
    assert found.value("refused_requests_total", status="404", code="not_found") == 2
    assert found.value("refused_requests_total", status="405", code="method_not_allowed") == 1
    assert found.value("refused_requests_total", status="401", code="invalid_api_key") == 1
    assert found.value("refused_requests_total", status="400", code="invalid_json") == 1
    assert found.value("http_requests_total", method="GET", route="/stream/{token}", status="404") == 1


def test_clients_cannot_add_labels_without_end(measured: Gateway) -> None:
    for number in range(100):
        measured.client.get(f"/v1/unknown/{number}")
        measured.client.post(f"/v1/predictions/{number}/cancel")
    found = scrape(measured)
    assert found.labels("http_requests_total", "route") <= {"other", "/predictions/{prediction_id}/cancel"}
    metrics = Metrics()
    for number in range(1000):
        metrics.refused(400, f"code_{number}")
    assert len(list(metrics.registry.collect())) < 100
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    assert sum(sample.name == "llama_gateway_refused_requests_total" for sample in samples) == 65


def test_times_and_tokens_of_predictions_are_distributed(measured: Gateway) -> None:
    for prompt in ("succeed", "succeed", "fail", "refuse"):
        measured.create(prompt=prompt, prefer="wait")
    found = scrape(measured)
    assert found.value("queue_time_seconds_count") == 4
    assert found.value("time_to_first_token_seconds_count") == 3
    assert found.value("time_between_tokens_seconds_count") == 6 + 6 + 1
    assert found.value("time_per_output_token_seconds_count") == 3
    assert found.value("prediction_duration_seconds_count") == 4
    assert found.value("prediction_input_tokens_sum") == 3
    assert found.value("prediction_output_tokens_sum") == 7 + 7 + 2
    assert found.value("prediction_output_tokens_bucket", le="8.0") == 3


def test_each_prediction_of_a_lost_server_is_counted(gateways: StartGateway) -> None:
    with FakeCog(Script(hold_after=0)) as cog:
        gateway = gateways(cog.url, metrics_key=METRICS_KEY)
        predictions = [gateway.create() for _ in range(3)]
        until(lambda: cog.counts.running == 3)
        cog.die()
        until(lambda: scrape(gateway).value("predictions_interrupted_total") == 3)
        assert scrape(gateway).value("requeues_total", reason="lost") == 3
        cog.rules.script = Script()
        cog.start_again()
        assert {gateway.wait_for(prediction)["status"] for prediction in predictions} == {"succeeded"}
        assert scrape(gateway).value("predictions_interrupted_total") == 3
        assert scrape(gateway).value("queue_time_seconds_count") == 3


def test_a_cancelled_completion_is_no_fault_of_the_gateway(measured: Gateway) -> None:
    faults = {"internal_error": "500", "storage_unavailable": "503"}
    key = measured.add_key("ann")
    with measured.client_of(key) as client, ThreadPoolExecutor() as threads:
        completion = threads.submit(client.post, "/v1/chat/completions", json=chat("hold"))
        until(lambda: scrape(measured).value("running_predictions") == 1)
        measured.revoke("ann")
        assert completion.result().status_code == 500
    found = scrape(measured)
    assert found.value("refused_requests_total", status="500", code="cancelled") == 1
    for code, status in faults.items():  # an alert needs their numbers from the start
        assert found.value("refused_requests_total", status=status, code=code) == 0
    labels = {"method": "POST", "route": "/chat/completions", "status": "500"}
    assert found.value("http_requests_total", **labels) == 1
    assert found.value("failures_total", code="other") == 0


def test_a_busy_server_is_counted(gateways: StartGateway) -> None:
    with FakeCog(false_conflicts=5) as cog:
        gateway = gateways(cog.url, metrics_key=METRICS_KEY)
        assert gateway.wait_for(gateway.create())["status"] == "succeeded"
        assert scrape(gateway).value("requeues_total", reason="busy") == 1


# --- what is the case


def test_the_queue_and_the_places_are_shown(cog: FakeCog, gateways: StartGateway) -> None:
    cog.rules.script = Script(hold_after=1)
    gateway = gateways(cog.url, metrics_key=METRICS_KEY, places=2)
    predictions = [gateway.create() for _ in range(5)]
    until(lambda: cog.counts.running == 2)
    found = scrape(gateway)
    assert found.value("queue_length") == 3
    assert found.value("running_predictions") == 2
    assert (found.value("oldest_waiting_seconds") or 0) > 0
    assert found.value("server_ready", server=cog.url) == 1
    assert found.value("server_free_places", server=cog.url) == 0
    assert found.value("server_running_predictions", server=cog.url) == 2
    cog.rules.script = Script()
    cog.release()
    for prediction in predictions:
        gateway.wait_for(prediction)
    found = scrape(gateway)
    assert found.value("queue_length") == found.value("oldest_waiting_seconds") == 0
    assert found.value("server_free_places", server=cog.url) == 2


def test_a_server_that_left_the_list_vanishes(gateways: StartGateway, tmp_path: Path) -> None:
    with FakeCog() as cog, FakeCog() as other:
        servers = tmp_path / "servers.txt"
        servers.write_text(f"{cog.url}\n{other.url}\n")
        gateway = gateways(file=servers, metrics_key=METRICS_KEY)
        until(lambda: scrape(gateway).labels("server_ready", "server") == {cog.url, other.url})
        servers.write_text(f"{cog.url}\n")
        gateway.inside.servers.reload()
        for name in ("server_ready", "server_free_places", "server_running_predictions"):
            until(lambda name=name: scrape(gateway).labels(name, "server") == {cog.url})  # type: ignore[misc]


def test_two_gateways_in_one_process_have_their_own_numbers(tmp_path: Path) -> None:
    with FakeCog() as cog:
        one = Gateway([cog.url], tmp_path / "one.sqlite3", metrics_key=METRICS_KEY)
        two = Gateway([cog.url], tmp_path / "two.sqlite3", metrics_key=METRICS_KEY, model="acme/llama")
        with one, two:
            for gateway in (one, two):
                gateway.wait_until_ready()
            one.create(prefer="wait")
            counts = [scrape(g).value("prediction_duration_seconds_count") for g in (one, two)]
            assert counts == [1, 0]
            assert scrape(two).labels("info", "model") == {"acme/llama"}


def test_a_gateway_that_is_being_stopped_is_still_measured(cog: FakeCog, gateways: StartGateway) -> None:
    cog.rules.script = Script(hold_after=1)
    gateway = gateways(cog.url, metrics_key=METRICS_KEY, wiring={"grace": 60})
    prediction = gateway.wait_for(gateway.create(), "processing")

    async def stop_starting() -> None:
        gateway.inside.stop_starting()

    gateway.run(stop_starting())
    assert gateway.client.get("/healthz").status_code == 200
    assert scrape(gateway).value("running_predictions") == 1
    cog.release()
    assert gateway.wait_for(prediction)["status"] == "succeeded"
    assert scrape(gateway).value("predictions_ended_total", status="succeeded", api="replicate") == 1


# --- its form


def test_the_scrape_is_readable_in_both_formats(tmp_path: Path) -> None:
    with busy_gateway(tmp_path / "gateway.sqlite3") as gateway, gateway.client_of(METRICS_KEY) as client:
        plain = client.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
        modern = client.get("/metrics", headers={"Accept": accept})
        assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        families = list(open_metrics(modern.text))  # type: ignore[no-untyped-call]
        assert len(families) == len(Scrape(plain).families)
        head = client.head("/metrics")
        assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=x", "text/plain; version=1.x"])
def test_a_format_that_does_not_exist_gets_the_default(measured: Gateway, accept: str) -> None:
    with measured.client_of(METRICS_KEY) as client:
        response = client.get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_names_follow_the_rules_of_prometheus(tmp_path: Path) -> None:
    with busy_gateway(tmp_path / "gateway.sqlite3") as gateway:
        found = scrape(gateway)
    assert len(found.samples) == found.text.count("\n") - found.text.count("# ")  # no sample twice
    for family in found.families:
        name = family.name
        assert re.fullmatch(r"(llama_gateway|process)_[a-z_]+", name), name
        assert family.documentation.endswith("."), name
        assert not re.search(r"_(total|count|sum|bucket|ms|milliseconds|minutes|kilobytes)$", name), name
        if re.search(r"_(time|duration|waiting)(_|$)", name):
            assert name.endswith("_seconds"), name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            assert set(sample.labels) <= {
                "api", "code", "key", "le", "method", "model", "reason", "route", "server", "status", "version"
            }  # fmt: skip


def test_the_guide_lists_every_metric(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "gateway.md").read_text()
    listed = re.findall(r"^\| `((?:llama_gateway|process)_\w+)` \|", guide, re.MULTILINE)
    with busy_gateway(tmp_path / "gateway.sqlite3") as gateway:
        families = scrape(gateway).families
    shown = [family.name + ("_total" if family.type == "counter" else "") for family in families]
    if sys.platform != "linux":
        listed = [name for name in listed if not name.startswith(ONLY_ON_LINUX)]
    assert sorted(listed) == sorted(shown)


# --- who may read it


def test_a_gateway_that_needs_no_keys_shows_its_metrics_to_this_machine(
    cog: FakeCog, gateways: StartGateway
) -> None:
    gateway = gateways(cog.url, key=None)
    with gateway.client_of(None) as client:
        assert "llama_gateway_queue_length 0.0" in client.get("/metrics").text
        assert client.get("/metrics", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("/metrics", headers={"Origin": "http://evil.example"}).status_code == 403


def test_the_metrics_need_a_key_of_their_own(cog: FakeCog, gateways: StartGateway) -> None:
    gateway = gateways(cog.url)
    refused = gateway.client.get("/metrics")
    assert refused.status_code == 403
    assert "Set LLAMA_GATEWAY_METRICS_KEY" in refused.json()["detail"]
    assert gateway.client_of(None).get("/metrics").status_code == 403


@pytest.mark.parametrize("authorization", [None, "Bearer test", f"Token {METRICS_KEY}", "Bearer", "Bearer é"])
def test_the_keys_of_clients_are_refused(measured: Gateway, authorization: str | None) -> None:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    with httpx2.Client(base_url=measured.url, trust_env=False) as client:
        refused = client.get("/metrics", headers=headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert METRICS_KEY not in refused.text
    assert measured.client_of(METRICS_KEY).get("/v1/account").status_code == 401


# --- that it never disturbs


def test_a_database_that_cannot_be_read_leaves_the_rest(
    measured: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    measured.create(prompt="succeed", prefer="wait")
    database = sqlite3.connect(measured.settings.database)
    database.execute("DROP TABLE usage")
    database.close()
    found = scrape(measured)
    assert found.value("database_readable") == 0
    assert not any(name.startswith("llama_gateway_usage") for name in found.names)
    assert found.value("prediction_duration_seconds_count") == 1
    assert "the metrics lack the usage" in caplog.text


def test_a_database_that_does_not_respond_leaves_the_rest(
    measured: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.gateway.routes.metrics._DATABASE_TIMEOUT", 0.1)
    storage, released, calls = measured.inside.storage, threading.Event(), list[asyncio.Task[bool]]()

    async def hang() -> None:
        calls.append(asyncio.create_task(storage.run(lambda _: released.wait())))

    measured.run(hang())
    try:
        for _ in range(3):
            found = scrape(measured)
            assert found.value("database_readable") == 0
            assert found.value("queue_length") == 0
    finally:
        released.set()
    until(lambda: scrape(measured).value("database_readable") == 1)


def test_a_metric_that_cannot_be_recorded_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    prediction = Prediction(PredictionRequest(1, {}, "owner/name"))
    prediction.metrics["input_token_count"] = "secret"
    with caplog.at_level(logging.ERROR):
        Metrics().ended(prediction, Outcome(Status.SUCCEEDED))
    assert "a metric was not recorded: ValueError" in caplog.text
    assert "secret" not in caplog.text
