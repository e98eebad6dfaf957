"""The sections of the report about speed, memory and serving. A figure that was not measured is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.tables import counted, table

Measured = dict[str, Any]


def precision_sections(measured: dict[str, Measured]) -> Iterator[str]:
    """Yield the tables that compare precisions. `measured` has the figures of each."""
    yield from _decode(measured)
    yield from _by_precision(
        measured,
        "step_without_graphs",
        "## A decode step without CUDA graphs, by number of requests, in ms",
        lambda figures: {counted(height, "request"): _ms(seconds) for height, seconds in figures.items()},
    )
    yield from _by_precision(
        measured,
        "launches",
        "## Kernel launches of a decode step, and the sum of the kernels' times",
        lambda figures: {
            counted(height, "request"): f"{row['launches']:,} ({_ms(row['seconds_of_kernels'])} ms)"
            for height, row in figures.items()
        },
    )
    yield from _by_precision(
        measured,
        "mixed_lengths",
        "## One long request beside short ones",
        lambda figures: {
            "requests": str(figures["requests"]),
            f"one of {figures['long']:,} tokens, others of {figures['short']}, ms": _ms(
                figures["seconds_mixed"]
            ),
            "as many tokens in equal requests, ms": _ms(figures["seconds_equal"]),
        },
    )
    yield from _by_precision(
        measured,
        "sampling",
        "## A decode step by sampling parameters, in ms",
        lambda figures: {
            name.replace("_", " "): str(value) if name == "requests" else _ms(value)
            for name, value in figures.items()
        },
    )
    yield from _by_precision(
        measured,
        "prompts",
        "## Prompt tokens per second, by prompt tokens per step, and the time of such a step",
        lambda figures: {
            f"{chunk} tokens": f"{row['tokens_per_second']:,.0f} ({_ms(row['seconds_per_step'])} ms)"
            for chunk, row in figures.items()
        },
    )
    yield from _by_precision(measured, "graphs", "## CUDA graphs", _graphs)
    yield from _by_precision(measured, "memory", "## Memory in GB", _memory)


def _decode(measured: dict[str, Measured]) -> Iterator[str]:
    yield from _by_precision(
        measured,
        "decode",
        "## Tokens per second, by number of requests, and the time of a step",
        lambda figures: {
            counted(height, "request"): f"{row['tokens_per_second']:,.0f} ({_ms(row['seconds'])} ms)"
            for height, row in figures.items()
        },
    )
    yield from _by_precision(
        measured,
        "generate_of_transformers",
        "## Tokens per second of `generate` of transformers on the same layers",
        lambda figures: {
            counted(height, "request"): "out of memory" if speed is None else f"{speed:,.0f}"
            for height, speed in figures.items()
        },
    )


def _graphs(figures: Measured) -> dict[str, str]:
    return {
        "graphs": str(figures["graphs"]),
        "seconds to capture": f"{figures['seconds']:.1f}",
        "memory, GB": f"{figures['bytes'] / 1e9:.2f}",
    }


def _memory(figures: Measured) -> dict[str, str]:
    return {
        "requests": str(figures["rows"]),
        "tokens per request": f"{figures['context']:,}",
        "all": f"{figures['used'] / 1e9:.2f}",
        "weights, calculated": f"{figures['weights_calculated'] / 1e9:.2f}",
        "cache, calculated": f"{figures['cache_calculated'] / 1e9:.2f}",
        "other": f"{figures['reserve_used'] / 1e9:.2f}",
        "other, calculated": f"{figures['reserve_calculated']['total'] / 1e9:.2f}",
    }


def _by_precision(
    measured: dict[str, Measured], name: str, title: str, cells: Callable[[Measured], dict[str, str]]
) -> Iterator[str]:
    """Yield a table with a row per precision. `cells` returns the text of each column from the figures."""
    rows = {precision: cells(figures[name]) for precision, figures in measured.items() if figures.get(name)}
    if not rows:
        return
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    yield title
    yield table(
        ("precision", *columns),
        ((precision, *(row.get(column, "") for column in columns)) for precision, row in rows.items()),
    )


def serving_section(measured: Measured) -> Iterator[str]:
    """Yield the figures of Cog's server."""
    if not (served := measured.get("serving")):
        return
    yield "## Cog's server with packed weights"
    yield table(
        ("figure", "value"),
        (
            ("precision", served["quantization"]),
            ("weights on the disk, GB", f"{served['bytes_on_disk'] / 1e9:.1f}"),
            ("start to ready, s", f"{served['seconds_to_ready']:.1f}"),
            ("start to the first token, s", f"{served['seconds_to_first_token']:.1f}"),
            ("parts of the setup", served.get("setup", "")),
            ("tokens per second of one request", f"{served['tokens_per_second']:.0f}"),
            ("requests at once", f"{served['requests_at_once']} of {served['context']:,} tokens"),
        ),
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
