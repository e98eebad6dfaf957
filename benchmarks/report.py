"""Turn the JSON document of a benchmark run into Markdown tables and charts.

`python -m benchmarks.report benchmarks/results/cpu.json` writes the `.md` and `.svg` files next to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.charts import draw
from benchmarks.tables import by_batch_table, counted, table
from benchmarks.targets import OURS, OURS_IN_FLOAT32, Results

_SAME_PRECISION = {
    "bfloat16": (OURS, (", bfloat16", ", bf16")),
    "float32": (OURS_IN_FLOAT32, (", float32",)),
}
"""By precision: our engine's name, and how the names of the peers in that precision end."""


def write_report(results: Results, stem: Path) -> None:
    """Write `stem`.json, `stem`.md and `stem`.svg."""
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(results, stem.name), encoding="utf-8")
    draw(results, stem.with_suffix(".svg"))


def markdown(results: Results, name: str) -> str:
    """Return the whole report, which shows the chart `name`.svg."""
    sections = [
        *_setting(results),
        f"![tokens per second, time to first token and time between tokens]({name}.svg)",
        *_speeds(results),
        *_one_engine(results),
        *_starts(results),
        *_busy_cpu(results),
        "## Versions",
        "\n".join(
            f"- {peer}: {', '.join(f'{k} {v}' for k, v in versions.items())}"
            for peer, versions in results["versions"].items()
        ),
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


def _speeds(results: Results) -> Iterator[str]:
    yield "## Our engine and the fastest peer of the same precision"
    yield "The ratio is our engine's tokens per second divided by those of the peer."
    yield summary_table(results)
    yield "## Tokens per second, by number of concurrent requests"
    yield throughput_table(results)
    for name in results["not_measured"]:
        yield f"Not measured, because it did not run on this machine: {name}."
    yield "## Time to first token in ms, by number of concurrent requests"
    yield by_batch_table(results["throughput"], _first_token)
    if results["beside_vllm"]:
        yield "## Our server on vLLM and the vLLM server"
        yield "These figures come from more rounds than those above. Tokens per second:"
        yield by_batch_table(results["beside_vllm"], _speed)
        yield "Time to first token, in ms:"
        yield by_batch_table(results["beside_vllm"], _first_token)
    yield "## Targets"
    yield '"A relative to B" means A divided by B.'
    yield targets_table(results)
    yield "## 32 requests that arrive 50 ms apart"
    yield table(
        ("engine", "tokens/s", "slowest to fastest round, tokens/s", "time to first token, s"),
        (
            (peer, f"{r['tokens_per_second']:.0f}", _spread(r), f"{r['time_to_first_token']:.2f}")
            for peer, r in results["arriving"].items()
        ),
    )


def _one_engine(results: Results) -> Iterator[str]:
    beside, soak = results["long_prompt_beside"], results["soak"]
    yield "## A long prompt that arrives while other requests decode"
    yield (
        f"While our engine decodes {beside['streams']} requests, a prompt of {beside['prompt_tokens']:,} "
        f"tokens arrives. The time to its first token is {beside['time_to_first_token']:.1f} s."
    )
    yield table(
        (f"time between tokens of the {beside['streams']} requests", "ms"),
        (
            ("before the long prompt arrives, median", _ms(beside["median_before"])),
            ("while the long prompt is read, median", _ms(beside["median_during"])),
            ("while the long prompt is read, 99th percentile", _ms(beside["p99_during"])),
            ("while the long prompt is read, longest", _ms(beside["longest_during"])),
        ),
    )
    yield "## Time to first token of a dialogue's next turn, in s"
    yield table(
        ("engine", "history of 1,500 tokens, not in the cache", "next turn, history in the cache"),
        ((peer, f"{r['cold']:.2f}", f"{r['next_turn']:.2f}") for peer, r in results["next_turn"].items()),
    )
    yield "## Memory"
    yield (
        f"Our engine serves {soak['requests']:,} short requests. A tenth of the callers disconnect before "
        "the end."
    )
    yield table(
        ("resident memory", "MB"),
        (
            ("after the first 200 requests", f"{soak['memory_after_first_200'] / 1e6:.0f}"),
            (f"after all {soak['requests']:,} requests", f"{soak['memory_after_last'] / 1e6:.0f}"),
        ),
    )


def _starts(results: Results) -> Iterator[str]:
    yield "## Cold start, in seconds from the start of the process"
    yield table(
        ("engine and model", "ready", "first token"),
        ((name, f"{r['ready']:.1f}", f"{r['first_token']:.1f}") for name, r in results["cold_start"].items()),
    )
    yield "## Loading a bfloat16 checkpoint, without the time for imports"
    yield table(
        ("quantization", "checkpoint, GB", "reading its files, s", "loading it, s"),
        (
            (name, f"{r['bytes'] / 1e9:.1f}", f"{r['reading']:.1f}", f"{r['loading']:.1f}")
            for name, r in results["load"].items()
        ),
    )
    yield "## One linear layer with 768 inputs and 9,216 outputs, in microseconds per call"
    yield table(
        ("kernel", *(counted(rows, "row") for rows in next(iter(results["linears"].values())))),
        ((kernel, *(f"{t:,.0f}" for t in times.values())) for kernel, times in results["linears"].items()),
    )


def _busy_cpu(results: Results) -> Iterator[str]:
    measured = results["busy_cpu"]
    machine, speeds = measured["machine"], measured["speeds"]
    settings = list(next(iter(speeds.values()))["1"]["quiet"])
    yield "## Tokens per second while another program uses the CPU"
    yield (
        f"Measured on {'the same' if machine == results['machine'] else 'another'} machine: "
        f"{machine['processor']}, {machine['cores']} cores, vector instructions: "
        f'{", ".join(machine["instructions"]) or "none"}. "Busy" means that another program runs an endless '
        "loop on one core. The number of threads is either chosen by the engine or fixed."
    )
    columns = [(state, name) for state in ("quiet", "busy") for name in settings]
    yield table(
        (
            "model",
            "concurrent requests",
            *(f"{'idle' if state == 'quiet' else state} CPU, threads: {name}" for state, name in columns),
        ),
        (
            (model, batch, *(f"{rows[state][name]:.0f}" for state, name in columns))
            for model, by_batch in speeds.items()
            for batch, rows in by_batch.items()
        ),
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
    return table(head, _summary_rows(results["throughput"]))


def _summary_rows(by_batch: Results) -> Iterator[tuple[str, ...]]:
    for precision, (ours, endings) in _SAME_PRECISION.items():
        for batch, rows in by_batch.items():
            speeds = {name: row["tokens_per_second"] for name, row in rows.items() if name.endswith(endings)}
            peers = [name for name in speeds if not name.startswith("our ")]
            if ours in speeds and peers:
                best = max(peers, key=speeds.__getitem__)
                ratio = round(speeds[ours] / speeds[best], 3)  # as in `targets.evaluate`
                name, _, _ = best.rpartition(", ")
                yield precision, batch, f"{speeds[ours]:.0f}", name, f"{speeds[best]:.0f}", f"{ratio:.2f}"


def throughput_table(results: Results) -> str:
    """Return the table of tokens per second, which the README shows too."""
    return by_batch_table(results["throughput"], _speed)


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


def _speed(row: Results) -> str:
    return f"{row['tokens_per_second']:.0f}"


def _first_token(row: Results) -> str:
    return _ms(row["time_to_first_token"])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


def _spread(row: dict[str, float]) -> str:
    return f"{row['slowest']:.0f} to {row['fastest']:.0f}"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_report(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(""))
