"""The measurement of quality (`benchmarks/quality`), compared with plain transformers on a tiny model."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import compiled_kernels
from small_models import CORPUS, write_model
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.quality import __main__ as quality
from benchmarks.quality.figures import common_tokens, divergence, figures
from benchmarks.quality.predictions import (
    CANDIDATES,
    LENGTH,
    NEW_TOKENS,
    PROMPT,
    SCORED,
    Predictions,
    TextPredictor,
    TextTooShort,
    cut,
)
from benchmarks.quality.report import markdown, quality_table
from llama import ROOT
from llama.model.config import load_config
from llama.model.pack import pack
from llama.model.placement import Placement
from llama.settings import Settings
from llama.text.load_tokenizer import load_tokenizer
from llama.torch_engine.layer_packing import load_parts

RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(3, 700, (5, LENGTH), generator=torch.Generator().manual_seed(0))


def predicted(folder: Path, windows: Tensor, *, flash_attention: bool) -> Predictions:
    config = load_config(folder)
    placement = Placement(CPU, torch.float32, "none", LENGTH + 1, flash_attention)
    parts = load_parts(folder, config, placement)
    kernels = None if flash_attention else compiled_kernels(torch.float32, torch.float32)
    return TextPredictor(parts, config, placement, config.vocab_size, kernels).predict(windows)


@pytest.fixture(scope="module")
def predictions(llama_folder: Path, windows: Tensor) -> Predictions:
    return predicted(llama_folder, windows, flash_attention=False)


@pytest.fixture(scope="module")
def plain(llama_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def log_probabilities(plain: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Those of transformers for the scored tokens: [windows, SCORED, vocabulary]."""
    with torch.inference_mode():
        logits: Tensor = plain(windows).logits[:, PROMPT - 1 : -1]
    return logits.double().log_softmax(dim=-1)


# --- predictions and figures


def test_the_perplexity_is_that_of_transformers(
    predictions: Predictions, log_probabilities: Tensor, windows: Tensor
) -> None:
    losses = -log_probabilities.gather(2, windows[:, PROMPT:, None])[..., 0]
    assert torch.allclose(predictions.losses.double(), losses, atol=1e-3)
    got = figures(predictions, predictions)["perplexity"]
    assert got["value"] == pytest.approx(math.exp(losses.mean()), rel=1e-3)
    by_window = losses.mean(dim=1)
    error = float(by_window.std()) / math.sqrt(len(windows))
    assert got["standard_error"] == pytest.approx(got["value"] * error, rel=1e-2)


def test_the_greedy_tokens_and_answers_are_those_of_transformers(
    predictions: Predictions, log_probabilities: Tensor, windows: Tensor, plain: LlamaForCausalLM
) -> None:
    assert torch.equal(predictions.best, log_probabilities.argmax(dim=-1))
    likely = log_probabilities.topk(CANDIDATES).values
    assert torch.allclose(predictions.log_probabilities.double(), likely, atol=1e-3)
    assert torch.allclose(log_probabilities.gather(2, predictions.candidates), likely, atol=1e-3)
    prompts = windows[:, :PROMPT]
    answers = plain.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(predictions.generated, answers[:, PROMPT:])


def test_flash_attention_gives_the_same_figures(
    llama_folder: Path, predictions: Predictions, windows: Tensor
) -> None:
    got = figures(predicted(llama_folder, windows, flash_attention=True), predictions)
    assert got["perplexity_change"]["value"] == pytest.approx(0, abs=1e-4)
    assert got["same_token"]["value"] == 1
    assert got["same_answers"] == len(windows)


def test_windows_are_predicted_the_same_in_several_batches(
    llama_folder: Path, predictions: Predictions, windows: Tensor
) -> None:
    got = predicted(llama_folder, windows.repeat(15, 1)[:71], flash_attention=False)
    assert torch.allclose(got.losses, predictions.losses.repeat(15, 1)[:71], atol=1e-3)
    assert torch.equal(got.generated, predictions.generated.repeat(15, 1)[:71])


