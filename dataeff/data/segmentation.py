"""Images with a class for every pixel: `shapes` and `parquet:DIR` with a column of masks.

A row is read as one uint8 array of C + 1 planes: the image, and 255 minus the class of every pixel. So streams, shifts
and crops treat both alike, and what a shift pads with (0) is the ignore label 255.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dataeff.data.decode import BadImageError, centre_crop, fit_to_size
from dataeff.data.fingerprint import files_fingerprint, text_fingerprint
from dataeff.data.parquet import ParquetImages, ParquetRecords
from dataeff.data.shapes_segmentation import IGNORE, NOISE, ShapesSegmentation
from dataeff.data.sources import ImageSource, Store
from dataeff.data.spec import DataSpec, parse_spec
from dataeff.data.splits import Splits
from dataeff.data.subsets import IntArray
from dataeff.data.transforms import Augment, Preprocess

MASK_COLUMNS = ("label", "mask", "annotation")
OPTIONS = ("labels", "seed", "val", "test", "size")
SHAPES_SIZE, SHAPES_TRAIN, SHAPES_OTHER = 64, 600, 200
NO_CLASS = 254
KEEP_BYTES = 256 * 2**20


def open_segmentation(text: str) -> Splits:
    """Open a data set whose images have a class for every pixel.

    `shapes`: rendered scenes of 64 x 64 pixels, 600 for training, 200 each for validation and test.
    `parquet:DIR`: an image column as for classification and one of masks, PNG files whose grey values are classes,
    named `label`, `mask` or `annotation`. The schema metadata (`huggingface`) of that column lists `classes` (or
    `names`), and may name the number of one that does not count as `ignore`; 255 never counts.

    Options, after `?` and joined by `&`:

    - `size=N`: scale to cover N x N, then cut the centre out; masks by the nearest pixel.
    - `labels=N`: N training images, evenly spaced.
    - `val=F` (0.1), `test=F` (0.2): where files are missing. Without test files the validation files are the test
      split. What is cut is the end of the training rows: neighbouring frames of a film are nearly equal.
    - `seed=S` (0): of the rendered scenes.

    Returns:
        Splits whose `image_shape` is (C, H, W) while `images()` of train, val and test gives C + 1 planes (see
        `unpack`); their `labels` are 0.

    Raises:
        FileNotFoundError: no such folder, or no training files in it.
        ValueError: another kind of data or option; files without masks or class names; while reading, an image or mask
            that cannot be decoded or do not fit each other, or a class outside the list, naming file and row.
    """
    spec = parse_spec(text)
    unknown = sorted(spec.given - set(OPTIONS))
    if spec.kind not in ("shapes", "parquet") or unknown:
        what = f"option {unknown[0]!r}" if unknown else f"'{spec.kind}'"
        raise ValueError(
            f"'{text}': {what} is not for images with classes of pixels; give shapes or parquet:DIR with "
            f"{', '.join(OPTIONS)}"
        )
    splits = _open_shapes(spec) if spec.kind == "shapes" else _open_parquet(spec)
    if spec.labels is None:
        return splits
    if spec.labels > len(splits.train):
        raise ValueError(f"labels={spec.labels}: the training split has {len(splits.train)} images only")
    rows = np.linspace(0, len(splits.train) - 1, spec.labels).round().astype(np.int64)
    return Splits(**{**vars(splits), "train": splits.train.subset(rows)})


def unpack(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Preprocessed rows float32 (B, C + 1, H, W) -> images (B, C, H, W), and classes int64 (B, H, W) with 255 for
    pixels that do not count."""
    return pairs[:, :-1].contiguous(), pairs[:, -1].long()


