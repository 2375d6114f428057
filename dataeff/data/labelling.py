"""`labelling:DIR`: images that people are labelling. What `ray_jobs.label` keeps in its folder, seen as a data set.

DIR holds `labelling.json` (where the images are, and which of them check the network) and `answers.csv` (the labels
given so far). An image without an answer has the label `UNKNOWN`. The check images are both the validation and the test
split; all others are the training split.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field
from torch import Tensor

from dataeff.core.config import Config
from dataeff.data.folder import SUFFIXES, FolderRecords
from dataeff.data.parquet import ParquetImages, ParquetRecords
from dataeff.data.sources import UNKNOWN, EncodedRecords, RawData, RawSplit
from dataeff.data.spec import DataSpec, parse_spec
from dataeff.data.subsets import IntArray

MANIFEST, ANSWERS = "labelling.json", "answers.csv"


class Manifest(Config):
    """What a labelling began with; never changed afterwards."""

    source: str = Field(description="folder:DIR or parquet:DIR, without options")
    files: list[str] = Field(description="relative to DIR: image files, or Parquet files")
    count: int = Field(ge=1, description="images in all")
    check: list[int] = Field(description="numbers of the images that measure the network")
    classes: list[str] = Field(min_length=2)
    size: int = Field(ge=4, description="side that images are brought to, pixels")


def find_images(source: str) -> list[str]:
    """Files of an unlabelled data set, relative to its folder: images at any depth, or Parquet files.

    Raises:
        FileNotFoundError: no such folder, or nothing of that kind in it.
        ValueError: neither folder: nor parquet:.
    """
    spec = parse_spec(source)
    if spec.kind not in ("folder", "parquet"):
        raise ValueError(f"{source}: people label images of folder:DIR or parquet:DIR")
    root = Path(spec.location).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    kinds = SUFFIXES if spec.kind == "folder" else {".parquet"}
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in kinds and path.is_file())
    if not found:
        raise FileNotFoundError(f"{source}: no files named {' '.join(sorted(kinds))} in this folder")
    return [path.relative_to(root).as_posix() for path in found]


def open_records(source: str, files: Sequence[str]) -> EncodedRecords:
    """The images of `files`, whatever their labels.

    Raises:
        FileNotFoundError: a Parquet file is gone; image files are looked for only when they are read.
    """
    spec = parse_spec(source)
    root = Path(spec.location).expanduser()
    if spec.kind == "folder":
        return FolderRecords(root, [root / name for name in files])
    return ParquetRecords([ParquetImages(root / name, labelled=False) for name in files])


def missing_files(manifest: Manifest) -> list[str]:
    """Files that the labelling began with and that are gone."""
    root = Path(parse_spec(manifest.source).location).expanduser()
    return [name for name in manifest.files if not (root / name).is_file()]


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"labelling:{folder}: no {MANIFEST}; begin with python -m ray_jobs.label --out {folder}"
        )
    return Manifest.model_validate_json(path.read_text(encoding="utf-8"))


def read_answers(folder: Path) -> dict[str, str]:
    """Image -> class, in the order they were given."""
    path = folder / ANSWERS
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["image"]: row["label"] for row in csv.DictReader(file)}


def open_labelling(spec: DataSpec) -> RawData:
    """Open the folder of a labelling."""
    folder = Path(spec.location).expanduser()
    manifest, answers = read_manifest(folder), read_answers(folder)
    records = open_records(manifest.source, manifest.files)
    if len(records) != manifest.count:
        raise ValueError(f"{manifest.source}: {len(records)} images, {manifest.count} when the labelling began")
    check = np.array(manifest.check, dtype=np.int64)
    pool = np.setdiff1d(np.arange(manifest.count), check)
    train, checked = (_split(records, rows, manifest.classes, answers) for rows in (pool, check))
    # Without the answers, so that decoded images are found again after every cycle.
    content = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return RawData(tuple(manifest.classes), train, checked, checked, content)


def _split(records: EncodedRecords, rows: IntArray, classes: Sequence[str], answers: Mapping[str, str]) -> RawSplit:
    numbers = {name: number for number, name in enumerate(classes)}
    chosen = ChosenRecords(records, rows)
    given = (answers.get(chosen.describe(row)) for row in range(len(chosen)))
    labels = [UNKNOWN if answer is None else numbers[answer] for answer in given]
    return RawSplit(chosen, np.array(labels, dtype=np.int64))


class ChosenRecords(EncodedRecords):
    """Some of the images of another record set."""

    def __init__(self, records: EncodedRecords, rows: IntArray) -> None:
        self._records = records
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def describe(self, row: int) -> str:
        return self._records.describe(int(self._rows[row]))

    def blob(self, row: int) -> Tensor:
        return self._records.blob(int(self._rows[row]))

    def prepare(self) -> None:
        self._records.prepare()
