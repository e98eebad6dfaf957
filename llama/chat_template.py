"""The dialogue format of a model that brings a chat template, encoded by its own fast tokenizer.

Token ids are those of transformers' `apply_chat_template`, except that a control word which a caller typed
stays text. Knows chat templates and the two ways in which fast tokenizers spell text (byte-level, and like
SentencePiece); knows nothing of Llama 2's tags.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.detokenizer import Vocabulary
from llama.dialog import Dialog
from llama.errors import BadTokenizer, InvalidInput
from llama.form import without_byte_order_marks
from llama.template import Control, FormattedPrompt
from llama.tokenizer import Segment, Tokenizer, without_surrogates

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

_PRIVATE = range(0xF0000, 0xFFFFE)  # code points without a meaning


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
        self._markers = _Markers(backend, self._special)

    def encode(self, prompt: Dialog | FormattedPrompt) -> list[int]:
        if isinstance(prompt, FormattedPrompt):
            return [*self._bos, *self._markers.encode(self._formatted(prompt))]
        if not any(word in content for word in self._special for content in (prompt.system, *prompt.turns)):
            return _encode(self._backend, without_surrogates(self._rendered(prompt, {})))
        return self._markers.encode(self._segments(prompt))

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

        Before rendering, each control word in a content is exchanged for one private character that occurs
        nowhere in the dialogue; in what lies between the template's own control words it is put back.
        """
        typed = set(dialog.system).union(*dialog.turns)
        free = (chr(code) for code in _PRIVATE if chr(code) not in typed)
        hidden = dict(zip(self._special, free, strict=False))
        shown = {ord(private): word for word, private in hidden.items()}
        rendered = self._rendered(dialog, hidden)
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
                f"this model's chat template cannot render a dialogue of {len(messages)} messages with these "
                f"roles ({type(error).__name__}); send other messages, or leave the system prompt blank"
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _hide(self, content: str, hidden: dict[str, str]) -> str:
        return self._special_word.sub(lambda match: hidden[match[0]], content)

    def _control_word(self, token_id: int) -> str:
        return str(self._tokenizer.added_tokens_decoder[token_id].content)


class _Markers:
    """Encodes text in which the control tokens are given by id, so that all else is text.

    It has a copy of the tokenizer in which control words are ordinary text. A control token is written as a
    marker: random private characters, which no caller can guess, with the same rules about the white space
    around it. So everything is encoded as one string, as transformers does it.
    """

    def __init__(self, backend: Backend, special: dict[str, int]) -> None:
        from tokenizers import AddedToken

        added = backend.get_added_tokens_decoder()
        tokens = {i: added.get(i) or AddedToken(word, normalized=False) for word, i in special.items()}
        self._backend = copy.deepcopy(backend)
        # Only tokens that are known as special can be switched off.
        self._backend.add_special_tokens([*tokens.values()])
        self._backend.encode_special_tokens = True
        random = secrets.SystemRandom()
        self._marker = {i: "".join(map(chr, random.choices(_PRIVATE, k=8))) for i in tokens}
        self._backend.add_tokens(
            [
                AddedToken(
                    self._marker[i],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=False,
                )
                for i, token in tokens.items()
            ]
        )
        self._control_id = {self._backend.token_to_id(marker): i for i, marker in self._marker.items()}

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Raises InvalidInput when the tokenizer cannot tell a control token from text here."""
        segments = list(segments)
        text = "".join(self._marker[s] if isinstance(s, int) else without_surrogates(s) for s in segments)
        ids = [self._control_id.get(i, i) for i in _encode(self._backend, text)]
        if [i for i in ids if i in self._marker] != [s for s in segments if isinstance(s, int)]:
            raise InvalidInput(
                "the prompt contains control words of this model, and its tokenizer cannot encode them as "
                "text; leave them out"
            )
        return ids


def load_chat_template_tokenizer(folder: Path) -> ChatTemplateTokenizer:
    """Raises BadTokenizer when the folder's tokenizer cannot be loaded, when it spells text in a way that is
    not known here, or when its chat template cannot render a message."""
    tokenizer = ChatTemplateTokenizer(_load_fast_tokenizer(folder))
    try:
        fault = _template_fault(tokenizer, system="")
    except InvalidInput:  # some templates demand a system message
        try:
            fault = _template_fault(tokenizer, system="Be brief.")
        except InvalidInput as error:
            fault = f"cannot render a user message ({error.__cause__})"
    if fault is not None:
        raise BadTokenizer(f"the chat template in {folder} {fault}; copy the model's chat template again")
    return tokenizer


def _template_fault(tokenizer: ChatTemplateTokenizer, system: str) -> str | None:
    """Raises InvalidInput when the template cannot render a message."""
    one, other = Dialog(system, ("Hello",)), Dialog(system, ("Why?",))
    if not tokenizer.encode(one):
        return "renders a user message as nothing"
    if tokenizer.render(one) == tokenizer.render(other):
        return "leaves out what the user says"
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
                f"{folder} has a chat template but no tokenizer.json, which the template needs; copy the "
                "model's tokenizer.json into the folder, or write one with transformers' save_pretrained"
            ) from error
        raise BadTokenizer(
            f"the tokenizer files in {folder} cannot be loaded ({type(error).__name__}: {error}); copy them "
            "again"
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise BadTokenizer(f"{folder} needs a tokenizer.json and an end-of-text token; add them")
    return tokenizer


def _encode(backend: Backend, text: str) -> list[int]:
    # As a batch of one: `encode` would hold the interpreter's lock all the time (tokenizers 0.23).
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)
    return list(encoding.ids)


def _control_words(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids by word: special tokens, and those added tokens that the template writes as if they were."""
    template = str(tokenizer.chat_template)
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and not token.content.strip().isalnum())
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
