"""The Llama class, which turns a request into pieces of text and metrics.

Combines the tokenizer, the engine, the detokenizer and the stop filter. Knows nothing about HTTP or tensors.
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
"""Writes one line to a prediction's log."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A validated and tokenized request that is ready to run."""

    request: Request
    token_ids: list[int]
    params: SamplingParams
    """The request's parameters, with the token limits clamped to the room left in the context."""
    metrics: Metrics


class Llama:
    """A model that answers requests. It can be used from any number of threads."""

    def __init__(self, tokenizer: Tokenizer, engine: Engine, max_concurrency: int | None = None) -> None:
        """`max_concurrency`: how many prompts can be tokenized at once; None for the executor's default."""
        self._tokenizer = tokenizer
        self._engine = engine
        self._limits = PromptLimits(engine.context_length, tokenizer.longest_piece)
        # One thread per prediction, so that tokenizing a long prompt does not delay a short one.
        self._threads = ThreadPoolExecutor(max_concurrency, "llama-prepare")

    @property
    def healthy(self) -> bool:
        """False once predictions can no longer be served."""
        return self._engine.healthy

    def close(self) -> None:
        """Stop the engine. Running predictions fail with an error."""
        self._engine.close()
        self._threads.shutdown(wait=False)

    def prepare(self, inputs: Mapping[str, Any]) -> Prediction:
        """Validate a prediction's inputs, named as in `Predictor.run`, and tokenize its prompt.

        The prediction's time is measured from this call. Raises a UserError if the inputs are invalid.
        """
        return self._prepare(inputs, Metrics())

    async def prepare_in_thread(self, inputs: Mapping[str, Any]) -> Prediction:
        """Run `prepare` in a thread, because all predictions of a server share one event loop."""
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
        """Prepare a prediction and stream its answer, for use outside Cog.

        Metrics are not recorded. Close the iterator to cancel.
        """
        return self.stream_here(self.prepare(inputs), log)

    def stream_here(self, prediction: Prediction, log: Log) -> Iterator[str]:
        """Stream the answer of a prepared prediction, for use outside Cog, like `answer`."""
        return self.stream(prediction, scope=NoScope(), log=log, cancellation=Cancellation())

    def stream(
        self, prediction: Prediction, *, scope: Scope, log: Log, cancellation: Cancellation
    ) -> Iterator[str]:
        """Yield the answer in pieces, each with all the text that is ready.

        Records the token count before each piece, and all metrics at the end. Closing the iterator early or
        setting `cancellation` stops the generation. If `scope` or `log` fails, the failure is written to the
        server's log and the answer continues. Raises an EngineError if the engine fails.
        """
        metrics = prediction.metrics
        scope = GuardedScope(scope)
        # This message omits the line, which may contain a prompt.
        log = guarded(
            log, "a prediction's log could not be written; no more lines are logged for this prediction"
        )
        # So that a prediction that is cancelled or lost can be billed.
        scope.record_metric("input_token_count", metrics.input_token_count)
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
            yield f"the maximum was lowered to {params.maximum} new tokens, the room left in the context"
        if request.debug:
            yield f"formatted prompt: {self._tokenizer.render(request.prompt)!r}"
            yield f"settings: {json.dumps(params.model_dump(exclude_none=True), separators=(',', ':'))}"


def _report(prediction: Prediction) -> Iterator[str]:
    if prediction.request.log_performance_metrics or prediction.request.debug:
        for name, value in prediction.metrics.values().items():
            yield f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}"
