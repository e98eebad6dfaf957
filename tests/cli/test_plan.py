"""The command `plan`: its table, and what it says about each precision."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fake_cuda.patches import nf4_rule
from small_models import LLAMA_2_TOKENIZER, needs_llama_2_tokenizer
from typer.testing import CliRunner, Result

from llama import ROOT
from llama.cli.main import app
from llama.cli.plan import nf4_requests
from llama.model.gpu_reserve import gpu_reserve
from llama.model.precision_plan import LLAMA_2_70B, bytes_of_weights
from llama.model.quantized_layers import Quantization


def plan(*arguments: str, weights: Path | None = None, **environment: str) -> Result:
    env = {"LLAMA_WEIGHTS": str(weights or ""), **environment}
    return CliRunner().invoke(app, ["plan", *arguments], env=env)


def row(result: Result, precision: str) -> str:
    (line,) = (line for line in result.stdout.splitlines() if line.startswith(precision))
    return line


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--gpus", "80"], 0, "nf4        39.6 GB   36.9 GB  27"),
        (["--gpus", "80,80"], 0, "requests of 4096 tokens on the vllm engine:"),
        (
            ["--gpus", "80,80"],
            0,
            "fp8        69.5 GB   70.2 GB   32 (52 fit)  chosen: fast for one or many requests",
        ),
        (["--gpus", "80,80", "--capability", "8.0"], 0, "needs compute capability 8.9 (the GPU has 8.0)"),
        (["--gpus", "24"], 1, "needs 39.6 GB for weights (20.5 GB available)"),
    ],
)
def test_plan_prints_what_fits_and_exits_with_1_if_nothing_does(
    arguments: list[str], code: int, words: str
) -> None:
    result = plan(*arguments)
    assert result.exit_code == code
    assert words in result.stdout


def test_plan_follows_the_dtype_and_concurrency_settings(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_DTYPE", "float32")
    monkeypatch.setenv("COG_MAX_CONCURRENCY", "5")
    result = plan("--gpus", "48", weights=llama_folder)
    assert re.search(r"^32 bits .*  5 \(\d+ fit\) ", result.stdout, re.MULTILINE)


@needs_llama_2_tokenizer
def test_plan_follows_the_weights_and_context_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_MAX_CONTEXT", "1024")
    result = plan("--gpus", "48", weights=LLAMA_2_TOKENIZER)
    assert "requests of 1024 tokens on the torch engine:" in result.stdout
    assert row(result, "nf4").startswith("nf4        39.6 GB   4.9 GB  14")


@pytest.mark.parametrize(
    ("gigabytes", "capability", "precision", "use"),
    [
        ("192", "10.0", "16 bits", "chosen: most accurate; needs the most memory"),
        ("85", "9.0", "fp8", "chosen: fast for one or many requests"),
        ("85", "9.0", "int8", "slower than fp8"),
        ("85", "9.0", "nf4", "saves memory; slow with more than 16 at once"),
        ("192", "10.0", "nf4", "saves memory; slow with more than 4 at once"),
        ("85", "8.0", "int8", "slower than nf4, but rounds less"),
        ("85", "8.0", "nf4", "chosen: saves memory; fast for one or many"),
        ("48", "7.5", "int8", "needs 69.5 GB for weights .*"),
    ],
)
def test_plan_says_what_a_precision_is_good_for(
    gigabytes: str, capability: str, precision: str, use: str
) -> None:
    line = row(plan("--gpus", gigabytes, "--capability", capability), precision)
    assert re.search(f"  {use}$", line), line


def test_nf4_is_slow_for_more_requests_only_if_the_server_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COG_MAX_CONCURRENCY", "16")
    assert row(plan("--gpus", "85"), "nf4").endswith("saves memory; fast for one or many")


def test_the_rows_of_the_table_fit_into_90_columns() -> None:
    lines = [*plan("--gpus", "85").stdout.splitlines(), *plan("--gpus", "192").stdout.splitlines()]
    assert max(map(len, lines)) <= 90


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_wraps_only_the_last_column(columns: int) -> None:
    primary, secondary = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LLAMA_WEIGHTS": "", "TERM": "xterm"}
    with os.fdopen(secondary, "w") as terminal:
        subprocess.run(
            [sys.executable, "-m", "llama", "plan", "--gpus", "85"],
            cwd=ROOT,
            env=environment,
            stdout=terminal,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    printed = os.read(primary, 10_000).decode()
    os.close(primary)
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()]
    assert max(map(len, lines)) <= columns
    names = [line[:9].strip() for line in lines[1:]]
    assert [name for name in names if name] == ["precision", "16 bits", "fp8", "int8", "nf4"]
    rest = [line for line, name in zip(lines[1:], names, strict=True) if not name]
    assert all(line.startswith(" " * 40) for line in rest)
    assert len(rest) == (2 if columns == 80 else 0)


class Card(NamedTuple):
    capability: tuple[int, int]
    multiprocessors: int
    free: int = 0
    """GB."""


CARDS = {
    "T4": Card((7, 5), 40),
    "A100 (80 GB)": Card((8, 0), 108, 85),
    "A10": Card((8, 6), 72),
    "A6000": Card((8, 6), 84),
    "Orin": Card((8, 7), 16),
    "L40S (48 GB)": Card((8, 9), 142, 48),
    "H100 (80 GB)": Card((9, 0), 132, 85),
    "H200 (141 GB)": Card((9, 0), 132, 149),
    "B200 (192 GB)": Card((10, 0), 148, 192),
    "B300": Card((10, 3), 148),
    "Thor": Card((11, 0), 20),
    "RTX 5090": Card((12, 0), 170),
    "RTX PRO 6000 (96 GB)": Card((12, 0), 188, 102),
}


def unpacked(card: Card, rows: int) -> list[tuple[int, int]]:
    """The shapes of a layer's weights that bitsandbytes first writes to memory in 16 bits, by its own rule."""
    config = LLAMA_2_70B
    hidden, mlp, keys = (
        config.hidden_size,
        config.intermediate_size,
        config.num_key_value_heads * config.head_dim,
    )
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    shapes += [(mlp, hidden), (mlp, hidden), (hidden, mlp)]
    dtype = torch.bfloat16 if card.capability >= (8, 0) else torch.float16
    rule = nf4_rule(card.multiprocessors, card.capability)
    return [shape for shape in shapes if not rule(0, dtype, rows, *shape)]


