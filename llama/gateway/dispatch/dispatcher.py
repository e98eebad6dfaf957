"""Gives waiting predictions to servers, and goes on when a server is lost.

Knows the queue and the servers. Knows nothing about HTTP towards clients or about the database.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx2

from llama.errors import ServerLost
from llama.gateway.dispatch.affinity import dialogue_of
from llama.gateway.dispatch.queue import FairQueue
from llama.gateway.dispatch.servers import Server, Servers
from llama.gateway.dispatch.upstream import Busy, Unavailable, run_on_server
from llama.gateway.prediction import Outcome, Prediction, Status

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
"""How many servers may be lost while they work on one prediction, because it may be the cause."""
_BUSY_DELAYS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Seconds between tries. Cog's server can refuse a prediction for a moment although it has a free place."""

Finish = Callable[[Prediction, Outcome], Awaitable[None]]


@dataclass
class _Run:
    """A prediction that runs on a server."""

    prediction: Prediction
    server: Server
    task: asyncio.Task[None]
    stop: Outcome | type[Unavailable] | None = None
    """Why it has to stop."""
    begun: bool = False

    def end(self, stop: Outcome | type[Unavailable]) -> None:
        """Stop it. A prediction that has lost its server can still be cancelled, but not the reverse."""
        first = self.stop is None
        if not isinstance(self.stop, Outcome):
            self.stop = stop
        if first and self.begun:  # a task that is cancelled earlier never runs, and its place is never free
            self.task.cancel()


class Dispatcher:
    """The queue in front of the servers. It awaits `finish` once for every prediction that ends, and calls
    `on_sent` when it gives a prediction to a server."""

    def __init__(
        self,
        client: httpx2.AsyncClient,
        servers: Servers,
        queue: FairQueue,
        at_once: Callable[[int], int | None],
    ) -> None:
        """`at_once` tells how many predictions of a key may run at the same time; None means any number."""
        self._client, self._servers, self._queue, self._at_once = client, servers, queue, at_once
        self.on_sent: Callable[[Prediction], None] = lambda _: None
        self.finish: Finish
        self._running = dict[str, _Run]()
        self._running_by_key = Counter[int]()
        self._attempts = Counter[str]()
        self._closing = False
        servers.on_ready, servers.on_lost = self.dispatch, self._lose

    @property
    def running(self) -> list[Prediction]:
        return [run.prediction for run in self._running.values()]

    def add(self, prediction: Prediction) -> None:
        """Queue a prediction."""
        self._queue.add(prediction)
        self.dispatch()

    async def stop(self, prediction: Prediction, outcome: Outcome, *, only_waiting: bool = False) -> None:
        """End a prediction with this outcome. Does nothing if it has ended, or if it runs and
        `only_waiting` is set."""
        if self._queue.remove(prediction):
            await self.finish(prediction, outcome)
        elif not only_waiting and (run := self._running.get(prediction.id)):
            run.end(outcome)

    def dispatch(self) -> None:
        """Start as many waiting predictions as there are free places."""
        while not self._closing and len(self._queue) and any(server.free > 0 for server in self._servers.all):
            prediction = self._queue.next(self._may_run)
            if prediction is None:
                return
            server = self._servers.choose(dialogue_of(prediction.request.inputs))
            assert server is not None
            server.in_flight += 1
            self._running_by_key[prediction.request.key_id] += 1
            task = asyncio.create_task(self._run(prediction, server))
            self._running[prediction.id] = _Run(prediction, server, task)
            self.on_sent(prediction)

    def _may_run(self, key_id: int) -> bool:
        limit = self._at_once(key_id)
        return limit is None or self._running_by_key[key_id] < limit

    async def _run(self, prediction: Prediction, server: Server) -> None:
        try:
            outcome = await self._answer(prediction, server)
        finally:
            # The place is free before the outcome is stored, so that the next prediction starts at once.
            server.in_flight -= 1
            self._running_by_key[prediction.request.key_id] -= 1
            del self._running[prediction.id]
        if outcome is None:
            self._queue.add_first(prediction)
        self.dispatch()
        if outcome is not None:
            self._attempts.pop(prediction.id, None)
            await self.finish(prediction, outcome)

    async def _answer(self, prediction: Prediction, server: Server) -> Outcome | None:
        """Run a prediction on a server. Returns None if another server should run it."""
        run = self._running[prediction.id]
        run.begun = True
        busy = False
        try:
            if run.stop is None:
                return await self._run_patiently(prediction, server)
        except Busy:
            busy = True
        except Unavailable as error:
            server.suspect()
            logger.warning("the server %s lost a prediction: %s", server.url, error)
        except asyncio.CancelledError:
            if run.stop is None:  # the gateway ends
                raise
        if isinstance(run.stop, Outcome):
            return run.stop
        if busy:
            return None
        if not prediction.pieces:
            self._attempts[prediction.id] += prediction.status is Status.PROCESSING
            if self._attempts[prediction.id] < _ATTEMPTS:
                prediction.restart()
                return None
        lost = ServerLost("the server ended or stopped responding during the answer; try again")
        return Outcome(Status.FAILED, str(lost))

    async def _run_patiently(self, prediction: Prediction, server: Server) -> Outcome:
        for delay in _BUSY_DELAYS:
            try:
                return await run_on_server(self._client, server.url, server.host, prediction)
            except Busy:
                await asyncio.sleep(delay)
        raise Busy

    def _lose(self, server: Server) -> None:
        """A server does not respond any more: end what runs on it."""
        for run in self._running.values():
            if run.server is server:
                run.end(Unavailable)

    async def close(self, grace: float) -> None:
        """Start no more predictions, and give the running ones `grace` seconds to end."""
        self._closing = True
        tasks = [run.task for run in self._running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
