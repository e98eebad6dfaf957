"""Turn the JSON document of `make bench-gateway` into Markdown.

`python -m benchmarks.gateway.report benchmarks/results/gateway.json` writes the `.md` file next to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import targets_table
from benchmarks.tables import counted, table
from benchmarks.targets import Results


def markdown(results: Results) -> str:
    """Return the whole report."""
    sections = [*_setting(results), *_streams(results), *_many(results), *_end(results)]
    return "\n\n".join(sections) + "\n"


def _setting(results: Results) -> Iterator[str]:
    machine, paced = results["machine"], results["paced"]
    yield f"# The gateway: {machine['processor']}, {machine['cores']} cores"
    yield (
        f"The machine has {machine['memory_gb']} GB of memory and runs {machine['system']} and Python "
        f"{machine['python']}. `make bench-gateway` measured commit {results['commit']} on "
        f"{results['date']}, in {results['minutes']:.0f} minutes. The servers, the gateways and the clients "
        "share the machine's cores."
    )
    yield (
        "All ways to a server were measured in one run, interleaved; values are medians over the rounds. The "
        "CPU time is that of the gateway's process, divided by the pieces of text that it passed on; it "
        "includes the time for creating and storing the predictions."
    )
    yield "## Targets"
    yield '"A relative to B" means A divided by B.'
    yield targets_table(results)
    yield "## Streams of a paced server"
    yield (
        f"A fake server sends {paced['pieces']} pieces of text, one every {1000 * paced['gap']:.0f} ms, to "
        "each of its clients."
    )


def _streams(results: Results) -> Iterator[str]:
    paced, streams = results["paced"], results["streams"]
    for name, title in (
        ("one", "1 stream"),
        ("arriving", f"{streams} streams that start {1000 * paced['apart']:.0f} ms apart"),
        ("many", f"{streams} streams that start at the same moment"),
    ):
        yield f"{title}:"
        yield _table(paced[name], "pieces/s")
    yield "## Streams of our server"
    yield (
        f"Cog's server with the embedded model generates {results['tokens']} tokens per request. It uses "
        "all cores, so the gateway's CPU time is taken from the server."
    )
    for name, streams in (("one", 1), ("many", results["streams"])):
        yield f"{counted(streams, 'stream')}:"
        yield _table(results["real"][name], "tokens/s")


def _table(rows: Results, speed: str) -> str:
    per = speed.removesuffix("s/s")
    return table(
        (
            "way",
            speed,
            "slowest to fastest round",
            "first text after, ms",
            f"CPU per {per}, us",
            "memory, MB",
        ),
        (
            (
                name,
                f"{row['per_second']:.1f}",
                f"{row['slowest']:.1f} to {row['fastest']:.1f}",
                f"{1000 * row['first']:.1f}",
                f"{1e6 * row['cpu_per_piece']:.0f}" if "cpu_per_piece" in row else "",
                f"{row['memory'] / 1e6:.0f}" if "memory" in row else "",
            )
            for name, row in rows.items()
        ),
    )


def _many(results: Results) -> Iterator[str]:
    waiting, leaving = results["waiting"], results["leaving"]
    yield "## More requests than places"
    yield (
        f"{waiting['requests']} requests of {waiting['keys']} keys wait for {waiting['places']} places, "
        "queued one key after the other; meanwhile, every client reads a stream. All were answered. While "
        f"several keys had waiting requests, no key started more than {waiting['lead']} requests before "
        f"another one. The gateway used at most {waiting['memory'] / 1e6:.0f} MB of memory."
    )
    yield "## Clients that leave and a server that is killed"
    yield (
        f"{leaving['requests']:,} requests run on two servers. A tenth is cancelled, a tenth is dropped by "
        "its client, and one server is killed when half of the requests have started."
    )
    yield table(
        ("requests", "number"),
        (
            ("succeeded", f"{leaving['succeeded']:,}"),
            ("cancelled", f"{leaving['cancelled']:,}"),
            ("failed", f"{leaving['failed']:,}"),
            ("had sent pieces on the killed server", f"{leaving['with_pieces']:,}"),
            ("stored", f"{leaving['predictions']:,}"),
            ("counted for their keys", f"{leaving['counted']:,}"),
        ),
    )
    yield (
        f"The stored predictions have {leaving['tokens']:,} tokens, and the counts of the keys have "
        f"{leaving['counted_tokens']:,}. Broken rules: {'; '.join(leaving['faults']) or 'none'}."
    )


def _end(results: Results) -> Iterator[str]:
    start = results["start"]
    yield "## Start"
    yield (
        f"The gateway was ready {start['seconds']:.2f} s after the start of its process, and used "
        f"{start['memory'] / 1e6:.0f} MB of memory then."
    )
    yield "## Versions"
    yield "\n".join(f"- {name} {version}" for name, version in results["versions"].items())


if __name__ == "__main__":
    source = Path(sys.argv[1])
    results = json.loads(source.read_text(encoding="utf-8"))
    source.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
