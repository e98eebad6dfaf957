"""The gauges: the state of the gateway at the moment of a scrape.

Reads the queue and the servers when Prometheus asks, so nothing has to be kept up to date, and a server that
is no longer on the list disappears. Knows nothing about past events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import llama
from llama.gateway.metrics.recorder import PREFIX


class Queue(Protocol):
    def __len__(self) -> int: ...
    @property
    def oldest_age(self) -> float: ...


class Server(Protocol):
    url: str
    ready: bool
    in_flight: int

    @property
    def free(self) -> int: ...


class Servers(Protocol):
    @property
    def all(self) -> Sequence[Server]: ...


class State(Collector):
    """The state of one gateway. `running` returns the number of running predictions."""

    def __init__(self, model: str, queue: Queue, servers: Servers, running: Callable[[], int]) -> None:
        self._model, self._queue, self._servers, self._running = model, queue, servers, running

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            PREFIX.rstrip("_"),
            "The version of the gateway and the name of its model.",
            value={"version": llama.__version__, "model": self._model},
        )
        yield _gauge("queue_length", "Predictions that wait for a server.", len(self._queue))
        yield _gauge(
            "oldest_waiting_seconds",
            "Seconds since the creation of the prediction that has waited longest; 0 if none waits.",
            self._queue.oldest_age,
        )
        yield _gauge("running_predictions", "Predictions that run on a server.", self._running())
        yield from self._of_servers()

    def _of_servers(self) -> Iterator[Metric]:
        ready = _by_server("server_ready", "Whether a server is ready: 1 or 0.")
        free = _by_server("server_free_places", "How many more predictions a server can take.")
        running = _by_server("server_running_predictions", "Predictions that run on a server.")
        for url, servers in self._by_url().items():
            ready.add_metric([url], float(any(server.ready for server in servers)))
            free.add_metric([url], sum(max(0, server.free) for server in servers))
            running.add_metric([url], sum(server.in_flight for server in servers))
        yield from (ready, free, running)

    def _by_url(self) -> dict[str, list[Server]]:
        """Two names can resolve to the same address."""
        found = dict[str, list[Server]]()
        for server in self._servers.all:
            found.setdefault(server.url, []).append(server)
        return found


def _gauge(name: str, description: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, description, value=value)


def _by_server(name: str, description: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, description, labels=["server"])
