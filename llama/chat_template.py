"""The dialogue format of a model that brings a chat template, encoded by its own fast tokenizer.

Token ids are those of transformers' `apply_chat_template`, except that a control word which a caller typed
stays text. Knows chat templates and the two ways in which fast tokenizers spell text (byte-level, and like
SentencePiece); knows nothing of Llama 2's tags.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.control_markers import PRIVATE, ControlMarkers, encode_text
from llama.detokenizer import Vocabulary
from llama.dialog import Dialog
from llama.errors import BadTokenizer, InvalidInput
from llama.form import read_object, without_byte_order_marks
from llama.template import Control, FormattedPrompt
from llama.tokenizer import Check, Segment, Tokenizer, characters, no_check, without_surrogates

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_LOOKS_LIKE_CONTROL = re.compile(r"[<\[|].*[>\]|]", re.DOTALL)


class ChatTemplateTokenizer(Tokenizer):
    """The format of a model that brings a chat template, encoded by that model's own tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises BadTokenizer when the vocabulary is spelt in a way that is not known here."""
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.vocabulary = _vocabulary(backend)
        self.text_size = 1 + max(backend.get_vocab(with_added_tokens=False).values())
        self._bos = (
            [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []
        )
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special = _control_words(tokenizer)
        self._special_word = re.compile(
            "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or r"(?!)"
        )
        self._markers = ControlMarkers(backend, self._special)
        added = backend.get_added_tokens_decoder().values()
        self._strips = any(token.lstrip or token.rstrip for token in added)

    def encode(self, prompt: Dialog | FormattedPrompt, check: Check = no_check) -> list[int]:
        if isinstance(prompt, FormattedPrompt):
            segments = list(self._formatted(prompt))
            check(self._characters(segments))
            return [*self._bos, *self._markers.encode(segments)]
        contents = (prompt.system, *prompt.turns)
        if not any(word in content for word in self._special for content in contents):
            rendered = self._rendered(prompt, {})
            check(self._characters(self._split(rendered, {}) if self._strips else [rendered]))
            ids = encode_text(self._backend, without_surrogates(rendered))
            if not self._has_more_controls(ids, rendered):
                return ids
        segments = list(self._segments(prompt))
        check(self._characters(segments))
        return self._markers.encode(segments)

    def _characters(self, segments: Iterable[Segment]) -> int:
        """Without the blanks around texts, if there are control words that swallow them."""
        return characters(s.strip() if self._strips and isinstance(s, str) else s for s in segments)

    def _has_more_controls(self, ids: Sequence[int], rendered: str) -> bool:
        """Whether text became control tokens, as when a normalizer turns full-width letters into a word."""
        controls = Counter(token_id for token_id in ids if token_id in self._markers.control_ids)
        return any(count > rendered.count(self._control_word(i)) for i, count in controls.items())

    def _segments(self, prompt: Dialog | FormattedPrompt) -> Iterator[Segment]:
        if isinstance(prompt, Dialog):
            return self._chat(prompt)
        return iter([*self._bos, *self._formatted(prompt)])

    def _formatted(self, prompt: FormattedPrompt) -> Iterator[Segment]:
        for part in prompt.parts:
            if isinstance(part, str):
                yield part
            else:
                yield from self._bos if part is Control.BOS else [self.eos_token_id]

    def _chat(self, dialog: Dialog) -> Iterator[Segment]:
        """Render the template, then tell its control words from the same words typed by a caller.

        Before rendering, each control word in a content is replaced by a private-use character that does not
        occur in the dialogue. It is restored after the rendered text has been split.
        """
        typed = set(dialog.system).union(*dialog.turns)
        free = (chr(code) for code in PRIVATE if chr(code) not in typed)
        hidden = dict(zip(self._special, free, strict=False))
        shown = {ord(private): word for word, private in hidden.items()}
        return self._split(self._rendered(dialog, hidden), shown)

    def _split(self, rendered: str, shown: dict[int, str]) -> Iterator[Segment]:
        """Control tokens, and the text between them with hidden words restored."""
        end = 0
        for match in self._special_word.finditer(rendered):
            if text := rendered[end : match.start()]:
                yield text.translate(shown)
            yield self._special[match[0]]
            end = match.end()
        if text := rendered[end:]:
            yield text.translate(shown)

    def _rendered(self, dialog: Dialog, hidden: dict[str, str]) -> str:
        """The template's text for a dialogue. `hidden`: what stands for a control word in a content.

        Raises InvalidInput when the template cannot render this dialogue.
        """
        roles = ["user", "assistant"] * len(dialog.turns)
        contents = list(dialog.turns)
        if dialog.begun_answer:
            contents[-1] = contents[-1].strip()
        if dialog.system.strip():
            roles, contents = ["system", *roles], [dialog.system, *contents]
        messages = [
            {"role": role, "content": self._hide(content, hidden) if hidden else content}
            for role, content in zip(roles, contents, strict=False)
        ]
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not dialog.begun_answer,
                continue_final_message=dialog.begun_answer,
            )
        # A template is a program, and may end in any error. Its text may quote the caller, so it is left out.
        except Exception as error:
            raise InvalidInput(
                f"this model's chat template cannot render {len(messages)} messages, the first of the role "
                f"{messages[0]['role']} ({type(error).__name__}); leave system_prompt blank, or send other "
                "messages"
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _hide(self, content: str, hidden: dict[str, str]) -> str:
        return self._special_word.sub(lambda match: hidden[match[0]], content)

    def _control_word(self, token_id: int) -> str:
        return str(self._tokenizer.added_tokens_decoder[token_id].content)


def load_chat_template_tokenizer(folder: Path) -> ChatTemplateTokenizer:
    """Raises BadTokenizer when the folder's tokenizer cannot be loaded, when it spells text in a way that is
    not known here, or when its chat template cannot render a message."""
    tokenizer = ChatTemplateTokenizer(_load_fast_tokenizer(folder))
    faults = [_template_fault(tokenizer, system) for system in ("", "Be brief.")]
    if all(faults):  # some templates demand a system message, and some refuse one
        raise BadTokenizer(f"the chat template in {folder} {faults[0]}; correct it, or copy the model's own")
    if faults[1]:
        logger.warning(
            "the chat template %s with a system message: callers must leave system_prompt blank", faults[1]
        )
    return tokenizer


def _template_fault(tokenizer: ChatTemplateTokenizer, system: str) -> str | None:
    """What is wrong with how a chat template renders one user message; None when it is right."""
    one, other = Dialog(system, ("Hello",)), Dialog(system, ("Why?",))
    try:
        if not tokenizer.encode(one):
            return "renders a user message as nothing"
        if tokenizer.render(one) == tokenizer.render(other):
            return "leaves out what the user says"
    except InvalidInput as error:
        line = getattr(error.__cause__, "lineno", None)
        return f"cannot render a user message ({error.__cause__}{f', line {line}' if line else ''})"
    return None


def _load_fast_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with without_byte_order_marks(folder) as clean:
            tokenizer = AutoTokenizer.from_pretrained(clean, local_files_only=True, trust_remote_code=False)
    # transformers and tokenizers raise many types here, bare Exception among them
    except Exception as error:
        if not (folder / "tokenizer.json").is_file():
            raise BadTokenizer(
                f"{folder} has a chat template but no tokenizer.json, without which it cannot be used; copy "
                "the model's tokenizer.json into the folder, or write one with transformers' save_pretrained"
            ) from error
        raise BadTokenizer(
            f"the tokenizer files in {folder} cannot be loaded ({type(error).__name__}: {error}); copy them "
            "again"
        ) from error
    if not tokenizer.is_fast:
        raise BadTokenizer(f"{folder} has no tokenizer.json; copy the model's into the folder")
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(_end_of_text(folder))
    if tokenizer.eos_token_id is None:
        raise BadTokenizer(
            f"the token that ends a text is not in {folder / 'tokenizer.json'}; correct eos_token_id"
        )
    return tokenizer


def _end_of_text(folder: Path) -> int:
    """The first id that ends an answer, for a tokenizer that names no token of its own."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        named = read_object(path).get("eos_token_id") if path.is_file() else None
        first = named[0] if isinstance(named, list) and named else named
        if type(first) is int:
            return first
    raise BadTokenizer(
        f"no file in {folder} names the token that ends a text; set eos_token in tokenizer_config.json"
    )


def _control_words(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids by word: special tokens, and added tokens that look like control words. Only the names differ from
    model to model: many add `<|user|>` without calling it special."""
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or _LOOKS_LIKE_CONTROL.search(token.content)
    }


