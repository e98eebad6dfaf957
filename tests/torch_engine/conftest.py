from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

import pytest
import torch
from batches import Computing
from transformers import LlamaForCausalLM


@pytest.fixture(scope="session")
def model(llama_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(params=get_args(Computing))
def computing(request: pytest.FixtureRequest) -> Computing:
    return cast("Computing", request.param)
