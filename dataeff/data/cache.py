"""Decoded images on disk: `cache=DIR`.

One split is one Arrow IPC file of uint8 images, named by a key over the data's content and the options that change
pixels. It is read memory-mapped, so processes on one machine share its pages. It appears under its name only when
complete (written beside it, then renamed), a file lock lets one process build while others wait, and a file that is cut
short or whose sampled batches fail their checksum is built again.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataeff.data.sources import DecodingStore, Records, decoding_threads, find_bad_images
from dataeff.data.subsets import IntArray

_BATCH_BYTES = 4 * 2**20
_CHECKED_BATCHES = 32


class MappedStore:
    """Decoded images in a memory-mapped Arrow file; rows that were skipped hold zeros and are never asked for.

    Args:
        file: the whole mapped file, uint8 [bytes].
        starts: the byte at which each row begins, int64 [N].
        shape: (C, H, W).
        records: what the rows were decoded from.
    """

    def __init__(
        self, file: NDArray[np.uint8], starts: IntArray, shape: tuple[int, int, int], records: Records
    ) -> None:
        width = int(np.prod(shape))
        # Rows of one Arrow batch follow one another, batches do not: seen as a window at every byte, any rows are one
        # indexing operation.
        self._windows = np.lib.stride_tricks.as_strided(file, (len(file) - width + 1, width), (1, 1), writeable=False)
        self._starts = starts
        self._records = records
        self.shape = shape

    def __len__(self) -> int:
        return len(self._records)

    def read(self, rows: IntArray) -> Tensor:
        return torch.from_numpy(self._windows[self._starts[rows]]).view(len(rows), *self.shape)

    def describe(self, row: int) -> str:
        return self._records.describe(row)


def open_cached(directory: Path, key: str, records: Records) -> MappedStore | None:
    """The cached split, or None when it is absent or damaged."""
    path = directory / f"{key}.arrow"
    if not path.exists():
        return None
    try:
        with pa.memory_map(str(path)) as source:
            file = source.read_buffer()
        reader = pa.ipc.open_file(file)
        shape = tuple(json.loads(reader.schema.metadata[b"shape"]))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        checked = set(np.linspace(0, len(batches) - 1, _CHECKED_BATCHES).astype(np.int64).tolist())
        for number in checked:
            metadata = reader.get_batch_with_custom_metadata(number).custom_metadata
            if int(metadata[b"crc32"]) != zlib.crc32(_bytes_of(batches[number]).data):
                return None
        if sum(len(batch) for batch in batches) != len(records):
            return None
        starts = [
            _bytes_of(batch).ctypes.data - file.address + np.prod(shape) * np.arange(len(batch)) for batch in batches
        ]
        return MappedStore(np.frombuffer(file, dtype=np.uint8), np.concatenate(starts), shape, records)
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        return None


def build_cached(directory: Path, key: str, store: DecodingStore, skip: set[int]) -> MappedStore:
    """Decode every row but `skip` into the cache, unless another process has done so meanwhile.

    Raises:
        OSError: the folder cannot be written, or is full.
    """
    with locked(directory, key):
        cached = open_cached(directory, key, store.records)
        if cached is None:
            with replacing(directory / f"{key}.arrow") as path:
                _write(path, store, skip)
            cached = open_cached(directory, key, store.records)
    if cached is None:
        raise OSError(f"the image cache {directory / key}.arrow cannot be read back after writing: check the disk")
    return cached


def bad_images(directory: Path | None, key: str, records: Records) -> dict[int, str]:
    """The rows that do not decode, with reasons: `find_bad_images`, remembered in the cache folder if there is one."""
    if directory is None:
        return find_bad_images(records)
    path = directory / f"{key}.bad.json"
    with locked(directory, key):
        try:
            return {int(row): reason for row, reason in json.loads(path.read_text()).items()}
        except (OSError, ValueError):
            bad = find_bad_images(records)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(bad))
            return bad


def _write(path: Path, store: DecodingStore, skip: set[int]) -> None:
    width = int(np.prod(store.shape))
    metadata = {"shape": json.dumps(store.shape)}
    schema = pa.schema([pa.field("pixels", pa.binary(width), nullable=False)], metadata=metadata)
    rows_per_batch = max(1, _BATCH_BYTES // width)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer, decoding_threads() as pool:
        for start in range(0, len(store), rows_per_batch):
            rows = np.arange(start, min(start + rows_per_batch, len(store)))
            images = np.zeros((len(rows), width), dtype=np.uint8)
            good = np.array([row for row in rows.tolist() if row not in skip], dtype=np.int64)
            parts = [part for part in np.array_split(good, 16) if len(part)]
            for part, decoded in zip(parts, pool.map(store.read, parts), strict=True):
                images[part - start] = decoded.numpy().reshape(len(part), width)
            array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(images)])
            checksum = {"crc32": str(zlib.crc32(images.data))}
            writer.write_batch(pa.record_batch([array], schema=schema), custom_metadata=checksum)


def _bytes_of(batch: pa.RecordBatch) -> NDArray[np.uint8]:
    column = batch.column(0)
    width = column.type.byte_width
    return np.frombuffer(column.buffers()[1], dtype=np.uint8, count=len(column) * width, offset=column.offset * width)


@contextmanager
def locked(directory: Path, key: str) -> Iterator[None]:
    """Hold `DIRECTORY/KEY.lock` against other processes; the folder is made when missing."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process ends, however it ends
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that becomes `path` if the block succeeds, and is removed if not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
