"""The dialogue format of a model with its own chat template, encoded by the model's fast tokenizer.

The token ids equal those of transformers' `apply_chat_template`, except that control words in a caller's
text are encoded as text. Knows chat templates; knows nothing about Llama 2's tags or about files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from llama.errors import InvalidInput
from llama.prompt.dialog import Dialog
from llama.prompt.prompt_template import Control, FormattedPrompt
from llama.text.control_markers import PRIVATE, ControlMarkers, encode_text
from llama.text.tokenizer import Check, Segment, Tokenizer, characters, no_check, without_surrogates
from llama.text.vocabulary import read_fast_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]

_LOOKS_LIKE_CONTROL = re.compile(r"[<\[|].*[>\]|]", re.DOTALL)


class ChatTemplateTokenizer(Tokenizer):
    """A tokenizer that formats dialogues with the model's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises BadTokenizer if the vocabulary is neither byte-level nor SentencePiece-like."""
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.vocabulary = read_fast_vocabulary(backend)
        own = backend.get_vocab(with_added_tokens=False).values()
        self.text_size = 1 + max((i for i in own if self.vocabulary.pieces[i]), default=0)
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
        segments = list(self._chat(prompt))
        check(self._characters(segments))
        if not self._has_words(segments):
            rendered = "".join(self._control_word(s) if isinstance(s, int) else s for s in segments)
            ids = encode_text(self._backend, without_surrogates(rendered))
            if not self._has_more_controls(ids, segments):
                return ids
        return self._markers.encode(segments)

    def _characters(self, segments: Iterable[Segment]) -> int:
        """The number of characters of text in the segments.

        White space around a run of text does not count if control tokens may absorb it (`lstrip`, `rstrip`).
        """
        return characters(s.strip() if self._strips and isinstance(s, str) else s for s in segments)

    def _has_words(self, segments: Iterable[Segment]) -> bool:
        """Whether any text contains a control word, which must then be encoded as text."""
        return any(word in s for s in segments if isinstance(s, str) for word in self._special)

    def _has_more_controls(self, ids: Iterable[int], segments: Iterable[Segment]) -> bool:
        """Whether text was encoded as a control token.

        This happens if, for example, a normalizer turns full-width letters into a control word.
        """
        given = Counter(s for s in segments if isinstance(s, int))
        return bool(Counter(i for i in ids if i in self._markers.control_ids) - given)

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
        """Render the template and split the result into text and the template's own control tokens.

        To distinguish these tokens from the same words in a caller's text, the contents are masked: the first
        character of every control word is replaced by a private-use character that does not occur in the
        dialogue. Any control word in the rendered text was then written by the template.
        """
        messages = _messages(dialog)
        mask = _mask_for(messages, {word[0] for word in self._special})
        end, rendered = 0, self._masked(messages, mask) if mask else self._rendered(messages)
        for match in self._special_word.finditer(rendered):
            if text := rendered[end : match.start()]:
                yield _unmasked(text, mask)
            yield self._special[match[0]]
            end = match.end()
        if text := rendered[end:]:
            yield _unmasked(text, mask)

    def _masked(self, messages: list[Message], mask: Mapping[str, str]) -> str:
        """Render the template with masked contents.

        The contents of a role are left unmasked if masking them changes what the template renders.
        """
        plain = self._rendered(messages)

        def rendered(roles: Collection[str]) -> str | None:
            with suppress(InvalidInput):
                masked = self._rendered([_masked(m, mask) if m["role"] in roles else m for m in messages])
                return masked if _unmasked(masked, mask) == plain else None
            return None

        roles = {message["role"] for message in messages}
        if (masked := rendered(roles)) is not None:
            return masked
        # For example, a template that cuts answers at `</think>` must find that word in them.
        return rendered([role for role in roles if rendered([role]) is not None]) or plain

    def _rendered(self, messages: list[Message]) -> str:
        """Render the template. Raises InvalidInput if the template fails on these messages."""
        begun = messages[-1]["role"] == "assistant"
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
            )
        # A template is a program and can raise any error. The error's text may quote the caller, so omit it.
        except Exception as error:
            raise InvalidInput(
                "this model's chat template cannot render the dialogue (number of messages: "
                f"{len(messages)}, first role: {messages[0]['role']}, error: {type(error).__name__}); leave "
                "system_prompt blank, or change the messages"
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _control_word(self, token_id: int) -> str:
        return str(self._tokenizer.added_tokens_decoder[token_id].content)


def _messages(dialog: Dialog) -> list[Message]:
    """The dialogue in the format of transformers."""
    contents = list(dialog.turns)
    if dialog.begun_answer:
        contents[-1] = contents[-1].strip()
    roles = ["user", "assistant"] * len(contents)
    if dialog.system.strip():
        roles, contents = ["system", *roles], [dialog.system, *contents]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def _mask_for(messages: list[Message], characters: Collection[str]) -> dict[str, str]:
    """Map each of `characters` that occurs in the contents to a private-use character that does not.

    Raises InvalidInput if the contents already use every private-use character.
    """
    contents = [message["content"] for message in messages]
    free = (chr(code) for code in PRIVATE if not any(chr(code) in content for content in contents))
    mask = {}
    for character in characters:
        if any(character in content for content in contents):
            if (private := next(free, None)) is None:
                raise InvalidInput(
                    "the prompt contains every private-use character from U+F0000 to U+FFFFD; remove one"
                )
            mask[character] = private
    return mask


def _masked(message: Message, mask: Mapping[str, str]) -> Message:
    content = message["content"]
    for character, private in mask.items():
        content = content.replace(character, private)
    return {**message, "content": content}


def _unmasked(text: str, mask: Mapping[str, str]) -> str:
    for character, private in mask.items():
        text = text.replace(private, character)
    return text


def _control_words(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Token ids by control word: all special tokens, and added tokens that look like control words.

    Many models add tokens such as `<|user|>` without marking them as special.
    """
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or _LOOKS_LIKE_CONTROL.search(token.content)
    }
