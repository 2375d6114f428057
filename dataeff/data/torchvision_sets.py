"""`torchvision:NAME?root=DIR`: the classification sets of torchvision.datasets, from files that are already there."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from dataeff.data.decode import BadImageError
from dataeff.data.sources import PillowRecords, RawData, RawSplit
from dataeff.data.spec import DataSpec, nearest
from dataeff.data.subsets import IntArray

_FINGERPRINT_IMAGES = 64


def open_torchvision(spec: DataSpec) -> RawData:
    """Open a set by its class name. Downloads only with `download=1`."""
    names = sorted(name for name in datasets.__all__ if "root" in inspect.signature(getattr(datasets, name)).parameters)
    if spec.location not in names:
        raise ValueError(
            f"torchvision:{spec.location}: no such data set{nearest(spec.location, names)}; known: {', '.join(names)}"
        )
    train = _load(spec, "train")
    test = _load(spec, "test")
    val = _load(spec, "val")
    assert train is not None
    split_labels = {name: _labels(data) for name, data in (("train", train), ("val", val), ("test", test)) if data}
    classes = tuple(str(c) for c in getattr(train, "classes", range(1 + int(split_labels["train"].max()))))
    digest = hashlib.sha256(spec.location.encode())
    splits: dict[str, RawSplit] = {}
    for name, data in (("train", train), ("val", val), ("test", test)):
        if data is not None:
            records = TorchvisionRecords(data, f"torchvision:{spec.location} {name}")
            splits[name] = RawSplit(records, split_labels[name])
            digest.update(split_labels[name].tobytes())
            for row in np.linspace(0, len(data) - 1, _FINGERPRINT_IMAGES).astype(np.int64).tolist():
                digest.update(np.asarray(records.open(row)).tobytes())
    return RawData(classes, splits["train"], splits.get("val"), splits.get("test"), digest.hexdigest())


class TorchvisionRecords(PillowRecords):
    """The images of a torchvision data set."""

    def __init__(self, data: Any, name: str) -> None:
        self._data = data
        self._name = name

    def __len__(self) -> int:
        return len(self._data)

    def describe(self, row: int) -> str:
        return f"{self._name} image {row}"

    def open(self, row: int) -> Image.Image:
        try:
            image = self._data[row][0]
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImageError(f"is not a readable image ({str(error).splitlines()[0]})") from None
        assert isinstance(image, Image.Image)
        return image


def _load(spec: DataSpec, split: str) -> Any | None:
    """The named split, or None where the class has no such split."""
    constructor = getattr(datasets, spec.location)
    parameters = inspect.signature(constructor).parameters
    arguments: dict[str, Any] = {"root": spec.root}
    if "train" in parameters:
        if split == "val":
            return None
        arguments["train"] = split == "train"
    elif "split" in parameters:
        arguments["split"] = split
    else:
        raise ValueError(f"torchvision:{spec.location} has no train and test split: use parquet: or folder: instead")
    if spec.download and "download" in parameters:
        arguments["download"] = True
    try:
        return constructor(**arguments)
    except ValueError:
        if split == "train":
            raise
        return None
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"torchvision:{spec.location}: the {split} files are not under {spec.root} "
            f"({str(error).splitlines()[0]}); put them there, or add download=1"
        ) from None


def _labels(data: Any) -> IntArray:
    for name in ("targets", "labels", "_labels"):
        if hasattr(data, name):
            return np.asarray(getattr(data, name), dtype=np.int64)
    return np.array([data[i][1] for i in range(len(data))], dtype=np.int64)
