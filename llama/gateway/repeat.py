"""Background work of the gateway that is done again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


async def repeat(work: Callable[[], Awaitable[None]], pause: float) -> None:
    """Do something every `pause` seconds until cancelled. An error is logged, and does not end it."""
    while True:
        try:
            await work()
        except Exception as error:
            logger.exception("background work of the gateway failed and is tried again: %s", error)
        await asyncio.sleep(pause)
