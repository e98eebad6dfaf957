"""Which folder of weights is served: the one that the settings name, else the embedded model's."""

from __future__ import annotations

from pathlib import Path

from llama.embedded import embedded_folder
from llama.errors import WeightsNotFound
from llama.settings import Settings


def weights_folder(settings: Settings) -> Path:
    """An existing folder. Raises WeightsNotFound, naming what was looked for."""
    if settings.weights is None:
        return embedded_folder(settings.cache_dir)
    folder = settings.weights.expanduser()
    if not folder.is_dir():
        raise WeightsNotFound(
            f"LLAMA_WEIGHTS is {folder}, which is not a folder; set it to one in Hugging Face format "
            "(config.json, safetensors, tokenizer)"
        )
    return folder
