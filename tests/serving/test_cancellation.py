"""Cancelling a future cancels its stream, on a real event loop in a thread, as in Cog's server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from llama.serving.cancellation import Cancellation, cancellation_of_current_task


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def run() -> Cancellation:
    return cancellation_of_current_task()


def test_cancelling_the_future_of_a_finished_task_still_sets_the_cancellation(
    loop: asyncio.AbstractEventLoop,
) -> None:
    called = threading.Event()
    future = asyncio.run_coroutine_threadsafe(run(), loop)
    future.result(timeout=5).on_cancel(called.set)
    assert not called.is_set()
    future.cancel()
    assert called.wait(timeout=5)


def test_cancelling_one_prediction_leaves_the_others_running(loop: asyncio.AbstractEventLoop) -> None:
    events = [threading.Event(), threading.Event()]
    futures = [asyncio.run_coroutine_threadsafe(run(), loop) for _ in events]
    for future, event in zip(futures, events, strict=True):
        future.result(timeout=5).on_cancel(event.set)
    futures[1].cancel()
    assert [event.is_set() for event in events] == [False, True]


def test_a_callback_registered_after_the_cancel_is_called_at_once() -> None:
    cancellation, called = Cancellation(), threading.Event()
    cancellation.set()
    cancellation.on_cancel(called.set)
    assert called.is_set()


def test_a_task_without_a_future_still_gets_a_cancellation() -> None:
    assert isinstance(asyncio.run(run()), Cancellation)
