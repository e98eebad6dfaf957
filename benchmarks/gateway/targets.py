"""Compare what a run measured with the gateway's targets. Knows nothing about how it was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.targets import Results, Row, judged

REPLICATE = "gateway, Replicate's stream"
OPENAI = "gateway, OpenAI's stream"
FAKE = "fake Cog server"
REAL = "our server"


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Return all targets with what was wanted, what was measured, and whether that is enough."""
    return judged(_targets(results))


def _targets(results: Results) -> Iterator[Row]:
    streams, paced, real = results["streams"], results["paced"]["many"], results["real"]
    for way in (REPLICATE, OPENAI):
        speed = paced[way]["per_second"] / paced[FAKE]["per_second"]
        yield f"{way}: pieces/s relative to the paced server; {streams} streams", 0.97, speed, False
        cpu = 1e6 * paced[way]["cpu_per_piece"]
        yield f"{way}: CPU time per piece in us; {streams} streams", 150, cpu, True
        for name, how in (
            ("one", "1 stream"),
            ("arriving", f"{streams} streams that start one after the other"),
            ("many", f"{streams} streams that start at the same moment"),
        ):
            rows = results["paced"][name]
            late = 1e3 * (rows[way]["first"] - rows[FAKE]["first"])
            what = "time to first piece more than that of the paced server, in ms"
            yield f"{way}: {what}; {how}", 10, late, True
    speed = real["many"][REPLICATE]["per_second"] / real["many"][REAL]["per_second"]
    yield f"{REPLICATE}: tokens/s relative to our server; {streams} streams", 0.93, speed, False
    for name, count in (("one", "1 stream"), ("many", f"{streams} streams")):
        late = 1e3 * (real[name][REPLICATE]["first"] - real[name][REAL]["first"])
        yield f"{REPLICATE}: time to first token more than that of our server, in ms; {count}", 10, late, True
    yield from _of_many(results)
    yield "seconds until the gateway is ready", 2, results["start"]["seconds"], True
    yield "resident memory of the gateway when it is ready, in MB", 150, _mb(results["start"]), True


def _of_many(results: Results) -> Iterator[Row]:
    waiting, leaving = results["waiting"], results["leaving"]
    requests = f"{waiting['requests']} waiting requests"
    yield f"{requests}: the most that one key started before another waiting key", 8, waiting["lead"], True
    yield f"{requests}: resident memory in MB", 300, _mb(waiting), True
    wrong = f"{leaving['requests']:,} requests, clients and a server that leave: broken rules"
    yield wrong, 0, len(leaving["faults"]), True


def _mb(row: Results) -> float:
    return float(row["memory"] / 1e6)
