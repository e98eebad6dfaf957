"""Gives waiting predictions to servers, and moves them to another server when theirs is lost.

Knows the queue and the servers. Knows nothing about HTTP towards clients or about the database.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from llama.errors import GatewayRestarted, ServerLost
from llama.gateway.dispatch.cog_client import Busy, CogClient, Unavailable
from llama.gateway.dispatch.queue import FairQueue
from llama.gateway.dispatch.servers import Server, Servers
from llama.gateway.dispatch.upstream import run_on_server
from llama.gateway.metrics.recorder import Metrics
from llama.gateway.prediction import Outcome, Prediction, Status

logger = logging.getLogger(__name__)

_LOST_SERVERS = 3
"""A prediction that has lost this many servers fails, because it may be the cause."""
_BUSY_DELAYS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Seconds between tries. Cog's server can refuse a prediction for a moment although it has a free place."""
_FULL_FOR = 1.0
"""Seconds without new predictions for a server that reports no free place although it should have one."""

Finish = Callable[[Prediction, Outcome], Awaitable[None]]


@dataclass
class _Run:
    """A prediction that runs on a server."""

    prediction: Prediction
    server: Server
    task: asyncio.Task[None]
    begun: bool = False
    outcome: Outcome | None = None
    """If set, the prediction has to end at once, with this outcome."""
    lost: bool = False
    """Whether the server no longer responds."""

    def interrupt(self) -> None:
        if self.begun:  # a task cancelled before its first step never frees its place
            self.task.cancel()


class Dispatcher:
    """The queue in front of the servers. It awaits `finish` once for every prediction that ends, and calls
    `on_sent` when it gives a prediction to a server, and `on_requeued` when the prediction waits again."""

    def __init__(
        self,
        client: CogClient,
        servers: Servers,
        queue: FairQueue,
        at_once: Callable[[int], int | None],
        metrics: Metrics,
    ) -> None:
        """`at_once` tells how many predictions of a key may run at the same time; None means any number."""
        self._client, self._servers, self._queue, self._at_once = client, servers, queue, at_once
        self._metrics = metrics
        self.on_sent: Callable[[Prediction], None] = lambda _: None
        self.on_requeued: Callable[[Prediction], None] = lambda _: None
        self.finish: Finish
        self._running = dict[str, _Run]()
        self._running_by_key = Counter[int]()
        self.stopping = False
        """Whether no more predictions are started, because the gateway ends."""
        servers.on_ready, servers.on_lost = self.dispatch, self._lose

    @property
    def running(self) -> list[Prediction]:
        return [run.prediction for run in self._running.values()]

    @property
    def waiting(self) -> list[Prediction]:
        return list(self._queue)

    def is_running(self, prediction: Prediction) -> bool:
        return prediction.id in self._running

    def add(self, prediction: Prediction) -> None:
        """Queue a prediction."""
        self._queue.add(prediction)
        self.dispatch()

    async def stop(self, prediction: Prediction, outcome: Outcome) -> None:
        """End a prediction with this outcome. Does nothing if it has ended."""
        if self._queue.remove(prediction):
            await self.finish(prediction, outcome)
        elif (run := self._running.get(prediction.id)) and run.outcome is None:
            run.outcome = outcome
            if not run.lost:  # otherwise the task is already ending
                run.interrupt()

    def dispatch(self) -> None:
        """Start as many waiting predictions as there are free places."""
        while not self.stopping and len(self._queue) and self._servers.any_free:
            prediction = self._queue.next(self._may_run)
            if prediction is None:
                return
            server = self._servers.choose(prediction.request.inputs)
            server.in_flight += 1
            prediction.server = server.url
            self._running_by_key[prediction.request.key_id] += 1
            task = asyncio.create_task(self._run(prediction, server))
            self._running[prediction.id] = _Run(prediction, server, task)
            self.on_sent(prediction)

    def _may_run(self, key_id: int) -> bool:
        limit = self._at_once(key_id)
        return limit is None or self._running_by_key[key_id] < limit

    async def _run(self, prediction: Prediction, server: Server) -> None:
        try:
            outcome = await self._answer(self._running[prediction.id])
        finally:
            # The place is free before the outcome is stored, so that the next prediction starts at once.
            server.in_flight -= 1
            self._running_by_key[prediction.request.key_id] -= 1
            del self._running[prediction.id]
        if outcome is None:
            self._queue.add_first(prediction)
            self.on_requeued(prediction)
        else:
            server.full_until = 0.0
        self.dispatch()
        if outcome is not None:
            await self.finish(prediction, outcome)

    async def _answer(self, run: _Run) -> Outcome | None:
        """Run a prediction on its server. Returns None if another server should run it."""
        run.begun, busy = True, False
        try:
            if run.outcome is None and not run.lost:
                return await self._run_with_retries(run)
        except Busy:
            run.server.full_until = time.monotonic() + _FULL_FOR
            busy = True
        except Unavailable as error:
            run.server.suspect()
            logger.warning("the server %s lost a prediction (%s)", run.server.url, error)
        except asyncio.CancelledError:
            if run.outcome is None and not run.lost:  # the gateway ends
                raise
        except Exception:
            logger.exception("the gateway failed during a prediction")
            run.outcome = _failed(ServerLost("the gateway failed during the answer; its log says why"))
        if run.outcome is not None:
            return run.outcome
        outcome = None if busy else self._after_loss(run.prediction)
        if outcome is None:
            self._metrics.requeued("busy" if busy else "lost")
        return outcome

    async def _run_with_retries(self, run: _Run) -> Outcome:
        for delay in _BUSY_DELAYS:
            try:
                return await run_on_server(
                    self._client, run.server.url, run.server.host, run.prediction, self._metrics
                )
            except Busy:
                await asyncio.sleep(delay)
        raise Busy

    def _after_loss(self, prediction: Prediction) -> Outcome | None:
        """What follows from the loss of a server: None if another server should begin again."""
        prediction.lost_servers += 1
        self._metrics.interrupted()
        if prediction.pieces or prediction.lost_servers >= _LOST_SERVERS:
            return _failed(ServerLost("the server ended or stopped responding during the answer; try again"))
        prediction.restart()
        return None

    def _lose(self, server: Server) -> None:
        """Interrupt the predictions of a server that no longer responds."""
        for run in self._running.values():
            if run.server is server and not run.lost and run.outcome is None:
                run.lost = True
                run.interrupt()

    def stop_starting(self) -> None:
        """Start no more predictions."""
        self.stopping = True

    async def idle(self, stop_requested: asyncio.Event) -> None:
        """Wait until no prediction runs, or until `stop_requested` is set."""
        stop = asyncio.create_task(stop_requested.wait())
        try:
            while self._running and not stop.done():
                tasks = [run.task for run in self._running.values()]
                await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()

    async def end(self) -> None:
        """Start no more predictions, and fail those that run."""
        self.stop_starting()
        tasks = [run.task for run in self._running.values()]
        ending = GatewayRestarted("the gateway was stopped during the prediction; create it again")
        for prediction in self.running:
            await self.stop(prediction, _failed(ending))
        await asyncio.gather(*tasks, return_exceptions=True)


def _failed(error: Exception) -> Outcome:
    return Outcome(Status.FAILED, str(error))
