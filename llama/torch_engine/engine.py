"""TorchEngine: one background thread that takes requests from a queue and steps the model.

A turn of the loop: take in what is new, let go of who has left, read some of the prompts that wait, then
one decode step for all whose prompt is read. Knows how the parts play together; each part is a module of
its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from weakref import WeakSet

import torch
from torch import Tensor

from llama.engine import TokenStream, check_token_ids
from llama.errors import DoesNotFit, EngineError, EngineStopped, GenerationFailed
from llama.sampling import SamplingParams
from llama.torch_engine.kv_cache import KVCache
from llama.torch_engine.layers import Parts
from llama.torch_engine.runner import Chunk, Runner
from llama.torch_engine.sampler import UNUSABLE, Sampler
from llama.torch_engine.scheduler import Scheduler, Sequence
from llama.torch_engine.thread_count import ThreadCount

logger = logging.getLogger(__name__)

# Prompt tokens a turn, so that nobody's stream stands still for more than about two decode steps: a
# share for each prompt that waits, which grows with the step's own length, and a bound on the whole.
_SHARE = {"cuda": (256, 8), "cpu": (32, 4)}
MOST_A_TURN = {"cuda": 1024, "cpu": 512}
_REPORT_EVERY = 60.0  # seconds
_SAME_LENGTH = 256  # steps whose longest requests differ by less take about as long


class TorchEngine:
    """An `Engine` on one device."""

    def __init__(
        self,
        load: Callable[[], tuple[Parts, KVCache]],
        *,
        vocabulary: int,
        eos_token_ids: Collection[int],
        prefix_reuse: bool,
        cuda_graphs: bool,
        threads: int | None = None,
    ) -> None:
        """Waits until the model is loaded; raises what `load` raises. `vocabulary`: ids below this are
        tokens; a checkpoint may pad its table.

        `load` runs on the engine's thread. OpenMP gives every thread that computes a crew of its own, and
        once there are more workers than cores they stop to wait for each other's turn (measured on two
        cores: 32 ms a step, not 20). So one thread does all there is to compute.
        """
        self._vocabulary, self._eos = vocabulary, frozenset(eos_token_ids)
        self._prefix_reuse, self._cuda_graphs = prefix_reuse, cuda_graphs
        self._fixed_threads = threads
        self._arrivals: SimpleQueue[Sequence | None] = SimpleQueue()
        self._streams: WeakSet[TokenStream] = WeakSet()
        self._lock = threading.Lock()
        self._stopped = False  # under the lock: nothing is queued behind the loop's last look
        self._reported, self._tokens = time.monotonic(), 0
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(load, ready), name="llama-engine", daemon=True
        )
        self._thread.start()
        ready.result()

    def _set_up(self, parts: Parts, cache: KVCache) -> None:
        plan = cache.plan
        self._plan, self._device, self._cache = plan, parts.device, cache
        self._stretched_from = parts.stretched_from
        self._runner = Runner(parts, cache)
        self._sampler = Sampler(plan.rows, plan.length, self._vocabulary, self._eos, parts.device)
        self._scheduler = Scheduler(plan.rows, cache, prefix_reuse=self._prefix_reuse)
        if self._fixed_threads is not None:
            torch.set_num_threads(self._fixed_threads)
        adapts = parts.device.type == "cpu" and self._fixed_threads is None
        self._threads = ThreadCount(torch.get_num_threads() if adapts else 1, torch.set_num_threads)
        if parts.device.type == "cuda":
            if self._cuda_graphs:
                self._runner.capture()
            # Memory that is not enough shows now, and not in somebody's answer.
            most = min(MOST_A_TURN["cuda"], plan.length)
            self._runner.prefill([Chunk(0, plan.length - most, self._tensor([0] * most))])

    @property
    def context_length(self) -> int:
        return self._plan.length

    @property
    def max_requests(self) -> int:
        return self._plan.rows

    @property
    def healthy(self) -> bool:
        return not self._stopped and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests that hold a place in the batch."""
        return len(self._scheduler.running)

    def check(self, params: SamplingParams) -> None:
        """There is nothing in the API that it cannot do."""

    def submit(self, token_ids: Seq[int], params: SamplingParams) -> TokenStream:
        check_token_ids(token_ids, self._vocabulary)
        stretched = 0 < self._stretched_from < len(token_ids) + params.maximum
        sequence = Sequence(list(token_ids), len(token_ids), params, TokenStream(), stretched=stretched)
        with self._lock:
            if self._stopped:
                raise EngineStopped("the engine is not running; restart the server")
            self._streams.add(sequence.stream)
            self._arrivals.put(sequence)
        return sequence.stream

    def close(self) -> None:
        self._arrivals.put(None)
        self._thread.join()

    def _run(self, load: Callable[[], tuple[Parts, KVCache]], ready: Future[None]) -> None:
        try:
            self._set_up(*load())
        except torch.OutOfMemoryError as error:
            ready.set_exception(
                DoesNotFit(
                    f"the memory of the device does not hold the cache and the largest step ({error}); set a "
                    "smaller LLAMA_CACHE_MEMORY or LLAMA_MAX_CONTEXT"
                )
            )
            return
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        failure: EngineError = EngineStopped("the engine was stopped; restart the server")
        try:
            while self._take_arrivals():
                self._turn()
        except Exception as error:
            logger.exception("the engine's loop failed")
            failure = GenerationFailed(
                f"a step of the engine failed with {type(error).__name__} and the engine has stopped; "
                "see the server's log and restart it"
            )
        finally:
            with self._lock:
                self._stopped = True
            for stream in self._streams:  # no effect on a stream that has ended
                # Each has an exception of its own: a raised one carries the traceback of its caller's thread.
                stream.fail(type(failure)(str(failure).partition(": ")[2]))

    def _take_arrivals(self) -> bool:
        """Queue what has arrived, waiting for it while there is nothing else to do. False: stop."""
        while True:
            try:
                sequence = self._arrivals.get(block=self._scheduler.idle)
            except Empty:
                return True
            if sequence is None:
                return False
            self._scheduler.add(sequence)

    def _turn(self) -> None:
        self._scheduler.drop_cancelled_waiting()
        running = self._scheduler.running
        # What a prompt that was not read to its end has in the cache was never seen to be finite.
        self._release({row: s.decoding for row, s in enumerate(running) if s.stream.cancelled})
        self._prefill()
        self._decode()
        self._report()

    def _prefill(self) -> None:
        """Read prompts, the oldest first, as far as a turn allows; several in one step."""
        left = self._prefill_budget()
        while chunks := self._next_chunks(left):
            left -= sum(len(chunk.token_ids) for chunk in chunks.values())
            # The last row first: when one ends at its first token, the rows below stay as they are.
            for sequence, logits in reversed(self._read(chunks).items()):
                if sequence.decoding:
                    with self._failing_alone(sequence):
                        self._begin_answer(sequence, logits)

    def _next_chunks(self, most: int) -> dict[Sequence, Chunk]:
        """What to read in one step: at most `most` tokens."""
        chunks: dict[Sequence, Chunk] = {}
        left = most
        while left > 0 and (entry := self._scheduler.next_prefill({chunk.row for chunk in chunks.values()})):
            row, sequence = entry
            with self._failing_alone(sequence):
                if sequence.cached == 0 and row == len(self._scheduler.running) - 1:
                    self._scheduler.reuse_prefix(row)
                end = min(sequence.cached + left, sequence.prompt_length)
                token_ids = self._tensor(sequence.tokens[sequence.cached : end])
                chunks[sequence] = Chunk(row, sequence.cached, token_ids, sequence.stretched)
                left -= len(token_ids)
            if sequence not in chunks and row < len(self._scheduler.running):
                chunks, left = {}, most  # it failed, and its row has been given to another sequence
        return chunks

    def _read(self, chunks: dict[Sequence, Chunk]) -> dict[Sequence, Tensor]:
        """Read chunks into the cache. Logits [1, V] of the last token of each, without those that failed."""
        for sequence, chunk in chunks.items():
            sequence.cached = chunk.end  # set before reading, so that a partial read is cleared as well
        if len(chunks) > 1:
            try:
                logits = self._runner.prefill([*chunks.values()])
                return dict(zip(chunks, torch.split(logits, 1), strict=True))
            except Exception as error:
                logger.warning("%d prompts could not be read in one step (%s)", len(chunks), error)
        read: dict[Sequence, Tensor] = {}
        # The highest row first: when one fails, the rows below stay as they are.
        for sequence, chunk in sorted(chunks.items(), key=lambda item: -item[1].row):
            with self._failing_alone(sequence):
                read[sequence] = self._runner.prefill([chunk])
        return read

    def _begin_answer(self, sequence: Sequence, logits: Tensor) -> None:
        """The prompt is read: let it take part in decoding, and hand out its first token."""
        row = self._scheduler.running.index(sequence)
        self._sampler.add(row, self._tensor(sequence.tokens), sequence.params)
        self._runner.place(row, sequence.cached, stretched=sequence.stretched)
        self._emit(row, logits)

    @contextmanager
    def _failing_alone(self, sequence: Sequence) -> Iterator[None]:
        """An exception inside fails this request and no other."""
        try:
            yield
        except Exception as error:
            logger.exception("a prompt could not be read")
            sequence.stream.fail(
                GenerationFailed(
                    f"the prompt could not be read ({type(error).__name__}); see the server's log"
                )
            )
            self._scheduler.forget_prefixes()
            self._release({self._scheduler.running.index(sequence): False})

    def _prefill_budget(self) -> int:
        decoding, device = self._scheduler.decoding, self._device.type
        if not decoding:
            return MOST_A_TURN[device]
        base, a_stream = _SHARE[device]
        return min((base + a_stream * decoding) * (1 + self._scheduler.waiting), MOST_A_TURN[device])

    def _decode(self) -> None:
        running = self._scheduler.running
        decoding = [sequence for sequence in running if sequence.decoding]
        if not decoding:
            return
        longest, started = max(len(sequence.tokens) for sequence in decoding), time.perf_counter()
        logits = self._runner.decode(len(running), longest)
        for sequence in decoding:
            sequence.cached += 1
        self._emit(0, logits)
        shape = len(running), longest // _SAME_LENGTH
        self._threads.observe(shape, time.perf_counter() - started)

    def _emit(self, first: int, logits: Tensor) -> None:
        """Take the next token of the sequences from row `first` on and hand it out, or end them."""
        tokens = self._sampler.sample(logits[:, : self._vocabulary], first)
        self._runner.feed(first, tokens)
        ended: dict[int, bool] = {}  # row: whether what it has in the cache is good
        for row, token in enumerate(tokens.tolist(), start=first):  # waits for the device
            sequence = self._scheduler.running[row]
            if sequence.decoding and self._hand_out(sequence, token):
                ended[row] = token != UNUSABLE
        self._release(ended)

    def _hand_out(self, sequence: Sequence, token: int) -> bool:
        """Give a sequence its next token; whether that ends it."""
        stream, params = sequence.stream, sequence.params
        if token == UNUSABLE:
            stream.fail(GenerationFailed("the model's output is not finite; try a wider LLAMA_DTYPE"))
            return True
        if token in self._eos and sequence.generated >= params.minimum:
            stream.finish("stop")
            return True
        sequence.tokens.append(token)
        self._tokens += 1
        stream.put(token)
        if sequence.generated < params.maximum:
            return False
        stream.finish("length")
        return True

    def _release(self, ended: dict[int, bool]) -> None:
        """Take sequences out of their rows. The highest first, so that few others have to move."""
        for row, good in sorted(ended.items(), reverse=True):
            if not good:
                self._cache.clear(row, self._scheduler.running[row].cached)
            moved = self._scheduler.release(row, keep=good)
            if moved is not None:
                self._sampler.move(moved, row)
                self._runner.move(moved, row)
            freed = row if moved is None else moved
            self._sampler.remove(freed)
            self._runner.remove(freed)

    def _report(self) -> None:
        """A line a minute while there is work."""
        now = time.monotonic()
        if now - self._reported < _REPORT_EVERY:
            return
        running = self._scheduler.running
        logger.info(
            "engine: %d running, %d waiting, %.0f%% of the cache in use, %.1f tokens/s",
            len(running),
            self._scheduler.waiting,
            100 * sum(sequence.cached for sequence in running) / (self._plan.rows * self._plan.length),
            self._tokens / (now - self._reported),
        )
        self._reported, self._tokens = now, 0

    def _tensor(self, token_ids: Seq[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.long, device=self._device)
