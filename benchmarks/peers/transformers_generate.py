"""`generate` of transformers, with one static batch: all prompts have one length and arrive together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.protocol import Clock, Request, Times, serve


class _RecordTimes(StoppingCriteria):  # type: ignore[misc]
    """Records the time of each step. It never stops the generation."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.times = list[float]()

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.times.append(self._clock())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Generate:
    def __init__(self, model: str) -> None:
        self.versions = {name: version(name) for name in ("torch", "transformers")}
        dtype = getattr(torch, os.environ["LLAMA_DTYPE"])
        self._model = LlamaForCausalLM.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> Times:
        if len({(request.at, len(request.prompt), request.new_tokens) for request in requests}) > 1:
            raise NotImplementedError("a static batch needs requests of one length that arrive together")
        clock = Clock()
        recorder = _RecordTimes(clock)
        count = requests[0].new_tokens
        prompts = torch.tensor([request.prompt for request in requests])
        self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            stopping_criteria=StoppingCriteriaList([recorder]),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
            ),
        )
        assert len(recorder.times) == count
        return [recorder.times for _ in requests]

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(Generate)
