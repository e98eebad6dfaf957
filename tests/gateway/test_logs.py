"""The log as text and as JSON: its form, its lines, and what it never contains."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateways import KEY, MODEL, Gateway
from scrapes import METRICS_KEY, chat, script_of
from server_clients import PATIENCE, Body, until

from benchmarks.fake_cog import FakeCog
from llama import ROOT
from llama.errors import BadSettings
from llama.gateway.logs import REQUESTS, JsonLines, configure
from llama.gateway.start import read_settings
from llama.serving.server import free_port

StartGateway = Callable[..., Gateway]


class Log:
    """What was logged, one line per record."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self.handler = logging.StreamHandler(self._stream)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[Body]:
        return [json.loads(line) for line in self.text.splitlines()]

    def of(self, event: str) -> list[Body]:
        """The lines about requests or predictions."""
        return [line for line in self.lines if line.get("event") == event]

    def one(self, event: str, **fields: Any) -> Body:
        """The only line of an event with these fields, which may not have been written yet."""

        def found() -> list[Body]:
            return [line for line in self.of(event) if fields.items() <= line.items()]

        until(found)
        (line,) = found()
        return line


@pytest.fixture
def log() -> Iterator[Log]:
    """The log of the gateway, as the command configures it. A test calls `configure` first."""
    log, root, ours = Log(), logging.getLogger(), logging.getLogger("llama")
    levels, handlers = (ours.level, REQUESTS.level), root.handlers
    root.handlers = [log.handler]
    ours.setLevel(logging.INFO)
    yield log
    root.handlers = handlers
    ours.setLevel(levels[0])
    REQUESTS.setLevel(levels[1])


@pytest.fixture
def json_log(log: Log) -> Log:
    configure("json")
    return log


@pytest.fixture
def logged(cog: FakeCog, gateways: StartGateway) -> Gateway:
    cog.rules.script = script_of
    return gateways(cog.url, metrics_key=METRICS_KEY)


# --- the form


def test_a_line_is_one_json_object_with_a_time_in_utc() -> None:
    record = logging.LogRecord("name", logging.WARNING, "", 1, "two\nlines of %s", ("é",), None)
    record.color_message = "for a terminal"
    line = JsonLines().format(record)
    assert "\n" not in line
    body = json.loads(line)
    assert list(body) == ["time", "level", "logger", "message"]
    assert (body["level"], body["logger"], body["message"]) == ("WARNING", "name", "two\nlines of é")
    assert body["time"].endswith("Z")
    assert datetime.fromisoformat(body["time"]).utcoffset() == timedelta(0)


def test_an_exception_is_a_field() -> None:
    try:
        raise ValueError("reason")
    except ValueError:
        record = logging.LogRecord("name", logging.ERROR, "", 1, "failed", None, sys.exc_info())
    body = json.loads(JsonLines().format(record))
    assert body["exception"].startswith("Traceback")
    assert body["exception"].endswith("ValueError: reason")


# --- the lines


def test_a_request_has_one_line_with_its_route_and_its_key(logged: Gateway, json_log: Log) -> None:
    created = logged.create(prompt="succeed", prefer="wait")
    logged.get(created)
    line = json_log.one("request", route="/predictions/{prediction_id}")
    assert line["method"] == "GET"
    assert line["status"] == 200
    assert line["key"] == "environment"
    assert line["milliseconds"] > 0
    assert line["bytes"] > 100
    assert line["complete"] is True
    assert line["problem"] is None


def test_a_refused_request_has_the_code_of_its_problem(logged: Gateway, json_log: Log) -> None:
    assert logged.client_of("wrong").get("/v1/account").status_code == 401
    line = json_log.one("request", problem="invalid_api_key")
    assert (line["status"], line["key"], line["route"]) == (401, None, None)


def test_a_stream_that_its_client_leaves_is_not_complete(logged: Gateway, json_log: Log) -> None:
    body = chat("hold", stream=True)
    with logged.client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    line = json_log.one("request", route="/chat/completions")
    assert (line["status"], line["complete"]) == (200, False)
    assert json_log.one("prediction", status="canceled", api="openai")["output_tokens"] == 1


@pytest.mark.parametrize(
    ("path", "body", "route"),
    [
        ("/v1/chat/completions", chat("hold"), "/chat/completions"),
        (
            f"/v1/models/{MODEL}/predictions",
            {"input": {"prompt": "hold"}},
            "/models/{owner}/{name}/predictions",
        ),
        ("/page/markdown", {"text": "![" * 50_000}, "/page/markdown"),
    ],
)
def test_a_response_whose_client_left_before_it_began_is_not_complete(
    logged: Gateway, json_log: Log, path: str, body: Body, route: str
) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        logged.client.post(path, json=body, headers={"Prefer": "wait"}, timeout=httpx2.Timeout(60, read=0.3))
    line = json_log.one("request", route=route)
    assert (line["status"], line["complete"], line["bytes"]) == (499, False, 0)


def test_a_prediction_goes_on_when_its_creator_has_left(logged: Gateway, json_log: Log, cog: FakeCog) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        logged.client.post(
            f"/v1/models/{MODEL}/predictions",
            json={"input": {"prompt": "hold"}},
            headers={"Prefer": "wait"},
            timeout=httpx2.Timeout(60, read=0.3),
        )
    json_log.one("request", status=499)
    cog.release()
    assert json_log.one("prediction", api="replicate")["status"] == "succeeded"


