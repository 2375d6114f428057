"""Batches of images from requests of any size.

`serve.batch` is not used: it counts requests and not images unless given a size function, with which a large request
is put behind every newer small one; and it closes a batch while the previous one still runs, so that a busy model
gets many small batches. Here a batch closes only when the model is free.
"""

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from dataeff.core.artifact import Prediction

logger = logging.getLogger("ray.serve")

Run = Callable[[Tensor, Tensor], Prediction]
RunAsync = Callable[[Tensor, Tensor], Awaitable[Prediction]]


@dataclass(frozen=True)
class _Row:
    image: Tensor
    setting: Tensor
    answer: "asyncio.Future[Prediction]"
    deadline: float


class Batcher:
    """Runs `run(images [B, C, H, W], settings [B, ...])` on batches of up to `max_batch` images.

    A batch starts when the model is free and either `max_batch` images wait or the oldest has waited `wait_s` seconds.
    Images whose request was cancelled leave the queue. A batch that fails is run again image by image, so that only
    the image at fault fails. Used from one event loop.

    Args:
        run: a function, which gets a thread of its own, or a coroutine function.
        parallel: batches that a coroutine function may have under way at once.
    """

    def __init__(self, run: Run | RunAsync, max_batch: int, wait_s: float, parallel: int = 1) -> None:
        self._run = run
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._rows: deque[_Row] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._free = asyncio.Semaphore(parallel)
        self._under_way: set[asyncio.Task[None]] = set()
        self._worker: asyncio.Task[None] | None = None

    async def predict(self, images: Tensor, settings: Tensor) -> Prediction:
        """Answers for B images in their order; they may share batches with other requests or span several."""
        loop = asyncio.get_running_loop()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        deadline = loop.time() + self._wait_s
        rows = [
            _Row(image, setting, loop.create_future(), deadline)
            for image, setting in zip(images, settings, strict=True)
        ]
        self._rows.extend(rows)
        self._arrived.set()
        return joined(await asyncio.gather(*(row.answer for row in rows)))

    def check(self) -> None:
        """Raise RuntimeError if the batching task has ended, after which no request would be answered."""
        if self._worker is not None and self._worker.done():
            raise RuntimeError("the batching task has ended")

    def close(self) -> None:
        """End the batching task and the thread; for a model that gets no more requests."""
        if self._worker is not None:
            self._worker.cancel()
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        while True:
            await self._free.acquire()
            await self._wait()
            batch = self._take()
            if not batch:
                self._free.release()
                continue
            task = asyncio.create_task(self._answer(batch))
            self._under_way.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._under_way.discard(task)
        self._free.release()

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
            settings = torch.stack([row.setting for row in batch])
            result = await self._call(images, settings)
        except Exception as error:
            if len(batch) > 1:
                logger.exception("a batch of %d images failed; running them one by one", len(batch))
                for row in batch:
                    await self._answer([row])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for index, row in enumerate(batch):
            if not row.answer.done():
                row.answer.set_result(part(result, slice(index, index + 1)))

    async def _call(self, images: Tensor, settings: Tensor) -> Prediction:
        if inspect.iscoroutinefunction(self._run):
            return await cast(RunAsync, self._run)(images, settings)
        run = cast(Run, self._run)
        return await asyncio.get_running_loop().run_in_executor(self._thread, run, images, settings)


def part(prediction: Prediction, rows: slice) -> Prediction:
    """Some rows of a prediction, of its own class; every field has a row for each image."""
    return type(prediction)(**{field.name: getattr(prediction, field.name)[rows] for field in fields(prediction)})


def joined(predictions: Sequence[Prediction]) -> Prediction:
    """Predictions of one class one after the other."""
    if len(predictions) == 1:
        return predictions[0]
    first = predictions[0]
    return type(first)(
        **{field.name: torch.cat([getattr(item, field.name) for item in predictions]) for field in fields(first)}
    )
