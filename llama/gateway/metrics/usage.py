"""The counters that agree with the command `usage`, because they come from the same table of the database.

They survive a restart. Knows sums by key and model. Knows nothing about the database itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from llama.gateway.metrics.recorder import PREFIX
from llama.gateway.storage.usage_table import Column, Usage
from llama.gateway.usage_report import PricedUsage

COLUMNS = (Column.KEY, Column.MODEL)
_LABELS = [column.value for column in COLUMNS]


def nothing_used(key: str, model: str) -> Usage:
    """The usage of a key that has not been used. Prometheus sees an increase only if it has seen the count
    before it, so a new key needs a zero."""
    return Usage((key, model), 0, 0, 0, 0.0)


class Scrape(Collector):
    """Everything that one scrape shows: the metrics of a registry, and the usage of all keys."""

    def __init__(self, registry: CollectorRegistry, usage: Iterable[PricedUsage] | None) -> None:
        """`usage`: the sums by `COLUMNS`. If it is None, the database could not be read."""
        self._registry, self._usage = registry, usage

    def collect(self) -> Iterator[Metric]:
        yield from self._registry.collect()
        yield GaugeMetricFamily(
            f"{PREFIX}database_readable",
            "Whether the database could be read for this scrape: 1 or 0. If not, the usage is left out.",
            value=float(self._usage is not None),
        )
        if self._usage is not None:
            yield from _families(list(self._usage))


def _families(lines: list[PricedUsage]) -> Iterator[Metric]:
    values: dict[str, tuple[str, list[float]]] = {
        "predictions": ("Predictions that have ended", [line.predictions for line in lines]),
        "input_tokens": ("Input tokens", [line.input_tokens for line in lines]),
        "output_tokens": ("Output tokens", [line.output_tokens for line in lines]),
        "seconds": ("Seconds for which servers worked on predictions", [line.seconds for line in lines]),
        "dollars": ("Price of the tokens in dollars", [float(line.price) for line in lines]),
    }
    for name, (description, counts) in values.items():
        family = CounterMetricFamily(
            f"{PREFIX}usage_{name}", f"{description}, by key and model. It survives restarts.", labels=_LABELS
        )
        for line, count in zip(lines, counts, strict=True):
            family.add_metric(line.of, count)
        yield family
