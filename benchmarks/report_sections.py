"""The sections of a report about other requests than the main comparison, starts, memory and threads.

A section whose figures were not measured is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables import by_batch_table, counted, milliseconds, table
from benchmarks.targets import Results


def other_requests_sections(results: Results) -> Iterator[str]:
    if results.get("arriving"):
        yield "## 32 requests that arrive 50 ms apart"
        yield table(
            ("engine", "tokens/s", "slowest to fastest round, tokens/s", "time to first token, s"),
            (
                (peer, speed(r), _spread(r), f"{r['time_to_first_token']:.2f}")
                for peer, r in results["arriving"].items()
            ),
        )
    if results.get("mixed_lengths"):
        yield from _mixed_lengths(results)
    if results.get("dialogue"):
        yield from _dialogue(results["dialogue"])
    if results.get("beside_busy_loop"):
        yield "## Tokens per second of all engines while another program uses the CPU"
        yield "The other program runs an endless loop on one core."
        yield by_batch_table(results["beside_busy_loop"], speed)


def _mixed_lengths(results: Results) -> Iterator[str]:
    mixed = results["workload"]["mixed_lengths"]
    yield "## Requests of mixed lengths"
    yield (
        f"A request with a prompt of {mixed['long_prompt_tokens']:,} tokens and {mixed['short_prompts']} "
        f"with prompts of {mixed['short_prompt_tokens']} tokens arrive together. Each generates "
        f"{mixed['new_tokens']} tokens. Tokens per second are the new tokens of all requests, divided by "
        "the time until the last request ends. llama.cpp reads all prompts before the first token. "
        "`generate` of transformers is not measured, because it would pad every prompt to the longest."
    )
    yield table(
        ("engine", "tokens/s", "time to first token of the long prompt, s", "of the short prompts, s"),
        (
            (
                peer,
                speed(r),
                f"{r['time_to_first_token_of_long']:.2f}",
                f"{r['time_to_first_token_of_short']:.2f}",
            )
            for peer, r in results["mixed_lengths"].items()
        ),
    )


def _dialogue(rows: Results) -> Iterator[str]:
    lengths = next(iter(rows.values()))["prompt_tokens"]
    yield f"## A dialogue of {len(lengths)} turns with the embedded model, in bfloat16"
    yield (
        "Each prompt has all earlier turns, with fixed answers, and a new question, in the model's chat "
        f"format. The prompts have {lengths[0]} to {lengths[-1]} tokens. The engines get token ids, and "
        "generate 64 tokens per turn. `generate` of transformers keeps no cache between turns. Times to "
        "first token are in ms."
    )
    yield table(
        ("engine", "tokens/s", *(f"turn {number}" for number in range(1, len(lengths) + 1))),
        ((peer, speed(row), *map(milliseconds, row["first_tokens"])) for peer, row in rows.items()),
    )


def our_engine_sections(results: Results) -> Iterator[str]:
    if results.get("long_prompt_beside"):
        yield from _long_prompt_beside(results["long_prompt_beside"])
    if results.get("next_turn"):
        yield "## Time to first token of a dialogue's next turn, in s"
        yield table(
            ("engine", "history of 1,500 tokens, not in the cache", "next turn, history in the cache"),
            ((peer, f"{r['cold']:.2f}", f"{r['next_turn']:.2f}") for peer, r in results["next_turn"].items()),
        )
    if results.get("soak"):
        yield from _memory(results["soak"])


def _long_prompt_beside(beside: Results) -> Iterator[str]:
    yield "## A long prompt that arrives while other requests decode"
    yield (
        f"While our engine decodes {beside['streams']} requests, a prompt of {beside['prompt_tokens']:,} "
        f"tokens arrives. The time to its first token is {beside['time_to_first_token']:.1f} s."
    )
    yield table(
        (f"time between tokens of the {beside['streams']} requests", "ms"),
        (
            ("before the long prompt arrives, median", milliseconds(beside["median_before"])),
            ("while the long prompt is read, median", milliseconds(beside["median_during"])),
            ("while the long prompt is read, 99th percentile", milliseconds(beside["p99_during"])),
            ("while the long prompt is read, longest", milliseconds(beside["longest_during"])),
        ),
    )


def _memory(soak: Results) -> Iterator[str]:
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


def starts_sections(results: Results) -> Iterator[str]:
    if results.get("cold_start"):
        yield "## Cold start, in seconds from the start of the process"
        yield table(
            ("engine and model", "ready", "first token"),
            (
                (name, f"{r['ready']:.1f}", f"{r['first_token']:.1f}")
                for name, r in results["cold_start"].items()
            ),
        )
    if results.get("load"):
        yield "## Loading a bfloat16 checkpoint, without the time for imports"
        yield table(
            ("quantization", "checkpoint, GB", "reading its files, s", "loading it, s"),
            (
                (name, f"{r['bytes'] / 1e9:.1f}", f"{r['reading']:.1f}", f"{r['loading']:.1f}")
                for name, r in results["load"].items()
            ),
        )
    if results.get("linears"):
        linears = results["linears"]
        yield "## One linear layer with 768 inputs and 9,216 outputs, in microseconds per call"
        yield table(
            ("kernel", *(counted(rows, "row") for rows in next(iter(linears.values())))),
            ((kernel, *(f"{t:,.0f}" for t in times.values())) for kernel, times in linears.items()),
        )


def busy_cpu_sections(results: Results) -> Iterator[str]:
    if not results.get("busy_cpu"):
        return
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


def speed(row: Results) -> str:
    return f"{row['tokens_per_second']:.0f}"


def first_token(row: Results) -> str:
    return milliseconds(row["time_to_first_token"])


def _spread(row: dict[str, float]) -> str:
    return f"{row['slowest']:.0f} to {row['fastest']:.0f}"
