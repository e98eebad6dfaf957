from __future__ import annotations

from pathlib import Path

import pytest

from llama.errors import BadSettings
from llama.settings import Settings


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_WEIGHTS", "")
    monkeypatch.setenv("LLAMA_MAX_CONTEXT", "")
    settings = Settings.from_environment()
    assert settings.weights is None
    assert settings.max_context is None


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("LLAMA_WEIGHTS", "/weights", "weights", Path("/weights")),
        ("LLAMA_DTYPE", "bfloat16", "dtype", "bfloat16"),
        ("LLAMA_MAX_CONTEXT", "1024", "max_context", 1024),
        ("LLAMA_CACHE_MEMORY", "8GB", "cache_memory", 8_000_000_000),
        ("LLAMA_CACHE_MEMORY", "512MiB", "cache_memory", 512 * 2**20),
        ("COG_MAX_CONCURRENCY", "4", "max_concurrency", 4),
    ],
)
def test_a_variable_is_converted_to_the_type_of_its_setting(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, field: str, value: object
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(Settings.from_environment(), field) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("LLAMA_DTYPE", "int4"),
        ("LLAMA_ENGINE", "none"),
        ("LLAMA_QUANTIZATION", "nf3"),
        ("LLAMA_MAX_CONTEXT", "0"),
        ("LLAMA_CACHE_MEMORY", "lots"),
        ("COG_MAX_CONCURRENCY", "many"),
    ],
)
def test_an_invalid_value_is_reported_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(BadSettings, match=rf"^E3000 BadSettings: {variable} is '{text}', but it should be "):
        Settings.from_environment()
