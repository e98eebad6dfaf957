"""Tables and charts for people, made from the one JSON document of a run.

python -m benchmarks.report benchmarks/results/cpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.targets import Results

_CHARTS = (
    ("tokens_per_second", 1, "tokens per second"),
    ("time_to_first_token", 1000, "time to first token, ms"),
    ("time_between_tokens", 1000, "time between tokens, ms"),
)


def write_report(results: Results, stem: Path) -> None:
    """`stem`.json, .md and .svg."""
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(results, stem.name), encoding="utf-8")
    draw(results, stem.with_suffix(".svg"))


def markdown(results: Results, name: str) -> str:
    """The whole report."""
    sections = [
        *_setting(results),
        f"![speed, time to first token, time between tokens]({name}.svg)",
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
    yield f"# Measured on {machine['processor']}, {machine['cores']} cores"
    yield (
        f"{machine['memory_gb']} GB, {machine['system']}, Python {machine['python']}; of the wide "
        f"instructions it has {', '.join(machine['instructions']) or 'none'}. {results['date']}, commit "
        f"{results['commit']}, {results['minutes']:.0f} minutes. Made by `make bench`."
    )
    yield (
        f"A random Llama of {workload['parameters'] / 1e6:.0f} million parameters, prompts of "
        f"{workload['prompt_tokens']} tokens, {workload['new_tokens']} new ones, greedy. Medians of rounds "
        "in which peers take turns; the whole call, prefill included. To the first token: the mean of a "
        "turn's requests. vLLM runs its worker in the engine's process in every "
        "measurement: by default it leaves a core to its scheduler, half of a small machine."
    )


def _speeds(results: Results) -> Iterator[str]:
    yield "## Tokens per second, by requests at once"
    yield throughput_table(results)
    for name in results["not_measured"]:
        yield f"Not measured, since it did not run here: {name}."
    yield "## Time to first token, ms, by requests at once"
    yield _by_batch(results["throughput"], _first_token)
    if results["beside_vllm"]:
        yield "## Our server on vLLM beside vLLM's own, in more rounds"
        yield "Tokens per second, then ms to the first token:"
        yield _by_batch(results["beside_vllm"], _speed)
        yield _by_batch(results["beside_vllm"], _first_token)
    yield "## Targets"
    yield targets_table(results)
    yield "## Arriving one every 50 ms, 32 requests"
    yield _table(
        ("", "tokens/s", "slowest to fastest", "time to first token, s"),
        (
            (peer, f"{r['tokens_per_second']:.0f}", _spread(r), f"{r['time_to_first_token']:.2f}")
            for peer, r in results["arriving"].items()
        ),
    )


def _one_engine(results: Results) -> Iterator[str]:
    beside, soak = results["long_prompt_beside"], results["soak"]
    yield "## A long prompt beside running streams"
    yield (
        f"{beside['streams']} streams, then a prompt of {beside['prompt_tokens']} tokens, whose first token "
        f"comes after {beside['time_to_first_token']:.1f} s. Time between tokens of the streams: median "
        f"{_ms(beside['median_before'])} before; while it is read {_ms(beside['median_during'])}, "
        f"99th percentile {_ms(beside['p99_during'])}, longest {_ms(beside['longest_during'])}."
    )
    yield "## A dialogue's next turn"
    yield _table(
        ("time to first token, s", "1,500 tokens of history, cold", "next turn"),
        ((peer, f"{r['cold']:.2f}", f"{r['next_turn']:.2f}") for peer, r in results["next_turn"].items()),
    )
    yield "## Memory"
    yield (
        f"{soak['requests']:,} short requests, a tenth of whose callers leave early: "
        f"{soak['memory_after_first_200'] / 1e6:.0f} MB resident after the first 200, "
        f"{soak['memory_after_last'] / 1e6:.0f} MB after the last."
    )


def _starts(results: Results) -> Iterator[str]:
    yield "## Cold start"
    yield _table(
        ("seconds from the start of the process", "ready", "first token"),
        ((name, f"{r['ready']:.1f}", f"{r['first_token']:.1f}") for name, r in results["cold_start"].items()),
    )
    yield "## Loading, imports left out"
    yield _table(
        ("a checkpoint in bfloat16, loaded as", "GB", "reading its files, s", "loading it, s"),
        (
            (name, f"{r['bytes'] / 1e9:.1f}", f"{r['reading']:.1f}", f"{r['loading']:.1f}")
            for name, r in results["load"].items()
        ),
    )
    yield "## One linear layer, 768 to 9,216, microseconds by rows"
    yield _table(
        ("", *next(iter(results["linears"].values()))),
        ((kernel, *(f"{t:,.0f}" for t in times.values())) for kernel, times in results["linears"].items()),
    )


def _busy_cpu(results: Results) -> Iterator[str]:
    measured = results["busy_cpu"]
    machine, speeds = measured["machine"], measured["speeds"]
    settings = list(next(iter(speeds.values()))["1"]["quiet"])
    yield "## Beside a busy program, tokens per second"
    yield (
        f"Measured on {machine['processor']}, {machine['cores']} cores. Busy: another program keeps one core "
        "busy with an endless loop. The number of threads is chosen by the engine, or fixed."
    )
    yield _table(
        (
            "model",
            "requests at once",
            *(f"{state}, threads {name}" for state in ("quiet", "busy") for name in settings),
        ),
        (
            (model, batch, *(f"{rows[state][name]:.0f}" for state in ("quiet", "busy") for name in settings))
            for model, by_batch in speeds.items()
            for batch, rows in by_batch.items()
        ),
    )


def throughput_table(results: Results) -> str:
    """The README shows this one too."""
    return _by_batch(results["throughput"], _speed)


def _by_batch(by_batch: Results, figure: Callable[[Results], str]) -> str:
    """A row a peer, a column a number of requests; blank where that was not measured."""
    peers = list(dict.fromkeys(peer for rows in by_batch.values() for peer in rows))
    return _table(
        ("", *by_batch),
        (
            (peer, *(figure(rows[peer]) if peer in rows else "" for rows in by_batch.values()))
            for peer in peers
        ),
    )


def targets_table(results: Results) -> str:
    """Misses included."""
    verdict = {True: "met", False: "**missed**", None: "not measured"}
    return _table(
        ("target", "wanted", "got", ""),
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


def draw(results: Results, path: Path) -> None:
    """Three charts side by side, over the number of requests at once."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "the same picture for the same figures"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(_CHARTS), figsize=(14, 4.2), layout="constrained")
    by_batch = results["throughput"]
    batches = [int(batch) for batch in by_batch]
    for axis, (name, factor, title) in zip(axes, _CHARTS, strict=True):
        for peer in by_batch[str(batches[0])]:
            rows = [by_batch[str(batch)].get(peer) for batch in batches]
            points = [(batch, row[name] * factor) for batch, row in zip(batches, rows, strict=True) if row]
            ours = peer.startswith("ours")
            axis.plot(*zip(*points, strict=True), marker="o", label=peer, linewidth=2.5 if ours else 1.2)
        axis.set(xscale="log", yscale="log", title=title, xlabel="requests at once")
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(visible=True, alpha=0.3)
    machine = results["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['cores']} cores")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _speed(row: Results) -> str:
    return f"{row['tokens_per_second']:.0f}"


def _first_token(row: Results) -> str:
    return f"{1000 * row['time_to_first_token']:.0f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def _spread(row: dict[str, float]) -> str:
    return f"{row['slowest']:.0f} to {row['fastest']:.0f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def lines() -> Iterator[str]:
        cells = [str(cell) for cell in head]
        yield "| " + " | ".join(cells) + " |"
        yield "|---" * len(cells) + "|"
        for row in rows:
            yield "| " + " | ".join(row) + " |"

    return "\n".join(lines())


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_report(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(""))
