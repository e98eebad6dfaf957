"""llama.cpp with one static batch of sequences. Needs llama-cpp-python.

Uses the C interface, because the Python class of llama-cpp-python answers one request at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from benchmarks.machine import usable_cores
from benchmarks.protocol import Clock, Request, Times, serve


class LlamaCpp:
    def __init__(self, model: str) -> None:
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        # With its own AMX kernels for q4_0, the process crashes with a protection fault (0.3.36).
        flags = Path("/proc/cpuinfo")  # only Linux has this file
        params.use_extra_bufts = not flags.is_file() or "amx_int8" not in flags.read_text()
        self._model = lib.llama_model_load_from_file(model.encode(), params)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def run(self, requests: Sequence[Request]) -> Times:
        if len({(request.at, len(request.prompt), request.new_tokens) for request in requests}) > 1:
            raise NotImplementedError("a static batch needs requests of one length that arrive together")
        prompts = [request.prompt for request in requests]
        context = self._context(len(prompts), len(prompts[0]) + requests[0].new_tokens)
        batch = lib.llama_batch_init(len(prompts) * len(prompts[0]), 0, 1)
        clock = Clock()
        times = list[float]()
        chunks, position = prompts, 0
        for _ in range(requests[0].new_tokens):
            tokens = self._step(context, batch, chunks, position)
            times.append(clock())
            position += len(chunks[0])
            chunks = [[token] for token in tokens]
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return [times for _ in requests]

    def _context(self, sequences: int, length: int) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = -(-sequences * length // 256) * 256
        params.n_batch, params.n_ubatch = sequences * length, 512
        params.n_seq_max, params.kv_unified = sequences, True
        params.n_threads = params.n_threads_batch = usable_cores()
        return lib.llama_init_from_model(self._model, params)

    def _step(self, context: Any, batch: Any, chunks: list[list[int]], position: int) -> list[int]:
        """Read a chunk of every sequence, from `position` on. Return the best next token of each."""
        ends = []
        count = 0
        for sequence, chunk in enumerate(chunks):
            for offset, token in enumerate(chunk):
                batch.token[count], batch.pos[count] = token, position + offset
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
        lib.llama_model_free(self._model)


if __name__ == "__main__":
    serve(LlamaCpp)
