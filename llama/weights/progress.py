"""Progress of a long download or load: a bar on a terminal, or a log line every 10 s.

Knows bytes and seconds; knows nothing about what is downloaded or loaded.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Show = Callable[[int], None]
"""Takes the number of bytes that are complete."""

_BYTES_PER_GB = 1e9


class LogProgress:
    """Logs a line at most every `every` seconds."""

    def __init__(self, total: int, done: int, every: float = 10.0) -> None:
        self._total, self._every = total, every
        self._first = self._last = (time.monotonic(), done)

    def show(self, done: int) -> None:
        now = time.monotonic()
        seconds = now - self._last[0]
        if seconds < self._every:
            return
        rate = max(0.0, (done - self._last[1]) / seconds)
        average = (done - self._first[1]) / (now - self._first[0])
        self._last = (now, done)
        logger.info(
            "%.1f of %.1f GB, %.0f MB/s, %s",
            done / _BYTES_PER_GB,
            self._total / _BYTES_PER_GB,
            rate / 1e6,
            _time_left(self._total - done, average),
        )


def _time_left(missing: int, rate: float) -> str:
    if rate <= 0:
        return "time left unknown"
    return f"{max(0, missing) / rate / 60:.0f} min left"


@contextmanager
def progress(total: int, done: int) -> Iterator[Show]:
    """Yield a function to call from one thread, about twice a second. `done` bytes are complete already."""
    if not sys.stderr.isatty():
        yield LogProgress(total, done).show
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with (
        logging_redirect_tqdm(),
        # Work that ends within a second shows no bar.
        tqdm(
            total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True, leave=False, delay=1
        ) as bar,
    ):

        def show(now: int) -> None:
            bar.update(now - bar.n)

        yield show
