"""The images that a task is trained on and asked about, read a block at a time."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataeff.data import ImageSource
from dataeff.data.subsets import IntArray
from dataeff.pretraining.task import Images

BLOCK = 512  # images that are converted and answered at once
SAMPLE = 2000  # images that statistics and fingerprints look at


class Pool:
    """Float32 images in [0, 1] by number, whatever holds them; labels are never looked at.

    Args:
        images: float32 in [0, 1] or uint8, (N, C, H, W), or a split of a data set.

    Raises:
        ValueError: another type or shape, or values outside [0, 1] among the first SAMPLE evenly spaced images.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        if isinstance(images, Tensor):
            if images.dim() != 4 or images.dtype not in (torch.float32, torch.uint8):
                raise ValueError(
                    f"images must be float32 or uint8 (N, C, H, W), got {images.dtype} {list(images.shape)}"
                )
            self.image_shape = (images.shape[1], images.shape[2], images.shape[3])
        else:
            self.image_shape = images.image_shape
        if self.image_shape[0] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels, got {self.image_shape[0]}")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int] | IntArray) -> Tensor:
        """Float32 (B, C, H, W) in [0, 1]."""
        rows = np.asarray(indices, np.int64)
        if isinstance(self.images, ImageSource):
            pixels = self.images.images(rows)
        else:
            pixels = self.images[torch.from_numpy(rows)]
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels

    def blocks(self, indices: IntArray | None = None) -> Iterator[Tensor]:
        """All images, or those at `indices`, BLOCK at a time."""
        rows = np.arange(len(self)) if indices is None else indices
        return (self.read(rows[start : start + BLOCK]) for start in range(0, len(rows), BLOCK))

    def _sample(self) -> Iterator[Tensor]:
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), SAMPLE)).astype(np.int64))
        return self.blocks(rows)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of each channel, 1 where it is constant."""
        sums, count = torch.zeros(2, self.image_shape[0], dtype=torch.float64), 0
        for block in self._sample():
            low, high = float(block.min()), float(block.max())
            if not (low >= 0 and high <= 1):
                raise ValueError(f"images must be in [0, 1], found {low:.4g} to {high:.4g}; undo the normalisation")
            pixels = block.double()
            sums += torch.stack([pixels.mean((2, 3)).sum(0), pixels.square().mean((2, 3)).sum(0)])
            count += len(block)
        mean, square = sums / count
        std = (square - mean.square()).clamp(min=0).sqrt()
        return mean.float(), torch.where(std > 1e-6, std, 1.0).float()

    def fingerprint(self) -> str:
        """Of the number of images and the pixels of evenly spaced ones, so that another pool or order is noticed."""
        digest = hashlib.sha256(f"{len(self)} {self.image_shape}".encode())
        for block in self._sample():
            digest.update(block.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def read_each(self, requests: Sequence[IntArray], workers: int) -> Iterator[Tensor]:
        """The images of one request after another; `workers` processes read ahead."""
        if workers == 0:
            yield from map(self.read, requests)
            return
        generator = torch.Generator()  # so that the caller's global one is left alone
        loader = DataLoader(
            _Requests(self, requests),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork",
            generator=generator,
        )
        for answer in loader:
            if isinstance(answer, Exception):
                raise answer
            yield answer


class _Requests(Dataset[Any]):
    """Reads by the number of a request; runs in loader processes."""

    def __init__(self, pool: Pool, requests: Sequence[IntArray]) -> None:
        self.pool, self.requests = pool, requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> Tensor | Exception:
        # An exception goes back as a value: the loader would bury its one line in a traceback's text.
        try:
            return self.pool.read(self.requests[number])
        except (ValueError, OSError) as error:
            return error


def image_keys(images: Tensor) -> NDArray[np.int64]:
    """(B,) a number for each image's content, so that what is drawn for it does not depend on its place in a pool."""
    rows = images.detach().float().cpu().contiguous().flatten(1).numpy()
    keys = [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") >> 1 for row in rows]
    return np.array(keys, dtype=np.int64)


def map_blocks(images: Images, answer: Callable[[Tensor], Tensor], device: torch.device) -> NDArray[np.generic]:
    """`answer` of all images, a block at a time, without gradient: rows in the order of the images."""
    pool = Pool(images)
    with torch.no_grad():
        parts = [answer(block.to(device)).cpu().numpy() for block in pool.blocks()]
        if not parts:
            parts = [answer(torch.zeros(1, *pool.image_shape, device=device)).cpu().numpy()[:0]]
    return np.concatenate(parts)
