"""The command `chat`: a dialogue with the model in a terminal.

Knows how a terminal edits lines, which turns the dialogue has so far, and which turns to drop when the
context is full.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from llama.cli.inputs import InputOptions, check_inputs, read_inputs
from llama.cli.loading import load_with_notice
from llama.cli.terminal import command, fail, undecodable
from llama.errors import LlamaError, PromptRequired, PromptTooLong

if TYPE_CHECKING:
    from llama.generation import Llama, Prediction

_GREETING = "Type a message and press Enter. Ctrl-C stops an answer; Ctrl-D or `exit` ends the chat."
_EXIT_WORDS = ("exit", "quit")
_WAITING, _ERASE = "...", "\r\x1b[K"


@command
def chat(inputs: InputOptions = None) -> None:
    """Chat with the model. Ctrl-C stops an answer; Ctrl-D or `exit` ends the chat.

    A custom prompt_template cannot be used in a chat; use `complete` for one.
    """
    values = read_inputs(inputs)
    if sys.stdin is None:
        raise PromptRequired(
            "standard input is closed; run chat in a terminal, or use `complete` with a prompt as its "
            "argument"
        )
    check_inputs({**values, "messages": [*(values["messages"] or []), {"role": "user", "content": "Hi!"}]})
    llama = load_with_notice()
    try:
        Chat(llama, values).run()
    finally:
        llama.close()


class Chat:
    """A dialogue in progress: `messages` are its turns so far, `inputs` are the other inputs of every
    prediction."""

    def __init__(self, llama: Llama, inputs: dict[str, Any]) -> None:
        self._llama, self._inputs = llama, inputs
        self.messages: list[dict[str, str]] = inputs["messages"] or []

    def run(self) -> None:
        """Answer message after message until the input ends or the user types `exit` or `quit`."""
        with suppress(ImportError):  # readline edits lines, keeps a history and accepts pasted newlines
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")
        print(_GREETING, file=sys.stderr)
        logging.getLogger("llama").setLevel(logging.WARNING)  # no log lines between turns
        while (user := _ask()) is not None and user.strip() not in _EXIT_WORDS:
            if undecodable(user):
                print(f"the message is not valid {sys.stdin.encoding}; type it again", file=sys.stderr)
            elif user.strip():
                self._turn(user)

    def _turn(self, user: str) -> None:
        """Stream an answer. Ctrl-C ends it, and the text so far stays in the dialogue."""
        self.messages.append({"role": "user", "content": user})
        printed, log = list[str](), list[str]()
        try:
            prediction = self._prepare()
            with _keys_ignored():
                _print_stream(self._llama.stream_here(prediction, log.append), printed)
            if prediction.metrics.finish_reason == "length":
                print(_cut_notice(prediction), file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except LlamaError as error:
            fail(str(error))
        if self._inputs["debug"] or self._inputs["log_performance_metrics"]:
            print(*log, sep="\n", file=sys.stderr)
        if printed:
            self.messages.append({"role": "assistant", "content": "".join(printed)})
        else:
            self.messages.pop()

    def _prepare(self) -> Prediction:
        while True:
            try:
                return self._llama.prepare({**self._inputs, "messages": self.messages})
            except PromptTooLong:
                if not self._drop_oldest():
                    raise

    def _drop_oldest(self) -> bool:
        """Drop the oldest user message and its answer, but never the system message or the last user message.
        Returns False if there is nothing to drop."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        if len(self.messages) - first < 3:
            return False
        del self.messages[first : first + 2]
        print("(the context is full: the oldest message and its answer were dropped)", file=sys.stderr)
        return True


def _cut_notice(prediction: Prediction) -> str:
    limit = prediction.params.maximum
    full = limit < prediction.request.params.maximum
    reason = "the context is full" if full else "raise the limit with `-i max_new_tokens=N`"
    return f"(the answer was cut after {limit} tokens; {reason})"


@contextmanager
def _keys_ignored() -> Iterator[None]:
    """Inside the block, do not echo keys that are pressed; at its end, discard them. Ctrl-C still works."""
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
    """The user's next message, or None at the end of the input."""
    try:
        return input("> ").removeprefix("\ufeff")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _print_stream(pieces: Iterator[str], printed: list[str]) -> None:
    """Print an answer piece by piece, and append every printed piece to `printed`, even if the stream ends
    with an exception. On a terminal, dots are shown until the first piece arrives."""
    waiting = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if waiting:
        print(_WAITING, end="", flush=True)
    try:
        for piece in pieces:
            printed.append(piece)
            print(f"{_ERASE if waiting else ''}{piece}", end="", flush=True)
            waiting = False
    finally:
        if waiting:
            print(_ERASE, end="", flush=True)
    print()