class PairPreprocess(Preprocess):
    """`Preprocess` of the image planes; the last plane becomes the classes."""

    @classmethod
    def fit(cls, source: ImageSource, size: tuple[int, int] | None = None) -> Self:
        """See `Preprocess.fit`; `source` holds pairs."""
        images = ImageSource(_Images(source), source.labels)
        return cls(**Preprocess.fit(images, size).to_dict())

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C + 1, H, W) -> float32 (B, C + 1, *size)."""
        classes = 255.0 - centre_crop(images[:, -1:], self.size).float()
        return torch.cat([super().__call__(images[:, :-1]), classes], 1)

    def cropped(self, size: tuple[int, int]) -> Self:
        """The same for crops of another size."""
        return self.model_copy(update={"size": size})


class RandomCrop(Augment):
    """A window of the network's input size at a random place, up to `padding` pixels outside the image, mirrored or not
    ("shift_flip"); "none" cuts the centre out."""

    def __call__(self, images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 (B, C, H, W), draws float64 (B, 2 or 3) -> (B, C, *size)."""
        padding = self.padding or max(1, size[0] // 8)
        padded = functional.pad(images, (padding,) * 4)
        room = torch.tensor([padded.shape[2] - size[0] + 1, padded.shape[3] - size[1] + 1])
        corners = (draws[:, :2] * room).long().tolist()
        windows = [
            image[:, top : top + size[0], left : left + size[1]]
            for image, (top, left) in zip(padded, corners, strict=True)
        ]
        if self.kind == "shift_flip":
            flips = (draws[:, 2] < 0.5).tolist()
            windows = [w.flip(-1) if flip else w for w, flip in zip(windows, flips, strict=True)]
        return torch.stack(windows)


class _Images:
    """The image planes of pairs."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        channels, height, width = source.image_shape
        self.shape = (channels - 1, height, width)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows: IntArray) -> Tensor:
        return self._source.images(rows)[:, :-1]

    def describe(self, row: int) -> str:
        return self._source.describe(row)


# --- rendered scenes --------------------------------------------------------------------------------------------------


class _RenderedPairs:
    """Scenes of `ShapesSegmentation` as pairs; values from -1 - NOISE to 1 + NOISE become 0..255."""

    def __init__(self, scenes: ShapesSegmentation) -> None:
        self._scenes = scenes
        self.shape = (4, scenes.size, scenes.size)

    def __len__(self) -> int:
        return len(self._scenes)

    def read(self, rows: IntArray) -> Tensor:
        if not len(rows):
            return torch.empty(0, *self.shape, dtype=torch.uint8)
        images, classes = self._scenes.batch(rows.tolist())
        limit = 1 + NOISE
        pixels = ((images + limit) / (2 * limit) * 255).round().clamp(0, 255).to(torch.uint8)
        return torch.cat([pixels, (255 - classes).to(torch.uint8)[:, None]], 1)

    def describe(self, row: int) -> str:
        return f"shapes image {row}"


def _open_shapes(spec: DataSpec) -> Splits:
    idle = sorted(spec.given & {"val", "test"})
    if idle:
        raise ValueError(f"{idle[0]}= has no effect on '{spec.text}', which has all its splits: leave it out")
    size = spec.size or SHAPES_SIZE
    total = SHAPES_TRAIN + 2 * SHAPES_OTHER
    store = _RenderedPairs(ShapesSegmentation(total, size, spec.seed))
    source = _pairs(store)
    train, val, test = np.split(np.arange(total), [SHAPES_TRAIN, SHAPES_TRAIN + SHAPES_OTHER])
    return Splits(
        name=spec.text,
        train=source.subset(train),
        val=source.subset(val),
        test=source.subset(test),
        classes=ShapesSegmentation.classes,
        image_shape=(3, size, size),
        fingerprint=text_fingerprint("shapes segmentation", size, spec.seed, spec.labels),
        skipped=0,
    )


def _pairs(store: Store) -> ImageSource:
    return ImageSource(store, np.zeros(len(store), dtype=np.int64))


# --- Parquet ----------------------------------------------------------------------------------------------------------


class ParquetMasks(ParquetImages):
    """The column of masks of a Parquet file.

    Attributes:
        classes, ignored: names of all classes, and the number of the one that does not count, or None.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, labelled=False)
        schema = pq.read_schema(path)
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        column = self.image_column.partition(".")[0]
        described = metadata.get("info", {}).get("features", {}).get(column, {})
        self.classes: list[str] = described.get("classes") or described.get("names") or []
        self.ignored: int | None = described.get("ignore")
        if not self.classes or (self.ignored is not None and not 0 <= self.ignored <= 255):
            raise ValueError(
                f"{path.name}: the schema metadata must list the 'classes' of column '{column}', and may name one as "
                f"'ignore'; got {described}"
            )

    def _find_image_column(self, schema: pa.Schema) -> str:
        for name in MASK_COLUMNS:
            kind = schema.field(name).type if name in schema.names else None
            if kind is not None and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return f"{name}.bytes"
            if kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                return name
        raise ValueError(
            f"{self.path.name}: no column of masks ({', '.join(MASK_COLUMNS)}: encoded images); its columns are "
            f"{', '.join(schema.names)}"
        )


