"""Batches: an endless, resumable training stream, and one pass for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataeff.data.sources import ImageSource
from dataeff.data.subsets import IntArray
from dataeff.data.transforms import Augment, Preprocess, uniform_draws


class Batch(NamedTuple):
    """Images for one step of one process.

    Attributes:
        images: float32 [b, C, H, W], preprocessed.
        labels: int64 [b].
        indices: int64 [b], positions in the source.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


class TrainStream:
    """Shuffled, augmented batches without end; its whole state is the number of the next iteration.

    Epoch e visits the images in the permutation of (seed, e) and leaves the incomplete last batch out. A batch larger
    than the source takes whole permutations one after another (each an epoch of its own for augmentation), cut to the
    batch size; then every iteration is an epoch. Rank r gets the r-th contiguous slice of each global batch. Images,
    order and augmentation are the same for any number of ranks and loader workers.

    Args:
        source: the training split.
        preprocess, augment: applied to each batch.
        batch_size: images in a global batch, over all ranks; a multiple of `world_size`.
        seed: of order and augmentation.
        rank, world_size: which slice.
        start_iteration: go on exactly where an earlier stream stopped before this iteration.
        workers: loader processes that read, decode and augment ahead; 0 does so in the calling process.
        device: where batches go; uint8 pixels travel, and are normalised there.

    Example::

        with TrainStream(splits.train, preprocess, Augment("shift_flip"), 128, seed=0) as stream:
            for _ in range(1000):
                batch = next(stream)

    Raises:
        ValueError: an empty source or a batch size that the ranks cannot share; while iterating, `BadImageError`.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocess: Preprocess,
        augment: Augment,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_iteration: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_rank(rank, world_size)
        if not len(source):
            raise ValueError("the training split has no images")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch size {batch_size} is not a positive multiple of the {world_size} workers: "
                f"each takes an equal part of every batch"
            )
        self.iteration = start_iteration
        self.iterations_per_epoch = max(1, len(source) // batch_size)
        self._preprocess = preprocess
        self._device = torch.device(device)
        self._order = _TrainOrder(len(source), batch_size, seed, rank, world_size, start_iteration)
        reader = _Reader(source, augment, seed, preprocess.size)
        self._raw: Iterator[_RawBatch] | None = _read(reader, self._order, workers)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._raw is None:
            raise RuntimeError("the training stream is closed")
        batch = _finish(next(self._raw), self._preprocess, self._device)
        self.iteration += 1
        return batch

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration belongs to."""
        return self.iteration // self.iterations_per_epoch

    def close(self) -> None:
        """Stop the loader processes. The stream cannot be used afterwards."""
        if self._raw is not None:
            self._raw.close()  # type: ignore[attr-defined]
            self._raw = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def eval_batches(
    source: ImageSource,
    preprocess: Preprocess,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Every image exactly once over the ranks, in order: rank r gets the r-th contiguous share.

    Shares differ by at most one image, and may be empty; the last batch may be smaller.

    Args:
        batch_size: images in one batch of this rank.

    Raises:
        ValueError: batch size below 1 or an impossible rank.
    """
    _check_rank(rank, world_size)
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: must be at least 1")
    share = np.array_split(np.arange(len(source)), world_size)[rank]
    order = [(share[start : start + batch_size], None) for start in range(0, len(share), batch_size)]
    reader = _Reader(source, Augment("none"), 0, preprocess.size)
    return (_finish(raw, preprocess, torch.device(device)) for raw in _read(reader, order, workers))


Request = tuple[IntArray, IntArray | None]  # indices, and the epoch of each
_RawBatch = tuple[Tensor, Tensor, Tensor]  # uint8 images, labels, indices


class _TrainOrder:
    """Requests of one rank, from `start` on, without end."""

    def __init__(self, images: int, batch_size: int, seed: int, rank: int, world_size: int, start: int) -> None:
        self._images, self._batch_size, self._seed, self._start = images, batch_size, seed, start
        part = batch_size // world_size
        self._slice = slice(rank * part, (rank + 1) * part)

    def __iter__(self) -> Iterator[Request]:
        per_batch = -(-self._batch_size // self._images)  # permutations in a batch: 1 unless it exceeds the source
        per_epoch = max(1, self._images // self._batch_size)
        iteration, permuted, order = self._start, -1, np.empty(0, np.int64)
        while True:
            epoch, position = divmod(iteration, per_epoch)
            if epoch != permuted:
                permutations = range(epoch * per_batch, (epoch + 1) * per_batch)
                order = np.concatenate([self._permutation(p) for p in permutations])
                epochs = np.repeat(np.array(permutations), self._images)
                permuted = epoch
            batch = slice(position * self._batch_size, (position + 1) * self._batch_size)
            yield order[batch][self._slice], epochs[batch][self._slice]
            iteration += 1

    def _permutation(self, epoch: int) -> IntArray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._images)


class _Reader(Dataset[Any]):
    """Reads one request; runs in loader processes."""

    def __init__(self, source: ImageSource, augment: Augment, seed: int, size: tuple[int, int]) -> None:
        self._source, self._augment, self._seed, self._size = source, augment, seed, size

    def read(self, request: Request) -> _RawBatch:
        indices, epochs = request
        images = self._source.images(indices)
        if epochs is not None and self._augment.draws:
            draws = uniform_draws(self._seed, epochs, indices, self._augment.draws)
            images = self._augment(images, torch.from_numpy(draws), self._size)
        return images, torch.from_numpy(self._source.labels[indices]), torch.from_numpy(indices)

    def __getitems__(self, request: Request) -> _RawBatch | Exception:
        # An exception goes back as a value: the loader would bury its one line in a traceback's text.
        try:
            return self.read(request)
        except (ValueError, OSError) as error:
            return error


def _read(reader: _Reader, order: Any, workers: int) -> Iterator[_RawBatch]:
    if workers == 0:
        for request in order:
            yield reader.read(request)
        return
    loader = DataLoader(
        reader,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_identity,
        prefetch_factor=4,
        multiprocessing_context="fork",  # shares the encoded or mapped images with the workers without a copy
        generator=torch.Generator(),  # or else the loader takes a number from the global generator
    )
    batches = iter(loader)
    try:
        for raw in batches:
            if isinstance(raw, Exception):
                raise raw
            yield raw
    finally:
        batches._shutdown_workers()  # type: ignore[attr-defined]


def _identity(batch: Any) -> Any:
    return batch


def _finish(raw: _RawBatch, preprocess: Preprocess, device: torch.device) -> Batch:
    images, labels, indices = (tensor.to(device) for tensor in raw)
    return Batch(preprocess(images), labels, indices)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: must be from 0 to {world_size - 1} (world size {world_size})")
