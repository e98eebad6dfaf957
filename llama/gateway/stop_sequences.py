"""Writes stop sequences in the form of the predictor's input `stop_sequences`."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SPECIAL = re.compile(r"[\\,]")


def join_stops(stops: Iterable[str]) -> str:
    r"""Join texts with commas. Within a text, a comma is escaped to `\,` and a backslash to `\\`."""
    return ",".join(_SPECIAL.sub(r"\\\g<0>", stop) for stop in stops)