def test_a_prediction_has_one_line_when_it_has_ended(logged: Gateway, cog: FakeCog, json_log: Log) -> None:
    created = logged.create(prompt="succeed or not", prefer="wait")
    line = json_log.one("prediction", prediction=created["id"])
    assert {name: line[name] for name in ("key", "api", "status", "error", "server")} == {
        "key": "environment",
        "api": "replicate",
        "status": "succeeded",
        "error": None,
        "server": cog.url,
    }
    assert (line["input_tokens"], line["output_tokens"]) == (3, 7)
    assert 0 <= line["seconds_waiting"] <= line["time_to_first_token"] <= line["seconds"] < PATIENCE
    assert line["request_id"].startswith("req_")


def test_a_failed_prediction_has_its_code_without_its_text(logged: Gateway, json_log: Log) -> None:
    for prompt, code in (("refuse", "E1002"), ("fail", "E2001"), ("odd", None)):
        created = logged.create(prompt=prompt, prefer="wait")
        assert json_log.one("prediction", prediction=created["id"], status="failed")["error"] == code
    assert "no code" not in json_log.text
    assert "too long" not in json_log.text


def test_health_checks_and_scrapes_have_no_line(logged: Gateway, json_log: Log) -> None:
    for path in ("/healthz", "/readyz", "/v1/account"):
        assert logged.client.get(path).status_code == 200
    assert logged.client_of(METRICS_KEY).get("/metrics").status_code == 200
    json_log.one("request", route="/account")
    assert len(json_log.of("request")) == 1


def test_a_scrape_with_a_wrong_key_has_a_line(logged: Gateway, json_log: Log) -> None:
    assert logged.client_of("wrong").get("/metrics").status_code == 401
    assert json_log.one("request", route="/metrics")["problem"] == "invalid_api_key"


def test_as_text_only_predictions_have_a_line(logged: Gateway, log: Log) -> None:
    configure("text")
    created = logged.create(prompt="refuse", prefer="wait")
    until(lambda: log.text)
    assert log.text.startswith(f"prediction {created['id']} of environment failed (E1002): 0 + 0 tokens in ")
    assert log.text.count("\n") == 1


def test_nothing_secret_is_logged(logged: Gateway, json_log: Log) -> None:
    prompt = "succeed with a sesame prompt"
    created = logged.create(prompt=prompt, prefer="wait")
    stream = created["urls"]["stream"]
    logged.client.get(stream)
    logged.client.get(f"{stream}x?token=sesame")
    logged.client.get(f"/{stream.rpartition('/')[2]}/unknown")
    logged.client.get("/v1/account", headers={"Cookie": "llama_session=sesame"})
    logged.client.post("/v1/chat/completions", json=chat(prompt, user="sesame"))
    logged.client_of("sesame").get("/v1/account")
    logged.client.post("/page/login", json={"key": "sesame"})
    until(lambda: len(json_log.of("request")) == 8)
    for secret in ("sesame", stream.rpartition("/")[2], KEY + '"', " Paris"):
        assert secret not in json_log.text


def test_a_warning_about_an_unknown_setting_has_the_format_of_the_log(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_GATEWAY_LOG_FORMAT", "json")
    monkeypatch.setenv("LLAMA_GATEWAY_PLACE", "8")
    assert read_settings().log_format == "json"
    (line,) = log.lines
    assert line["level"] == "WARNING"
    assert line["message"].endswith("did you mean LLAMA_GATEWAY_PLACES?")


def test_invalid_settings_are_an_error_that_names_the_first(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_GATEWAY_LOG_FORMAT", "xml")
    with pytest.raises(BadSettings, match="LLAMA_GATEWAY_LOG_FORMAT is 'xml'"):
        read_settings()
    assert log.text == ""


# --- the process


def test_the_command_writes_only_json_and_lets_a_stream_end_after_sigterm(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    environment = {
        **os.environ,
        "LLAMA_GATEWAY_DATABASE": str(tmp_path / "gateway.sqlite3"),
        "LLAMA_GATEWAY_LOG_FORMAT": "json",
        "LLAMA_GATEWAY_PLACE": "8",
    }
    with FakeCog(script_of) as cog, log.open("w") as output:
        command = [sys.executable, "-m", "llama", "gateway", "--server", cog.url, "--port", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            until(lambda: "in a browser" in log.read_text())
            url = f"http://localhost:{port}/v1/chat/completions"
            with httpx2.stream(
                "POST", url, json=chat("hold", stream=True), timeout=PATIENCE, trust_env=False
            ) as response:
                lines = response.iter_lines()
                assert "assistant" in next(lines)
                process.send_signal(signal.SIGTERM)
                until(lambda: "have 25 s to end" in log.read_text())
                cog.release()
                assert "data: [DONE]" in list(lines)
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()
    written = [json.loads(line) for line in log.read_text().splitlines()]
    messages = [line["message"] for line in written]
    assert "LLAMA_GATEWAY_PLACE is not a known setting" in messages[0]
    assert f"the server {cog.url} is ready" in messages
    assert "stopping" in messages[-4]
    by_event = {line.get("event"): line for line in written}
    assert by_event["prediction"]["status"] == "succeeded"
    assert by_event["request"]["complete"] is True
    assert by_event["request"]["request_id"] == by_event["prediction"]["request_id"]
    assert messages[-1] == "the gateway has stopped"
