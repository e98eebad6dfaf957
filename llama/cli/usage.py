"""The command `usage`: what the keys of the gateway have used, and what it cost."""

from __future__ import annotations

import csv
import sys
from datetime import date
from typing import Annotated

import typer

from llama.cli.gateway_database import open_store
from llama.cli.terminal import command, print_table
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.usage_table import Column
from llama.gateway.usage_report import PricedUsage, total, with_prices

_COLUMNS = ("predictions", "input tokens", "output tokens", "seconds", "dollars")


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a day such as 2026-11-01") from error


@command
def usage(
    since: Annotated[
        date | None,
        typer.Option(
            parser=_day,
            metavar="YYYY-MM-DD",
            help="The first day (UTC). Without it, usage of all time is shown.",
        ),
    ] = None,
    by: Annotated[
        list[Column] | None,
        typer.Option(
            help="Print one line per key, day or model. Repeat it to combine them. The default is key."
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, with exact prices and no total.")] = False,
) -> None:
    """Print predictions, tokens, seconds and prices by key, day or model. Works while a gateway runs, too.

    A prediction is one run of the model, and its seconds are the time from its start on a server to its end.
    LLAMA_GATEWAY_DATABASE must name the file of the gateway. LLAMA_GATEWAY_INPUT_PRICE and
    LLAMA_GATEWAY_OUTPUT_PRICE set the prices, which also apply to earlier tokens.
    """
    settings = GatewaySettings.from_environment()
    columns = list(dict.fromkeys(by or [Column.KEY]))
    with open_store(settings) as store:
        lines = with_prices(store.usage.sums(columns, since=since), settings.prices)
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([*columns, *(column.replace(" ", "_") for column in _COLUMNS)])
        writer.writerows([*line.of, *_exact(line)] for line in lines)
        return
    if not lines:
        print("nothing has been used" + (f" since {since}" if since else ""), file=sys.stderr)
        return
    rows = [[*line.of, *_readable(line)] for line in lines]
    if len(lines) > 1:
        rows.append(["total", *[""] * (len(columns) - 1), *_readable(total(lines))])
    header = [column.upper() for column in (*columns, *_COLUMNS)]
    print_table([header, *rows], numbers_from=len(columns))


def _exact(line: PricedUsage) -> list[str]:
    counts = (line.predictions, line.input_tokens, line.output_tokens)
    return [*map(str, counts), f"{line.seconds:.3f}", f"{line.price:f}"]


def _readable(line: PricedUsage) -> list[str]:
    counts = (line.predictions, line.input_tokens, line.output_tokens)
    return [*(f"{count:,}" for count in counts), f"{line.seconds:,.1f}", f"{line.price:,.6f}"]
