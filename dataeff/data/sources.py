"""Images by number: where a split's pixels come from, and the labelled view of them that methods use."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dataeff.data.decode import BadImageError, decode, fit_to_size, natural_channels, open_pil, pil_to_tensor
from dataeff.data.subsets import IntArray

UNKNOWN = -1  # the label of an image that has none


class Store(Protocol):
    """Pixels by row number, all of one shape."""

    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def read(self, rows: IntArray) -> Tensor:
        """uint8 [len(rows), C, H, W]."""
        ...

    def describe(self, row: int) -> str:
        """Where the row comes from, for messages: `train-00000.parquet row 17`."""
        ...


class ImageSource:
    """One split: labelled uint8 images of one shape, read on demand.

    Attributes:
        labels: int64 [N].
        flags: bool [N] arrays by name, for analysis only (`hard` in digits-easy-hard).
        image_shape: (C, H, W).
    """

    def __init__(
        self,
        store: Store,
        labels: IntArray,
        flags: dict[str, NDArray[np.bool_]] | None = None,
        rows: IntArray | None = None,
    ) -> None:
        self._store = store
        self._rows = np.arange(len(store)) if rows is None else rows
        self.labels = labels
        self.flags = flags or {}
        self.image_shape = store.shape

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, indices: Sequence[int] | IntArray | Tensor) -> Tensor:
        """The images at `indices`, decoded now: uint8 [len(indices), C, H, W].

        Raises:
            BadImageError: naming the file and row.
            IndexError: an index outside 0..N-1.
        """
        return self._store.read(self._rows[np.asarray(indices, dtype=np.int64)])

    def describe(self, index: int) -> str:
        """Where image `index` comes from: its file and row."""
        return self._store.describe(int(self._rows[index]))

    def subset(self, indices: Sequence[int] | IntArray) -> ImageSource:
        """The images at `indices`, in that order; shares the pixels."""
        chosen = np.asarray(indices, dtype=np.int64)
        flags = {name: values[chosen] for name, values in self.flags.items()}
        return ImageSource(self._store, self.labels[chosen], flags, self._rows[chosen])

    def spread(self, count: int | None) -> ImageSource:
        """`count` images, evenly spaced; all where there are no more, or for None."""
        if count is None or count >= len(self):
            return self
        return self.subset(np.linspace(0, len(self) - 1, count).round().astype(np.int64))


@dataclass
class RawSplit:
    """What one file-level split holds, before sizes, cuts and subsets: pixels in memory, or records to decode."""

    pixels: ArrayStore | Records
    labels: IntArray
    flags: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


@dataclass
class RawData:
    """What a source finds under its location; `content` identifies the data (see `fingerprint.py`)."""

    classes: tuple[str, ...]
    train: RawSplit
    val: RawSplit | None
    test: RawSplit | None
    content: str


class ArrayStore:
    """Images held in memory, uint8 [N, C, H, W]."""

    def __init__(self, images: Tensor, name: str) -> None:
        self._images = images
        self._name = name
        self.shape: tuple[int, int, int] = (images.shape[1], images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self._images)

    def read(self, rows: IntArray) -> Tensor:
        return self._images.index_select(0, torch.from_numpy(rows))

    def describe(self, row: int) -> str:
        return f"{self._name} image {row}"

    def reshaped(self, size: int | None, channels: int | None) -> ArrayStore:
        """The same images with a side of `size` pixels and `channels` channels (grey is repeated)."""
        images = self._images
        if size is not None:
            images = fit_to_size(images, (size, size))
        if channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1).contiguous()
        return ArrayStore(images, self._name)


class Records(ABC):
    """Encoded images by row number, of any size."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def describe(self, row: int) -> str: ...

    @abstractmethod
    def open(self, row: int) -> Image.Image:
        """The image, its pixels not read yet where the format allows that."""

    @abstractmethod
    def load(self, row: int, channels: int) -> Tensor:
        """The decoded image, uint8 [channels, H, W]."""

    def prepare(self) -> None:  # noqa: B027 (most records have nothing to prepare)
        """Bring everything into memory that loader processes should share rather than read again."""

    def named(self, row: int, error: BadImageError) -> BadImageError:
        """The same error with the file and row in front."""
        return BadImageError(f"{self.describe(row)} {error}")

    def open_named(self, row: int) -> Image.Image:
        """`open`, with errors that name the file and row."""
        try:
            return self.open(row)
        except BadImageError as error:
            raise self.named(row, error) from None


