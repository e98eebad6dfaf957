"""The number of threads, on machines that exist in the test only: their steps take as long as they say."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from llama.torch_engine.thread_count import ThreadCount


class Machine:
    """`seconds(threads, busy)`: a step. `busy`: other programs that want a core of their own."""

    def __init__(self, cores: int, seconds: Callable[[int, int], float]) -> None:
        self.now, self.busy, self.steps = 0.0, 0, 0
        self.seconds = seconds
        self.used = cores
        self.count = ThreadCount(cores, self.use, clock=lambda: self.now)
        self.random = random.Random(1)

    def use(self, count: int) -> None:
        self.used = count

    def run(self, seconds: float, shape: object = 1) -> float:
        """Steps a second, over so many seconds."""
        end, steps = self.now + seconds, 0
        while self.now < end:
            took = self.seconds(self.used, self.busy) * self.random.uniform(0.97, 1.03)
            self.now += took
            self.count.observe(shape, took)
            steps += 1
        return steps / seconds


def spinning(cores: int, work: float) -> Callable[[int, int], float]:
    """Threads share the work; all of them wait for one that has to share its core."""
    return lambda threads, busy: work / threads * (2.5 if threads + busy > cores else 1)


@pytest.mark.parametrize("work", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("cores", [2, 4, 8])
def test_a_busy_core_is_left_alone_and_taken_back(cores: int, work: float) -> None:
    machine = Machine(cores, spinning(cores, work))
    best, with_one_fewer = cores / work, (cores - 1) / work
    machine.run(2)
    assert machine.run(20) > 0.95 * best
    machine.busy = 1
    machine.run(2)
    assert machine.run(20) > 0.9 * with_one_fewer
    machine.busy = 0
    machine.run(2)
    assert machine.run(20) > 0.95 * best


def test_a_machine_that_is_busy_from_the_beginning_is_noticed() -> None:
    machine = Machine(2, spinning(2, 0.03))
    machine.busy = 1
    machine.run(2)
    assert machine.run(20) > 0.9 / 0.03


def test_several_busy_cores_are_left_alone_one_by_one() -> None:
    machine = Machine(8, spinning(8, 0.1))
    machine.run(5)
    machine.busy = 3
    machine.run(5)
    assert machine.run(20) > 0.85 * 5 / 0.1


def test_one_thread_stays_one() -> None:
    machine = Machine(1, lambda threads, busy: 0.01)
    machine.run(20)
    assert machine.used == 1


def test_a_trial_ends_with_the_steps_of_its_shape() -> None:
    machine = Machine(2, spinning(2, 0.02))
    for turn in range(200):  # every shape too short for a trial to be judged
        machine.run(0.03, shape=turn)
    machine.run(0.1, shape="last")
    assert machine.count.current == machine.used


def test_steps_that_do_not_gain_from_threads_may_have_any_number() -> None:
    machine = Machine(4, lambda threads, busy: 0.01)
    machine.run(60)
    assert 1 <= machine.used <= 4
