"""How many predictions a key may create per minute."""

from __future__ import annotations

import pytest

from llama.gateway.access.throttle import Throttle
from llama.gateway.problems import Problem
from llama.gateway.storage.keys import Key, KeyLimits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def allowed(throttle: Throttle, key: Key, attempts: int) -> int:
    """How many of some requests, made at the same time, are allowed."""
    count = 0
    for _ in range(attempts):
        try:
            throttle.check(key)
        except Problem:
            continue
        count += 1
    return count


def test_a_key_without_a_limit_is_never_throttled() -> None:
    assert allowed(Throttle(Clock()), Key(1, "free"), 1000) == 1000


def test_a_key_can_use_its_whole_minute_at_once_and_gains_requests_steadily() -> None:
    clock, key = Clock(), Key(1, "a", KeyLimits(requests_per_minute=6))
    throttle = Throttle(clock)
    assert allowed(throttle, key, 10) == 6
    clock.now += 9.9
    assert allowed(throttle, key, 10) == 0
    clock.now += 0.2
    assert allowed(throttle, key, 10) == 1
    clock.now += 3600
    assert allowed(throttle, key, 10) == 6


def test_keys_do_not_share_their_limits() -> None:
    throttle = Throttle(Clock())
    one, other = Key(1, "a", KeyLimits(requests_per_minute=2)), Key(2, "b", KeyLimits(requests_per_minute=3))
    assert (allowed(throttle, one, 5), allowed(throttle, other, 5)) == (2, 3)


def test_a_limit_that_was_lowered_counts_at_once() -> None:
    throttle = Throttle(Clock())
    throttle.check(Key(1, "a", KeyLimits(requests_per_minute=600)))
    assert allowed(throttle, Key(1, "a", KeyLimits(requests_per_minute=2)), 5) == 2


def test_the_problem_is_replicates_and_says_when_to_come_back() -> None:
    clock, key = Clock(), Key(1, "a", KeyLimits(requests_per_minute=6))
    throttle = Throttle(clock)
    assert allowed(throttle, key, 6) == 6
    clock.now += 1.5
    with pytest.raises(Problem) as raised:
        throttle.check(key)
    problem = raised.value
    assert problem.status == 429
    assert problem.for_replicate()["detail"] == "Request was throttled. Your rate limit resets in ~9s."
    assert problem.for_replicate()["retry_after"] == 9
    assert problem.headers == {"Retry-After": "9"}
    assert problem.for_openai()["error"]["code"] == "rate_limit_exceeded"
    clock.now += 9
    throttle.check(key)


def test_retry_after_is_at_most_a_minute() -> None:
    throttle, key = Throttle(Clock()), Key(1, "a", KeyLimits(requests_per_minute=1))
    throttle.check(key)
    with pytest.raises(Problem) as raised:
        throttle.check(key)
    assert raised.value.headers == {"Retry-After": "60"}
