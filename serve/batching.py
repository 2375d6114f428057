"""Batches of images from requests of any size.

`serve.batch` is not used: it counts requests and not images unless given a size function, with which a large request
is put behind every newer small one; and it closes a batch while the previous one still runs, so that a busy model
gets many small batches. Here a batch closes only when the model is free.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dataeff.core.artifact import Prediction

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class _Row:
    image: Tensor
    budget: Tensor
    answer: "asyncio.Future[Prediction]"
    deadline: float


class Batcher:
    """Runs `run(float32 [B, C, H, W], float64 [B])` in a thread of its own on batches of up to `max_batch` images.

    A batch starts when the model is free and either `max_batch` images wait or the oldest has waited `wait_s` seconds.
    Images whose request was cancelled leave the queue. A batch that fails is run again image by image, so that only
    the image at fault fails. Used from one event loop.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Prediction], max_batch: int, wait_s: float) -> None:
        self._run = run
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._rows: deque[_Row] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None

    async def predict(self, images: Tensor, budgets: Tensor) -> Prediction:
        """Answers for B images in their order; they may share batches with other requests or span several."""
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        deadline = loop.time() + self._wait_s
        rows = [
            _Row(image, budget, loop.create_future(), deadline) for image, budget in zip(images, budgets, strict=True)
        ]
        self._rows.extend(rows)
        self._arrived.set()
        answers = await asyncio.gather(*(row.answer for row in rows))
        return Prediction(
            torch.cat([answer.probabilities for answer in answers]),
            torch.cat([answer.macs for answer in answers]),
            torch.cat([answer.path for answer in answers]),
        )

    def check(self) -> None:
        """Raise RuntimeError if the batching task has ended, after which no request would be answered."""
        if self._worker is not None and self._worker.done():
            raise RuntimeError("the batching task has ended")

    async def _work(self) -> None:
        while True:
            await self._wait()
            batch = self._take()
            if batch:
                await self._answer(batch)

    async def _wait(self) -> None:
        while not self._rows:
            self._arrived.clear()
            await self._arrived.wait()
        try:
            async with asyncio.timeout_at(self._rows[0].deadline):
                while len(self._rows) < self._max_batch:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass

    def _take(self) -> list[_Row]:
        batch: list[_Row] = []
        while self._rows and len(batch) < self._max_batch:
            row = self._rows.popleft()
            if not row.answer.done():
                batch.append(row)
        return batch

    async def _answer(self, batch: list[_Row]) -> None:
        try:
            images = torch.stack([row.image for row in batch])
            budgets = torch.stack([row.budget for row in batch])
            result = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, images, budgets)
        except Exception as error:
            if len(batch) > 1:
                logger.exception("a batch of %d images failed; running them one by one", len(batch))
                for row in batch:
                    await self._answer([row])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for index, row in enumerate(batch):
            one = slice(index, index + 1)
            if not row.answer.done():
                row.answer.set_result(Prediction(result.probabilities[one], result.macs[one], result.path[one]))
