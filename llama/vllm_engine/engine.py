"""VLLMEngine: the `Engine` protocol on vLLM, for several GPUs or machines.

A background thread runs an event loop with vLLM's asynchronous engine, which takes and returns token ids.
Translates between our parameters and errors and those of vLLM. Knows nothing about text, stop sequences or
metrics, which are the same for every engine.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import threading
from collections.abc import Collection, Coroutine, Sequence
from itertools import count
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from vllm import AsyncEngineArgs
from vllm import SamplingParams as VLLMParams
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from llama.engine import TokenStream, check_token_ids
from llama.errors import EngineError, EngineNotStarted, EngineStopped, GenerationFailed, NotSupported
from llama.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The temperatures that vLLM supports, besides 0. It would silently raise a lower one to _COLDEST.
_COLDEST, _HOTTEST = 0.01, 2.0
_LARGEST_SEED = 2**63
_LARGEST_TOP_K = 2**31 - 1
_REPORT_EVERY = 60.0  # seconds


class VLLMEngine:
    """An `Engine` that runs the model in vLLM's own processes."""

    def __init__(
        self, arguments: AsyncEngineArgs, *, vocabulary: int, eos_token_ids: Collection[int]
    ) -> None:
        """Wait until the model is loaded. Raises EngineNotStarted.

        Ids from `vocabulary` on are not tokens: a checkpoint may pad its embedding table.
        """
        self._vocabulary, self._eos = vocabulary, frozenset(eos_token_ids)
        self._tokens = 0
        self._ids = count()
        self._answers: set[asyncio.Task[Any]] = set()
        self._lock = threading.Lock()
        self._stopped = False  # guarded by the lock, so that no request is queued after the end
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llama-vllm", daemon=True)
        self._thread.start()
        try:
            self._vllm = self._wait_for(_start(arguments))
        except Exception as error:
            self._end_loop()
            raise EngineNotStarted(
                f"vLLM did not start ({type(error).__name__}: {error}); its log has the reason"
            ) from error
        except BaseException:  # Ctrl-C: otherwise, our process could not exit before vLLM's have loaded
            self._abandon()
            raise
        self._reporting = asyncio.run_coroutine_threadsafe(self._report(), self._loop)

    @property
    def context_length(self) -> int:
        return int(self._vllm.model_config.max_model_len)

    @property
    def max_requests(self) -> int:
        return int(self._vllm.vllm_config.scheduler_config.max_num_seqs)

    @property
    def healthy(self) -> bool:
        return not self._stopped and not self._vllm.errored

    @property
    def _padding(self) -> range:
        """The ids in the embedding table that are not tokens."""
        return range(self._vocabulary, int(self._vllm.model_config.get_vocab_size()))

    def check(self, params: SamplingParams) -> None:
        if not params.greedy and not _COLDEST <= params.temperature <= _HOTTEST:
            raise NotSupported(
                f"temperature is {params.temperature:g}, but the vllm engine supports only 0 and "
                f"values from {_COLDEST:g} to {_HOTTEST:g}; send one of those"
            )

    def submit(self, token_ids: Sequence[int], params: SamplingParams) -> TokenStream:
        check_token_ids(token_ids, self._vocabulary)
        stream = TokenStream()
        answer = self._answer(tokens_input(list(token_ids)), params, stream)
        with self._lock:
            if not self.healthy:
                answer.close()
                raise EngineStopped("the engine is not running; restart the server")
            stream.on_cancel(asyncio.run_coroutine_threadsafe(answer, self._loop).cancel)
        return stream

    def close(self) -> None:
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        try:
            self._wait_for(self._end())
        finally:
            self._end_loop()

    async def _answer(self, prompt: TokensInput, params: SamplingParams, stream: TokenStream) -> None:
        """Put tokens into the stream until the request ends. Cancelling this task aborts vLLM's request."""
        task = asyncio.current_task()
        assert task is not None
        self._answers.add(task)
        try:
            theirs = vllm_params(params, self._eos, self._padding)
            async for output in self._vllm.generate(prompt, theirs, str(next(self._ids))):
                self._hand_out(output.outputs[0], stream)
        except asyncio.CancelledError:
            stream.fail(EngineStopped("the engine was stopped; restart the server"))
            raise
        except Exception as error:
            logger.exception("vLLM failed a request")
            stream.fail(_translated(error))
        finally:
            self._answers.discard(task)

    def _hand_out(self, completion: CompletionOutput, stream: TokenStream) -> None:
        token_ids, reason = completion.token_ids, completion.finish_reason
        for token_id in token_ids[:-1] if reason == "stop" and token_ids[-1] in self._eos else token_ids:
            stream.put(token_id)
            self._tokens += 1
        if reason in ("stop", "length"):
            stream.finish(reason)
        elif reason is not None:
            stream.fail(GenerationFailed(f"vLLM ended the request ({reason}); try again"))

    async def _report(self) -> None:
        """Log one line per minute while there is work."""
        while True:
            before = self._tokens
            await asyncio.sleep(_REPORT_EVERY)
            if self._answers:
                rate = (self._tokens - before) / _REPORT_EVERY
                logger.info("engine: %d requests running or waiting, %.1f tokens/s", len(self._answers), rate)

    async def _end(self) -> None:
        self._reporting.cancel()
        for task in self._answers:
            task.cancel()
        await asyncio.gather(*self._answers, return_exceptions=True)
        self._vllm.shutdown()

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _abandon(self) -> None:
        """Kill the processes that are still starting, and stop the event loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        while self._thread.is_alive():
            for process in multiprocessing.active_children():
                process.kill()
            self._thread.join(0.1)


async def _start(arguments: AsyncEngineArgs) -> AsyncLLM:
    """Start vLLM's engine in the running event loop.

    The usage context determines how many tokens vLLM reads per step.
    """
    # Ctrl-C in a terminal goes to vLLM's processes too, and would end them. They inherit the blocked signal.
    resource_tracker.ensure_running()  # before blocking the signal: starting the tracker unblocks it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    return AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)


def vllm_params(
    params: SamplingParams, eos_token_ids: Collection[int], padding: Collection[int] = ()
) -> VLLMParams:
    """Translate a request's parameters for vLLM. A rule that is off stays off.

    `padding` has the ids in the embedding table that are not tokens.
    """
    return VLLMParams(
        temperature=0.0 if params.greedy else params.temperature,
        top_p=params.top_p or 1.0,  # 0 is greedy
        top_k=min(max(params.top_k, 0), _LARGEST_TOP_K),
        repetition_penalty=params.repetition,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        # For vLLM, -1 means no seed, and a seed has 64 bits.
        seed=None if params.seed is None else params.seed % _LARGEST_SEED,
        max_tokens=params.maximum,
        min_tokens=params.minimum,
        # We pass the EOS tokens ourselves, so that the same rule applies to all engines.
        ignore_eos=True,
        stop_token_ids=sorted(eos_token_ids),
        logit_bias=dict.fromkeys(padding, float("-inf")) or None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _translated(error: Exception) -> EngineError:
    if isinstance(error, EngineDeadError):
        return GenerationFailed("vLLM's engine has died; see the server's log and restart the server")
    return GenerationFailed(f"vLLM failed the request with {type(error).__name__}; see the server's log")
