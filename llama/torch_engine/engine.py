"""TorchEngine: one background thread that takes requests from a queue and steps a batch.

Knows threads, queues and failures; knows nothing about what a step does, which is in `batch.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from weakref import WeakSet

from llama.engine import TokenStream
from llama.errors import DoesNotFit, EngineError, EngineStopped, GenerationFailed, LlamaError
from llama.model.gpu_errors import is_out_of_memory
from llama.sampling_params import SamplingParams
from llama.torch_engine.batch import Batch
from llama.torch_engine.scheduler import BatchRequest

logger = logging.getLogger(__name__)

_REPORT_EVERY = 60.0  # seconds


class TorchEngine:
    """An `Engine` on one device."""

    def __init__(self, load: Callable[[], Batch]) -> None:
        """Wait until the model is loaded. Raises what `load` raises.

        `load` runs on the engine's thread, so that a single thread computes everything. OpenMP gives every
        computing thread its own team of workers, and if there are more workers than cores, they wait for each
        other: on two cores, a step took 32 ms instead of 20 ms.
        """
        self._arrivals: SimpleQueue[BatchRequest | None] = SimpleQueue()
        self._streams: WeakSet[TokenStream] = WeakSet()
        self._lock = threading.Lock()
        self._stopped = False  # guarded by the lock, so that no request is queued after the loop has ended
        loaded: Future[Batch] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(load, loaded), name="llama-engine", daemon=True
        )
        self._thread.start()
        self._batch = loaded.result()

    @property
    def context_length(self) -> int:
        return self._batch.shape.length

    @property
    def max_requests(self) -> int:
        return self._batch.shape.rows

    @property
    def healthy(self) -> bool:
        return not self._stopped and self._thread.is_alive()

    def check(self, params: SamplingParams) -> None:
        """Accept all parameters: this engine supports the whole API."""

    def submit(self, token_ids: Sequence[int], params: SamplingParams) -> TokenStream:
        request = self._batch.request(token_ids, params)
        with self._lock:
            if self._stopped:
                raise EngineStopped("the engine is not running; restart the server")
            self._streams.add(request.stream)
            self._arrivals.put(request)
        return request.stream

    def close(self) -> None:
        self._arrivals.put(None)
        self._thread.join()

    def _run(self, load: Callable[[], Batch], loaded: Future[Batch]) -> None:
        try:
            batch = load()
        except BaseException as error:
            explained = isinstance(error, LlamaError) or not is_out_of_memory(error)
            loaded.set_exception(error if explained else _does_not_fit(error))
            return
        loaded.set_result(batch)
        failure: EngineError = EngineStopped("the engine was stopped; restart the server")
        try:
            self._serve(batch)
        except Exception as error:
            logger.exception("the engine's loop failed")
            failure = GenerationFailed(
                f"a step of the engine failed with {type(error).__name__}, and the engine has stopped; "
                "see the server's log and restart the server"
            )
        finally:
            with self._lock:
                self._stopped = True
            for stream in self._streams:  # this has no effect on streams that have ended
                # Each stream gets its own exception, because each reader's thread adds a traceback to it.
                stream.fail(type(failure)(failure.message))

    def _serve(self, batch: Batch) -> None:
        """Step until the engine is closed. Log one line per minute while there is work."""
        reported, generated = time.monotonic(), 0
        while self._take_arrivals(batch):
            batch.step()
            if (seconds := time.monotonic() - reported) >= _REPORT_EVERY:
                speed = (batch.generated - generated) / seconds
                reported, generated = time.monotonic(), batch.generated
                logger.info(
                    "engine: %d running, %d waiting, %.0f%% of the cache in use, %.1f tokens/s",
                    batch.running,
                    batch.waiting,
                    100 * batch.cache_use,
                    speed,
                )

    def _take_arrivals(self, batch: Batch) -> bool:
        """Queue the requests that have arrived. If there is nothing else to do, wait for one.

        Returns False if the engine is to stop.
        """
        while True:
            try:
                request = self._arrivals.get(block=batch.idle)
            except Empty:
                return True
            if request is None:
                return False
            batch.add(request)


def _does_not_fit(error: BaseException) -> DoesNotFit:
    return DoesNotFit(
        "the device does not have enough memory for the weights, the key/value cache, the CUDA graphs and "
        f"the largest prefill step ({error}); end other programs that use the device, set a smaller "
        "LLAMA_CACHE_MEMORY, COG_MAX_CONCURRENCY or LLAMA_MAX_CONTEXT, or choose another LLAMA_QUANTIZATION"
    )