def _vocabulary(backend: Backend) -> Vocabulary:
    """Raises BadTokenizer when the pieces are spelt in a way not known here."""
    decoder = json.dumps(json.loads(backend.to_str())["decoder"])
    byte_level = "ByteLevel" in decoder
    if not byte_level and "ByteFallback" not in decoder:
        raise BadTokenizer("tokenizer.json is neither byte-level nor SentencePiece-like; use another model")
    vocabulary, added = backend.get_vocab(), backend.get_added_tokens_decoder()
    pieces: list[str | bytes] = [b"" if byte_level else ""] * (max(vocabulary.values()) + 1)
    byte_of = _byte_of_character()
    try:
        for piece, token_id in vocabulary.items():
            if token_id in added:
                text = "" if added[token_id].special else added[token_id].content
                pieces[token_id] = text.encode() if byte_level else text
            elif byte_level:
                pieces[token_id] = bytes(byte_of[character] for character in piece)
            else:
                pieces[token_id] = _byte_fallback_piece(piece)
    except KeyError as error:
        raise BadTokenizer(f"tokenizer.json is not byte-level throughout ({error}); copy it again") from error
    return Vocabulary(pieces, sentencepiece=not byte_level)


def _byte_of_character() -> dict[str, int]:
    """How a byte-level vocabulary spells bytes as printable characters, read backwards."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _byte_fallback_piece(piece: str) -> str | bytes:
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(match[1], 16)]) if match else piece
