"""Text piece by piece equals the text decoded at once; stop sequences are cut wherever pieces are."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import LLAMA_2_TOKENIZER, VOCABULARY, needs_llama_2_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from llama.text.detokenizer import Detokenizer
from llama.text.llama2_tokenizer import Llama2Tokenizer
from llama.text.stop_filter import StopFilter
from llama.text.vocabulary import Vocabulary

CUTS = st.lists(st.integers(1, 4), min_size=1)


def in_chunks(items: list[int] | str, cuts: list[int]) -> list[list[int] | str]:
    chunks, start, turn = [], 0, 0
    while start < len(items):
        end = start + cuts[turn % len(cuts)]
        chunks.append(items[start:end])
        start, turn = end, turn + 1
    return chunks


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
    """Any ids, with control and byte tokens far more often than chance would have them."""
    return st.lists(st.one_of(st.integers(0, 2), st.integers(3, 258), st.integers(0, vocabulary - 1)))


@settings(max_examples=300, deadline=None)
@given(ids=ids_with_many_bytes(VOCABULARY), cuts=CUTS)
def test_any_ids_cut_anywhere_give_sentencepieces_text(
    small: SentencePieceProcessor, ids: list[int], cuts: list[int]
) -> None:
    assert detokenize(Llama2Tokenizer(small).vocabulary, ids, cuts) == small.decode(ids)


@needs_llama_2_tokenizer
@settings(max_examples=150, deadline=None)
@given(ids=ids_with_many_bytes(32000), cuts=CUTS)
def test_any_ids_cut_anywhere_give_sentencepieces_text_in_llama_2s_vocabulary(
    real: SentencePieceProcessor, ids: list[int], cuts: list[int]
) -> None:
    assert detokenize(real_vocabulary(real), ids, cuts) == real.decode(ids)


_VOCABULARIES: dict[int, Vocabulary] = {}


def real_vocabulary(processor: SentencePieceProcessor) -> Vocabulary:
    """Made once: it has 32,000 pieces."""
    return _VOCABULARIES.setdefault(id(processor), Llama2Tokenizer(processor).vocabulary)


@settings(max_examples=300, deadline=None)
@given(text=st.text(), cuts=CUTS)
def test_any_text_comes_back(small: SentencePieceProcessor, text: str, cuts: list[int]) -> None:
    assert detokenize(Llama2Tokenizer(small).vocabulary, small.encode(text), cuts) == text


@settings(max_examples=200, deadline=None)
@given(begun=st.text("ab \n🦙", min_size=1), rest=st.text("ab \n🦙"), cuts=CUTS)
def test_a_begun_answer_and_its_continuation_read_as_one_text(
    small: SentencePieceProcessor, begun: str, rest: str, cuts: list[int]
) -> None:
    ids, begun_ids = small.encode(begun + rest), small.encode(begun)
    if ids[: len(begun_ids)] == begun_ids:  # else the tokens of the whole are cut elsewhere
        continued = detokenize(Llama2Tokenizer(small).vocabulary, ids[len(begun_ids) :], cuts, continues=True)
        assert begun + continued == begun + rest


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.binary(max_size=4)), cuts=CUTS)
def test_byte_level_pieces_cut_anywhere_are_utf_8_with_replacement(
    pieces: list[bytes], cuts: list[int]
) -> None:
    vocabulary = Vocabulary(pieces, sentencepiece=False)
    text = detokenize(vocabulary, list(range(len(pieces))), cuts)
    assert text == b"".join(pieces).decode("utf-8", "replace")


def test_a_character_waits_for_its_last_byte_and_what_is_ready_goes_out_together() -> None:
    vocabulary = Vocabulary([b"ab", *(bytes([byte]) for byte in "🦙".encode()), b"c"], sentencepiece=False)
    detokenizer = Detokenizer(vocabulary)
    assert [detokenizer.update([i]) for i in range(4)] == ["ab", "", "", ""]
    assert detokenizer.update([4, 5, 0]) == "🦙cab"
    assert detokenizer.flush() == ""


def cut_at_first_stop(text: str, stops: list[str], exempt: int = 0) -> str:
    """The plain rule: the sequence that ends first, the longest of those that end together. What ends within
    the first `exempt` characters has no effect."""
    for end in range(exempt + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


ALPHABET = st.text("abc", max_size=40)


@settings(max_examples=500, deadline=None)
@given(text=ALPHABET, stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=5), cuts=CUTS)
def test_the_first_stop_sequence_cuts_the_text_in_any_split(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    filter_ = StopFilter(stops)
    pieces = [filter_.update(str(chunk)) for chunk in in_chunks(text, cuts)]
    whole = "".join(pieces) + filter_.flush()
    assert whole == cut_at_first_stop(text, stops)
    assert filter_.stopped == any(stop in text for stop in stops)
    # At no moment had more been handed out than the end allows: nothing leaks, not even a part.
    assert whole.startswith("".join(pieces))


@settings(max_examples=500, deadline=None)
@given(
    exempt=ALPHABET,
    text=ALPHABET,
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=5),
    cuts=CUTS,
)
def test_a_stop_sequence_that_ends_in_exempt_text_has_no_effect(
    exempt: str, text: str, stops: list[str], cuts: list[int]
) -> None:
    filter_ = StopFilter(stops)
    pieces = [filter_.update(str(chunk), may_stop=False) for chunk in in_chunks(exempt, cuts)]
    assert not filter_.stopped
    pieces += [filter_.update(str(chunk)) for chunk in in_chunks(text, cuts)]
    whole = "".join(pieces) + filter_.flush()
    assert whole == cut_at_first_stop(exempt + text, stops, len(exempt))
    assert whole.startswith("".join(pieces))


def test_no_more_is_held_back_than_may_become_a_stop_sequence() -> None:
    filter_ = StopFilter(["</answer>", "STOP"])
    assert [filter_.update(text) for text in ("one <", "/ans", "wer two", " ST", "ART")] == [
        "one ",
        "",
        "</answer two",
        " ",
        "START",
    ]


def test_a_flush_in_the_middle_forgets_what_was_begun() -> None:
    filter_ = StopFilter(["ab"])
    assert filter_.update("ab", may_stop=False) == "ab"
    assert filter_.update("a") + filter_.flush() + filter_.update("b") == "ab"


def test_nothing_comes_after_a_stop_sequence() -> None:
    filter_ = StopFilter(["x"])
    assert filter_.update("axb") + filter_.update("cd") + filter_.flush() == "a"


def test_ten_thousand_stop_sequences_are_one_pass() -> None:
    filter_ = StopFilter([f"stop number {i}!" for i in range(10_000)])
    assert filter_.update("stop number 99" * 1000) == "stop number 99" * 999
    assert filter_.update("99! more") + filter_.flush() == ""
    assert filter_.stopped
