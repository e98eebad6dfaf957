"""`make bench-gateway`: measure the gateway in front of fakes of Cog's server and of our real server.

LiteLLM's proxy is measured beside it if `--litellm` names a Python interpreter that has it. The results are
written as JSON and Markdown; the JSON is also the last line of the output.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import resource
import tempfile
import time
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx2

from benchmarks.fake_cog import FakeCog
from benchmarks.gateway import load_scenarios, processes
from benchmarks.gateway.apis import Reading, ask_cog, ask_openai, ask_replicate, client
from benchmarks.gateway.books import faults, read_books
from benchmarks.gateway.processes import KEY, Process
from benchmarks.gateway.report import markdown
from benchmarks.gateway.streams import Row, Way, compare, log
from benchmarks.gateway.targets import evaluate
from benchmarks.machine import commit, describe
from llama import ROOT
from llama.serving.schema import write_schema
from llama.serving.server import CogServer
from predict import Predictor

STREAMS = 32
PIECES, GAP = 200, 0.02  # 50 pieces per second and stream, faster than a 70B model on one GPU
APART = 0.05  # seconds between the starts of streams that arrive one after the other
TOKENS = 64
KEYS = {"first": 332, "second": 100, "third": 60, "fourth": 40}
"""Requests per key; the first key also fills the places."""


def main() -> None:
    arguments = _arguments()
    started = time.monotonic()
    # Every waiting client is an open connection here and in the gateway.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(20_000, most), most))
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(_measure(Path(folder), arguments))
    results["minutes"] = (time.monotonic() - started) / 60
    results["targets"] = evaluate(results)
    stem: Path = arguments.results
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(json.dumps(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--litellm", metavar="PYTHON", help="a Python interpreter with litellm[proxy]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every comparison")
    parser.add_argument("--requests", type=int, default=2000, help="requests while a server is killed")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "gateway",
        help="the path of the results, without a suffix (default: %(default)s)",
    )
    return parser.parse_args()


async def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": describe(),
        "versions": {name: version(name) for name in ("fastapi", "httpx2", "uvicorn", "coglet")},
        "streams": STREAMS,
        "paced": {"pieces": PIECES, "gap": GAP, "apart": APART},
        "tokens": TOKENS,
        "start": _start(folder),
    }
    if arguments.litellm:
        results["versions"]["litellm"] = processes.version_of_litellm(arguments.litellm)
    results["paced"] |= await _paced(folder, arguments)
    results["waiting"] = await _waiting(folder)
    results["leaving"] = await _leaving(folder, arguments.requests)
    results["real"] = await _real(folder, arguments.rounds)
    return results


def _start(folder: Path) -> Row:
    """Measure how long the gateway takes until it is ready, and its memory then."""
    seconds, memory = list[float](), list[int]()
    with FakeCog() as cog:
        for number in range(5):
            began = time.perf_counter()
            with processes.gateway([cog.url], folder / f"start{number}.sqlite3") as gateway:
                gateway.wait_until_ready()
                seconds.append(time.perf_counter() - began)
                memory.append(gateway.memory)
    log(f"ready after {median(seconds):.2f} s")
    return {"seconds": median(seconds), "memory": max(memory), "rounds": len(seconds)}


async def _paced(folder: Path, arguments: argparse.Namespace) -> Row:
    """Measure streams of a paced fake server, directly and through the gateways."""
    async with AsyncExitStack() as stack:

        async def opened(server: Process, key: str | None = None) -> httpx2.AsyncClient:
            await asyncio.to_thread(stack.enter_context(server).wait_until_ready)
            return await stack.enter_async_context(client(server.url, key))

        cog = processes.fake_cog(PIECES, GAP)
        ways = [Way("fake Cog server", ask_cog, await opened(cog))]
        gateway = processes.gateway([cog.url], folder / "paced.sqlite3")
        to_gateway = await opened(gateway, KEY)
        ways.append(Way("gateway, Replicate's stream", ask_replicate, to_gateway, gateway))
        ways.append(Way("gateway, OpenAI's stream", ask_openai, to_gateway, gateway))
        if arguments.litellm:
            upstream = processes.fake_openai(PIECES, GAP)
            ways.append(Way("fake OpenAI server", ask_openai, await opened(upstream)))
            litellm = processes.litellm(arguments.litellm, upstream.url, folder)
            ways.append(Way("LiteLLM's proxy", ask_openai, await opened(litellm, KEY), litellm))
        rows = dict[str, Any]()
        for name, streams, apart in (("one", 1, 0.0), ("arriving", STREAMS, APART), ("many", STREAMS, 0.0)):
            title = f"{streams} streams, {1000 * apart:.0f} ms apart"
            rows[name] = await compare(
                ways, streams=streams, rounds=arguments.rounds, pieces=_words, apart=apart, title=title
            )
        return rows


def _words(reading: Reading) -> int:
    """How many pieces of the fake servers an answer has."""
    words = reading.text.count(" word")
    assert words == PIECES, f"an answer has {words} pieces, not {PIECES}"
    return words


async def _real(folder: Path, rounds: int) -> Row:
    """Measure streams of our own server with the embedded model, directly and through the gateway."""
    write_schema(Predictor.run, ROOT)
    async with AsyncExitStack() as stack:
        server = stack.enter_context(CogServer())
        await asyncio.to_thread(server.wait_until_ready)
        url = str(server.client.base_url)
        gateway = stack.enter_context(processes.gateway([url], folder / "real.sqlite3"))
        await asyncio.to_thread(gateway.wait_until_ready)
        to_gateway = await stack.enter_async_context(client(gateway.url, KEY))
        ways = [
            Way("our server", ask_cog, await stack.enter_async_context(client(url))),
            Way("gateway, Replicate's stream", ask_replicate, to_gateway, gateway),
        ]
        rows = dict[str, Any]()
        for name, streams, turns in (("one", 1, 6 * rounds), ("many", STREAMS, rounds)):
            rows[name] = await compare(
                ways,
                streams=streams,
                rounds=turns,
                pieces=lambda _: TOKENS,
                tokens=TOKENS,
                title=f"our server, {streams} streams",
            )
        return rows


async def _waiting(folder: Path) -> Row:
    """Let 500 requests wait for 32 places."""
    database = folder / "waiting.sqlite3"
    load_scenarios.add_keys(database, list(KEYS))
    with FakeCog() as cog, processes.gateway([cog.url], database) as gateway:
        await asyncio.to_thread(gateway.wait_until_ready)
        began = time.perf_counter()
        with processes.peak_memory(gateway) as peak:
            order = await load_scenarios.wait_for_places(gateway.url, cog, KEYS)
        waiting = {**KEYS, "first": KEYS["first"] - STREAMS}
        row = {
            "requests": len(order),
            "places": cog.counts.most_running,
            "keys": len(KEYS),
            "lead": load_scenarios.largest_lead(order, waiting),
            "memory": peak[0],
            "seconds": time.perf_counter() - began,
        }
    log(f"{row['requests']} requests waited: {row}")
    return row


async def _leaving(folder: Path, total: int) -> Row:
    """Kill a server and let clients leave while requests run."""
    database = folder / "leaving.sqlite3"
    load_scenarios.add_keys(database, ["first", "second"])
    began = time.perf_counter()
    with FakeCog() as cog, FakeCog() as killed:
        servers = [cog.url, killed.url]
        with processes.gateway(servers, database) as gateway:
            await asyncio.to_thread(gateway.wait_until_ready)
            with processes.peak_memory(gateway) as peak:
                lost = await load_scenarios.leave_and_kill(
                    gateway.url, [cog, killed], ["first", "second"], total
                )
    books = read_books(database)
    row = {
        "requests": total,
        "predictions": books.rows,
        "succeeded": len(books.numbers("succeeded")),
        "cancelled": len(books.numbers("canceled")),
        "failed": len(books.numbers("failed")),
        "with_pieces": sum(served.pieces > 0 and served.status in ("running", "lost") for served in lost),
        "counted": books.counted,
        "tokens": books.tokens,
        "counted_tokens": books.counted_tokens,
        "faults": faults(books, lost, total),
        "memory": peak[0],
        "seconds": time.perf_counter() - began,
    }
    log(f"{total} requests with a killed server: {row}")
    return row


if __name__ == "__main__":
    main()
