"""The predictions behind one OpenAI request, one per choice: created, followed and cancelled together.

Knows predictions. Knows nothing about HTTP or about the bodies of responses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Self

from llama.gateway.openai.errors import failure
from llama.gateway.openai.request import CompletionRequest
from llama.gateway.openai.response import Choice, TokenUsage
from llama.gateway.prediction import Prediction, PredictionRequest, Status
from llama.gateway.predictions import Predictions


@dataclass(frozen=True)
class Update:
    """What has happened to one choice."""

    index: int
    text: str
    """New text; empty if there was none for a while."""
    ended: bool = False


class Choices:
    """The predictions of all choices of a request."""

    def __init__(
        self, predictions: Predictions, created: Sequence[Prediction], request: CompletionRequest
    ) -> None:
        self._predictions, self._created, self._request = predictions, created, request

    @classmethod
    async def create(
        cls, predictions: Predictions, requests: Sequence[PredictionRequest], request: CompletionRequest
    ) -> Self:
        """Create all predictions. Raises Problem if they are refused."""
        return cls(predictions, await predictions.create(requests), request)

    async def cancel(self) -> None:
        """Cancel the predictions that have not ended."""
        running = [prediction for prediction in self._created if not prediction.status.ended]
        await asyncio.gather(*map(self._predictions.cancel, running))

    async def updates(self, silence: float = 10.0) -> AsyncGenerator[Update, None]:
        """Yield what happens to the choices until all have ended. Raises Problem as soon as one fails.

        An empty update means that nothing has happened to a choice for `silence` seconds.
        """
        sources = [self._follow(index, silence) for index in range(len(self._created))]
        followed = sources[0] if len(sources) == 1 else _merged(sources)
        async with aclosing(followed):
            async for update in followed:
                yield update

    async def _follow(self, index: int, silence: float) -> AsyncGenerator[Update, None]:
        prediction = self._created[index]
        async for pieces in prediction.follow(silence=silence):
            yield Update(index, "".join(pieces))
        if prediction.status is not Status.SUCCEEDED:
            raise failure(prediction, is_chat=self._request.is_chat)
        yield Update(index, "", ended=True)

    async def wait(self) -> None:
        """Wait until all choices have ended. Raises Problem as soon as one fails."""
        async with aclosing(self.updates()) as updates:
            async for _ in updates:
                pass

    def choice(self, index: int) -> Choice:
        """A choice that has ended."""
        prediction = self._created[index]
        return Choice("".join(prediction.pieces), self.finish_reason(index))

    def finish_reason(self, index: int) -> str:
        return "length" if self._created[index].metrics.get("finish_reason") == "length" else "stop"

    def all(self) -> list[Choice]:
        return [self.choice(index) for index in range(len(self._created))]

    def usage(self) -> TokenUsage:
        one_per_prompt = self._created[:: self._request.choices_per_prompt]
        return TokenUsage(
            prompt_tokens=_total("input_token_count", one_per_prompt),
            completion_tokens=_total("output_token_count", self._created),
        )


def _total(metric: str, predictions: Sequence[Prediction]) -> int:
    return sum(int(prediction.metrics.get(metric, 0)) for prediction in predictions)


async def _merged(sources: Sequence[AsyncGenerator[Update, None]]) -> AsyncGenerator[Update, None]:
    """Yield the items of all sources as they arrive. Raises what one of them raises."""
    arrived = asyncio.Queue[Update | Exception | None]()

    async def forward(source: AsyncIterator[Update]) -> None:
        try:
            async for item in source:
                arrived.put_nowait(item)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(forward(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
