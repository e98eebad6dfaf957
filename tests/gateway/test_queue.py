from __future__ import annotations

import pytest

from llama.gateway.dispatch.queue import FairQueue
from llama.gateway.prediction import Prediction, PredictionRequest
from llama.gateway.problems import Problem


def prediction(key_id: int) -> Prediction:
    return Prediction(PredictionRequest(key_id, {}, "owner/name"))


def taken(queue: FairQueue, *, not_keys: tuple[int, ...] = ()) -> list[int]:
    """The keys in the order in which the queue lets their predictions run."""
    keys = []
    while (found := queue.next(lambda key_id: key_id not in not_keys)) is not None:
        keys.append(found.request.key_id)
    return keys


def test_keys_take_turns_however_many_predictions_each_has() -> None:
    queue = FairQueue(100)
    for key_id in (1, 1, 1, 1, 2, 2, 3):
        queue.add(prediction(key_id))
    assert taken(queue) == [1, 2, 3, 1, 2, 1, 1]


def test_a_key_that_comes_late_does_not_wait_for_the_whole_queue_of_another() -> None:
    queue = FairQueue(100)
    for _ in range(10):
        queue.add(prediction(1))
    first = queue.next(lambda _: True)
    queue.add(prediction(2))
    assert first is not None
    assert taken(queue)[:3] == [1, 2, 1]


def test_predictions_of_one_key_keep_their_order() -> None:
    queue = FairQueue(100)
    waiting = [prediction(1) for _ in range(5)]
    for one in waiting:
        queue.add(one)
    assert [queue.next(lambda _: True) for _ in range(5)] == waiting


def test_a_prediction_that_lost_its_server_is_the_next_one() -> None:
    queue = FairQueue(100)
    for key_id in (1, 2):
        queue.add(prediction(key_id))
    lost = prediction(2)
    queue.add_first(lost)
    assert queue.next(lambda _: True) is lost


def test_a_key_at_its_limit_waits_while_others_go_on() -> None:
    queue = FairQueue(100)
    for key_id in (1, 2, 1, 2):
        queue.add(prediction(key_id))
    assert taken(queue, not_keys=(1,)) == [2, 2]
    assert len(queue) == 2
    assert taken(queue) == [1, 1]


def test_a_full_queue_of_one_key_refuses_only_that_key() -> None:
    queue = FairQueue(2)
    for _ in range(2):
        with queue.room_for(1):
            queue.add(prediction(1))
    with pytest.raises(Problem) as refused, queue.room_for(1):
        pass
    assert refused.value.status == 429
    assert 0 < int(refused.value.headers["Retry-After"]) <= 5
    with queue.room_for(2):
        queue.add(prediction(2))
    assert len(queue) == 3


def test_places_that_are_being_filled_count_as_full() -> None:
    queue = FairQueue(1)
    with queue.room_for(1), pytest.raises(Problem), queue.room_for(1):
        pass
    with queue.room_for(1):  # given back, because nothing was added
        pass


def test_a_cancelled_prediction_leaves_the_queue_once() -> None:
    queue = FairQueue(100)
    cancelled, other = prediction(1), prediction(1)
    queue.add(cancelled)
    queue.add(other)
    assert queue.remove(cancelled)
    assert not queue.remove(cancelled)
    assert queue.next(lambda _: True) is other
    assert queue.next(lambda _: True) is None