class EncodedRecords(Records):
    """Records that are encoded files in bytes."""

    @abstractmethod
    def blob(self, row: int) -> Tensor:
        """The encoded file, uint8 [n]."""

    def open(self, row: int) -> Image.Image:
        return open_pil(self.blob(row))

    def load(self, row: int, channels: int) -> Tensor:
        return decode(self.blob(row), channels)


class PillowRecords(Records):
    """Records that another library opens as Pillow images."""

    def load(self, row: int, channels: int) -> Tensor:
        return pil_to_tensor(self.open(row), channels)


class DecodingStore:
    """Decodes records whenever they are read.

    Args:
        records: where they come from.
        shape: (C, H, W) of every image.
        resize: bring other sizes to (H, W); otherwise another size is an error.
        reference: how to name the image that set the shape, in that error.
    """

    def __init__(self, records: Records, shape: tuple[int, int, int], resize: bool, reference: str) -> None:
        self.records = records
        self.shape = shape
        self._resize = resize
        self._reference = reference

    def __len__(self) -> int:
        return len(self.records)

    def read(self, rows: IntArray) -> Tensor:
        images = [self._read_one(row) for row in rows.tolist()]
        return torch.stack(images) if images else torch.empty(0, *self.shape, dtype=torch.uint8)

    def _read_one(self, row: int) -> Tensor:
        channels, height, width = self.shape
        try:
            pixels = self.records.load(row, channels)
        except BadImageError as error:
            raise self.records.named(row, error) from None
        if pixels.shape != self.shape:
            if not self._resize:
                self.refuse_size(row, pixels.shape[1], pixels.shape[2])
            pixels = fit_to_size(pixels, (height, width))
        return pixels

    def describe(self, row: int) -> str:
        return self.records.describe(row)

    def check_sizes(self, rows: IntArray, limit: int = 2000) -> None:
        """Read the headers of `limit` evenly spaced rows, so that most faults show before training starts."""
        chosen = rows if len(rows) <= limit else rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]
        for row in chosen.tolist():
            image = self.records.open_named(row)
            if (image.height, image.width) != self.shape[1:] and not self._resize:
                self.refuse_size(row, image.height, image.width)

    def refuse_size(self, row: int, height: int, width: int) -> None:
        raise ValueError(
            f"images differ in size: {self._reference} is {self.shape[1]}x{self.shape[2]} (height x width) and "
            f"{self.describe(row)} is {height}x{width}; add size=N to bring all to N x N"
        )


def first_shape(records: Records, row: int, size: int | None, channels: int | None) -> tuple[int, int, int]:
    """(C, H, W) that the options, or else image `row`, ask for."""
    image = records.open_named(row)
    height, width = (image.height, image.width) if size is None else (size, size)
    return (channels or natural_channels(image), height, width)


def find_bad_images(records: Records) -> dict[int, str]:
    """Decode every record once; the rows that fail, with the reason."""

    def reason(row: int) -> str | None:
        try:
            records.load(row, 3)
        except BadImageError as error:
            return str(records.named(row, error))
        return None

    with decoding_threads() as pool:
        reasons = pool.map(reason, range(len(records)), chunksize=64)
        return {row: text for row, text in enumerate(reasons) if text is not None}


def decoding_threads() -> ThreadPoolExecutor:
    """Threads for decoding many images at once; the decoders let go of the interpreter lock."""
    return ThreadPoolExecutor(max_workers=min(8, len(os.sched_getaffinity(0))))
