"""Batches of images from requests of any size.

`serve.batch` is not used: it counts requests and not images unless given a size function, with which a large request
is put behind every newer small one; and it closes a batch while the previous one still runs, so that a busy model
gets many small batches. Here a batch closes only when the model is free.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dataeff.core.artifact import Prediction

logger = logging.getLogger("ray.serve")

# Some rows of a batch, and the answers to the whole batch so far.
Part = tuple[Tensor, Prediction]
Run = Callable[[Tensor, Tensor], Iterable[Part]]

# Most calls that one trip to a thread of `Together` answers: the first of them waits for the last.
TOGETHER = 16


@dataclass(frozen=True)
class _Row:
    image: Tensor
    setting: Tensor
    answer: "asyncio.Future[Prediction]"
    deadline: float


class Batcher:
    """Runs `run(images [B, C, H, W], settings [B, ...])` on batches of up to `max_batch` images.

    `run` yields rows of the batch as soon as they are answered, each once, so that an image that leaves a cascade early
    does not wait for the others; see `whole` for a network that answers all at once. A batch starts when the model is
    free and either `max_batch` images wait or the oldest has waited `wait_s` seconds: under load batches form while the
    one before runs. Images whose request was cancelled leave the queue. A batch that fails is run again image by image,
    so that only the image at fault fails. Used from one event loop; `run` has a thread of its own.
    """

    def __init__(self, run: Run, max_batch: int, wait_s: float) -> None:
        self._run = run
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._rows: deque[_Row] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
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
        if len(rows) == 1:
            return await rows[0].answer
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
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._run_rows, loop, batch)
        except Exception as error:
            if len(batch) > 1:
                logger.exception("a batch of %d images failed; running them one by one", len(batch))
                for row in batch:
                    if not row.answer.done():
                        await self._answer([row])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)

    @torch.inference_mode()
    def _run_rows(self, loop: asyncio.AbstractEventLoop, batch: list[_Row]) -> None:
        images, settings = torch.stack([row.image for row in batch]), torch.stack([row.setting for row in batch])
        for rows, prediction in self._run(images, settings):
            answered = [(batch[row], part(prediction, slice(row, row + 1))) for row in rows.tolist()]
            if answered:
                loop.call_soon_threadsafe(_deliver, answered)


def _deliver(answered: list[tuple[_Row, Prediction]]) -> None:
    for row, prediction in answered:
        if not row.answer.done():
            row.answer.set_result(prediction)


def whole(function: Callable[[Tensor, Tensor], Prediction]) -> Run:
    """`function`, which answers a batch at once, as a `Run`."""

    def run(images: Tensor, settings: Tensor) -> Iterator[Part]:
        yield torch.arange(len(images)), function(images, settings)

    return run


class Together:
    """Runs calls in threads, those that have come in meanwhile on one trip.

    A trip to a thread and back costs about as much as decoding a small image; under load one trip serves many requests.
    Used from one event loop.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = threads
        self._waiting: deque[_Call] = deque()

    async def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(*arguments)` returns or raises."""
        loop = asyncio.get_running_loop()
        call = _Call(function, arguments, loop.create_future())
        self._waiting.append(call)
        self._start(loop)
        return await call.answer

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._free and self._waiting:
            calls = [self._waiting.popleft() for _ in range(min(TOGETHER, len(self._waiting)))]
            calls = [call for call in calls if not call.answer.done()]
            if calls:
                self._free -= 1
                self._pool.submit(self._run, loop, calls)

    def _run(self, loop: asyncio.AbstractEventLoop, calls: "list[_Call]") -> None:
        outcomes = [call.outcome() for call in calls]
        loop.call_soon_threadsafe(self._deliver, loop, calls, outcomes)

    def _deliver(self, loop: asyncio.AbstractEventLoop, calls: "list[_Call]", outcomes: list[Any]) -> None:
        self._free += 1
        self._start(loop)
        for call, (result, error) in zip(calls, outcomes, strict=True):
            if call.answer.done():
                continue
            if error is None:
                call.answer.set_result(result)
            else:
                call.answer.set_exception(error)


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    answer: "asyncio.Future[Any]"

    def outcome(self) -> tuple[Any, Exception | None]:
        try:
            return self.function(*self.arguments), None
        except Exception as error:
            return None, error


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
