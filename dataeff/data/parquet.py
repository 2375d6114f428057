"""`parquet:DIR`: image columns in the Hugging Face convention."""

from __future__ import annotations

import json
import warnings
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dataeff.data.decode import BadImageError
from dataeff.data.fingerprint import files_fingerprint
from dataeff.data.sources import UNKNOWN, EncodedRecords, RawData, RawSplit
from dataeff.data.spec import DataSpec
from dataeff.data.subsets import IntArray

_IMAGE_COLUMNS = ("image", "img")
_PATTERNS = {
    "train": ("train*.parquet",),
    "val": ("val*.parquet", "dev*.parquet"),
    "test": ("test*.parquet",),
}


def open_parquet(spec: DataSpec) -> RawData:
    """Open `DIR/train*.parquet` and, where present, `val*` (or `validation*`) and `test*`.

    Images are a column `image` or `img`: encoded files, as binary or as a struct with a binary field `bytes`. Labels
    are an integer column `label`; class names come from the schema metadata (`huggingface`), else they are the numbers.
    """
    root, files = _files(spec)
    opened = {split: [ParquetImages(path) for path in paths] for split, paths in files.items()}
    names = _class_names(opened["train"] + opened["val"] + opened["test"])
    if names is None:
        names = tuple(str(k) for k in range(1 + max((file.largest_label() for file in opened["train"]), default=0)))
    splits = {split: _read_split(parts, names) if parts else None for split, parts in opened.items()}
    train = splits["train"]
    assert train is not None
    content = files_fingerprint(root, [path for paths in files.values() for path in paths])
    return RawData(names, train, splits["val"], splits["test"], content)


def open_unlabelled(spec: DataSpec) -> RawData | None:
    """The training files where they lack the column `label`: all images `UNKNOWN`, no classes; None if they have it.

    Raises:
        FileNotFoundError, ValueError: as `open_parquet`; some of the training files have labels.
    """
    root, paths = _files(spec)
    files = [ParquetImages(path, labelled=False) for path in paths["train"]]
    labelled = [file.path.name for file in files if file.has_labels]
    if len(labelled) == len(files):
        return None
    if labelled:
        raise ValueError(f"parquet:{spec.location}: {labelled[0]} has a column 'label' and other files have none")
    records = ParquetRecords(files)
    train = RawSplit(records, np.full(len(records), UNKNOWN, np.int64))
    return RawData((), train, None, None, files_fingerprint(root, paths["train"]))


def _files(spec: DataSpec) -> tuple[Path, dict[str, list[Path]]]:
    """The folder and its files by split; there are training files."""
    root = Path(spec.location).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"parquet:{spec.location}: no such folder")
    files = {split: sorted({f for p in patterns for f in root.glob(p)}) for split, patterns in _PATTERNS.items()}
    if not files["train"]:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"parquet:{spec.location}: no train*.parquet in this folder (it holds: {found})")
    return root, files


