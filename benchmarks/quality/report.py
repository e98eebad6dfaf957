"""Turn the results of `benchmarks.quality` into Markdown, and write both files. Runs no model.

`python -m benchmarks.quality.report benchmarks/results/quality.json` writes the `.md` file again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import vector_instructions
from benchmarks.report import write_json
from benchmarks.tables import table

NAMES = {"bfloat16": "bf16", "float16": "float16", "fp8": "FP8", "int8": "int8", "nf4": "NF4"}

_FP8_ON_A_CPU = (
    "On a CPU, torch sums FP8 products in float32 and rounds the sum once, to bfloat16. The tensor cores of "
    "a Hopper GPU keep about 14 bits of a partial sum (arXiv:2412.19437, section 3.3.2). How much that "
    "changes the figures was not measured."
)

Figure = dict[str, float]
"""`value` and `standard_error`."""


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the JSON file, which is always complete, and then the Markdown file next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def markdown(results: dict[str, Any]) -> str:
    """Return the whole report."""
    return "\n\n".join(_sections(results)) + "\n"


def _sections(results: dict[str, Any]) -> Iterator[str]:
    text = results["text"]
    yield f"# Quality of each precision: {results['model']} on {_device(results)}"
    yield (
        f"The text is {text['name']}. It has {text['tokens']:,} tokens and is cut into {text['windows']} "
        f"windows of {text['prompt_tokens'] + text['scored_tokens']} tokens. A window starts every "
        f"{text['scored_tokens']} tokens. As in serving, the engine reads the first {text['prompt_tokens']} "
        "tokens of a window as a prompt and decodes the others one by one. These "
        f"{text['windows'] * text['scored_tokens']:,} tokens are scored."
    )
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    yield f"Measured on {results['date']} with {versions}."
    if results["precisions"]:
        yield _arithmetic(results)
        yield quality_table(results)
        yield _explanation(results)
        if results["device"] == "cpu" and "fp8" in results["precisions"]:
            yield _FP8_ON_A_CPU
    if results["left_out"]:
        yield "## Precisions that were left out"
        rows = ((NAMES[name], why.replace("|", "\\|")) for name, why in results["left_out"].items())
        yield table(("precision", "reason"), rows)


def quality_table(results: dict[str, Any]) -> str:
    """Return the table of all precisions, which `docs/reference.md` shows too."""
    reference = NAMES[results["reference"]]
    head = (
        "precision",
        "perplexity",
        f"change from {reference}",
        "same greedy token",
        "divergence, nats",
        f"tokens until an answer of {results['text']['new_tokens']} differs",
        "same answers",
    )
    return table(head, (_row(name, row, results) for name, row in results["precisions"].items()))


def _row(name: str, row: dict[str, Any], results: dict[str, Any]) -> tuple[str, ...]:
    perplexity = f"{row['perplexity']['value']:.3f}"
    if name == results["reference"]:
        return NAMES[name], perplexity, *("reference",) * 5
    return (
        NAMES[name],
        perplexity,
        _estimate(row["perplexity_change"], "+.2f", " %", 100),
        _estimate(row["same_token"], ".1f", " %", 100),
        _estimate(row["divergence"], ".4f"),
        _estimate(row["tokens_until_difference"], ".1f"),
        f"{row['same_answers']} of {results['text']['windows']}",
    )


def _estimate(figure: Figure, form: str, unit: str = "", factor: float = 1) -> str:
    value, error = factor * figure["value"], factor * figure["standard_error"]
    return f"{value:{form}}{unit} ± {error:{form.removeprefix('+')}}{unit and ' %'}"


def _device(results: dict[str, Any]) -> str:
    machine = results["machine"]
    if results["device"] != "cpu":
        return str(results["device"])
    return f"{machine['cores']} cores of an {machine['processor']} with {vector_instructions(machine)}"


def _arithmetic(results: dict[str, Any]) -> str:
    found: dict[str, list[str]] = {}
    for name, row in results["precisions"].items():
        found.setdefault(row["arithmetic"], []).append(NAMES[name])
    kinds = (f"{', '.join(names)} in {kind}" for kind, names in found.items())
    return f"The engine computed with these types: {'; '.join(kinds)}."


def _explanation(results: dict[str, Any]) -> str:
    reference, row = NAMES[results["reference"]], results["precisions"][results["reference"]]
    text = results["text"]
    return (
        "± is one standard error, calculated from the differences between windows. The perplexity of "
        f"{reference} itself is {_estimate(row['perplexity'], '.1f')}, because some windows are harder than "
        "others. The changes are calculated window by window, so these differences do not affect them. The "
        "greedy token is compared at every scored position, after the same text. The answers continue the "
        f"prompts of the windows. The divergence is the Kullback-Leibler divergence from {reference}. All "
        f"tokens except the {text['candidates']} that {reference} finds most likely count as one outcome."
    )


if __name__ == "__main__":
    source = Path(sys.argv[1])
    source.with_suffix(".md").write_text(markdown(json.loads(source.read_text("utf-8"))), encoding="utf-8")
