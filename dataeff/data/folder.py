"""`folder:DIR`: one folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataeff.data.fingerprint import files_fingerprint
from dataeff.data.sources import UNKNOWN, EncodedRecords, RawData, RawSplit
from dataeff.data.spec import DataSpec
from dataeff.data.subsets import IntArray

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


def open_folder(spec: DataSpec) -> RawData:
    """Open `DIR/train/CLASS/*` (with `val/` and `test/` where present), or `DIR/CLASS/*` with splits cut by seed.

    The classes are the sorted folder names of the training split. Files whose suffix is not an image's are ignored.
    """
    root = _root(spec)
    folders = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in _SPLIT_FOLDERS.items()
    }
    if folders["train"] is None:
        folders = {"train": root, "val": None, "test": None}
    train_folder = folders["train"]
    assert train_folder is not None
    classes = tuple(path.name for path in _class_folders(train_folder))
    if not classes:
        raise FileNotFoundError(f"folder:{spec.location}: no class folders in {train_folder.name}/")
    listed = {split: _list_images(root, folder, classes) for split, folder in folders.items() if folder is not None}
    splits = {split: RawSplit(FolderRecords(root, files), labels) for split, (files, labels) in listed.items()}
    content = files_fingerprint(root, [path for files, _ in listed.values() for path in files])
    return RawData(classes, splits["train"], splits.get("val"), splits.get("test"), content)


def open_unlabelled(spec: DataSpec) -> RawData | None:
    """All images of a folder without folders in it: all `UNKNOWN`, no classes; None where there are folders.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
    """
    root = _root(spec)
    if _class_folders(root):
        return None
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"folder:{spec.location}: no images (files named {' '.join(sorted(SUFFIXES))})")
    train = RawSplit(FolderRecords(root, files), np.full(len(files), UNKNOWN, np.int64))
    return RawData((), train, None, None, files_fingerprint(root, files))


def _root(spec: DataSpec) -> Path:
    root = Path(spec.location).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"folder:{spec.location}: no such folder")
    return root


class FolderRecords(EncodedRecords):
    """Image files, read whenever they are asked for."""

    def __init__(self, root: Path, files: list[Path]) -> None:
        self._root = root
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def describe(self, row: int) -> str:
        return self._files[row].relative_to(self._root).as_posix()

    def blob(self, row: int) -> Tensor:
        return torch.from_numpy(np.fromfile(self._files[row], dtype=np.uint8))


def _class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list_images(root: Path, folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], IntArray]:
    files: list[Path] = []
    labels: list[int] = []
    for class_folder in _class_folders(folder):
        where = class_folder.relative_to(root).as_posix()
        if class_folder.name not in classes:
            raise ValueError(f"{where}/: this class is not in the training split, which has {', '.join(classes)}")
        images = sorted(path for path in class_folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not images:
            raise ValueError(f"{where}/: this class has no images (files named {' '.join(sorted(SUFFIXES))})")
        files += images
        labels += [classes.index(class_folder.name)] * len(images)
    return files, np.array(labels, dtype=np.int64)
