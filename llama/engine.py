"""The interface between text and tensors: token ids and sampling parameters in, token ids out.

`Engine` is the interface that `generation.py` uses. `TokenStream` passes an answer from an engine's thread to
a caller's thread. Neither knows text, stop sequences or metrics.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal, Protocol

from llama.errors import EngineError, InvalidInput
from llama.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]

# Cog's server drops a stream whose reader is 1,024 events behind, and every list of tokens makes two events:
# text and a metric. With this many seconds between two lists, a reader may pause for 16 seconds.
PACE = 1 / 32
"""The shortest time between two lists of tokens of a stream, in seconds."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids that a model may generate."""

    size: int
    """Ids below this are valid."""
    eos_token_ids: Collection[int]
    """Ids that end an answer."""


class TokenStream:
    """The answer to one request, passed from an engine's thread to a caller's thread."""

    def __init__(self) -> None:
        self._events: SimpleQueue[int | FinishReason | EngineError] = SimpleQueue()
        self._cancelled = threading.Event()
        self._ended = threading.Event()
        self._tell_engine: Callable[[], object] | None = None
        self.finish_reason: FinishReason | None = None
        """Why the answer ended. None while it is running, and after a failure."""
        self._error: EngineError | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """Yield token ids in lists, at most 32 lists per second. Each has all that are ready, without EOS.

        Raises an EngineError if the request failed, and raises it again if iterated again.
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
                self._ended.wait(PACE)
            if self._error is not None:
                raise self._error

    def cancel(self) -> None:
        """End the answer. Iteration stops immediately, and the engine drops the request before its next step.

        Any thread may call this, at any time, and more than once.
        """
        self._cancelled.set()
        self._end("cancelled")
        if self._tell_engine is not None:
            self._tell_engine()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def on_cancel(self, tell: Callable[[], object]) -> None:
        """Let `cancel` call `tell`, for an engine that does not check `cancelled` before each step."""
        self._tell_engine = tell

    def put(self, token_id: int) -> None:
        """Add the next token. Called by the engine."""
        self._events.put(token_id)

    def finish(self, reason: FinishReason) -> None:
        """End the answer. Called by the engine."""
        self._end(reason)

    def fail(self, error: EngineError) -> None:
        """End the answer with an error. Called by the engine."""
        self._end(error)

    def _end(self, event: FinishReason | EngineError) -> None:
        self._events.put(event)
        self._ended.set()


def check_token_ids(token_ids: Sequence[int], vocabulary: int) -> None:
    """Raise InvalidInput unless there are token ids and each of them is below `vocabulary`.

    On a GPU, any other id would make CUDA unusable for the whole process.
    """
    if not token_ids or not 0 <= min(token_ids) <= max(token_ids) < vocabulary:
        raise InvalidInput(
            f"the prompt is empty or has an id that is not a token ({len(token_ids)} ids); send at least one "
            f"id, each from 0 to {vocabulary - 1}"
        )


class Engine(Protocol):
    """Runs many requests concurrently. Its methods may be called from any thread."""

    @property
    def context_length(self) -> int:
        """The number of tokens that one request may have, prompt and answer together."""

    @property
    def max_requests(self) -> int:
        """The number of requests that run at once. Others wait, first come, first served."""

    @property
    def healthy(self) -> bool:
        """False if the engine can no longer serve requests."""

    def check(self, params: SamplingParams) -> None:
        """Raise NotSupported for parameters that this engine does not support."""

    def submit(self, token_ids: Sequence[int], params: SamplingParams) -> TokenStream:
        """Queue a request. The caller ensures that `token_ids` and `params.maximum` together fit the context.

        Raises EngineStopped if the engine no longer takes requests, and InvalidInput if `token_ids` is empty
        or has an id that is not a token of the model.
        """

    def close(self) -> None:
        """Stop the engine. Requests that have not ended fail with EngineStopped."""
