"""The seam between text and tensors: token ids and sampling parameters in, token ids out.

`Engine` is what `generation.py` needs of one; `TokenStream` is how an engine's thread hands an
answer to a caller's. Neither knows text, stop sequences or metrics.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Literal, Protocol

from llama.errors import EngineError, InvalidInput
from llama.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]

# Cog's server drops a stream whose reader is 1,024 events behind, and every list of tokens makes two events:
# text and a metric. At this many seconds between two lists a reader may stand still for 16 seconds.
_PACE = 1 / 32


class TokenStream:
    """One request's answer, on its way from an engine's thread to a caller's."""

    def __init__(self) -> None:
        self._events: SimpleQueue[int | FinishReason | EngineError] = SimpleQueue()
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._tell_engine: Callable[[], object] | None = None
        self.finish_reason: FinishReason | None = None
        """Why the answer ended; None while iterating, and if the request failed."""
        self._error: EngineError | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of token ids, each with all that is ready, without EOS; at most 32 a second.

        Raises an EngineError when the request has failed, and raises it again when iterated again.
        """
        if self._error is not None:
            raise self._error
        while self.finish_reason is None:
            token_ids = list[int]()
            event = self._events.get()
            while isinstance(event, int):
                token_ids.append(event)
                try:
                    event = self._events.get_nowait()
                except Empty:
                    break
            if isinstance(event, str):
                self.finish_reason = event
            elif isinstance(event, EngineError):
                self._error = event
            if token_ids:
                yield token_ids
                self._ended.wait(_PACE)
            if self._error is not None:
                raise self._error

    def cancel(self) -> None:
        """End the answer here: the caller hears at once, the engine drops it before its next step.
        Any thread may call this, at any time, more than once."""
        self._cancelled.set()
        self._end("cancelled")
        if self._tell_engine is not None:
            self._tell_engine()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def on_cancel(self, tell: Callable[[], object]) -> None:
        """For an engine that does not look at `cancelled` before each step: call `tell` when it is set."""
        self._tell_engine = tell

    def put(self, token_id: int) -> None:
        """For the engine: the next token."""
        self._events.put(token_id)

    def finish(self, reason: FinishReason) -> None:
        """For the engine: there is no more."""
        self._end(reason)

    def fail(self, error: EngineError) -> None:
        """For the engine: there will be no more, and why."""
        self._end(error)

    def _end(self, event: FinishReason | EngineError) -> None:
        self._events.put(event)
        self._ended.set()


def check_token_ids(token_ids: Sequence[int], vocabulary: int) -> None:
    """Raises InvalidInput unless there are token ids and each is below `vocabulary`. On a GPU, another id
    would end CUDA for the whole process."""
    if not token_ids or not 0 <= min(token_ids) <= max(token_ids) < vocabulary:
        raise InvalidInput(
            f"the prompt has {len(token_ids)} token ids; send at least one, each from 0 to {vocabulary - 1}"
        )


class Engine(Protocol):
    """Runs many requests at once. Methods may be called from any thread."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together that one request may have."""

    @property
    def max_requests(self) -> int:
        """Requests that run at once; others wait, first come, first served."""

    @property
    def healthy(self) -> bool:
        """False once requests can no longer be served."""

    def check(self, params: SamplingParams) -> None:
        """Raises NotSupported for what this engine cannot do."""

    def submit(self, token_ids: Sequence[int], params: SamplingParams) -> TokenStream:
        """Queue a request. `token_ids` and `params.maximum` fit the context together.

        Raises EngineStopped if the engine takes no more requests, and InvalidInput if `token_ids` is empty or
        has an id that is no token of the model.
        """

    def close(self) -> None:
        """Stop; whoever still waits gets EngineStopped."""
