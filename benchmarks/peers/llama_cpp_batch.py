"""llama.cpp with one batch of sequences that arrive together. Needs llama-cpp-python.

Uses the C interface, because the Python class of llama-cpp-python answers one request at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from benchmarks.machine import usable_cores
from benchmarks.protocol import Clock, Request, Times, serve

_CONTEXT_OF_ONE = 4096  # tokens of a single request, prompt and answer together


class LlamaCpp:
    def __init__(self, model: str) -> None:
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        # With its own AMX kernels for q4_0, the process crashes with a protection fault (0.3.36).
        flags = Path("/proc/cpuinfo")  # only Linux has this file
        params.use_extra_bufts = not flags.is_file() or "amx_int8" not in flags.read_text()
        self._model = lib.llama_model_load_from_file(model.encode(), params)
        self._kept: Any = None
        self._read = list[int]()  # the prompt whose keys and values `_kept` has
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def run(self, requests: Sequence[Request]) -> Times:
        if len({(request.at, request.new_tokens) for request in requests}) > 1:
            raise NotImplementedError("its requests must arrive together with the same number of new tokens")
        prompts = [request.prompt for request in requests]
        count = requests[0].new_tokens
        if len(prompts) == 1 and len(prompts[0]) + count <= _CONTEXT_OF_ONE:
            return [self._run_one(prompts[0], count)]
        context = self._context(len(prompts), max(map(len, prompts)) + count)
        times = self._generate(context, prompts, [0] * len(prompts), count)
        lib.llama_free(context)
        return [times for _ in requests]

    def _run_one(self, prompt: list[int], count: int) -> list[float]:
        """Answer one request. Like llama.cpp's server, keep the cache and read only new tokens."""
        if self._kept is None:
            self._kept = self._context(1, _CONTEXT_OF_ONE)
        # At least one token must be read, because the cache holds no logits.
        pairs = zip(self._read, prompt[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._kept), 0, common, -1)
        self._read = prompt
        return self._generate(self._kept, [prompt[common:]], [common], count)

    def _context(self, sequences: int, length: int) -> Any:
        """Return a context with room for `length` tokens in each sequence."""
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * -(-length // 256) * 256
        params.n_batch, params.n_ubatch = params.n_ctx, 512
        # With one cache for all sequences, every token would also read the masked cells of the others. This
        # was slower on two cores of an EPYC: 255 instead of 286 tokens/s for 8 requests of the workload, and
        # 302 instead of 373 tokens/s for 32.
        params.n_seq_max, params.kv_unified = sequences, False
        params.n_threads = params.n_threads_batch = usable_cores()
        return lib.llama_init_from_model(self._model, params)

    def _generate(
        self, context: Any, chunks: list[list[int]], positions: list[int], count: int
    ) -> list[float]:
        """Read a chunk of every sequence, from its position on, and decode. Return the time of each step."""
        batch = lib.llama_batch_init(sum(map(len, chunks)), 0, 1)
        clock = Clock()
        times = list[float]()
        for _ in range(count):
            tokens = self._step(context, batch, chunks, positions)
            times.append(clock())
            positions = [start + len(chunk) for start, chunk in zip(positions, chunks, strict=True)]
            chunks = [[token] for token in tokens]
        lib.llama_batch_free(batch)
        return times

    def _step(self, context: Any, batch: Any, chunks: list[list[int]], positions: list[int]) -> list[int]:
        """Read a chunk of every sequence, from its position on. Return the best next token of each."""
        ends = []
        count = 0
        for sequence, (chunk, start) in enumerate(zip(chunks, positions, strict=True)):
            for offset, token in enumerate(chunk):
                batch.token[count], batch.pos[count] = token, start + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = offset == len(chunk) - 1
                count += 1
            ends.append(count - 1)
        batch.n_tokens = count
        assert lib.llama_decode(context, batch) == 0
        shape = (self._vocabulary,)
        return [
            int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, end), shape).argmax()) for end in ends
        ]

    def close(self) -> None:
        if self._kept is not None:
            lib.llama_free(self._kept)
        lib.llama_model_free(self._model)


if __name__ == "__main__":
    serve(LlamaCpp)
