"""Renders Markdown in a process of its own, so that no text can slow down or stop the gateway.

The time to parse some texts grows with the square of their length, and a thread would take that time from the
event loop. The process is started for the first text. It ends when the gateway ends, and the system kills it
when a text takes too long.

This file is also the program of that process: `python -m llama.gateway.page.renderer`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from llama.gateway.page.markdown import html_of

MAX_CHARACTERS = 100_000
_SECONDS = 2.0
"""The processor time that one text may take. A usual answer takes a few hundredths of a second, but a list of
MAX_CHARACTERS takes almost one."""
_MAX_OF_ONE_OWNER = 8
"""A page sends one text at a time, but several people and tabs can share a key."""
_SECONDS_TO_END = 5.0
"""How long a process that has closed its output may take to end."""
_LENGTH = 4  # bytes, before each text in both directions
_FOLDER_OF_THE_PACKAGE = Path(__file__).parents[3]


class TooComplex(Exception):
    """The text takes too long to render."""


class TooManyTexts(Exception):
    """Too many texts of one owner are waiting."""


@dataclass
class _Texts:
    """The texts of one owner that wait or are being rendered."""

    count: int = 0
    one_by_one: asyncio.Lock = field(default_factory=asyncio.Lock)


class MarkdownRenderer:
    """A context manager that ends the process. Texts are rendered one after the other, and the owners take
    turns: otherwise, one of them could make all others wait."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._process: Process | None = None
        self._texts = dict[int, _Texts]()
        self._rendering = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with self._rendering:
            await self._stop()

    async def html_of(self, text: str, owner: int) -> str:
        """Return a text of at most MAX_CHARACTERS as HTML. `owner` is the id of a key.

        Raises TooComplex, and TooManyTexts if the owner has _MAX_OF_ONE_OWNER others that are not finished.
        """
        with self._counted(owner) as texts:
            async with texts.one_by_one, self._rendering:
                return await self._render(text)

    @contextmanager
    def _counted(self, owner: int) -> Iterator[_Texts]:
        texts = self._texts.setdefault(owner, _Texts())
        if texts.count >= _MAX_OF_ONE_OWNER:
            raise TooManyTexts
        texts.count += 1
        try:
            yield texts
        finally:
            texts.count -= 1
            if not texts.count:
                del self._texts[owner]

    async def _render(self, text: str) -> str:
        if self._process is None or self._process.returncode is not None:  # it may have been killed
            self._process = await self._start()
        try:
            return await _exchange(self._process, text)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if await self._stop(_SECONDS_TO_END) == -signal.SIGPROF:
                raise TooComplex from error
            raise RuntimeError("the process that renders Markdown has failed") from error
        except BaseException:  # otherwise the next call would read the rest of this answer
            await self._stop()
            raise

    async def _start(self) -> Process:
        command = (sys.executable, "-m", "llama.gateway.page.renderer", str(self._seconds))
        return await asyncio.create_subprocess_exec(
            *command,
            cwd=_FOLDER_OF_THE_PACKAGE,
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,  # an error could quote the text
            start_new_session=True,  # Ctrl-C is for the gateway
        )

    async def _stop(self, grace: float = 0.0) -> int | None:
        """End the process, if there is one, and return its exit code. It is killed after `grace` seconds. A
        process that is already ending needs some, because asyncio may miss its exit code if it is killed."""
        process, self._process = self._process, None
        if process is None:
            return None
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                return await process.wait()
        with suppress(ProcessLookupError):
            process.kill()
        return await process.wait()


async def _exchange(process: Process, text: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    content = text.encode()
    process.stdin.write(len(content).to_bytes(_LENGTH) + content)
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(_LENGTH))
    return (await process.stdout.readexactly(length)).decode()


def serve(texts: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """Render texts until the input ends. A text that takes more processor time ends the process."""
    while length := texts.read(_LENGTH):
        text = texts.read(int.from_bytes(length)).decode()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        content = html_of(text).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(len(content).to_bytes(_LENGTH) + content)
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
