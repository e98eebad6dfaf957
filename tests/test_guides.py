"""The examples of the guides in `docs/`: each is run, and its output compared with the text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from small_models import LLAMA_2_TOKENIZER, needs_embedded, needs_llama_2_tokenizer

from llama import ROOT

WEIGHTS = "weights/llama-2-70b-chat"
"""The folder that the guides name for the real tokenizer."""


class Example(NamedTuple):
    """A command of a guide."""

    command: str
    output: str
    weights: str | None
    """What the guide has exported as LLAMA_WEIGHTS at this point."""


def commands(guide: str) -> Iterator[tuple[str, str]]:
    """The commands of the console blocks, in order, each with the output that the guide shows."""
    text = (ROOT / "docs" / guide).read_text("utf-8")
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command = re.match(r"[^\n]*<< 'END'\n.*?^END\n|[^\n]*\n", part, re.MULTILINE | re.DOTALL)
            assert command is not None
            yield command[0], part[command.end() :]


def tokenize_examples() -> Iterator[Example]:
    weights = None
    for command, output in commands("prompting.md"):
        if export := re.fullmatch(r"export LLAMA_WEIGHTS=(\S+)\n", command):
            weights = export[1]
        elif command == "unset LLAMA_WEIGHTS\n":
            weights = None
        else:
            yield Example(command, output, weights)


def marked(example: Example) -> object:
    needs = needs_llama_2_tokenizer if example.weights == WEIGHTS else needs_embedded
    return pytest.param(example, marks=needs)


@pytest.mark.parametrize("example", [marked(example) for example in tokenize_examples()])
def test_every_tokenize_example_prints_what_the_guide_shows(example: Example) -> None:
    assert example.command.startswith("python -m llama tokenize <<")
    folder = str(LLAMA_2_TOKENIZER) if example.weights == WEIGHTS else ""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_") or k == "LLAMA_CACHE_DIR"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", example.command],
        cwd=ROOT,
        env={**kept, "PATH": path, "LLAMA_WEIGHTS": folder},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.stdout == example.output
    assert result.returncode == 0


def test_the_guide_has_examples_of_both_kinds_of_model() -> None:
    examples = list(tokenize_examples())
    assert len(examples) >= 15
    assert {example.weights for example in examples} == {WEIGHTS, None}


def test_every_name_that_the_contributing_guide_places_in_a_file_is_in_that_file() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text("utf-8")
    places = re.findall(r"`([A-Za-z_.]+)`(?: \([^)]*\))?\s+in\s+`([\w./]+\.(?:py|toml))`", text)
    assert len(places) >= 20
    for name, path in places:
        defined = rf"(\b(def|class|tool)[ .]|^[ \[]*\"?){re.escape(name.rpartition('.')[2])}\b"
        assert re.search(defined, (ROOT / path).read_text("utf-8"), re.MULTILINE), f"{name} in {path}"


def test_every_file_that_the_contributing_guide_names_exists() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text("utf-8")
    named = set(re.findall(r"`((?:llama|tests|benchmarks)(?:/\w+)*(?:/|\.\w+)?)`", text))
    assert len(named) >= 30
    made_by_running = {"benchmarks/out", "benchmarks/results/gpu.json"}  # a new clone has neither
    assert sorted(path for path in named - made_by_running if not (ROOT / path).exists()) == []
