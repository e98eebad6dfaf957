"""Choose the number of threads for decode steps on a CPU that other programs use too.

OpenMP's threads wait for each other by spinning. On an idle machine, that is fastest. But if another program
takes one of their cores, all threads wait for the one that lost its core, and a step takes several times as
long. With one thread fewer, no thread waits. The number is found by trial: from time to time, a few steps run
with one thread more or fewer, and the new number stays if steps of the same shape are faster.

Knows step times and numbers of threads; knows nothing about models or tensors.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

_RECENT = 8  # the current speed is the mean over this many steps
_TRIAL = 4  # steps in a trial, unless the first ones are clearly slower
_FASTER = 0.95  # a new number is kept if a step takes less than this fraction of the time before
_DEGRADED = 1.25  # if steps become slower than the best mean by this factor, the load has changed
_TRY_AGAIN_EVERY = 0.3  # seconds between trials of fewer threads after the load has changed
_TRY_MORE_EVERY = 1.7  # seconds between trials of more threads: a core that becomes free is used after that
_TRY_FEWER_EVERY = 10.0  # seconds between trials of fewer threads: on an idle machine, they only cost time


@dataclass(slots=True)
class _Trial:
    """Steps with a number of threads on trial. With the `usual` number, a step took `before` seconds."""

    usual: int
    before: float
    times: list[float] = field(default_factory=list)


class ThreadCount:
    """Chooses a number of threads from 1 to `most`, and calls `apply` with every new number."""

    def __init__(
        self, most: int, apply: Callable[[int], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._apply, self._clock = most, apply, clock
        self.current = most
        self._shape: Hashable = None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._best = math.inf  # the fastest mean of this shape with the current number of threads
        self._leap = False  # whether to try half as many threads next, because several cores may be busy
        self._means: dict[int, float] = {}  # the latest mean of this shape, by number of threads
        self._trial: _Trial | None = None
        self._tried_more = self._tried_fewer = clock() - _TRY_FEWER_EVERY

    def start_over(self) -> None:
        """Use all threads again, and then try fewer soon. Call this before the first step after a pause, in
        which another program may have ended."""
        if self.current < self._most:
            self._forget(None)
            self._use(self._most)
            self._tried_fewer = self._clock() - _TRY_FEWER_EVERY

    def observe(self, shape: Hashable, seconds: float) -> None:
        """Record the duration of a step. Only steps of the same shape are compared."""
        if self._most == 1:
            return
        if shape != self._shape:
            self._forget(shape)
        if self._trial is not None:
            self._judge(self._trial, seconds)
            return
        self._recent.append(seconds)
        if len(self._recent) < _RECENT // 2:
            return
        mean = sum(self._recent) / len(self._recent)
        self._best = min(self._best, mean)
        self._consider_trial(mean)

    def _consider_trial(self, mean: float) -> None:
        now = self._clock()
        degraded = mean > _DEGRADED * self._best
        fewer = self.current // 2 if self._leap else self.current - 1
        fewer_was_faster = mean > self._means.get(fewer, mean)
        every = _TRY_AGAIN_EVERY if degraded or fewer_was_faster else _TRY_FEWER_EVERY
        if self.current > 1 and now - self._tried_fewer >= every:
            self._tried_fewer = now
            self._leap = not self._leap
            self._begin(fewer, mean)
        elif self.current < self._most and now - self._tried_more >= _TRY_MORE_EVERY:
            self._tried_more = now
            self._begin(self.current + 1, mean)

    def _begin(self, count: int, mean: float) -> None:
        self._trial = _Trial(self.current, mean)
        self._means[self.current] = mean
        self._use(count)

    def _judge(self, trial: _Trial, seconds: float) -> None:
        """End a trial as soon as it is clear whether its number of threads is better."""
        trial.times.append(seconds)
        mean = sum(trial.times) / len(trial.times)
        if mean > _DEGRADED * trial.before or len(trial.times) == _TRIAL:
            self._means[self.current] = mean
            self._end(self.current if mean < _FASTER * trial.before else trial.usual)

    def _end(self, count: int) -> None:
        self._trial = None
        self._use(count)
        self._recent.clear()
        self._best = math.inf

    def _forget(self, shape: Hashable) -> None:
        """Discard all measurements, because the next steps have another shape."""
        if self._trial is not None:
            self._use(self._trial.usual)
            self._trial = None
        self._shape, self._best = shape, math.inf
        self._recent.clear()
        self._means.clear()

    def _use(self, count: int) -> None:
        if count != self.current:
            self.current = count
            self._apply(count)
