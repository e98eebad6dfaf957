"""`make quality`: measure how much quality each precision costs, with the engine's own code.

For each precision, it measures the perplexity of a text, how often the most likely token is that of the
reference (bf16, or the widest precision that fits), the divergence from the reference's probabilities, and
how many tokens greedy answers have in common with the reference's. `predictions.py` runs the model, and
`figures.py` has the statistics. The results are written after each precision, as JSON and as Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.attempts import log
from benchmarks.machine import describe
from benchmarks.quality.figures import figures
from benchmarks.quality.predictions import (
    CANDIDATES,
    LENGTH,
    NEW_TOKENS,
    PROMPT,
    SCORED,
    Predictions,
    TextPredictor,
    TextTooShort,
    Windows,
    cut,
)
from benchmarks.quality.report import write_report
from benchmarks.workload import OUT
from llama import ROOT
from llama.errors import LlamaError
from llama.model.config import load_config
from llama.model.gpu_errors import is_out_of_memory
from llama.model.placement import Placement, pick_device, place
from llama.settings import Settings
from llama.text.load_tokenizer import fit_tokenizer, load_tokenizer
from llama.torch_engine.cpu_compiler import Kernels, compile_in_background, use_threads
from llama.torch_engine.layer_packing import load_parts
from llama.weights.folder import weights_folder

TEXT = ROOT / "tests" / "corpus.txt"
TEXT_NAME = "an earlier version of this project's documents: English with commands, code and tables"
PRECISIONS: Mapping[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
    "float16": {"dtype": "float16", "quantization": "none"},
    # What is not quantized is in bfloat16, as on a GPU.
    "fp8": {"dtype": "bfloat16", "quantization": "fp8"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
}
"""The settings of each precision. The first one that can be measured is the reference of the others."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and the text that it predicts."""

    folder: Path
    config: LlamaConfig
    vocabulary: int
    windows: Windows


def main() -> None:
    arguments = _arguments()
    settings = partial(Settings, weights=arguments.weights, device=arguments.device, max_context=LENGTH + 1)
    try:
        subject = read_subject(weights_folder(settings()), arguments.text)
        device = pick_device(settings())
    except (LlamaError, TextTooShort, OSError, UnicodeDecodeError) as error:
        sys.exit(f"nothing was measured: {error}")
    results = new_results(subject, arguments.text, device)
    path = arguments.results or _default_path(arguments, device)
    failed = measure_all(subject, settings, results, path)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    if failed or not results["precisions"]:
        sys.exit(f"failed: {', '.join(failed) or 'no precision could be measured'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or a GPU such as cuda:0 (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="a folder of weights (default: the embedded model)")
    parser.add_argument(
        "--text", type=Path, default=TEXT, help="a text in UTF-8 (default: the documents in tests/corpus.txt)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="the JSON file to write; a Markdown file is written next to it "
        "(default: quality.json, or quality_gpu.json on a GPU, in benchmarks/results; for another model or "
        "text, in benchmarks/out)",
    )
    arguments = parser.parse_args()
    results = arguments.results
    if results is not None and (results.suffix != ".json" or results.is_dir() or not results.parent.is_dir()):
        parser.error(f"--results is {results}; name a .json file in an existing folder")
    return arguments


def _default_path(arguments: argparse.Namespace, device: torch.device) -> Path:
    """Return the file of the published results, or, for another model or text, one that git ignores."""
    published = arguments.weights is None and arguments.text == TEXT
    name = "quality.json" if device.type == "cpu" else "quality_gpu.json"
    return (ROOT / "benchmarks" / "results" if published else OUT) / name


def read_subject(folder: Path, text: Path) -> Subject:
    """Read a model's configuration and tokenizer, and cut the text into windows.

    Raises LlamaError, TextTooShort, OSError or UnicodeDecodeError.
    """
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    fit_tokenizer(tokenizer, config.vocab_size, folder)
    return Subject(folder, config, tokenizer.size, cut(text.read_text(encoding="utf-8"), tokenizer))


def new_results(subject: Subject, text: Path, device: torch.device) -> dict[str, Any]:
    """Return results that describe what is measured and on which machine, without figures."""
    windows = subject.windows.token_ids
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "model": subject.folder.resolve().name,
        "text": {
            "name": text.name if text != TEXT else TEXT_NAME,
            "tokens": subject.windows.text_tokens,
            "windows": len(windows),
            "prompt_tokens": PROMPT,
            "scored_tokens": SCORED,
            "new_tokens": NEW_TOKENS,
            "candidates": CANDIDATES,
        },
        "reference": None,
        "precisions": {},
        "left_out": {},
    }


def measure_all(
    subject: Subject, settings: partial[Settings], results: dict[str, Any], path: Path
) -> list[str]:
    """Measure every precision, and write the results after each. Return the names of those that failed.

    A precision that the device or the checkpoint does not allow is left out, and has not failed.
    """
    reference: Predictions | None = None
    failed = []
    for name, options in PRECISIONS.items():
        log(f"measuring {name} ...")
        started = time.perf_counter()
        try:
            placement = place(settings(**options), subject.config)
            predictions = predict(subject, placement, None if reference is None else reference.candidates)
            if reference is None:
                reference, results["reference"] = predictions, name
            results["precisions"][name] = {
                "arithmetic": str(placement.arithmetic).removeprefix("torch."),
                "seconds": time.perf_counter() - started,
                **figures(predictions, reference),
            }
        except Exception as error:  # so that the other precisions are measured
            results["left_out"][name] = " ".join(f"{type(error).__name__}: {error}".split())
            if not isinstance(error, LlamaError) and not is_out_of_memory(error):
                traceback.print_exc()
                failed.append(name)
        write_report(results, path)
        gc.collect()
        torch.cuda.empty_cache()  # has no effect if CUDA is not in use
    return failed


def predict(subject: Subject, placement: Placement, candidates: Tensor | None) -> Predictions:
    """Load the model, and let it predict the text. `candidates` is as in `TextPredictor.predict`."""
    kernels = _kernels(placement)
    parts = load_parts(subject.folder, subject.config, placement)
    predictor = TextPredictor(parts, subject.config, placement, subject.vocabulary, kernels)
    return predictor.predict(subject.windows.token_ids, candidates)


def _kernels(placement: Placement) -> Kernels | None:
    """Return the compiled kernels that the engine uses on a CPU, or None on a GPU."""
    if placement.device.type != "cpu":
        return None
    cache_dir = Settings().cache_dir
    kernels = compile_in_background(placement.arithmetic, placement.cache_dtype, cache_dir).result()
    use_threads(torch.get_num_threads())
    return kernels


if __name__ == "__main__":
    main()
