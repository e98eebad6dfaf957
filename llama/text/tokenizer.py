"""Token ids of a prompt, exactly as the model was trained on them.

Two formats: Llama 2's, here, by SentencePiece as in Meta's reference; and that of a model that brings
a chat template of its own (`chat_template.py`). In both, text never becomes a control token. Knows how
a dialogue is spelt; knows nothing of sampling, engines or weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama.errors import BadTokenizer
from llama.prompt.dialog import B_INST, B_SYS, E_INST, E_SYS, Dialog
from llama.prompt.prompt_template import Control, FormattedPrompt
from llama.text.detokenizer import Vocabulary
from llama.weights.file_checks import read_object

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Segment = str | int
"""A run of text to be encoded, or the id of a control token."""


Check = Callable[[int], object]


def no_check(_: int) -> None:
    """Of any length."""


def characters(segments: Iterable[Segment]) -> int:
    """Length of the text in segments."""
    return sum(len(segment) for segment in segments if isinstance(segment, str))


class Tokenizer(ABC):
    """A vocabulary and the dialogue format that goes with it."""

    vocabulary: Vocabulary
    text_size: int
    """Ids from here on are control tokens, or words that were added to the vocabulary."""
    eos_token_id: int

    @property
    def size(self) -> int:
        """Number of token ids."""
        return len(self.vocabulary.pieces)

    @property
    def longest_piece(self) -> int:
        """Characters of the longest token: more text than this a token cannot stand for."""
        return max(map(len, self.vocabulary.pieces))

    def restrict(self, size: int) -> None:
        """Forget the ids from `size` on, which the model cannot read."""
        self.vocabulary = replace(self.vocabulary, pieces=self.vocabulary.pieces[:size])

    @abstractmethod
    def encode(self, prompt: Dialog | FormattedPrompt, check: Check = no_check) -> list[int]:
        """The token ids that the model is given. `check` is called with the number of characters that are to
        be encoded, and may raise before they are."""

    def render(self, prompt: Dialog | FormattedPrompt) -> str:
        """What is encoded, as text for people: control tokens are shown as words."""
        return "".join(
            self._control_word(segment) if isinstance(segment, int) else segment
            for segment in self._segments(prompt)
        )

    @abstractmethod
    def _segments(self, prompt: Dialog | FormattedPrompt) -> Iterator[Segment]: ...

    @abstractmethod
    def _control_word(self, token_id: int) -> str: ...


class LlamaTokenizer(Tokenizer):
    """Llama 2's format: every exchange encoded on its own, between BOS and EOS.

    Source: `chat_completion` in Meta's reference (llama/generation.py).
    """

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._processor = processor
        self.eos_token_id = processor.eos_id()
        self.vocabulary = Vocabulary(
            [_sentencepiece_piece(processor, i) for i in range(processor.vocab_size())], sentencepiece=True
        )
        self.text_size = 1 + max((i for i, piece in enumerate(self.vocabulary.pieces) if piece), default=0)

    def encode(self, prompt: Dialog | FormattedPrompt, check: Check = no_check) -> list[int]:
        segments = list(self._segments(prompt))
        check(characters(segments))
        ids = list[int]()
        for segment in segments:
            ids += [segment] if isinstance(segment, int) else self._encode_text(without_surrogates(segment))
        return ids

    def _segments(self, prompt: Dialog | FormattedPrompt) -> Iterator[Segment]:
        bos, eos = self._processor.bos_id(), self.eos_token_id
        if isinstance(prompt, FormattedPrompt):
            yield bos
            for part in prompt.parts:
                yield part if isinstance(part, str) else {Control.BOS: bos, Control.EOS: eos}[part]
            return
        turns = [*prompt.turns]
        if prompt.system.strip():
            turns[0] = f"{B_SYS}\n{prompt.system}\n{E_SYS}\n\n{turns[0]}"
        for start in range(0, len(turns), 2):
            user = f"{B_INST} {turns[start].strip()} {E_INST}"
            yield bos
            if start + 2 < len(turns):
                yield f"{user} {turns[start + 1].strip()} "
                yield eos
            elif start + 1 < len(turns):  # a begun answer: no EOS and no space after it
                yield f"{user} {turns[start + 1].strip()}"
            else:
                yield user

    def _encode_text(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def _control_word(self, token_id: int) -> str:
        return str(self._processor.id_to_piece(token_id))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder, with the format that the model was trained on.

    Raises BadTokenizer when there is none, it is damaged, or it has no dialogue format known here.
    """
    template = _chat_template(folder)
    if template is not None and B_SYS not in template:
        from llama.text.chat_template import load_chat_template_tokenizer

        return load_chat_template_tokenizer(folder)
    path = next(
        (folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()), None
    )
    if path is None:
        raise BadTokenizer(
            f"{folder / 'tokenizer.model'} is not there, and neither is tokenizer.json; copy the model's "
            "tokenizer files into the folder"
        )
    processor = _load_sentencepiece(path)
    if [processor.id_to_piece(i) for i in range(4)] != ["<unk>", "<s>", "</s>", "<0x00>"]:
        raise BadTokenizer(
            f"{path} is not a Llama 2 vocabulary and the folder has no chat template of another format; "
            "add the chat template that the model was trained on"
        )
    return LlamaTokenizer(processor)


def _chat_template(folder: Path) -> str | None:
    """The chat template that transformers would render: of several the one called default, and "" if there is
    none of that name. None for a folder without templates."""
    try:
        if (path := folder / "chat_template.jinja").is_file():
            return path.read_text(encoding="utf-8-sig")
        if (path := folder / "additional_chat_templates").is_dir() and any(path.glob("*.jinja")):
            return ""
    except (OSError, ValueError) as error:
        raise BadTokenizer(f"{path} cannot be read ({error}); copy it again") from error
    path = folder / "tokenizer_config.json"
    template = read_object(path, BadTokenizer).get("chat_template") if path.is_file() else None
    if isinstance(template, dict):
        template = template.get("default", "")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else ""
    if not isinstance(template, str | None):
        raise BadTokenizer(f"{path} has no text as chat_template; copy it again")
    return template


def _load_sentencepiece(path: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    from llama.text.sentencepiece_model import from_tokenizer_json

    try:
        if path.suffix == ".json":
            return SentencePieceProcessor(model_proto=from_tokenizer_json(path))
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise BadTokenizer(f"{path} is not a SentencePiece model; copy it again") from error


def _sentencepiece_piece(processor: SentencePieceProcessor, token_id: int) -> str | bytes:
    if processor.is_control(token_id) or processor.is_unused(token_id):
        return ""
    if processor.is_unknown(token_id):
        return str(processor.decode([token_id]))
    piece = str(processor.id_to_piece(token_id))
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(token_id) else piece


def without_surrogates(text: str) -> str:
    """Halves of UTF-16 pairs, which JSON can carry and no tokenizer takes, become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
