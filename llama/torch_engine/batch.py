"""The requests of an engine, and one step of the model for all of them.

A step drops cancelled requests, reads some of the prompts, and decodes one token for each request whose
prompt has been read. Knows how the scheduler, the model and the sampler work together; has no thread and no
lock (`engine.py` has both).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llama.engine import TokenStream, check_token_ids
from llama.errors import GenerationFailed
from llama.sampling_params import SamplingParams
from llama.torch_engine.attention import Chunk
from llama.torch_engine.cpu_compiler import Kernels
from llama.torch_engine.kv_cache import KVCache
from llama.torch_engine.layers import ModelParts
from llama.torch_engine.prompt_share import MOST_PROMPT_TOKENS, PromptShare
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner
from llama.torch_engine.sampler import NOT_FINITE, Sampler
from llama.torch_engine.scheduler import BatchRequest, RequestState, Scheduler
from llama.torch_engine.thread_count import ThreadCount

logger = logging.getLogger(__name__)

_OVERFLOW = "the model's output is not finite; set LLAMA_DTYPE to float32, or to bfloat16 on Ampere or later"
_SAME_LENGTH = 256  # decode steps take about the same time if their longest requests differ by less than this


class Batch:
    """Requests that share the steps of one model. Only `request` may be called from any thread."""

    def __init__(
        self,
        parts: ModelParts,
        cache: KVCache,
        *,
        vocabulary: int,
        eos_token_ids: Collection[int],
        prefix_reuse: bool = True,
        kernels: Kernels | None = None,
        threads: ThreadCount | None = None,
    ) -> None:
        """Ids from `vocabulary` on are not tokens: a checkpoint may pad its embedding table. `threads` adapts
        the number of CPU threads to the durations of decode steps."""
        self._vocabulary, self._eos = vocabulary, frozenset(eos_token_ids)
        self._stretched_from, self._device = parts.stretched_from, parts.device
        self._share = PromptShare(MOST_PROMPT_TOKENS[parts.device.type])
        self._threads, self.shape = threads, cache.shape
        self.generated = 0
        """The number of tokens generated so far, over all requests."""
        rows = Rows(cache)
        self._runner = Runner(parts, rows, kernels)
        self._sampler = Sampler(rows, vocabulary, self._eos)
        self._scheduler = Scheduler(cache.shape.rows, rows, prefix_reuse=prefix_reuse)

    def prepare_gpu(self, *, graphs: bool) -> None:
        """Capture graphs and run the largest steps, so that memory runs out now instead of during a request.
        Raises EngineNotStarted, or an error that `is_out_of_memory` recognizes."""
        if graphs:
            self._runner.capture()
        logits = self._runner.run_largest_steps(MOST_PROMPT_TOKENS[self._device.type])
        self._sampler.sample_all(logits[:, : self._vocabulary])

    def request(self, token_ids: Sequence[int], params: SamplingParams) -> BatchRequest:
        """Return a new request for `add`. Any thread may call this. Raises InvalidInput."""
        check_token_ids(token_ids, self._vocabulary)
        stretched = 0 < self._stretched_from < len(token_ids) + params.maximum
        return BatchRequest(list(token_ids), len(token_ids), params, TokenStream(), stretched)

    def add(self, request: BatchRequest) -> None:
        """Add a request to the end of the queue."""
        if self._threads is not None and self.idle:
            self._threads.start_over()
        self._scheduler.add(request)

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    @property
    def running(self) -> int:
        """The number of requests that have a row."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """The number of requests that are waiting for a row."""
        return self._scheduler.waiting

    @property
    def cache_use(self) -> float:
        """The fraction of the cache that running requests fill."""
        return sum(r.cached for r in self._scheduler.running) / (self.shape.rows * self.shape.length)

    def step(self) -> None:
        """Decode one token for every request whose prompt has been read, and read more prompts.

        If reading a prompt fails, only that request fails. If this method raises, the caller fails them all.
        """
        self._drop_cancelled()
        self._prefill()
        self._decode()

    def _drop_cancelled(self) -> None:
        """Free the rows of cancelled requests, and drop those that are still waiting."""
        self._scheduler.drop_cancelled_waiting()
        running = enumerate(self._scheduler.running)
        # Until a prompt has been read completely, nothing has checked that its keys and values are finite.
        self._release({row: r.state is RequestState.DECODING for row, r in running if r.stream.cancelled})

    def _prefill(self) -> None:
        """Read prompts, oldest first and several at once, until the step's share is used up."""
        started = time.perf_counter()
        decoding, rows = self._scheduler.decoding, self.shape.rows
        left = share = self._share.tokens(decoding > 0, min(self.running + self.waiting, rows) - decoding)
        while chunks := self._next_chunks(left):
            left -= sum(len(chunk.token_ids) for chunk in chunks.values())
            # In reverse, so that a request that ends with its first token does not change the other rows.
            for request, logits in reversed(self._read(chunks).items()):
                ended: dict[int, bool] = {}
                if request.cached == request.prompt_length:
                    with self._isolating_failure(request):
                        ended = self._begin_answer(request, logits)
                self._release(ended)
        if left < share:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._share.observe_reading(share - left, time.perf_counter() - started)

    def _next_chunks(self, most: int) -> dict[BatchRequest, Chunk]:
        """Return the chunks to read together, with at most `most` tokens in total."""
        chunks: dict[BatchRequest, Chunk] = {}
        left = most
        while left > 0 and (entry := self._scheduler.next_prefill({chunk.row for chunk in chunks.values()})):
            row, request = entry
            with self._isolating_failure(request):
                if request.cached == 0 and row == self.running - 1:
                    self._scheduler.reuse_prefix(row)
                end = min(request.cached + left, request.prompt_length)
                token_ids = self._tensor(request.tokens[request.cached : end])
                chunks[request] = Chunk(row, request.cached, token_ids, request.stretched)
                left -= len(token_ids)
            if request not in chunks and row < self.running:
                chunks, left = {}, most  # it failed, and another request is in its row now: start again
        return chunks

    def _read(self, chunks: dict[BatchRequest, Chunk]) -> dict[BatchRequest, Tensor]:
        """Read chunks into the cache. Return the logits [1, V] of each chunk's last token, except those of
        requests that failed."""
        for request, chunk in chunks.items():
            request.cached = chunk.end  # set before reading, so that a partial read is cleared as well
        if len(chunks) > 1:
            try:
                logits = self._runner.prefill([*chunks.values()])
                return dict(zip(chunks, torch.split(logits, 1), strict=True))
            except Exception as error:
                logger.warning("%d prompts failed together (%s); reading each alone", len(chunks), error)
        read: dict[BatchRequest, Tensor] = {}
        # Highest row first: if its request fails, the lower rows do not change.
        for request, chunk in sorted(chunks.items(), key=lambda item: -item[1].row):
            with self._isolating_failure(request):
                read[request] = self._runner.prefill([chunk])
        return read

    def _begin_answer(self, request: BatchRequest, logits: Tensor) -> dict[int, bool]:
        """Start decoding a request whose prompt has been read, and emit its first token. Return
        what `_emit` returns."""
        row = self._scheduler.running.index(request)
        self._sampler.add(row, self._tensor(request.tokens), request.params)
        self._runner.start_decoding(row, request.cached, stretched=request.stretched)
        request.state = RequestState.DECODING
        return self._emit(row, [request], logits)

    @contextmanager
    def _isolating_failure(self, request: BatchRequest) -> Iterator[None]:
        """If the body raises an exception, fail this request and no other."""
        try:
            yield
        except Exception as error:
            logger.exception("the engine failed on a prompt")
            request.stream.fail(
                GenerationFailed(
                    f"the engine failed on this prompt ({type(error).__name__}); see the server's log"
                )
            )
            self._scheduler.forget_prefixes()
            self._release({self._scheduler.running.index(request): False})

    def _decode(self) -> None:
        running = self._scheduler.running
        decoding = [request for request in running if request.state is RequestState.DECODING]
        if not decoding:
            return
        longest, started = max(len(request.tokens) for request in decoding), time.perf_counter()
        logits = self._runner.decode(len(running), longest)
        for request in decoding:
            request.cached += 1
        self._release(self._emit(0, running, logits))
        seconds = time.perf_counter() - started
        self._share.observe_decoding(seconds)
        if self._threads is not None:
            self._threads.observe((len(logits), longest // _SAME_LENGTH), seconds)

    def _emit(self, first: int, requests: Sequence[BatchRequest], logits: Tensor) -> dict[int, bool]:
        """Sample the next token for the rows from `first` on, and hand it out to requests that are decoding.
        Return the rows of requests that have ended, and whether the keys and values of each are finite."""
        decoding = [request.params for request in requests if request.state is RequestState.DECODING]
        tokens = self._sampler.sample(logits[:, : self._vocabulary], first, decoding)
        self._runner.feed(first, tokens)
        ended: dict[int, bool] = {}
        for row, (request, token) in enumerate(zip(requests, tokens.tolist(), strict=True), start=first):
            if request.state is RequestState.DECODING and self._hand_out(request, token):
                ended[row] = token != NOT_FINITE
        return ended

    def _hand_out(self, request: BatchRequest, token: int) -> bool:
        """Put the next token into a request's stream. Return whether the request has ended."""
        stream, params = request.stream, request.params
        if token == NOT_FINITE:
            stream.fail(GenerationFailed(_OVERFLOW))
            return True
        if token in self._eos and request.generated >= params.minimum:
            stream.finish("stop")
            return True
        request.tokens.append(token)
        self.generated += 1
        stream.put(token)
        if request.generated < params.maximum:
            return False
        stream.finish("length")
        return True

    def _release(self, ended: dict[int, bool]) -> None:
        """Free rows, highest first, so that the numbers of the remaining rows stay valid."""
        for row in sorted(ended, reverse=True):
            self._scheduler.release(row, sound=ended[row])

    def _tensor(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.long, device=self._device)
