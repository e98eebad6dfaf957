"""TorchEngine: one background thread that takes requests from a queue and steps the model.

A turn of the loop: take in what is new, let go of who has left, admit, prefill one chunk of one
prompt, then one decode step for all who are ready. So a long prompt holds nobody's stream for longer
than a chunk. Knows how the parts play together; each part is a module of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from collections.abc import Sequence as Seq
from queue import Empty, SimpleQueue

import torch
from transformers import LlamaForCausalLM

from llama.engine import TokenStream
from llama.errors import EngineError, EngineStopped, GenerationFailed
from llama.sampling import SamplingParams
from llama.torch_engine.kv_cache import CachePlan, KVCache
from llama.torch_engine.runner import Runner
from llama.torch_engine.sampler import Sampler
from llama.torch_engine.scheduler import Scheduler, Sequence

logger = logging.getLogger(__name__)

_CHUNK = {"cuda": 512, "cpu": 128}  # prompt tokens a turn: what others wait for at most
_REPORT_EVERY = 60.0  # seconds


class TorchEngine:
    """An `Engine` on one device."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        plan: CachePlan,
        *,
        vocabulary: int,
        eos_token_ids: Collection[int],
    ) -> None:
        """`vocabulary`: ids below this are tokens; a checkpoint may pad its table with more rows."""
        self._plan = plan
        self._vocabulary, self._eos = vocabulary, frozenset(eos_token_ids)
        self._cache = KVCache(model.config, plan, model.dtype, model.device)
        self._runner = Runner(model, self._cache)
        self._sampler = Sampler(plan.slots, vocabulary, eos_token_ids, model.device)
        self._scheduler = Scheduler(plan.slots)
        self._chunk = _CHUNK.get(model.device.type, _CHUNK["cpu"])
        self._arrivals: SimpleQueue[Sequence | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = False  # under the lock: nothing is queued behind the loop's last look
        self._reported, self._tokens = time.monotonic(), 0
        self._thread = threading.Thread(target=self._run, name="llama-engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        return self._plan.length

    @property
    def max_requests(self) -> int:
        return self._plan.slots

    @property
    def healthy(self) -> bool:
        return not self._stopped and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests that hold a place in the batch."""
        return self._scheduler.running

    def submit(self, token_ids: Seq[int], params: SamplingParams) -> TokenStream:
        sequence = Sequence(list(token_ids), params, TokenStream())
        with self._lock:
            if self._stopped:
                raise EngineStopped("the engine is not running; restart the server")
            self._arrivals.put(sequence)
        return sequence.stream

    def close(self) -> None:
        self._arrivals.put(None)
        self._thread.join()

    def _run(self) -> None:
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
            self._fail_everybody(failure)

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

    def _fail_everybody(self, failure: EngineError) -> None:
        while not self._arrivals.empty():
            if (sequence := self._arrivals.get()) is not None:
                self._scheduler.add(sequence)
        for sequence in self._scheduler.drain():
            # One exception an answer: a raised one carries the traceback of its caller's thread.
            sequence.stream.fail(type(failure)(str(failure).partition(": ")[2]))

    def _turn(self) -> None:
        self._scheduler.drop_cancelled_waiting()
        for slot in self._scheduler.cancelled:
            self._release(slot)
        for slot, sequence in self._scheduler.admit():
            self._sampler.add(slot, self._tensor(sequence.prompt), sequence.params)
        self._prefill()
        self._decode()
        self._report()

    def _prefill(self) -> None:
        if (entry := self._scheduler.prefilling) is None:
            return
        slot, sequence = entry
        chunk = sequence.prompt[sequence.cached : sequence.cached + self._chunk]
        logits = self._runner.prefill(slot, self._tensor(chunk), sequence.cached)
        sequence.cached += len(chunk)
        if sequence.prefilled:
            self._emit([entry], logits)

    def _decode(self) -> None:
        entries = self._scheduler.decoding
        if not entries:
            return
        slots = [slot for slot, _ in entries]
        tokens = self._tensor([sequence.last_token for _, sequence in entries])
        logits = self._runner.decode(slots, tokens, [sequence.cached for _, sequence in entries])
        for _, sequence in entries:
            sequence.cached += 1
        self._emit(entries, logits)

    def _emit(self, entries: list[tuple[int, Sequence]], logits: torch.Tensor) -> None:
        """Take each sequence's next token and hand it out, or end the sequence."""
        slots = [slot for slot, _ in entries]
        generated = [sequence.generated for _, sequence in entries]
        tokens = self._sampler.sample(logits[:, : self._vocabulary], slots, generated)
        for (slot, sequence), token in zip(entries, tokens, strict=True):
            if token < 0:
                self._cache.clear(slot)
                sequence.stream.fail(
                    GenerationFailed("the model's output is not finite; try a wider LLAMA_DTYPE")
                )
                self._release(slot)
            elif token in self._eos and sequence.generated >= sequence.params.minimum:
                sequence.stream.finish("stop")
                self._release(slot)
            else:
                self._hand_out(slot, sequence, token)

    def _hand_out(self, slot: int, sequence: Sequence, token: int) -> None:
        sequence.last_token = token
        sequence.generated += 1
        self._tokens += 1
        sequence.stream.put(token)
        if sequence.generated >= sequence.params.maximum:
            sequence.stream.finish("length")
            self._release(slot)

    def _release(self, slot: int) -> None:
        self._sampler.remove(slot)
        self._scheduler.release(slot)

    def _report(self) -> None:
        """A line a minute while there is work."""
        now = time.monotonic()
        if now - self._reported < _REPORT_EVERY:
            return
        cached = sum(sequence.cached for _, sequence in self._scheduler.decoding)
        logger.info(
            "engine: %d running, %d waiting, %.0f%% of the cache in use, %.1f tokens/s",
            self._scheduler.running,
            self._scheduler.waiting,
            100 * cached / (self._plan.slots * self._plan.length),
            self._tokens / (now - self._reported),
        )
        self._reported, self._tokens = now, 0

    def _tensor(self, token_ids: Seq[int]) -> torch.Tensor:
        return torch.tensor(token_ids, dtype=torch.long, device=self._runner.device)
