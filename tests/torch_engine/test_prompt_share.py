"""How many prompt tokens a step reads, after given times for reading and decoding."""

from __future__ import annotations

import pytest

from llama.engine import PACE
from llama.torch_engine.prompt_share import PromptShare

MOST = 512


def measured(decode: float, per_token: float) -> PromptShare:
    """A share after a step that took `decode` seconds to decode, and `per_token` for each prompt token."""
    share = PromptShare(MOST)
    share.observe_decoding(decode)
    share.observe_reading(100, 100 * per_token)
    return share


def test_a_step_reads_the_most_tokens_if_no_answer_is_running_or_nothing_is_measured() -> None:
    assert measured(0.015, 0.0005).tokens(False, 1) == MOST
    share = PromptShare(MOST)
    assert share.tokens(True, 1) == MOST
    share.observe_decoding(0.015)
    assert share.tokens(True, 1) == MOST
    share.observe_reading(100, 0.05)
    assert share.tokens(True, 1) < MOST


@pytest.mark.parametrize(
    ("decode", "per_token", "tokens"),
    [
        (0.04, 0.0005, 120),
        (0.08, 0.0005, 240),  # slower decoding, or faster reading, makes the share larger
        (0.04, 0.00025, 240),
        (0.04, 0.1, 16),  # but a share is neither too small to be read quickly
        (10.0, 0.0005, MOST),  # nor larger than the step allows
    ],
)
def test_reading_takes_one_and_a_half_times_as_long_as_decoding(
    decode: float, per_token: float, tokens: int
) -> None:
    assert measured(decode, per_token).tokens(True, 1) == tokens


def test_a_step_that_is_faster_than_a_stream_may_become_as_long_as_the_pace_of_a_stream() -> None:
    per_token = PACE / 100
    assert measured(PACE / 2, per_token).tokens(True, 1) == measured(PACE, per_token).tokens(True, 1) == 150
    assert measured(PACE * 2, per_token).tokens(True, 1) == 300


def test_more_requests_without_a_first_token_get_a_larger_share() -> None:
    share = measured(0.04, 0.0005)
    assert [share.tokens(True, unread) for unread in (1, 2, 3, 32)] == [120, 480, MOST, MOST]


def test_the_share_follows_the_speed_of_the_machine() -> None:
    share = measured(0.04, 0.0005)
    shares = []
    for _ in range(30):
        share.observe_decoding(0.08)
        shares.append(share.tokens(True, 1))
    assert shares == sorted(shares)
    assert 120 < shares[0] < 180  # a single slow step changes little
    assert shares[-1] in (239, 240)
