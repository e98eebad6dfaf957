"""Fixtures that all tests share.

`llama_folder` is a random Llama with Llama 2's dialogue format. `embedded_folder` is the real embedded chat
model, which must be installed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_models import train_sentencepiece, write_model


def pytest_configure(config: pytest.Config) -> None:
    """Let all engines in the tests, including those in other processes, share the compiled kernels."""
    if (cache := getattr(config, "cache", None)) is not None:  # `-p no:cacheprovider` removes it
        os.environ.setdefault("NUMBA_CACHE_DIR", str(cache.mkdir("numba")))


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(train_sentencepiece())
    return path


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny-llama-chat"
    write_model(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    return folder


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    from llama.settings import Settings
    from llama.weights.embedded import embedded_folder

    return embedded_folder(Settings().cache_dir)