class _ParquetPairs:
    """Images and masks, decoded when they are read; kept if all of them take at most `KEEP_BYTES`.

    Args:
        size: side that both are brought to; None keeps them, and refuses other sizes than the first image's.
        table: class of every grey value, uint8 (256,), with `IGNORE`; values without a class are 254.
        classes: how many there are, for messages.
    """

    def __init__(
        self, images: ParquetRecords, masks: ParquetRecords, size: int | None, table: NDArray[np.uint8], classes: int
    ) -> None:
        self._images, self._masks, self._size = images, masks, size
        self._table, self._classes = torch.from_numpy(table), classes
        first = images.open_named(0)
        height, width = (first.height, first.width) if size is None else (size, size)
        self.shape = (4, height, width)
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._images)

    def read(self, rows: IntArray) -> Tensor:
        found = [self._kept[row] if row in self._kept else self._read(row) for row in rows.tolist()]
        if len(self) * math.prod(self.shape) <= KEEP_BYTES:
            self._kept |= dict(zip(rows.tolist(), found, strict=True))
        return torch.stack(found) if found else torch.empty(0, *self.shape, dtype=torch.uint8)

    def describe(self, row: int) -> str:
        return self._images.describe(row)

    def _read(self, row: int) -> Tensor:
        try:
            image, mask = self._images.load(row, 3), self._masks.load(row, 1)
        except BadImageError as error:
            raise self._images.named(row, error) from None
        if image.shape[1:] != mask.shape[1:]:
            raise self._images.named(
                row,
                BadImageError(f"has an image of {list(image.shape[1:])} and a mask of {list(mask.shape[1:])} pixels"),
            )
        classes = self._table[mask.long()]
        if bool((classes == NO_CLASS).any()):
            value = int(mask[classes == NO_CLASS][0])
            raise self._images.named(
                row, BadImageError(f"has a pixel of class {value}, outside the class list (0 to {self._classes - 1})")
            )
        if self._size is not None:
            size = (self._size, self._size)
            image, classes = fit_to_size(image, size), fit_classes(classes, size)
        elif image.shape[1:] != self.shape[1:]:
            raise self._images.named(
                row,
                BadImageError(
                    f"is {list(image.shape[1:])} pixels, the first image {list(self.shape[1:])}; give size=N"
                ),
            )
        return torch.cat([image, 255 - classes])


def fit_classes(classes: Tensor, size: tuple[int, int]) -> Tensor:
    """`fit_to_size` for class maps uint8 (1, H, W): the nearest pixel instead of a mean."""
    height, width = classes.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    if scaled != (height, width):
        classes = functional.interpolate(classes[None].float(), size=scaled, mode="nearest-exact")[0].to(torch.uint8)
    return centre_crop(classes, size)


def class_table(classes: Sequence[str], ignored: int | None) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
    """The classes that count, and the number of each grey value among them, uint8 (256,): 255 to ignore, 254 none."""
    table = np.full(256, NO_CLASS, dtype=np.uint8)
    counted = [number for number in range(len(classes)) if number != ignored]
    table[counted] = np.arange(len(counted))
    table[[IGNORE, *([] if ignored is None else [ignored])]] = IGNORE
    return tuple(classes[number] for number in counted), table


def _open_parquet(spec: DataSpec) -> Splits:
    root = Path(spec.location).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"parquet:{spec.location}: no such folder")
    files = {name: sorted(root.glob(f"{name}*.parquet")) for name in ("train", "val", "test")}
    if not files["train"]:
        raise FileNotFoundError(f"parquet:{spec.location}: no train*.parquet in this folder")
    masks = {name: [ParquetMasks(path) for path in paths] for name, paths in files.items()}
    listed = [(file.classes, file.ignored) for parts in masks.values() for file in parts]
    if any(entry != listed[0] for entry in listed):
        raise ValueError(f"parquet:{spec.location}: the files list different classes: {listed[0][0]} and others")
    classes, table = class_table(*listed[0])
    if not 1 <= len(classes) <= NO_CLASS:
        raise ValueError(f"parquet:{spec.location}: {len(classes)} classes count; they must be 1 to {NO_CLASS}")

    def read(name: str) -> ImageSource:
        images = ParquetRecords([ParquetImages(path, labelled=False) for path in files[name]])
        store = _ParquetPairs(images, ParquetRecords(list(masks[name])), spec.size, table, len(listed[0][0]))
        images.prepare()
        return _pairs(store)

    found: dict[str, Any] = {name: read(name) for name, paths in files.items() if paths}
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    for name in ("test", "val"):
        if name in found:
            if name in spec.given:
                raise ValueError(f"{name}= has no effect on '{spec.text}', which has files for it: leave it out")
            continue
        count = round(getattr(spec, name) * len(found["train"]))
        rows = np.arange(len(found["train"]))
        found["train"], found[name] = (
            found["train"].subset(rows[: len(rows) - count]),
            found["train"].subset(rows[len(rows) - count :]),
        )
    height, width = found["train"].image_shape[1:]
    content = files_fingerprint(root, [path for paths in files.values() for path in paths])
    options = sorted((name, getattr(spec, name)) for name in OPTIONS)
    return Splits(
        name=spec.text,
        **found,
        classes=classes,
        image_shape=(3, height, width),
        fingerprint=text_fingerprint("segmentation", content, options),
        skipped=0,
    )
