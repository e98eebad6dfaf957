"""The detokenizer: text decoded piece by piece equals the text decoded at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from chunks import in_chunks
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from small_models import LLAMA_2_TOKENIZER, VOCABULARY, needs_llama_2_tokenizer

from llama.text.detokenizer import Detokenizer
from llama.text.llama2_tokenizer import Llama2Tokenizer
from llama.text.vocabulary import Vocabulary

CUTS = st.lists(st.integers(1, 4), min_size=1)


def detokenize(vocabulary: Vocabulary, ids: list[int], cuts: list[int], **options: bool) -> str:
    detokenizer = Detokenizer(vocabulary, **options)
    return "".join(detokenizer.update(chunk) for chunk in in_chunks(ids, cuts)) + detokenizer.flush()


@pytest.fixture(scope="module")
def small(sentencepiece_model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(sentencepiece_model))


@pytest.fixture(scope="module")
def real() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(LLAMA_2_TOKENIZER / "tokenizer.model"))


def ids_with_many_bytes(vocabulary: int) -> st.SearchStrategy[list[int]]:
    """Any ids, with a high proportion of control and byte tokens."""
    return st.lists(st.one_of(st.integers(0, 2), st.integers(3, 258), st.integers(0, vocabulary - 1)))


@settings(max_examples=300, deadline=None)
@given(ids=ids_with_many_bytes(VOCABULARY), cuts=CUTS)
def test_any_ids_in_any_chunks_decode_as_by_sentencepiece(
    small: SentencePieceProcessor, ids: list[int], cuts: list[int]
) -> None:
    assert detokenize(Llama2Tokenizer(small).vocabulary, ids, cuts) == small.decode(ids)


@needs_llama_2_tokenizer
@settings(max_examples=150, deadline=None)
@given(ids=ids_with_many_bytes(32000), cuts=CUTS)
def test_any_ids_in_any_chunks_decode_as_by_sentencepiece_in_llama_2s_vocabulary(
    real: SentencePieceProcessor, ids: list[int], cuts: list[int]
) -> None:
    assert detokenize(real_vocabulary(real), ids, cuts) == real.decode(ids)


_VOCABULARIES: dict[int, Vocabulary] = {}


def real_vocabulary(processor: SentencePieceProcessor) -> Vocabulary:
    """Built once, because it has 32,000 pieces."""
    return _VOCABULARIES.setdefault(id(processor), Llama2Tokenizer(processor).vocabulary)


@settings(max_examples=300, deadline=None)
@given(text=st.text(), cuts=CUTS)
def test_any_text_is_encoded_and_decoded_without_loss(
    small: SentencePieceProcessor, text: str, cuts: list[int]
) -> None:
    assert detokenize(Llama2Tokenizer(small).vocabulary, small.encode(text), cuts) == text


@settings(max_examples=200, deadline=None)
@given(begun=st.text("ab \n🦙", min_size=1), rest=st.text("ab \n🦙"), cuts=CUTS)
def test_a_partial_answer_and_its_continuation_join_into_one_text(
    small: SentencePieceProcessor, begun: str, rest: str, cuts: list[int]
) -> None:
    ids, begun_ids = small.encode(begun + rest), small.encode(begun)
    if ids[: len(begun_ids)] == begun_ids:  # otherwise a token spans the boundary
        continued = detokenize(Llama2Tokenizer(small).vocabulary, ids[len(begun_ids) :], cuts, continues=True)
        assert begun + continued == begun + rest


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.binary(max_size=4)), cuts=CUTS)
def test_byte_level_pieces_in_any_chunks_decode_as_utf_8_with_replacement(
    pieces: list[bytes], cuts: list[int]
) -> None:
    vocabulary = Vocabulary(pieces, sentencepiece=False)
    text = detokenize(vocabulary, list(range(len(pieces))), cuts)
    assert text == b"".join(pieces).decode("utf-8", "replace")


def test_an_incomplete_character_is_held_back_until_its_last_byte() -> None:
    vocabulary = Vocabulary([b"ab", *(bytes([byte]) for byte in "🦙".encode()), b"c"], sentencepiece=False)
    detokenizer = Detokenizer(vocabulary)
    assert [detokenizer.update([i]) for i in range(4)] == ["ab", "", "", ""]
    assert detokenizer.update([4, 5, 0]) == "🦙cab"
    assert detokenizer.flush() == ""
