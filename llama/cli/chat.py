"""A talk with the model in a terminal: turns, editing, and what is dropped when the context is full.

Knows a terminal and dialogues; knows nothing of how a model is loaded.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from llama.cli.terminal import undecodable
from llama.errors import LlamaError, PromptTooLong

if TYPE_CHECKING:
    from llama.generation import Llama, Prediction

_GREETING = "Ask something. Enter sends it, Ctrl-C stops an answer, Ctrl-D or `exit` leaves."
_LEAVING = ("exit", "quit")
_WAITING, _ERASE = "...", "\r\x1b[K"


class Chat:
    """A dialogue in the making: `messages` are its turns so far, `inputs` the prediction's other inputs."""

    def __init__(self, llama: Llama, inputs: dict[str, Any]) -> None:
        self._llama, self._inputs = llama, inputs
        self.messages: list[dict[str, str]] = inputs["messages"] or []

    def run(self) -> None:
        """Talk until the input ends, or the user types `exit` or `quit`."""
        with suppress(ImportError):  # which edits lines, keeps a history and takes a pasted text as one
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")
        print(_GREETING, file=sys.stderr)
        logging.getLogger("llama").setLevel(logging.WARNING)  # not in the middle of the talk
        while (user := _ask()) is not None and user.strip() not in _LEAVING:
            if undecodable(user):
                print(f"that is not {sys.stdin.encoding} text; type it again", file=sys.stderr)
            elif user.strip():
                self._turn(user)

    def _turn(self, user: str) -> None:
        """Stream an answer. Ctrl-C ends it, and what was said stays said."""
        self.messages.append({"role": "user", "content": user})
        said = list[str]()
        try:
            prediction = self._prepare()
            with _keys_ignored():
                _print_stream(self._stream(prediction), said)
            if prediction.metrics.finish_reason == "length":
                print(_cut_notice(prediction), file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except LlamaError as error:
            print(error, file=sys.stderr)
        if said:
            self.messages.append({"role": "assistant", "content": "".join(said)})
        else:
            self.messages.pop()

    def _stream(self, prediction: Prediction) -> Iterator[str]:
        log = self._log if self._inputs["debug"] else lambda _: None
        return self._llama.stream_here(prediction, log)

    def _prepare(self) -> Prediction:
        while True:
            try:
                return self._llama.prepare({**self._inputs, "messages": self.messages})
            except PromptTooLong:
                if not self._drop_oldest():
                    raise

    def _drop_oldest(self) -> bool:
        """Drop the oldest question and its answer, so that the last turn fits; a system message stays."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        if len(self.messages) - first < 3:
            return False
        del self.messages[first : first + 2]
        print("(the context is full: the oldest question and answer are left out)", file=sys.stderr)
        return True

    def _log(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _cut_notice(prediction: Prediction) -> str:
    limit = prediction.params.maximum
    full = limit < prediction.request.params.maximum
    advice = "the context is full" if full else "`-i max_new_tokens=` allows more"
    return f"(cut after {limit} tokens; {advice})"


@contextmanager
def _keys_ignored() -> Iterator[None]:
    """Keys that are pressed inside are neither shown nor read later, except Ctrl-C."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
        yield
    finally:
        with suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
            termios.tcflush(keyboard, termios.TCIFLUSH)


def _ask() -> str | None:
    """The user's next turn; None at the end of input."""
    try:
        return input("> ").removeprefix("\ufeff")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _print_stream(pieces: Iterator[str], said: list[str]) -> None:
    """Print an answer as it comes; `said` has all of it that anyone has seen, however it ends."""
    waits = sys.stdout.isatty()
    if waits:
        print(_WAITING, end="", flush=True)
    try:
        for piece in pieces:
            said.append(piece)
            print(f"{_ERASE if waits else ''}{piece}", end="", flush=True)
            waits = False
    finally:
        if waits:
            print(_ERASE, end="", flush=True)
    print()
