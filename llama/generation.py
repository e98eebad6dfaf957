"""Llama: a request in, pieces of text and metrics out.

Puts tokenizer, engine, detokenizer and stop filter together. Knows nothing of HTTP or of tensors.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llama.engine import Engine, TokenStream
from llama.errors import EngineStopped
from llama.metrics import GuardedScope, Metrics, NoScope, Scope, guarded
from llama.prompt.limits import PromptLimits
from llama.prompt.request import Request
from llama.sampling_params import SamplingParams
from llama.serving.cancellation import Cancellation
from llama.text.detokenizer import Detokenizer
from llama.text.stop_filter import StopFilter
from llama.text.tokenizer import Tokenizer, encode_within

logger = logging.getLogger(__name__)

Log = Callable[[str], object]
"""Takes one line of a caller's log."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A request that has been checked and tokenized, and can be run."""

    request: Request
    token_ids: list[int]
    params: SamplingParams
    """The request's, clamped to the room left in the context."""
    metrics: Metrics


class Llama:
    """A model that answers. One object serves any number of threads."""

    def __init__(self, tokenizer: Tokenizer, engine: Engine, max_concurrency: int | None = None) -> None:
        """`max_concurrency`: predictions that may come at once; None means a few."""
        self._tokenizer = tokenizer
        self._engine = engine
        self._limits = PromptLimits(engine.context_length, tokenizer.longest_piece)
        # A thread for each prediction: a long prompt that is being tokenized does not hold up a short one.
        self._threads = ThreadPoolExecutor(max_concurrency, "llama-prepare")

    @property
    def healthy(self) -> bool:
        """False once predictions can no longer be served."""
        return self._engine.healthy

    def close(self) -> None:
        """Stop the engine; running predictions end with an error."""
        self._engine.close()
        self._threads.shutdown(wait=False)

    def prepare(self, inputs: Mapping[str, Any]) -> Prediction:
        """Check a prediction's inputs, by the names of `Predictor.run`, and tokenize its prompt.

        The prediction's clock starts here. Raises a UserError that says what is wrong.
        """
        return self._prepare(inputs, Metrics())

    async def prepare_in_thread(self, inputs: Mapping[str, Any]) -> Prediction:
        """`prepare` without blocking the event loop, which all predictions of the server share."""
        try:
            prepared = self._threads.submit(self._prepare, inputs, Metrics())
        except RuntimeError as error:  # shut down
            raise EngineStopped("the engine is not running; restart the server") from error
        return await asyncio.wrap_future(prepared)

    def _prepare(self, inputs: Mapping[str, Any], metrics: Metrics) -> Prediction:
        request = Request.from_inputs(inputs, self._limits)
        self._engine.check(request.params)
        token_ids = encode_within(self._limits, request.prompt, self._tokenizer)
        metrics.input_token_count = len(token_ids)
        room = self._limits.context - len(token_ids)
        params = request.params.model_copy(
            update={
                "max_new_tokens": min(request.params.maximum, room),
                "min_new_tokens": min(request.params.minimum, room),
            }
        )
        return Prediction(request, token_ids, params, metrics)

    def answer(self, inputs: Mapping[str, Any], log: Log) -> Iterator[str]:
        """Prepare and stream in one, for use outside Cog: nothing is recorded, and leaving the iterator is
        the way to cancel."""
        return self.stream_here(self.prepare(inputs), log)

    def stream_here(self, prediction: Prediction, log: Log) -> Iterator[str]:
        """`stream` for use outside Cog, as `answer`."""
        return self.stream(prediction, scope=NoScope(), log=log, cancellation=Cancellation())

    def stream(
        self, prediction: Prediction, *, scope: Scope, log: Log, cancellation: Cancellation
    ) -> Iterator[str]:
        """The answer in pieces, each with all the text that is ready.

        The number of tokens is recorded before each piece, and all metrics at the end. Leaving the iterator
        early, or `cancellation`, ends the work. Raises an EngineError. If `scope` or `log` fails, that goes
        to the server's log and the answer goes on.
        """
        metrics = prediction.metrics
        scope = GuardedScope(scope)
        # Without the line, which may hold a prompt.
        log = guarded(log, "the log of a prediction cannot be written; this prediction logs no more")
        for note in self._notes(prediction):
            log(note)
        try:
            stream = self._engine.submit(prediction.token_ids, prediction.params)
            cancellation.on_cancel(stream.cancel)
            try:
                for piece in self._pieces(prediction, stream):
                    metrics.record_progress(scope)
                    yield piece
            except GeneratorExit:
                metrics.finish_reason = "cancelled"
                raise
            finally:
                stream.cancel()
        finally:
            metrics.end()
            metrics.record(scope)
            for line in _report(prediction):
                log(line)

    def _pieces(self, prediction: Prediction, stream: TokenStream) -> Iterator[str]:
        params, metrics = prediction.params, prediction.metrics
        detokenizer = Detokenizer(self._tokenizer.vocabulary, continues=prediction.request.continues)
        stops = StopFilter(params.stops)

        def filtered(text: str) -> str:
            return stops.update(text, may_stop=metrics.output_token_count > params.minimum)

        for token_ids in stream:
            text = ""
            for token_id in token_ids:
                metrics.count_token()
                text += filtered(detokenizer.update([token_id]))
                if stops.stopped:
                    break
            if text:
                yield text
            if stops.stopped:
                metrics.finish_reason = "stop"
                return
        tail = filtered(detokenizer.flush()) + stops.flush()
        assert stream.finish_reason is not None  # the stream has ended
        metrics.finish_reason = "stop" if stops.stopped else stream.finish_reason
        if tail:
            yield tail

    def _notes(self, prediction: Prediction) -> Iterator[str]:
        request, params = prediction.request, prediction.params
        yield from request.notes
        if (request.params.explicit_maximum or 0) > params.maximum:
            yield f"the context leaves room for {params.maximum} new tokens"
        if request.debug:
            yield f"formatted prompt: {self._tokenizer.render(request.prompt)!r}"
            yield f"settings: {json.dumps(params.model_dump(exclude_none=True), separators=(',', ':'))}"


def _report(prediction: Prediction) -> Iterator[str]:
    if prediction.request.log_performance_metrics or prediction.request.debug:
        for name, value in prediction.metrics.values().items():
            yield f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}"
