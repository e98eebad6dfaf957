"""Reads `/metrics` as Prometheus does, and starts a gateway whose metrics all have samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from gateways import MODEL, Gateway
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from server_clients import Body, until

from benchmarks.fake_cog import FakeCog, Script

METRICS_KEY = "metrics key"
ONLY_ON_LINUX = "process_"
"""How the names of the metrics begin that prometheus_client reads from /proc."""
SCRIPTS = {
    "succeed": Script(),
    "fail": Script(("a", "b"), error="E2001 GenerationFailed: the engine failed"),
    "refuse": Script((), error="E1002 PromptTooLong: the prompt is too long"),
    "odd": Script(("a",), error="no code"),
    "hold": Script(("a", "b"), hold_after=1),
}


def by_first_word(scripts: Mapping[str, Script]) -> Callable[[Body], Script]:
    """Return what tells a fake server what to do: the first word of the prompt names its script."""

    def script_of(inputs: Body) -> Script:
        prompt = inputs.get("prompt") or inputs["messages"][0]["content"]
        return scripts[str(prompt).split()[0]]

    return script_of


script_of = by_first_word(SCRIPTS)


def chat(prompt: str, **more: Any) -> Body:
    """The body of a chat completion."""
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **more}


class Scrape:
    """One response of `/metrics`."""

    def __init__(self, response: httpx2.Response) -> None:
        assert response.status_code == 200, response.text
        self.text = response.text
        self.families: list[Metric] = list(text_string_to_metric_families(self.text))
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """The value of `llama_gateway_NAME`, or None if there is no such sample."""
        return self.samples.get((f"llama_gateway_{name}", frozenset(labels.items())))

    def labels(self, name: str, label: str) -> set[str]:
        """All values of a label."""
        return {dict(labels)[label] for found, labels in self.samples if found == f"llama_gateway_{name}"}

    @property
    def names(self) -> set[str]:
        """The names of all samples."""
        return {name for name, _ in self.samples}


def scrape(gateway: Gateway) -> Scrape:
    """Scrape a gateway whose setting `metrics_key` is METRICS_KEY."""
    with gateway.client_of(METRICS_KEY) as client:
        return Scrape(client.get("/metrics"))


@contextmanager
def busy_gateway(database: Path) -> Iterator[Gateway]:
    """A gateway that has served and refused requests in every way, and whose metrics all have samples."""
    with FakeCog(script_of) as cog, Gateway([cog.url], database, metrics_key=METRICS_KEY) as gateway:
        gateway.wait_until_ready()
        for prompt in ("succeed", "fail", "refuse", "odd"):
            gateway.create(prompt=prompt, prefer="wait")
        held = gateway.wait_for(gateway.create(prompt="hold"), "processing")
        until(lambda: gateway.get(held)["output"])
        gateway.client.post(f"/v1/predictions/{held['id']}/cancel")
        gateway.client.post("/v1/chat/completions", json=chat("succeed"))
        gateway.client.get("/v1/predictions/unknown")
        yield gateway
