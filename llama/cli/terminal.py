"""How a command reads, prints and ends on any terminal.

Knows signals and standard streams; knows nothing of commands.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

_UNDECODABLE = re.compile("[\\udc80-\\udcff]")


def end_by_exception_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the program as Ctrl-C does: everything that was started is ended on the way
    out. A signal that is ignored, as SIGHUP is under `nohup`, stays ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit_by_signal)


def _exit_by_signal(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def forgiving_streams() -> None:
    """Print what the terminal's encoding lacks as `?`, and read bytes that are no text as lone surrogates,
    which `undecodable` finds."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]


def undecodable(text: str) -> bool:
    """Whether a text of standard input had bytes that its encoding does not allow."""
    return _UNDECODABLE.search(text) is not None


def leave(code: int) -> NoReturn:
    """End the process at once. A thread may still be inside torch, whose own threads abort the process with a
    message of theirs when the interpreter takes them down."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
