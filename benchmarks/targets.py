"""Compare what a run measured with the project's performance targets.

Knows the figures of a run and the names of the engines; knows nothing about how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.tables import counted

Results = dict[str, Any]

OURS = "our engine, bfloat16"
OURS_IN_FLOAT32 = "our engine, float32"
SERVED = "our server, bfloat16"
SERVED_ON_VLLM = "our server on vLLM, bfloat16"
CHOSEN = "chosen by the engine"
GENERATE = "transformers generate, bfloat16"
VLLM = "vLLM engine (CPU, eager), bfloat16"
VLLM_SERVER = "vLLM server (CPU, eager), bfloat16"
BENCHMARK_MODEL = "benchmark model, bfloat16"
EMBEDDED_MODEL = "embedded model"
_BATCHES = (1, 8, 32)

Row = tuple[str, float, float | None, bool]
"""The target's name, the wanted value, the measured value, and whether the wanted value is an upper bound."""


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Return one row per target: `target` (its name), `wanted`, `got` and `met`.

    `got` and `met` are None if the figure was not measured.
    """
    return judged(_rows(results))


def judged(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Compare measured values with wanted ones. Returns what `evaluate` returns."""
    return [
        {
            "target": text,
            "wanted": f"{'at most' if upper else 'at least'} {wanted:g}",
            "got": None if got is None else round(got, 3),
            "met": None if got is None else bool(got <= wanted if upper else got >= wanted),
        }
        for text, wanted, got, upper in rows
    ]


def _rows(results: Results) -> Iterator[Row]:
    yield from _speeds_of_peers(results)
    yield from _other_requests(results)
    yield from _ours_alone(results)
    yield from _served_on_vllm(results)
    yield from _long_runs(results)
    yield from _busy_cpu(results)


def _speeds_of_peers(results: Results) -> Iterator[Row]:
    for peer, wanted in {
        VLLM: (1.1, 1.1, 1.05),
        "llama.cpp, bf16": (0.8, 1.15, 1.5),
        GENERATE: (2.0, 1.9, 1.9),
        "transformers generate, float32": (1.5, 1.3, 1.3),
    }.items():
        for batch, share in zip(_BATCHES, wanted, strict=True):
            got = _over(_part(results, "throughput", str(batch)), _alike(peer), peer)
            yield f"{_relative_to(peer)}; {counted(batch, 'request')}", share, got, False


def _other_requests(results: Results) -> Iterator[Row]:
    got = _over(_part(results, "mixed_lengths"), OURS, VLLM)
    yield f"{_relative_to(VLLM)}; 16 requests of mixed lengths", 1.2, got, False
    for dtype in ("bfloat16", "float32"):
        peer = f"transformers continuous batching, {dtype}"
        got = _over(_part(results, "arriving"), _alike(peer), peer)
        yield f"{_relative_to(peer)}; 32 requests, 50 ms apart", 2.0, got, False


def _relative_to(peer: str) -> str:
    return f"tokens/s of our engine relative to {peer}"


def _ours_alone(results: Results) -> Iterator[Row]:
    beside = _part(results, "long_prompt_beside")
    yield (
        "99th percentile of the time between tokens while a 2,000-token prompt is read, "
        "relative to the median before it arrives",
        3.0,
        beside["p99_during"] / beside["median_before"] if beside else None,
        True,
    )
    turn = _part(results, "next_turn", OURS)
    yield (
        "time to first token of a dialogue's next turn, relative to that of a dialogue that is not in the "
        "cache",
        0.15,
        turn["next_turn"] / turn["cold"] if turn else None,
        True,
    )
    served = _over(_part(results, "throughput", "32"), SERVED, OURS)
    yield "tokens/s of our server relative to our engine; 32 requests", 0.95, served, False


def _served_on_vllm(results: Results) -> Iterator[Row]:
    by_batch = {batch: _part(results, "beside_vllm", str(batch)) for batch in _BATCHES}
    for batch, rows in by_batch.items():
        name = f"tokens/s of our server on vLLM relative to the vLLM server; {counted(batch, 'request')}"
        yield name, 0.95, _over(rows, SERVED_ON_VLLM, VLLM_SERVER), False
    for batch, rows in by_batch.items():
        first = _of_both(rows, SERVED_ON_VLLM, VLLM_SERVER, "time_to_first_token")
        yield (
            "time to first token of our server on vLLM minus that of the vLLM server, in ms; "
            f"{counted(batch, 'request')}",
            10.0,
            None if first is None else 1000 * (first[0] - first[1]),
            True,
        )


def _long_runs(results: Results) -> Iterator[Row]:
    soak, load = _part(results, "soak"), _part(results, "load", "none")
    yield (
        "resident memory after 2,000 requests relative to that after 200",
        1.05,
        soak["memory_after_last"] / soak["memory_after_first_200"] if soak else None,
        True,
    )
    yield (
        "speed of loading a 4 GB checkpoint relative to reading its files",
        0.6,
        load["reading"] / load["loading"] if load else None,
        False,
    )


def _busy_cpu(results: Results) -> Iterator[Row]:
    for model, batch in ((BENCHMARK_MODEL, 1), (BENCHMARK_MODEL, 8), (EMBEDDED_MODEL, 1)):
        speeds = _part(results, "busy_cpu", "speeds", model, str(batch))
        chosen = "tokens/s with the engine's choice of threads relative to"
        what = f"{model}, {counted(batch, 'request')}"
        quiet, busy = (against_fixed(speeds, state) if speeds else None for state in ("quiet", "busy"))
        yield f"idle CPU: {chosen} one thread per core; {what}", 0.95, quiet, False
        yield f"busy CPU: {chosen} the best fixed number; {what}", 0.9, busy, False


def against_fixed(speeds: Results, state: str) -> float:
    """Return the speed with the engine's own choice of threads relative to that with a fixed number.

    The fixed number is one thread per core on an idle machine, and whichever is fastest on a busy one.
    """
    *fixed, all_cores = (speed for name, speed in speeds[state].items() if name != CHOSEN)
    return float(speeds[state][CHOSEN] / (all_cores if state == "quiet" else max([*fixed, all_cores])))


def _part(results: Results, *keys: str) -> Results:
    """Return what is stored under nested keys. It is empty if it was not measured."""
    for key in keys:
        results = results.get(key, {})
    return results


def _alike(peer: str) -> str:
    """Return the name of our engine in the peer's precision."""
    return OURS_IN_FLOAT32 if peer.endswith("float32") else OURS


def _over(rows: Results, ours: str, peer: str) -> float | None:
    """Return the ratio of two speeds, or None unless both were measured."""
    speeds = _of_both(rows, ours, peer, "tokens_per_second")
    return None if speeds is None else speeds[0] / speeds[1]


def _of_both(rows: Results, ours: str, peer: str, figure: str) -> tuple[float, float] | None:
    """Return the figure of both engines, or None unless both were measured."""
    if peer not in rows or ours not in rows:
        return None
    return rows[ours][figure], rows[peer][figure]
