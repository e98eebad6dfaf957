"""Repeats background work of the gateway."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


async def repeat(work: Callable[[], Awaitable[None]], pause: float) -> None:
    """Do the work, pause, and repeat until cancelled. An error is logged and does not end the loop."""
    while True:
        try:
            await work()
        except Exception as error:
            logger.exception("background work of the gateway failed and will be tried again: %s", error)
        await asyncio.sleep(pause)