class ParquetImages:
    """One Parquet file: labels (where it is `labelled`) read at once, encoded images a row group at a time, when first
    asked for.

    A row group that has been read stays in memory as one Arrow buffer of encoded bytes: a shuffled epoch visits all of
    them, and loader processes forked afterwards share the pages.
    """

    def __init__(self, path: Path, labelled: bool = True) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path.name}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
        schema = self._file.schema_arrow
        self.image_column = self._find_image_column(schema)
        self.names = _names_in_metadata(schema)
        self.has_labels = "label" in schema.names
        self.labels, self._null_label = self._read_labels(schema) if labelled else (np.empty(0, np.int64), None)
        groups = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts: list[int] = [0, *accumulate(groups)]
        self._groups: list[list[_Chunk] | None] = [None] * len(groups)

    def __len__(self) -> int:
        return self._starts[-1]

    def largest_label(self) -> int:
        return int(self.labels.max(initial=0))

    def check_labels(self, classes: int) -> None:
        if self._null_label is not None:
            raise ValueError(f"{self.path.name} row {self._null_label}: its label is null")
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(outside):
            raise ValueError(
                f"{self.path.name} row {outside[0]}: label {self.labels[outside[0]]} is outside the class list "
                f"(0 to {classes - 1})"
            )

    def blob(self, row: int) -> Tensor:
        group = bisect_right(self._starts, row) - 1
        row -= self._starts[group]
        for chunk in self._group(group):
            if row < len(chunk):
                return chunk.blob(row)
            row -= len(chunk)
        raise IndexError(row)

    def prepare(self) -> None:
        for group in range(len(self._groups)):
            self._group(group)

    def _group(self, number: int) -> list[_Chunk]:
        chunks = self._groups[number]
        if chunks is None:
            try:
                column = self._file.read_row_group(number, columns=[self.image_column]).column(0)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(
                    f"{self.path.name} rows {self._starts[number]} to {self._starts[number + 1] - 1} cannot be read "
                    f"({str(error).splitlines()[0]})"
                ) from None
            chunks = self._groups[number] = [_Chunk(chunk) for chunk in column.chunks]
        return chunks

    def _find_image_column(self, schema: pa.Schema) -> str:
        column = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
        if column is None:
            raise ValueError(f"{self.path.name}: no column 'image' or 'img'; its columns are {_columns(schema)}")
        kind = schema.field(column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return f"{column}.bytes"
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ValueError(
                f"{self.path.name}: column '{column}' is {kind}, not encoded images (binary, or a struct with 'bytes')"
            )
        return column

    def _read_labels(self, schema: pa.Schema) -> tuple[IntArray, int | None]:
        if not self.has_labels:
            raise ValueError(
                f"{self.path.name}: no column 'label'; its columns are {_columns(schema)} (images without labels are "
                "for ray_jobs.label, and for search_data of nas_search)"
            )
        if not pa.types.is_integer(schema.field("label").type):
            raise ValueError(f"{self.path.name}: column 'label' is {schema.field('label').type}, not integer classes")
        column = self._file.read(columns=["label"]).column("label")
        nulls = np.flatnonzero(column.is_null().to_numpy())
        labels = column.cast(pa.int64()).fill_null(-1).to_numpy().astype(np.int64)
        return labels, int(nulls[0]) if len(nulls) else None


class ParquetRecords(EncodedRecords):
    """The rows of several Parquet files, one after the other."""

    def __init__(self, files: list[ParquetImages]) -> None:
        self._files = files
        self._starts = [0, *accumulate(len(file) for file in files)]

    def __len__(self) -> int:
        return self._starts[-1]

    def describe(self, row: int) -> str:
        file, local = self._locate(row)
        return f"{file.path.name} row {local}"

    def blob(self, row: int) -> Tensor:
        file, local = self._locate(row)
        return file.blob(local)

    def prepare(self) -> None:
        for file in self._files:
            file.prepare()

    def _locate(self, row: int) -> tuple[ParquetImages, int]:
        number = bisect_right(self._starts, row) - 1
        return self._files[number], row - self._starts[number]


class _Chunk:
    """One Arrow binary array (or struct of it) seen as a flat tensor and offsets, without copies."""

    def __init__(self, array: pa.Array) -> None:
        if pa.types.is_struct(array.type):
            array = array.field("bytes")
        self._valid = None if array.null_count == 0 else array.is_valid().to_numpy(zero_copy_only=False)
        _, offsets, data = array.buffers()
        width = np.int64 if pa.types.is_large_binary(array.type) else np.int32
        self._offsets = np.frombuffer(offsets, dtype=width)[array.offset : array.offset + len(array) + 1]
        with warnings.catch_warnings():  # the buffer is read-only, and so is every use of this tensor
            warnings.simplefilter("ignore", UserWarning)
            self._data = torch.frombuffer(data, dtype=torch.uint8) if data is not None and data.size else None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def blob(self, row: int) -> Tensor:
        if self._data is None or (self._valid is not None and not self._valid[row]):
            raise BadImageError("has no image bytes (null)")
        return self._data[self._offsets[row] : self._offsets[row + 1]]


def _read_split(files: list[ParquetImages], names: tuple[str, ...]) -> RawSplit:
    for file in files:
        file.check_labels(len(names))
    return RawSplit(ParquetRecords(files), np.concatenate([file.labels for file in files]))


def _class_names(files: list[ParquetImages]) -> tuple[str, ...] | None:
    first = files[0]
    for file in files:
        if file.names != first.names:
            raise ValueError(
                f"{first.path.name} and {file.path.name} list different classes: {first.names} and {file.names}"
            )
    return first.names


def _names_in_metadata(schema: pa.Schema) -> tuple[str, ...] | None:
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    label = metadata.get("info", {}).get("features", {}).get("label", {})
    return tuple(label["names"]) if "names" in label else None


def _columns(schema: pa.Schema) -> str:
    return ", ".join(schema.names)
