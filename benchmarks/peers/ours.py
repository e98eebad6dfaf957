"""Our engine without the server. It is configured by the same `LLAMA_*` variables."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

from benchmarks.protocol import Clock, Request, Times, in_threads, serve
from llama.engine import Vocabulary
from llama.model.config import load_config
from llama.sampling_params import SamplingParams
from llama.settings import Settings
from llama.setup_times import SetupTimes
from llama.text.load_tokenizer import load_tokenizer
from llama.torch_engine.start import start_engine


class Ours:
    def __init__(self, model: str) -> None:
        self.versions = {name: version(name) for name in ("torch", "transformers")}
        folder = Path(model)
        vocabulary: Future[Vocabulary] = Future()
        vocabulary.set_result(Vocabulary(load_tokenizer(folder).size, eos_token_ids=[]))
        self._engine = start_engine(
            folder, load_config(folder), Settings.from_environment(), SetupTimes(), vocabulary
        )

    def run(self, requests: Sequence[Request]) -> Times:
        return in_threads(self._answer, requests)

    def _answer(self, request: Request, clock: Clock) -> list[float]:
        count = request.new_tokens
        params = SamplingParams(temperature=0.0, max_new_tokens=count, min_new_tokens=count)
        times = list[float]()
        stream = self._engine.submit(request.prompt, params)
        for token_ids in stream:
            times += [clock()] * len(token_ids)
            if request.leave_after is not None and len(times) >= request.leave_after:
                stream.cancel()
        return times

    def close(self) -> None:
        self._engine.close()


if __name__ == "__main__":
    serve(Ours)
