"""Stored answers of a network to a data set's images: what `ray_jobs.score` writes and cascades are fitted from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataeff.data.subsets import IntArray

METADATA = b"dataeff.scores"
REQUIRED = ("probabilities", "label")


@dataclass(frozen=True)
class Scores:
    """Answers to n images of one split.

    probabilities: float32 [n, k]; labels, indices (positions in the split): int64 [n]; macs: float64 [n], multiply-adds
    spent on each image, NaN where unknown.
    """

    probabilities: NDArray[np.float32]
    labels: IntArray
    indices: IntArray
    macs: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: slice | IntArray | NDArray[np.bool_]) -> Scores:
        return Scores(self.probabilities[rows], self.labels[rows], self.indices[rows], self.macs[rows])

    def table(self, split: str) -> pa.Table:
        """The columns of a score table."""
        flat = pa.array(self.probabilities.reshape(-1))
        return pa.table(
            {
                "split": pa.array([split] * len(self)),
                "index": self.indices,
                "label": self.labels,
                "probabilities": pa.FixedSizeListArray.from_arrays(flat, self.probabilities.shape[1]),
                "macs": self.macs,
            }
        )


def concatenate(parts: Sequence[Scores]) -> Scores:
    """The rows of several parts, one after the other."""
    return Scores(
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.macs for part in parts]),
    )


def score_schema(classes: int, about: Mapping[str, Any]) -> pa.Schema:
    """Schema of a score table; `about` (artifact, classes, data, full_macs, ...) is kept as JSON in its metadata."""
    return pa.schema(
        [
            ("split", pa.string()),
            ("index", pa.int64()),
            ("label", pa.int64()),
            ("probabilities", pa.list_(pa.float32(), classes)),
            ("macs", pa.float64()),
        ],
        metadata={METADATA: json.dumps(dict(about)).encode()},
    )


def write_scores(path: str | Path, splits: Mapping[str, Scores], about: Mapping[str, Any] | None = None) -> None:
    """Write a score table that fits into memory: split name -> its answers."""
    classes = next(iter(splits.values())).probabilities.shape[1]
    schema = score_schema(classes, about or {})
    with pq.ParquetWriter(path, schema) as writer:
        for name, scores in splits.items():
            writer.write_table(scores.table(name).cast(schema))


class ScoreTable:
    """A Parquet file of answers, read a part at a time, so that its size does not matter.

    Columns: `probabilities` (list of k numbers) and `label` (int) are required; `split` (text), `index` (position of
    the image in its split, by default the row's own) and `macs` may be left out. Any program may have written it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not Parquet, or a column is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file; write it with python -m ray_jobs.score")
        try:
            self._file = pq.ParquetFile(self.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
        schema = self._file.schema_arrow
        self.columns = [name for name in ("split", "index", "label", "probabilities", "macs") if name in schema.names]
        missing = [name for name in REQUIRED if name not in schema.names]
        if missing:
            raise ValueError(
                f"{self.path}: no column {' and '.join(missing)}; its columns are {', '.join(schema.names)}"
            )
        self.about: dict[str, Any] = json.loads((schema.metadata or {}).get(METADATA, b"{}"))

    def chunks(self, split: str, size: int, indices: IntArray | None = None) -> Iterator[Scores]:
        """Answers of one split, `size` at a time, in the order of the file.

        Args:
            indices: only these positions of the split.
        """
        waiting: list[Scores] = []
        for part in self._parts(split):
            kept = part if indices is None else part.rows(np.isin(part.indices, indices))
            if not len(kept):
                continue
            waiting.append(kept)
            if sum(map(len, waiting)) < size:
                continue
            joined = concatenate(waiting)
            whole = len(joined) // size * size
            for start in range(0, whole, size):
                yield joined.rows(slice(start, start + size))
            waiting = [joined.rows(slice(whole, None))] if whole < len(joined) else []
        if waiting:
            yield concatenate(waiting)

    def read(self, split: str, indices: IntArray | None = None) -> Scores:
        """All of `chunks` at once.

        Raises:
            ValueError: the table has no rows of the split.
        """
        parts = list(self.chunks(split, 65536, indices))
        if not parts:
            raise ValueError(f"{self.path}: no rows of split {split!r}; score it with python -m ray_jobs.score")
        return concatenate(parts)

    def _parts(self, split: str) -> Iterator[Scores]:
        row = 0
        for batch in self._file.iter_batches(batch_size=8192, columns=self.columns):
            first, row = row, row + len(batch)
            table = pa.table(batch).append_column("row", pa.array(np.arange(first, row)))
            if "split" in self.columns:
                table = table.filter(pa.compute.equal(table["split"], split))
            if len(table):
                yield self._scores(table)

    def _scores(self, table: pa.Table) -> Scores:
        lists = table["probabilities"].combine_chunks()
        values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        if len(values) % len(table) or len(np.unique(pa.compute.list_value_length(lists))) > 1:
            raise ValueError(f"{self.path}: the lists in column 'probabilities' differ in length")
        unknown = np.full(len(table), np.nan)
        index = "index" if "index" in self.columns else "row"
        return Scores(
            values.reshape(len(table), -1),
            table["label"].to_numpy().astype(np.int64),
            table[index].to_numpy().astype(np.int64),
            table["macs"].to_numpy().astype(np.float64) if "macs" in self.columns else unknown,
        )
