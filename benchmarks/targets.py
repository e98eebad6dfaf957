"""What the project wants to reach, held against what a run measured. Knows figures only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Results = dict[str, Any]

OURS = "ours, bfloat16"
OURS_IN_FLOAT32 = "ours, float32"
SERVED = "ours over HTTP, bfloat16"
SERVED_ON_VLLM = "ours on vLLM over HTTP, bfloat16"
CHOSEN = "chosen by the engine"
VLLM_SERVER = "vLLM's own server (CPU, eager), bfloat16"


def evaluate(results: Results) -> list[dict[str, Any]]:
    """One row a target: what, wanted, got (None where it was not measured), and whether it is met."""
    return [
        {
            "target": text,
            "wanted": f"{'at most' if upper else 'at least'} {wanted:g}",
            "got": None if got is None else round(got, 3),
            "met": None if got is None else bool(got <= wanted if upper else got >= wanted),
        }
        for text, wanted, got, upper in _rows(results)
    ]


Row = tuple[str, float, float | None, bool]
"""What, wanted, got, and whether `wanted` is an upper bound."""


def _rows(results: Results) -> Iterator[Row]:
    yield from _speeds_of_peers(results)
    yield from _ours_alone(results)
    yield from _served_on_vllm(results)
    yield from _long_runs(results)
    yield from _busy_cpu(results)


def _speeds_of_peers(results: Results) -> Iterator[Row]:
    for peer, wanted in {
        "transformers generate, bfloat16": (1.5, 1.3, 1.3),
        "transformers generate, float32": (1.5, 1.3, 1.3),
        "vLLM (CPU, eager), bfloat16": (1.0, 1.1, 1.1),
        "llama.cpp, bf16": (1.0, 0.9, 1.0),
    }.items():
        for batch, share in zip((1, 8, 32), wanted, strict=True):
            if not (peer.startswith("llama.cpp") and batch == 1):
                yield f"speed over {peer}, {batch} at once", share, _ratio(results, batch, peer), False
    yield "goal: over llama.cpp, bf16, 1 at once", 1.0, _ratio(results, 1, "llama.cpp, bf16"), False
    for batch in (8, 32):
        got = _ratio(results, batch, "llama.cpp, q4_0")
        yield f"goal: over llama.cpp, q4_0, {batch} at once", 1.0, got, False
    for dtype in ("bfloat16", "float32"):
        peer = f"transformers continuous batching, {dtype}"
        got = _over(results["arriving"], _alike(peer), peer)
        yield f"arriving one by one: over {peer}", 2.0, got, False


def _ours_alone(results: Results) -> Iterator[Row]:
    beside, turn = results["long_prompt_beside"], results["next_turn"][OURS]
    yield (
        "99th percentile time between tokens while a 2,000-token prompt is read, over the median before",
        3.0,
        beside["p99_during"] / beside["median_before"],
        True,
    )
    yield (
        "time to first token of a dialogue's next turn over the cold one",
        0.2,
        turn["next_turn"] / turn["cold"],
        True,
    )
    served = _over(results["throughput"]["32"], SERVED, OURS)
    yield "32 streams over HTTP over the engine alone", 0.9, served, False


def _served_on_vllm(results: Results) -> Iterator[Row]:
    by_batch = {batch: results["beside_vllm"].get(batch, {}) for batch in results["throughput"]}
    for batch, rows in by_batch.items():
        got = _over(rows, SERVED_ON_VLLM, VLLM_SERVER)
        yield f"our server on vLLM over vLLM's own, {batch} at once", 0.95, got, False
    for batch, rows in by_batch.items():
        first = _of_both(rows, SERVED_ON_VLLM, VLLM_SERVER, "time_to_first_token")
        yield (
            f"time to first token of our server on vLLM, ms after vLLM's own, {batch} at once",
            10.0,
            None if first is None else 1000 * (first[0] - first[1]),
            True,
        )


def _long_runs(results: Results) -> Iterator[Row]:
    soak, load = results["soak"], results["load"]["none"]
    yield (
        "memory after 2,000 requests over that after 200",
        1.05,
        soak["memory_after_last"] / soak["memory_after_first_200"],
        True,
    )
    yield (
        "loading a 4 GB checkpoint, as a share of the speed of reading it",
        0.7,
        load["reading"] / load["loading"],
        False,
    )


def _busy_cpu(results: Results) -> Iterator[Row]:
    for model, by_batch in results["busy_cpu"]["speeds"].items():
        for batch, speeds in by_batch.items():
            what = f"{model}, {batch} at once"
            quiet, busy = (against_fixed(speeds, state) for state in ("quiet", "busy"))
            yield f"{what}, quiet CPU: speed over that with a thread for every core", 0.95, quiet, False
            yield (
                f"{what}, beside a busy loop: speed over the better fixed number of threads",
                0.9,
                busy,
                False,
            )


def against_fixed(speeds: Results, state: str) -> float:
    """The engine's choice of threads over a fixed number: over all cores on a quiet machine, over whichever
    is faster on a busy one."""
    *fixed, all_cores = (speed for name, speed in speeds[state].items() if name != CHOSEN)
    return float(speeds[state][CHOSEN] / (all_cores if state == "quiet" else max([*fixed, all_cores])))


def _ratio(results: Results, batch: int, peer: str) -> float | None:
    return _over(results["throughput"][str(batch)], _alike(peer), peer)


def _alike(peer: str) -> str:
    """Ours in a peer's precision."""
    return OURS_IN_FLOAT32 if peer.endswith("float32") else OURS


def _over(rows: Results, ours: str, peer: str) -> float | None:
    speeds = _of_both(rows, ours, peer, "tokens_per_second")
    return None if speeds is None else speeds[0] / speeds[1]


def _of_both(rows: Results, ours: str, peer: str, figure: str) -> tuple[float, float] | None:
    """None unless both were measured."""
    if peer not in rows or ours not in rows:
        return None
    return rows[ours][figure], rows[peer][figure]
