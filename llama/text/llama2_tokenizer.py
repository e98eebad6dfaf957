"""Llama 2's dialogue format, encoded with SentencePiece as in Meta's reference code.

Knows how Llama 2's tags format a dialogue; knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llama.prompt.dialog import B_INST, B_SYS, E_INST, E_SYS, Dialog
from llama.prompt.prompt_template import Control, FormattedPrompt
from llama.text.tokenizer import Check, Segment, Tokenizer, characters, no_check, without_surrogates
from llama.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class Llama2Tokenizer(Tokenizer):
    """Llama 2's dialogue format: each exchange is encoded separately, between BOS and EOS.

    Source: `chat_completion` in Meta's reference code (llama/generation.py).
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
            elif start + 1 < len(turns):  # a partial answer has no space and no EOS after it
                yield f"{user} {turns[start + 1].strip()}"
            else:
                yield user

    def _encode_text(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def _control_word(self, token_id: int) -> str:
        return str(self._processor.id_to_piece(token_id))


def _sentencepiece_piece(processor: SentencePieceProcessor, token_id: int) -> str | bytes:
    if processor.is_control(token_id) or processor.is_unused(token_id):
        return ""
    if processor.is_unknown(token_id):
        return str(processor.decode([token_id]))
    piece = str(processor.id_to_piece(token_id))
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(token_id) else piece
