"""How a command reads, prints and ends, on any terminal and in any pipe.

Knows signals, standard streams, colours and exit codes; knows nothing about what the commands do.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import NoReturn, ParamSpec

import typer

from llama.errors import InvalidInput, LlamaError

P = ParamSpec("P")

_UNDECODABLE = re.compile("[\\udc80-\\udcff]")
_OUTPUT_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def command(function: Callable[P, int | None]) -> Callable[P, NoReturn]:
    """Turn a function into a typer command. Its result, or the error that ended it, becomes the exit code:
    1 for an error, which is printed on one line, and 128 + N for signal N."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> NoReturn:
        raise typer.Exit(exit_code(lambda: function(*args, **kwargs)))

    return run


def exit_code(function: Callable[[], int | None]) -> int:
    """Call a function and return the exit code that its result, or the error that ended it, stands for."""
    try:
        code = function() or 0
        sys.stdout.flush()
    except SystemExit as end:  # from typer, or a signal
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except LlamaError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OSError as error:
        if isinstance(error.__context__, SystemExit):  # a signal that also closed the terminal
            return int(error.__context__.code or 0)
        if error.errno not in _OUTPUT_FAULTS:
            raise
        return fail(
            f"the output cannot be written ({error.strerror}); free some disk space or write it elsewhere"
        )
    return code


def fail(message: str) -> int:
    """Print an error on stderr, with its code in colour if stderr is a terminal. Returns the exit code 1."""
    from rich.console import Console
    from rich.text import Text

    line = Text(message)
    line.highlight_regex(r"^E\d{4} \w+:", "bold red")
    with suppress(OSError):  # there is nowhere else to report it
        Console(stderr=True).print(line, soft_wrap=True)
    return 1


def end_by_exception_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, so that the program cleans up as it does after Ctrl-C.
    Signals that are ignored, such as SIGHUP under `nohup`, stay ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by __main__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit_by_signal)


def _exit_by_signal(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def forgiving_streams() -> None:
    """Print characters that the terminal's encoding lacks as `?`. Read undecodable bytes as lone surrogates,
    which `undecodable` finds. What is printed to a closed stream is discarded."""
    for number in range(3):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, so that no other file gets it
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]


def undecodable(text: str) -> bool:
    """Whether text from standard input or an argument had bytes that its encoding does not allow."""
    return _UNDECODABLE.search(text) is not None


def decoded(text: str, what: str, encoding: str = sys.getfilesystemencoding()) -> str:
    """Return a text unchanged. Raises InvalidInput if it could not be decoded; `what` names it. The default
    encoding is that of the arguments."""
    if undecodable(text):
        raise InvalidInput(f"{what} is not valid {encoding}; convert it and try again")
    return text


def print_table(rows: Sequence[Sequence[str]], numbers_from: int | None = None) -> None:
    """Print rows of equal length. Columns from `numbers_from` on are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if numbers_from is not None and index >= numbers_from else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def leave(code: int) -> NoReturn:
    """End the process at once. A normal exit would tear down the interpreter while a thread may still run
    inside torch, whose own threads then abort the process with a message."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 1
    os._exit(code)
