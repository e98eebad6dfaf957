"""Continuous batching by transformers."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from importlib.metadata import version

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from benchmarks.protocol import Clock, Request, Times, serve


class ContinuousBatching:
    def __init__(self, model: str) -> None:
        self.versions = {name: version(name) for name in ("torch", "transformers")}
        dtype = getattr(torch, os.environ["LLAMA_DTYPE"])
        # The cache fits 32 requests of 256 tokens. On a CPU, every token reads the whole cache, so a larger
        # cache would be slower.
        self._manager = (
            LlamaForCausalLM.from_pretrained(model, dtype=dtype)
            .eval()
            .init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
                ContinuousBatchingConfig(
                    page_size=32, num_blocks=256, max_batch_tokens=2048, allow_block_sharing=False
                ),
            )
        )
        self._manager.start()

    def run(self, requests: Sequence[Request]) -> Times:
        if sum(len(request.prompt) + request.new_tokens for request in requests) > 32 * 256:
            raise NotImplementedError("the requests do not fit in the cache")
        clock = Clock()
        threading.Thread(target=self._submit, args=(requests, clock)).start()
        times: Times = [[] for _ in requests]
        ended = 0
        while ended < len(requests):
            output = self._manager.get_result()
            assert output is not None, "the generation loop has ended"
            assert output.error is None, output.error
            mine = times[int(output.request_id)]
            mine += [clock()] * (len(output.generated_tokens) - len(mine))
            ended += output.is_finished()
        return times

    def _submit(self, requests: Sequence[Request], clock: Clock) -> None:
        for index, request in enumerate(requests):
            clock.wait_until(request.at)
            self._manager.add_request(
                request.prompt, str(index), max_new_tokens=request.new_tokens, streaming=True
            )

    def close(self) -> None:
        self._manager.stop(block=True)


if __name__ == "__main__":
    serve(ContinuousBatching)
