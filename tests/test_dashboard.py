"""The files in deploy/monitoring match each other, and the metrics of a gateway that has served requests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from fastapi.routing import APIRoute
from scrapes import ONLY_ON_LINUX, Scrape, busy_gateway, scrape

from llama import ROOT
from llama.gateway.metrics.recorder import KNOWN_CODES
from llama.gateway.problems import internal_error, not_stored
from llama.gateway.routes import catalog, openai, page, replicate

MONITORING = ROOT / "deploy" / "monitoring"
VARIABLES = {"$__rate_interval": "1m", "$__range": "6h", "$instance": ".*"}
ADDED_BY_PROMETHEUS = {"instance", "job"}

Body = dict[str, Any]


def dashboard() -> Body:
    body: Body = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    return body


def panels() -> list[Body]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def alerts() -> list[Body]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    """The names and the PromQL of all panels and alerts."""
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            yield panel["title"], query
    for alert in alerts():
        yield alert["alert"], alert["expr"]


def inside(expression: Any, kind: type) -> list[Any]:
    """All parts of an expression that are of this kind."""
    found = []

    def visit(part: Any) -> bool:
        if isinstance(part, kind):
            found.append(part)
        return True

    promql.walk(expression, visit)
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Scrape:
    """What a gateway shows that has served and refused requests."""
    with busy_gateway(tmp_path_factory.mktemp("gateway") / "gateway.sqlite3") as gateway:
        return scrape(gateway)


def labels_of(served: Scrape, metric: str) -> set[str]:
    return {name for found, labels in served.samples if found == metric for name, _ in labels}


@pytest.mark.parametrize("query", [pytest.param(query, id=title) for title, query in queries()])
def test_a_query_reads_metrics_and_labels_that_exist(query: str, served: Scrape) -> None:
    expression = promql.parse(query)
    selectors = inside(expression, promql.VectorSelector)
    assert selectors
    known = set(ADDED_BY_PROMETHEUS)
    for selector in selectors:
        if selector.name == "up":  # Prometheus's own
            continue
        if selector.name.startswith(ONLY_ON_LINUX) and sys.platform != "linux":
            continue
        assert selector.name in served.names
        labels = labels_of(served, selector.name) | ADDED_BY_PROMETHEUS
        known |= labels
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels
    for aggregation in inside(expression, promql.AggregateExpr):
        if aggregation.modifier is not None:
            assert set(aggregation.modifier.labels) <= known


def test_the_panels_show_every_metric_of_the_gateway(served: Scrape) -> None:
    shown = {
        selector.name.removesuffix("_bucket")
        for _, query in queries()
        for selector in inside(promql.parse(query), promql.VectorSelector)
    }
    names = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in served.families
        if family.name.startswith("llama_gateway")
    }
    assert names <= shown


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_asks_the_chosen_data_source(panel: Body) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "table"
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_dashboard_can_be_imported() -> None:
    body = dashboard()
    assert body["id"] is None
    assert body["uid"] is None
    assert body["schemaVersion"] >= 39
    variables = {variable["name"]: variable for variable in body["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert variables["instance"]["datasource"]["uid"] == "${datasource}"
    assert variables["instance"]["definition"] == "label_values(llama_gateway_info, instance)"
    ids = [panel["id"] for panel in body["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_panels_do_not_overlap() -> None:
    areas = [(panel["title"], panel["gridPos"]) for panel in dashboard()["panels"]]
    for title, area in areas:
        assert 0 <= area["x"] < area["x"] + area["w"] <= 24, title
    for (one, a), (other, b) in combinations(areas, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart = apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart, f"{one} overlaps {other}"


def test_an_alert_has_a_severity_and_says_what_to_do() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(set(names)) == len(names)
    for alert in alerts():
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description"} <= alert["annotations"].keys()
    titles = {panel["title"] for panel in panels()}
    assert "Failed predictions by code" in titles  # an alert names it


def test_the_alert_about_failures_counts_every_code_that_is_not_the_clients_fault() -> None:
    (query,) = (query for name, query in queries() if name == "PredictionsFail")
    matchers = {
        matcher.value
        for selector in inside(promql.parse(query), promql.VectorSelector)
        if selector.name == "llama_gateway_failures_total"
        for matcher in selector.matchers.matchers
    }
    (not_counted,) = matchers
    counted = {code for code in KNOWN_CODES if not re.fullmatch(not_counted, code)}
    assert counted == {"E2001", "E2002", "E4001", "E4002", "E4003"}


def test_the_alert_about_requests_counts_all_routes_that_create_predictions_and_no_others() -> None:
    (query,) = (query for name, query in queries() if name == "RequestsFail")
    routes = [route for router in (replicate, openai, page, catalog) for route in router.router.routes]
    posts = [route for route in routes if isinstance(route, APIRoute) and "POST" in (route.methods or ())]
    creating = {route.path for route in posts if route.endpoint.__name__.startswith("create_")}
    assert len(creating) == 6
    patterns = {
        matcher.name: matcher.value
        for selector in inside(promql.parse(query), promql.VectorSelector)
        for matcher in selector.matchers.matchers
    }
    assert {route.path for route in posts if re.fullmatch(patterns["route"], route.path)} == creating
    assert set(patterns["code"].split("|")) == {internal_error().code, not_stored().code}


def test_every_alert_has_a_time_at_which_it_fires() -> None:
    tests = yaml.safe_load((MONITORING / "alerts-test.yml").read_text())
    assert tests["rule_files"] == ["alerts.yml"]
    checks = [check for test in tests["tests"] for check in test["promql_expr_test"]]
    assert all(check["exp_samples"] == [] or "alertname" in check["expr"] for check in checks)
    text = str([check["exp_samples"] for check in checks])
    assert [alert["alert"] for alert in alerts() if f'alertname="{alert["alert"]}"' not in text] == []


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)"
)


def promtool(*arguments: str | Path) -> None:
    """Run promtool, which must find nothing wrong."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_alerts_fire_when_they_should_and_prometheus_accepts_its_files(tmp_path: Path) -> None:
    config = (MONITORING / "prometheus.yml").read_text()
    for mounted, here in (
        ("/etc/prometheus/alerts.yml", str(MONITORING / "alerts.yml")),
        ("/run/secrets/metrics_key", str(tmp_path / "metrics_key")),
    ):
        assert mounted in config
        config = config.replace(mounted, here)
    (tmp_path / "prometheus.yml").write_text(config)
    (tmp_path / "metrics_key").write_text("a key")
    promtool("check", "config", tmp_path / "prometheus.yml")
    promtool("test", "rules", MONITORING / "alerts-test.yml")


@needs_promtool
def test_a_gateway_without_any_server_shows_zero_ready_servers(tmp_path: Path) -> None:
    (query,) = (query for name, query in queries() if name == "Ready servers")
    zero = {"eval_time": "1m", "expr": query, "exp_samples": [{"labels": "{}", "value": 0}]}
    series = [{"series": "llama_gateway_info", "values": "1x10"}]
    tests = [{"input_series": series, "promql_expr_test": [zero]}]
    (tmp_path / "test.yml").write_text(json.dumps({"tests": tests}))
    promtool("test", "rules", tmp_path / "test.yml")


def test_the_alerts_name_the_job_of_prometheus() -> None:
    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    named = re.findall(r'job="([^"]*)"', "".join(alert["expr"] for alert in alerts()))
    assert set(named) == {job["job_name"]}