@pytest.mark.parametrize("name", CARDS)
def test_nf4_is_called_fast_as_long_as_bitsandbytes_unpacks_no_large_weight(name: str) -> None:
    """The projections to keys and to values do not count: each has an eighth of the weights of that to queries."""
    card, hidden = CARDS[name], LLAMA_2_70B.hidden_size
    most = nf4_requests(card.capability)
    assert not any(min(shape) >= hidden for rows in range(1, most + 1) for shape in unpacked(card, rows))
    assert most == 32 or any(min(shape) >= hidden for shape in unpacked(card, most + 1))


def milliseconds(quantization: Quantization, terabytes: float, card: Card, rows: int) -> str:
    """The time in which a GPU's memory delivers all weights of the 70B. The embeddings are not read."""
    config = LLAMA_2_70B
    count = bytes_of_weights(config, quantization) - 2 * config.vocab_size * config.hidden_size
    if quantization == "nf4":  # an unpacked weight is written and read, 2 bytes each
        count += config.num_hidden_layers * sum(4 * a * b for a, b in unpacked(card, rows))
    return f"{count / terabytes / 1e9:.1f}"


def documented_steps() -> list[list[str]]:
    text = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    _, _, section = text.partition("\n### Which precision?\n")
    lines = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if len(line) == 9][1:]


@pytest.mark.parametrize("cells", documented_steps(), ids=lambda cells: cells[0])
def test_the_times_of_a_step_in_the_guide_are_those_that_the_bandwidth_allows(cells: list[str]) -> None:
    name, bandwidth, chosen, requests, *times = cells
    card, terabytes = CARDS[name], float(bandwidth.removesuffix(" TB/s"))
    capability = ".".join(map(str, card.capability))
    result = plan("--gpus", str(card.free), "--capability", capability)
    (line,) = (line for line in result.stdout.splitlines() if "  chosen: " in line)
    assert re.split("  +", line)[0:4:3] == [chosen, requests]
    columns: list[tuple[Quantization, int]] = [("none", 1), ("fp8", 1), ("int8", 1), ("nf4", 1), ("nf4", 32)]
    for (quantization, rows), shown in zip(columns, times, strict=True):
        fits = re.split("  +", row(result, "16 bits" if quantization == "none" else quantization))[3] != "-"
        assert shown == (milliseconds(quantization, terabytes, card, rows) if fits else "-"), quantization


def test_the_guide_says_from_which_size_on_an_h100_gets_fp8_and_how_much_is_reserved() -> None:
    guide = " ".join((ROOT / "docs" / "deploy.md").read_text("utf-8").split())
    found = re.search(r"On an H100, FP8 is chosen if ([\d.]+) GB of memory are free", guide)
    assert found
    for gigabytes, precision in ((float(found[1]), "fp8"), (float(found[1]) - 0.1, "nf4")):
        assert "  chosen: " in row(plan("--gpus", f"{gigabytes:.1f}"), precision)
    least, most = (
        gpu_reserve(LLAMA_2_70B, q, torch.bfloat16, rows=32, context=4096, flash_attention=True).total / 1e9
        for q in ("none", "nf4")
    )
    assert f"needs {least:.1f} GB (16 bits) to {most:.1f} GB (NF4) for activations" in guide


def test_the_guide_says_for_which_sizes_and_capabilities_its_table_was_calculated() -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    for name, card in CARDS.items():
        major, minor = card.capability
        assert bool(card.free) == (f"\n| {name} | {card.free} | {major}.{minor} |\n" in guide), name


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_plan_prints_the_error_of_a_server_for_a_precision_that_cannot_be_served(quantization: str) -> None:
    result = plan("--gpus", "85", "--capability", "8.0", LLAMA_QUANTIZATION=quantization)
    assert result.exit_code == 1
    assert f"E3005 DoesNotFit: LLAMA_QUANTIZATION is {quantization}" in result.stderr
    assert "chosen" not in result.stdout


def test_plan_chooses_the_precision_that_is_set() -> None:
    assert "  chosen: slower" in row(plan("--gpus", "85", LLAMA_QUANTIZATION="int8"), "int8")


def test_the_guide_has_a_time_for_every_kind_of_card() -> None:
    named = [cells[0] for cells in documented_steps()]
    assert sorted(named) == sorted(name for name, card in CARDS.items() if card.free)
