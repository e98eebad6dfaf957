"""The number of threads, on simulated machines whose step times are given by a function."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from llama.torch_engine.thread_count import ThreadCount


class Machine:
    """A simulated machine. `seconds(threads, busy)` is the duration of a step, and `busy` the number of cores
    that other programs use."""

    def __init__(self, cores: int, seconds: Callable[[int, int], float]) -> None:
        self.now, self.busy, self.steps = 0.0, 0, 0
        self.seconds = seconds
        self.used = cores
        self.count = ThreadCount(cores, self.use, clock=lambda: self.now)
        self.random = random.Random(1)

    def use(self, count: int) -> None:
        self.used = count

    def run(self, seconds: float, shape: object = 1) -> float:
        """Run steps for so many seconds, and return the steps per second."""
        end, steps = self.now + seconds, 0
        while self.now < end:
            took = self.seconds(self.used, self.busy) * self.random.uniform(0.97, 1.03)
            self.now += took
            self.count.observe(shape, took)
            steps += 1
        return steps / seconds


def spinning(cores: int, work: float) -> Callable[[int, int], float]:
    """Return step times for threads that share the work, and that all wait for one that shares its core."""
    return lambda threads, busy: work / threads * (2.5 if threads + busy > cores else 1)


@pytest.mark.parametrize("work", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("cores", [2, 4, 8])
def test_a_busy_core_is_avoided_and_used_again_when_it_is_free(cores: int, work: float) -> None:
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


def test_a_core_that_is_busy_from_the_beginning_is_avoided() -> None:
    machine = Machine(2, spinning(2, 0.03))
    machine.busy = 1
    machine.run(2)
    assert machine.run(20) > 0.9 / 0.03


def test_several_busy_cores_are_avoided() -> None:
    machine = Machine(8, spinning(8, 0.1))
    machine.run(5)
    machine.busy = 3
    machine.run(5)
    assert machine.run(20) > 0.85 * 5 / 0.1


def test_all_threads_are_used_again_after_a_pause_and_a_busy_core_is_avoided_again() -> None:
    machine = Machine(2, spinning(2, 0.03))
    machine.busy = 1
    machine.run(5)
    assert machine.used == 1
    machine.count.start_over()
    assert machine.used == 2
    machine.run(1)
    assert machine.run(5) > 0.9 / 0.03


def test_one_thread_stays_one() -> None:
    machine = Machine(1, lambda threads, busy: 0.01)
    machine.run(20)
    assert machine.used == 1


def test_a_trial_ends_when_the_shape_of_the_steps_changes() -> None:
    machine = Machine(2, spinning(2, 0.02))
    for turn in range(200):  # every shape changes before its trial can end
        machine.run(0.03, shape=turn)
    machine.run(0.1, shape="last")
    assert machine.count.current == machine.used


def test_any_number_of_threads_is_allowed_if_steps_do_not_depend_on_it() -> None:
    machine = Machine(4, lambda threads, busy: 0.01)
    machine.run(60)
    assert 1 <= machine.used <= 4
