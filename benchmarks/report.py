"""Turn the JSON document of a benchmark run into Markdown tables and charts.

`python -m benchmarks.report benchmarks/results/cpu.json` writes the `.md` and `.svg` files next to it. If
a run was killed, the report has only the sections that were measured. `report_sections.py` has the sections
after the main comparison.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.charts import draw
from benchmarks.isa import NAMES
from benchmarks.machine import vector_instructions
from benchmarks.report_sections import (
    busy_cpu_sections,
    first_token,
    other_requests_sections,
    our_engine_sections,
    speed,
    starts_sections,
)
from benchmarks.tables import by_batch_table, table
from benchmarks.targets import OURS, OURS_IN_FLOAT32, Results

_SAME_PRECISION = {
    "bfloat16": (OURS, (", bfloat16", ", bf16")),
    "float32": (OURS_IN_FLOAT32, (", float32",)),
}
"""By precision: our engine's name, and how the names of the peers in that precision end."""


def write_report(results: Results, stem: Path) -> None:
    """Write `stem`.json, `stem`.md and, if throughput was measured, `stem`.svg."""
    write_json(stem.with_suffix(".json"), results)
    stem.with_suffix(".md").write_text(markdown(results, stem.name), encoding="utf-8")
    if results.get("throughput"):
        draw(results, stem.with_suffix(".svg"))


def write_json(path: Path, results: Results) -> None:
    """Write the file under a temporary name, and then rename it, so that it is always complete."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def markdown(results: Results, name: str) -> str:
    """Return the whole report, which shows the chart `name`.svg."""
    sections = [
        *_setting(results),
        *_speeds(results, name),
        *_left_out(results),
        *_targets(results),
        *other_requests_sections(results),
        *our_engine_sections(results),
        *starts_sections(results),
        *busy_cpu_sections(results),
        *_versions(results),
    ]
    return "\n\n".join(sections) + "\n"


def _setting(results: Results) -> Iterator[str]:
    machine, workload = results["machine"], results["workload"]
    yield f"# Benchmark results: {machine['processor']}, {machine['cores']} cores"
    yield (
        f"The machine has {machine['memory_gb']} GB of memory and runs {machine['system']} and Python "
        f"{machine['python']}. Vector instructions: {', '.join(machine['instructions']) or 'none'}. "
        f"`make bench` measured commit {results['commit']} on {results['date']}, in "
        f"{results['minutes']:.0f} minutes."
    )
    if "isa" in results:
        yield (
            f"All engines were limited to {NAMES[results['isa']]} by environment variables, and by hiding "
            "the other vector instructions from torch and vLLM."
        )
    yield (
        f"The benchmark model is a random Llama with {workload['parameters'] / 1e6:.0f} million parameters. "
        f"Each request has a prompt of {workload['prompt_tokens']} tokens and generates "
        f"{workload['new_tokens']} tokens with greedy decoding. The engines were measured in one run, "
        "interleaved; values are medians over the rounds. Tokens per second include prefill. The time to "
        "first token of a round is the mean over its requests."
    )
    yield (
        "vLLM runs in eager mode. Its worker runs in the engine's process, because vLLM would otherwise "
        "reserve a core for its scheduler."
    )


def _speeds(results: Results, name: str) -> Iterator[str]:
    if results.get("throughput"):
        yield f"![tokens per second, time to first token and time between tokens]({name}.svg)"
        yield "## Our engine and the fastest peer of the same precision"
        yield "The ratio is our engine's tokens per second divided by those of the peer."
        yield summary_table(results)
        yield "## Tokens per second, by number of concurrent requests"
        yield throughput_table(results)
        yield "## Time to first token in ms, by number of concurrent requests"
        yield by_batch_table(results["throughput"], first_token)
    if results.get("beside_vllm"):
        yield "## Our server on vLLM and the vLLM server"
        yield "These figures come from more rounds than those above. Tokens per second:"
        yield by_batch_table(results["beside_vllm"], speed)
        yield "Time to first token, in ms:"
        yield by_batch_table(results["beside_vllm"], first_token)


def _left_out(results: Results) -> Iterator[str]:
    if results.get("left_out"):
        yield "## Engines and measurements that were left out"
        yield table(
            ("engine or measurement", "scenario", "reason"),
            ((name, row["scenario"], _cell(row["reason"])) for name, row in results["left_out"].items()),
        )


def _targets(results: Results) -> Iterator[str]:
    yield "## Targets"
    isa = NAMES.get(results.get("isa", ""), vector_instructions(results["machine"]))
    yield f'Widest vector instructions in this run: {isa}. "A relative to B" means A divided by B.'
    yield targets_table(results)


def _versions(results: Results) -> Iterator[str]:
    if results.get("versions"):
        yield "## Versions"
        yield "\n".join(
            f"- {peer}: {', '.join(f'{k} {v}' for k, v in versions.items())}"
            for peer, versions in results["versions"].items()
        )


def summary_table(results: Results) -> str:
    """Return a table of our engine and the fastest peer of the same precision; the README shows it too."""
    head = (
        "precision",
        "concurrent requests",
        "our engine, tokens/s",
        "fastest peer",
        "its tokens/s",
        "ratio",
    )
    columns = dict(results["throughput"])
    if results.get("mixed_lengths"):
        columns["16, mixed lengths"] = results["mixed_lengths"]
    return table(head, _summary_rows(columns))


def _summary_rows(columns: Results) -> Iterator[tuple[str, ...]]:
    for precision, (ours, endings) in _SAME_PRECISION.items():
        for requests, rows in columns.items():
            speeds = {name: row["tokens_per_second"] for name, row in rows.items() if name.endswith(endings)}
            peers = [name for name in speeds if not name.startswith("our ")]
            if ours in speeds and peers:
                best = max(peers, key=speeds.__getitem__)
                ratio = round(speeds[ours] / speeds[best], 3)  # as in `targets.evaluate`
                name, _, _ = best.rpartition(", ")
                yield precision, requests, f"{speeds[ours]:.0f}", name, f"{speeds[best]:.0f}", f"{ratio:.2f}"


def throughput_table(results: Results) -> str:
    """Return the table of tokens per second, which the README shows too."""
    return by_batch_table(results["throughput"], speed)


def targets_table(results: Results) -> str:
    """Return the table of all targets, including missed ones."""
    verdict = {True: "met", False: "**missed**", None: "not measured"}
    return table(
        ("target", "wanted", "measured", "result"),
        (
            (
                row["target"],
                row["wanted"],
                "" if row["got"] is None else f"{row['got']:.2f}",
                verdict[row["met"]],
            )
            for row in results["targets"]
        ),
    )


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_report(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(""))
