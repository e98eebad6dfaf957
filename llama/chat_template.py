"""The dialogue format of a model that brings a chat template, encoded by its own fast tokenizer.

Knows chat templates and the two ways in which fast tokenizers spell text (byte-level, and like
SentencePiece); knows nothing of Llama 2's tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.detokenizer import Vocabulary
from llama.dialog import Dialog
from llama.errors import BadTokenizer, InvalidInput
from llama.template import Control, FormattedPrompt
from llama.tokenizer import Segment, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatTemplateTokenizer(Tokenizer):
    """The format of a model that brings a chat template, encoded by that model's own tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.vocabulary = _fast_vocabulary(tokenizer)
        self._bos = (
            [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []
        )
        self._special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        words = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        self._special_word = re.compile(f"({words})")
        self._special_start = re.compile(f"(?=(?:{words}))(.)", re.DOTALL)

    def _segments(self, prompt: Dialog | FormattedPrompt) -> Iterator[Segment]:
        if isinstance(prompt, Dialog):
            yield from self._chat(prompt)
            return
        yield from self._bos
        for part in prompt.parts:
            if isinstance(part, str):
                yield part
            else:
                yield from self._bos if part is Control.BOS else [self.eos_token_id]

    def _chat(self, dialog: Dialog) -> Iterator[Segment]:
        """Render the template, then tell its control words from the same words typed by a caller.

        Before rendering, the first character of each control word in a content is exchanged for one
        of Unicode's private ones that occurs nowhere in the dialogue; after splitting, it is put back.
        """
        contents = [dialog.system, *dialog.turns] if dialog.system.strip() else [*dialog.turns]
        roles = ["user", "assistant"] * len(contents)
        roles = ["system", *roles] if dialog.system.strip() else roles
        typed = set("".join(contents))
        private = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in typed)
        hidden = {ord(word[0]): next(private) for word in self._special}
        shown = {ord(private): chr(first) for first, private in hidden.items()}

        def hide(content: str) -> str:
            return self._special_start.sub(lambda match: match[1].translate(hidden), content)

        messages = [
            {"role": role, "content": hide(content)} for role, content in zip(roles, contents, strict=False)
        ]
        if dialog.begun_answer:
            messages[-1]["content"] = messages[-1]["content"].strip()
        for index, piece in enumerate(self._special_word.split(self._render_template(messages, dialog))):
            if index % 2:
                yield self._special[piece]
            elif piece:
                yield piece.translate(shown)

    def _render_template(self, messages: list[dict[str, str]], dialog: Dialog) -> str:
        from jinja2 import TemplateError

        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not dialog.begun_answer,
                continue_final_message=dialog.begun_answer,
            )
        except TemplateError as error:
            raise InvalidInput(
                f"this model's chat template refuses a dialogue of {len(messages)} messages with these "
                "roles; leave the system prompt blank or begin anew"
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _encode_text(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded.input_ids)

    def _control_word(self, token_id: int) -> str:
        return str(self._tokenizer.added_tokens_decoder[token_id].content)


def load_chat_template_tokenizer(folder: Path) -> ChatTemplateTokenizer:
    """Raises BadTokenizer when the folder's tokenizer does not load or spells text in another way."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # transformers and tokenizers raise many types here, bare Exception among them
    except Exception as error:
        raise BadTokenizer(
            f"{folder} has a chat template and no tokenizer that loads ({type(error).__name__}); "
            "copy the tokenizer files again"
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise BadTokenizer(f"{folder} needs a tokenizer.json and an end-of-text token; add them")
    return ChatTemplateTokenizer(tokenizer)


def _fast_vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Raises BadTokenizer when the pieces are spelt in a way not known here."""
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    if "ByteLevel" not in decoder and "ByteFallback" not in decoder:
        raise BadTokenizer("tokenizer.json is neither byte-level nor SentencePiece-like; use another model")
    byte_level = "ByteLevel" in decoder
    added = tokenizer.added_tokens_decoder
    byte_of = _byte_of_character()
    pieces = list[str | bytes]()
    for token_id, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if token_id in added:
            text = "" if added[token_id].special else added[token_id].content
            pieces.append(text.encode() if byte_level else text)
        else:
            pieces.append(bytes(byte_of[c] for c in piece) if byte_level else _byte_fallback_piece(piece))
    return Vocabulary(pieces, sentencepiece=not byte_level)


def _byte_of_character() -> dict[str, int]:
    """How a byte-level vocabulary spells bytes as printable characters, read backwards."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _byte_fallback_piece(piece: str) -> str | bytes:
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(match[1], 16)]) if match else piece
