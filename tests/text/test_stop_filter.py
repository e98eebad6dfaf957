"""The stop filter, compared with a naive search."""

from __future__ import annotations

from chunks import in_chunks
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.stop_filter import StopFilter

CUTS = st.lists(st.integers(1, 4), min_size=1)


def cut_at_first_stop(text: str, stops: list[str], exempt: int = 0) -> str:
    """A naive implementation: cut at the stop sequence that ends first, and at the longest of those that end
    together. Stop sequences that end within the first `exempt` characters have no effect."""
    for end in range(exempt + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


ALPHABET = st.text("abc", max_size=40)


@settings(max_examples=500, deadline=None)
@given(text=ALPHABET, stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=5), cuts=CUTS)
def test_text_in_any_chunks_is_cut_at_the_first_stop_sequence(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    filter_ = StopFilter(stops)
    pieces = [filter_.update(chunk) for chunk in in_chunks(text, cuts)]
    whole = "".join(pieces) + filter_.flush()
    assert whole == cut_at_first_stop(text, stops)
    assert filter_.stopped == any(stop in text for stop in stops)
    # Nothing of the stop sequence was returned at any time, not even a part.
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
    pieces = [filter_.update(chunk, may_stop=False) for chunk in in_chunks(exempt, cuts)]
    assert not filter_.stopped
    pieces += [filter_.update(chunk) for chunk in in_chunks(text, cuts)]
    whole = "".join(pieces) + filter_.flush()
    assert whole == cut_at_first_stop(exempt + text, stops, len(exempt))
    assert whole.startswith("".join(pieces))


def test_only_text_that_may_become_a_stop_sequence_is_held_back() -> None:
    filter_ = StopFilter(["</answer>", "STOP"])
    assert [filter_.update(text) for text in ("one <", "/ans", "wer two", " ST", "ART")] == [
        "one ",
        "",
        "</answer two",
        " ",
        "START",
    ]


def test_a_flush_resets_a_partial_match() -> None:
    filter_ = StopFilter(["ab"])
    assert filter_.update("ab", may_stop=False) == "ab"
    assert filter_.update("a") + filter_.flush() + filter_.update("b") == "ab"


def test_nothing_is_returned_after_a_stop_sequence() -> None:
    filter_ = StopFilter(["x"])
    assert filter_.update("axb") + filter_.update("cd") + filter_.flush() == "a"


def test_ten_thousand_stop_sequences_are_matched_in_one_pass() -> None:
    filter_ = StopFilter([f"stop number {i}!" for i in range(10_000)])
    assert filter_.update("stop number 99" * 1000) == "stop number 99" * 999
    assert filter_.update("99! more") + filter_.flush() == ""
    assert filter_.stopped