def test_a_model_agrees_with_itself(predictions: Predictions, windows: Tensor) -> None:
    got = figures(predictions, predictions)
    same = {"value": 1.0, "standard_error": 0.0}
    assert got["same_token"] == same
    assert got["perplexity_change"] == got["divergence"] == {"value": 0.0, "standard_error": 0.0}
    assert got["tokens_until_difference"] == {"value": NEW_TOKENS, "standard_error": 0.0}
    assert got["same_answers"] == len(windows)


def test_the_divergence_is_at_most_that_of_all_tokens(
    predictions: Predictions, log_probabilities: Tensor
) -> None:
    other = (2 * log_probabilities).log_softmax(dim=-1)  # as if at half the temperature
    changed = replace(predictions, log_probabilities=other.gather(2, predictions.candidates).float())
    exact = (log_probabilities.exp() * (log_probabilities - other)).sum(dim=-1)
    got = divergence(changed, predictions)
    assert (got <= exact + 1e-4).all()
    assert (got >= 0.5 * exact).all()


def test_all_differences_from_the_reference_are_counted(predictions: Predictions, windows: Tensor) -> None:
    best, generated = predictions.best.clone(), predictions.generated.clone()
    best[0, : SCORED // 2] += 1
    generated[0, 10] += 1
    changed = replace(predictions, losses=predictions.losses + 0.1, best=best, generated=generated)
    got, count = figures(changed, predictions), len(windows)
    assert got["perplexity_change"]["value"] == pytest.approx(math.exp(0.1) - 1, rel=1e-4)
    assert got["perplexity_change"]["standard_error"] == pytest.approx(0, abs=1e-6)
    assert got["same_token"]["value"] == pytest.approx(1 - 0.5 / count)
    assert got["same_token"]["standard_error"] == pytest.approx(0.5 / count)
    assert got["tokens_until_difference"]["value"] == (10 + (count - 1) * NEW_TOKENS) / count
    assert got["same_answers"] == count - 1


@pytest.mark.parametrize(
    ("answer", "tokens"), [([1, 2, 3], 3), ([9, 2, 3], 0), ([1, 9, 3], 1), ([1, 2, 9], 2)]
)
def test_tokens_before_the_first_difference_are_counted(answer: list[int], tokens: int) -> None:
    assert common_tokens(torch.tensor([answer]), torch.tensor([[1, 2, 3]])).tolist() == [tokens]


# --- windows of a text


def test_every_token_after_the_first_prompt_is_scored_once(llama_folder: Path) -> None:
    processor = load_tokenizer(llama_folder)
    text = CORPUS.read_text("utf-8")[:8000]
    found = cut(text, processor)
    assert (found.token_ids[:, 0] == 1).all(), "a window does not begin with the beginning-of-sequence token"
    scored = found.token_ids[:, PROMPT:].flatten().tolist()
    first = found.token_ids[0].tolist()
    rest = found.text_tokens - (PROMPT - 1) - len(scored)
    assert 0 <= rest < SCORED
    assert first[PROMPT:] == scored[:SCORED]
    assert found.token_ids[1, 1:PROMPT].tolist() == scored[SCORED - PROMPT + 1 : SCORED]


def test_a_text_that_is_too_short_is_refused(llama_folder: Path) -> None:
    with pytest.raises(
        TextTooShort, match=r"has \d+ tokens, but at least \d+ are needed .* use a longer text"
    ):
        cut("Too short.", load_tokenizer(llama_folder))


# --- a whole run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(CORPUS.read_text("utf-8")[:5000], encoding="utf-8")
    return path


def measured(folder: Path, text: Path, results: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure a folder in this process. Return the results in the file, and the names that failed."""
    settings = partial(Settings, device="cpu", max_context=LENGTH + 1)
    subject = quality.read_subject(folder, text)
    failed = quality.measure_all(subject, settings, quality.new_results(subject, text, CPU), results)
    assert [path.name for path in sorted(results.parent.iterdir())] == ["quality.json", "quality.md"]
    return json.loads(results.read_text("utf-8")), failed


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.quality", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_writes_all_precisions(llama_folder: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    done = run("--weights", llama_folder, "--text", text, "--results", path)
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text("utf-8"))
    assert list(results["precisions"]) == ["bfloat16", "float16", "fp8", "int8", "nf4"]
    assert results["left_out"] == {}
    assert results["reference"] == "bfloat16"
    assert path.with_suffix(".md").read_text("utf-8") == markdown(results)
    assert quality_table(results) in done.stdout
    rows = results["precisions"].values()
    assert all(0 < row["perplexity"]["value"] < math.inf for row in rows)
    # Both are in 16 bits, and 4 bits are the fewest.
    closest, *_, farthest = sorted(list(rows)[1:], key=lambda row: float(row["divergence"]["value"]))
    assert [closest, farthest] == [results["precisions"][name] for name in ("float16", "nf4")]


@pytest.mark.parametrize("missing", ["text", "weights"])
def test_nothing_is_measured_or_written_without_a_text_or_a_model(
    llama_folder: Path, tmp_path: Path, missing: str
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    weights = llama_folder if missing == "text" else tmp_path / "nothing"
    done = run("--weights", weights, "--text", short, "--results", tmp_path / "quality.json")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("nothing was measured: ")
    assert ("use a longer text" if missing == "text" else "E3001") in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_precision_that_fails_does_not_stop_the_others(
    llama_folder: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    write_model(folder, dtype="bfloat16")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e6  # more than float16 can represent
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((llama_folder / "tokenizer.model").read_bytes())
    results, failed = measured(folder, text, tmp_path / "results" / "quality.json")
    assert "float16" in failed
    assert {"bfloat16", "fp8"} <= results["precisions"].keys()
    assert results["left_out"]["float16"] == "ArithmeticError: the model's output is not finite"
    assert results["precisions"].keys() | results["left_out"].keys() == quality.PRECISIONS.keys()


def test_a_quantized_checkpoint_is_measured_in_its_own_precision(
    llama_folder: Path, text: Path, tmp_path: Path
) -> None:
    pack(llama_folder, tmp_path / "packed", "nf4", CPU)
    results, failed = measured(tmp_path / "packed", text, tmp_path / "results" / "quality.json")
    assert failed == []
    assert list(results["precisions"]) == ["nf4"]
    assert results["reference"] == "nf4"
    assert "the checkpoint is stored in nf4" in results["left_out"]["bfloat16"]
    report = markdown(results)
    assert "change from NF4" in report
    assert "the checkpoint is stored in nf4" in report


# --- the committed results


def test_the_documents_show_the_measured_quality() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    assert RESULTS.with_suffix(".md").read_text("utf-8") == markdown(results)
    assert results["left_out"] == {}
    text = results["text"]
    (section,) = (
        part
        for part in (ROOT / "docs" / "reference.md").read_text("utf-8").split("\n## ")
        if quality_table(results) in part
    )
    words = " ".join(section.split())
    assert f"{text['windows'] * text['scored_tokens']:,} tokens" in words
    assert f"torch {results['versions']['torch']}" in words
    assert results["model"].startswith("smollm2-135m-instruct")
    assert "SmolLM2-135M-Instruct" in words


def test_the_figures_of_another_model_do_not_replace_the_published_ones() -> None:
    cpu = torch.device("cpu")
    published, other = (
        quality._default_path(argparse.Namespace(weights=weights, text=quality.TEXT), cpu)
        for weights in (None, Path("other"))
    )
    assert published == ROOT / "benchmarks" / "results" / "quality.json"
    assert other == ROOT / "benchmarks" / "out" / "quality.json"
