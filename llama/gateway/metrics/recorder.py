"""Counts and times what happens to predictions and requests since the start of the gateway.

Knows predictions, and the statuses and codes of responses. Other modules tell it what has happened: it reads
neither the queue nor the servers nor the database. Errors are logged and not raised, because an error in a
metric must not break a prediction. Only `Metrics.piece` does not catch errors: it is called very often, and
observes nothing but the time.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from llama.errors import EngineError, GatewayError, LlamaError, UserError
from llama.gateway.prediction import Outcome, Prediction, Status
from llama.gateway.problems import internal_error, not_stored

logger = logging.getLogger(__name__)

P = ParamSpec("P")

PREFIX = "llama_gateway_"
OTHER = "other"
"""The value of a label for everything that is not one of its known values."""

# Seconds. The ranges suit a 70B model on GPUs as well as the small model on a CPU.
_UNTIL_FIRST = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60, 300, 1800)
_WAITING = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_LASTING = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
_TOKENS = tuple(2**power for power in range(3, 16))

_MAX_CODES = 64
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY")


def _harmless(method: Callable[P, None]) -> Callable[P, None]:
    """Log the errors of a method instead of raising them."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:  # not its message, which may quote a value of a client
            logger.error("a metric was not recorded: %s in %s", type(error).__name__, method.__name__)

    return call


class Metrics:
    """The counters and histograms of one gateway, in a registry of its own: a process can have several."""

    def __init__(self) -> None:
        # Otherwise, every counter and histogram has one more series, with the time of its creation.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._create_counters()
        self._create_histograms()

    def _create_counters(self) -> None:
        self._ended = self._counter(
            "predictions_ended", "Predictions that have ended, by status and API.", "status", "api"
        )
        self._failures = self._counter("failures", "Predictions that have failed, by error code.", "code")
        self._refused = self._counter(
            "refused_requests",
            "HTTP requests that were refused, by HTTP status and error code.",
            "status",
            "code",
        )
        self._requests = self._counter(
            "http_requests",
            "HTTP requests whose response has ended, without health checks and successful scrapes.",
            "method",
            "route",
            "status",
        )
        self._interrupted = self._counter(
            "predictions_interrupted",
            "Running predictions that lost their server. If a server fails, all of its predictions count, "
            "and a prediction that loses several servers counts each time.",
        )
        self._requeues = self._counter(
            "requeues",
            "Predictions that went back to the queue, because their server was busy or lost.",
            "reason",
        )
        for status in (Status.SUCCEEDED, Status.FAILED, Status.CANCELED):
            for api in ("replicate", "openai"):
                self._ended.labels(status, api)
        for code in (*KNOWN_CODES, OTHER):
            self._failures.labels(code)
        for reason in ("busy", "lost"):
            self._requeues.labels(reason)
        self._codes = set[str]()
        for problem in (internal_error(), not_stored()):  # an alert needs their numbers from the start
            self._codes.add(problem.code or "")
            self._refused.labels(problem.status, problem.code)

    def _create_histograms(self) -> None:
        self._first = self._histogram(
            "time_to_first_token_seconds",
            "Seconds from the creation of a prediction to the first piece of its answer, queue included.",
            _UNTIL_FIRST,
        )
        self._queue = self._histogram(
            "queue_time_seconds",
            "Seconds from the creation of a prediction until a server starts it.",
            _WAITING,
        )
        self._between = self._histogram(
            "time_between_tokens_seconds",
            "Seconds between two pieces of one answer. A piece is usually one token; if a server generates "
            "more than 32 tokens per second for an answer, a piece has several.",
            _BETWEEN,
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds",
            "Average seconds per output token of a prediction, after the first token.",
            _BETWEEN,
        )
        self._duration = self._histogram(
            "prediction_duration_seconds", "Seconds from the creation of a prediction to its end.", _LASTING
        )
        self._input = self._histogram("prediction_input_tokens", "Input tokens of a prediction.", _TOKENS)
        self._output = self._histogram("prediction_output_tokens", "Output tokens of a prediction.", _TOKENS)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, description, labels, registry=self.registry)

    def _histogram(self, name: str, description: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, description, buckets=bounds, registry=self.registry)

    # Predictions

    @_harmless
    def started(self, prediction: Prediction) -> None:
        """A server has begun to work on a prediction. Call it before `Prediction.start`. If a server is lost
        and another one begins again, only the first time counts."""
        if not prediction.was_started:
            self._queue.observe(prediction.age)

    def piece(self, prediction: Prediction) -> None:
        """A piece of an answer has arrived. Call it before `Prediction.add_piece`. It is called for every
        piece, so it does as little as possible."""
        last = prediction.last_piece_at
        if last is None:
            self._first.observe(prediction.age)
        else:
            self._between.observe(time.monotonic() - last)

    @_harmless
    def ended(self, prediction: Prediction, outcome: Outcome) -> None:
        """A prediction has ended."""
        self._ended.labels(outcome.status, prediction.request.api).inc()
        if outcome.status is Status.FAILED:
            code = outcome.error_code
            self._failures.labels(code if code in KNOWN_CODES else OTHER).inc()
        self._duration.observe(outcome.seconds(prediction))
        if "input_token_count" in prediction.metrics:  # otherwise, no server has read the prompt
            tokens = prediction.tokens
            self._input.observe(tokens.input)
            self._output.observe(tokens.output)
            first, last = prediction.first_piece_at, prediction.last_piece_at
            if tokens.output > 1 and first is not None and last is not None:
                self._per_token.observe((last - first) / (tokens.output - 1))

    @_harmless
    def interrupted(self) -> None:
        """A running prediction has lost its server."""
        self._interrupted.inc()

    @_harmless
    def requeued(self, reason: str) -> None:
        """A prediction waits again. `reason` is "busy" or "lost"."""
        self._requeues.labels(reason).inc()

    # Requests

    @_harmless
    def responded(self, method: str, route: str | None, status: int) -> None:
        """A response has ended. `route` is the path of its route, with names in place of values."""
        self._requests.labels(method if method in _METHODS else OTHER, route or OTHER, status).inc()

    @_harmless
    def refused(self, status: int, code: str) -> None:
        """A request was refused with a problem."""
        if code not in self._codes and len(self._codes) >= _MAX_CODES:
            code = OTHER
        self._codes.add(code)
        self._refused.labels(status, code).inc()


def _codes(kind: type[LlamaError]) -> Iterator[str]:
    for subclass in kind.__subclasses__():
        yield subclass.code


KNOWN_CODES = (*_codes(UserError), *_codes(EngineError), *_codes(GatewayError))
"""The codes of all errors with which a prediction can fail."""
