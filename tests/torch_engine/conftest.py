from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM


@pytest.fixture(scope="session")
def model(llama_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval().requires_grad_(False)
