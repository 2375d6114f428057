"""Batches of images: who shares one, when it closes, and what a cancelled request leaves."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dataeff.core.artifact import Prediction
from serve.batching import Batcher, Part, Together, whole


class Recorder:
    """A model that answers each image's own value and notes its batches and threads."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[float]] = []
        self.threads: set[str] = set()

    def __call__(self, images: Tensor, budgets: Tensor) -> Prediction:
        self.batches.append(images.flatten().tolist())
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        return Prediction(images.flatten(1), budgets, torch.zeros(len(images), 0, dtype=torch.bool))


def images(*values: float) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def budgets(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_requests_of_any_size_share_batches_and_keep_their_rows() -> None:
    model = Recorder()

    async def main() -> list[Prediction]:
        batcher = Batcher(whole(model), max_batch=4, wait_s=0.05)
        sizes = [1, 2, 6, 1, 2]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        values = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        return await asyncio.gather(*(batcher.predict(images(*v), budgets(*v)) for v in values))

    answers = asyncio.run(main())
    assert model.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [answer.probabilities.flatten().tolist() for answer in answers] == [
        [0],
        [1, 2],
        [3, 4, 5, 6, 7, 8],
        [9],
        [10, 11],
    ]
    assert [answer.macs.tolist() for answer in answers] == [[0], [1, 2], [3, 4, 5, 6, 7, 8], [9], [10, 11]]
    assert threading.current_thread().name not in model.threads


def test_images_that_arrive_while_the_model_runs_form_one_batch() -> None:
    model = Recorder()
    started, release = threading.Event(), threading.Event()

    def run(images: Tensor, budgets: Tensor) -> Prediction:
        started.set()
        assert release.wait(10)
        return model(images, budgets)

    async def main() -> None:
        batcher = Batcher(whole(run), max_batch=64, wait_s=0.001)
        requests = [asyncio.create_task(batcher.predict(images(0), budgets(1)))]
        await asyncio.to_thread(started.wait)
        for value in range(1, 10):
            requests.append(asyncio.create_task(batcher.predict(images(value), budgets(1))))
            await asyncio.sleep(0.005)
        release.set()
        await asyncio.gather(*requests)

    asyncio.run(main())
    assert model.batches == [[0], list(range(1, 10))]


def test_a_lonely_image_waits_no_longer_than_it_must() -> None:
    async def main() -> float:
        batcher = Batcher(whole(Recorder()), max_batch=64, wait_s=0.02)
        await batcher.predict(images(0), budgets(1))
        started = time.perf_counter()
        await batcher.predict(images(1), budgets(1))
        return time.perf_counter() - started

    assert 0.015 < asyncio.run(main()) < 0.2


def test_a_cancelled_request_costs_the_model_nothing() -> None:
    model = Recorder(seconds=0.05)

    async def main() -> None:
        batcher = Batcher(whole(model), max_batch=1, wait_s=0)
        tasks = [asyncio.create_task(batcher.predict(images(value), budgets(1))) for value in range(3)]
        await asyncio.sleep(0.02)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert model.batches == [[0], [2]]


def test_an_ended_batching_task_is_reported() -> None:
    async def main() -> str:
        batcher = Batcher(whole(Recorder()), max_batch=1, wait_s=0)
        await batcher.predict(images(0), budgets(1))
        batcher.check()
        assert batcher._worker is not None
        batcher._worker.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        try:
            batcher.check()
        except RuntimeError as error:
            return str(error)
        return ""

    assert "ended" in asyncio.run(main())


def test_an_image_that_leaves_early_is_answered_before_the_rest_of_its_batch() -> None:
    release = threading.Event()

    def run(images: Tensor, settings: Tensor) -> Iterator[Part]:
        answers = Prediction(images.flatten(1), settings, torch.zeros(len(images), 0, dtype=torch.bool))
        yield torch.tensor([1]), answers
        assert release.wait(10)
        yield torch.tensor([0, 2]), answers

    async def main() -> list[float]:
        batcher = Batcher(run, max_batch=3, wait_s=1)
        tasks = [asyncio.create_task(batcher.predict(images(value), budgets(1))) for value in (5, 6, 7)]
        first = await tasks[1]
        assert not tasks[0].done() and not tasks[2].done()
        release.set()
        return [float(found.probabilities) for found in (first, await tasks[0], await tasks[2])]

    assert asyncio.run(main()) == [6, 5, 7]


def test_a_failure_half_way_spares_the_images_that_have_left() -> None:
    calls: list[int] = []

    def run(images: Tensor, settings: Tensor) -> Iterator[Part]:
        calls.append(len(images))
        answers = Prediction(images.flatten(1), settings, torch.zeros(len(images), 0, dtype=torch.bool))
        yield torch.tensor([0]), answers
        if len(images) > 1:
            raise RuntimeError("the second stage fails")

    async def main() -> list[float]:
        batcher = Batcher(run, max_batch=3, wait_s=1)
        found = await asyncio.gather(*(batcher.predict(images(value), budgets(1)) for value in (5, 6, 7)))
        return [float(one.probabilities) for one in found]

    assert asyncio.run(main()) == [5, 6, 7]
    assert calls == [3, 1, 1]


def test_calls_that_come_in_while_a_thread_works_share_its_next_trip() -> None:
    started, release = threading.Event(), threading.Event()
    trips: list[str] = []

    def work(value: int) -> int:
        trips.append(threading.current_thread().name)
        if value == 0:
            started.set()
            assert release.wait(10)
        if value == 3:
            raise ValueError("three")
        return value * value

    async def main() -> list[Any]:
        together, loop = Together(1, "work"), asyncio.get_running_loop()
        handed = 0
        threadsafe = loop.call_soon_threadsafe

        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal handed
            handed += getattr(arguments[0], "__name__", "") == "_deliver"
            return threadsafe(*arguments, **options)

        loop.call_soon_threadsafe = count  # type: ignore[method-assign]
        tasks = [asyncio.create_task(together(work, 0))]
        await asyncio.to_thread(started.wait)
        tasks += [asyncio.create_task(together(work, value)) for value in range(1, 6)]
        await asyncio.sleep(0)
        tasks[5].cancel()
        release.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert handed == 2
        return found

    found = asyncio.run(main())
    assert found[:3] + found[4:5] == [0, 1, 4, 16]
    assert isinstance(found[3], ValueError) and isinstance(found[5], asyncio.CancelledError)
    assert len(trips) == 5
