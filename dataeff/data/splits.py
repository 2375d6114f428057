"""`open_splits`: from a data string to train, validation and test images."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name

import numpy as np

from dataeff.data.cache import bad_images, build_cached, open_cached
from dataeff.data.fingerprint import text_fingerprint
from dataeff.data.sources import (
    UNKNOWN,
    ArrayStore,
    DecodingStore,
    ImageSource,
    RawData,
    RawSplit,
    Records,
    Store,
    first_shape,
)
from dataeff.data.spec import DataSpec, parse_spec
from dataeff.data.subsets import longtail_subset, stratified_split, stratified_subset

_FORMAT = 1  # part of every key: raise it when decoding or resizing changes pixels

# Modules are imported when their data is asked for: matplotlib and torchvision take seconds.
_OPENERS: dict[str, str] = {
    "digits": "dataeff.data.embedded:open_digits",
    "digits-easy-hard": "dataeff.data.embedded:open_digits_easy_hard",
    "digit-pairs": "dataeff.data.embedded:open_digit_pairs",
    "letters": "dataeff.data.rendered:open_letters",
    "rendered-digits": "dataeff.data.rendered:open_rendered_digits",
    "parquet": "dataeff.data.parquet:open_parquet",
    "folder": "dataeff.data.folder:open_folder",
    "labelling": "dataeff.data.labelling:open_labelling",
    "torchvision": "dataeff.data.torchvision_sets:open_torchvision",
}
_UNLABELLED = {"parquet": "dataeff.data.parquet:open_unlabelled", "folder": "dataeff.data.folder:open_unlabelled"}


@dataclass(frozen=True)
class Splits:
    """An opened data set.

    Attributes:
        name: the data string, as given.
        train, val, test: the splits; `val` is empty with `val=0`.
        classes: class names; label k is `classes[k]`.
        image_shape: (C, H, W) of every image.
        fingerprint: SHA-256 over the data's content (see `files_fingerprint`) and the options that select from it;
            `cache` and the folder's place do not enter.
        skipped: images dropped by `on_bad_image=skip`, over all splits.
    """

    name: str
    train: ImageSource
    val: ImageSource
    test: ImageSource
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    fingerprint: str
    skipped: int


def open_splits(text: str) -> Splits:
    """Open the data set that `text` names.

    Sources: `digits`, `digits-easy-hard`, `digit-pairs`, `letters`, `rendered-digits`, `parquet:DIR`, `folder:DIR`,
    `torchvision:NAME?root=DIR[&download=1]`, `labelling:DIR` (see `labelling.py`).
    Options, after `?` and joined by `&`:

    - `labels=N`: keep a stratified labelled subset of N training images.
    - `rate=P`: the same for P percent of them; every class keeps at least one image.
    - `longtail=R`: make the training classes exponentially imbalanced, largest R times the smallest (before `labels`).
    - `seed=S` (0): of every cut and subset.
    - `val=F` (0.1): fraction cut from train, stratified, where the source has no validation split; 0 for none.
    - `test=F` (0.2): the same for the test split, cut first.
    - `size=N`: bring every image to N x N (scaled to cover, then centre-cropped).
    - `channels=1|3`: default as the first training image.
    - `cache=DIR`: keep decoded images there. The first opening decodes the whole set once; worth it wherever an image
      is read more than once. In-memory sets ignore it.
    - `on_bad_image=error|skip`: `skip` decodes everything once when the set is opened (remembered in the cache folder)
      and drops what fails.

    Without a cache, the headers of up to 2,000 images a split are checked here and the rest when they are read.

    Example::

        splits = open_splits("parquet:cifar10?labels=500&cache=decoded")
        images = splits.train.images([0, 1])     # uint8 [2, 3, 32, 32]

    Raises:
        FileNotFoundError: no such folder, or no training files in it.
        ValueError: a bad option, label, image (`BadImageError`), mixed sizes or a class without training images, naming
            the file and row.
    """
    spec = parse_spec(text)
    if spec.kind not in _OPENERS:
        raise ValueError(f"'{text}' has classes of pixels, not of images: it is for segmentation methods")
    raw: RawData = resolve_name(_OPENERS[spec.kind])(spec)
    _refuse_idle_fraction(spec, "val", raw.val is not None and spec.kind not in ("digits-easy-hard", "digit-pairs"))
    _refuse_idle_fraction(spec, "test", raw.test is not None)
    key = text_fingerprint(_FORMAT, raw.content)
    train, skipped = _prepare(spec, raw.train, f"{key}-train", None)
    _refuse_empty_classes(train, raw.classes)
    others: dict[str, ImageSource] = {}
    for name, raw_split in (("test", raw.test), ("val", raw.val)):
        if raw_split is not None:
            others[name], dropped = _prepare(spec, raw_split, f"{key}-{name}", train.image_shape)
            skipped += dropped
        else:
            rest, cut = stratified_split(train.labels, getattr(spec, name), spec.seed)
            train, others[name] = train.subset(rest), train.subset(cut)
    if spec.longtail is not None:
        train = train.subset(longtail_subset(train.labels, spec.longtail, spec.seed))
    if spec.labels is not None:
        train = train.subset(stratified_subset(train.labels, spec.labels, spec.seed))
    if spec.rate is not None:
        count = max(len(raw.classes), round(spec.rate / 100 * len(train)))
        train = train.subset(stratified_subset(train.labels, count, spec.seed))
    _refuse_empty_classes(train, raw.classes)
    return Splits(
        name=text,
        train=train,
        val=others["val"],
        test=others["test"],
        classes=raw.classes,
        image_shape=train.image_shape,
        fingerprint=text_fingerprint(_FORMAT, raw.content, sorted(spec.selection().items(), key=str)),
        skipped=skipped,
    )


def open_images(text: str) -> ImageSource:
    """The training images that `text` names, for what reads no label: `parquet:` may lack the column `label`, and
    `folder:` the folders of classes.

    The labels of such images are `UNKNOWN`, and nothing is cut off for other splits.

    Raises:
        FileNotFoundError, ValueError: as `open_splits`; options that choose by label, for images without labels.
    """
    spec = parse_spec(text)
    raw: RawData | None = resolve_name(_UNLABELLED[spec.kind])(spec) if spec.kind in _UNLABELLED else None
    if raw is None:
        return open_splits(text).train
    idle = sorted(spec.given & {"labels", "rate", "longtail", "val", "test"})
    if idle:
        raise ValueError(f"'{text}': its images have no labels to choose by: leave {idle[0]}= out")
    return _prepare(spec, raw.train, f"{text_fingerprint(_FORMAT, raw.content)}-train", None)[0]


def _prepare(spec: DataSpec, raw: RawSplit, key: str, shape: tuple[int, int, int] | None) -> tuple[ImageSource, int]:
    """A file-level split as images of one shape (the training split's, where known), and how many fell out."""
    if isinstance(raw.pixels, ArrayStore):
        return ImageSource(raw.pixels.reshaped(spec.size, spec.channels), raw.labels, raw.flags), 0
    bad = bad_images(spec.cache, key, raw.pixels) if spec.on_bad_image == "skip" else {}
    rows = np.setdiff1d(np.arange(len(raw.labels)), np.array(list(bad), dtype=np.int64))
    if not len(rows):
        raise ValueError(f"no image is readable: {next(iter(bad.values()), 'the files hold no rows')}")
    store = _open_store(spec, raw.pixels, rows, f"{key}-{spec.size}-{spec.channels}-{spec.on_bad_image}", shape)
    flags = {name: values[rows] for name, values in raw.flags.items()}
    return ImageSource(store, raw.labels[rows], flags, rows), len(bad)


def _open_store(
    spec: DataSpec, records: Records, rows: np.ndarray, key: str, shape: tuple[int, int, int] | None
) -> Store:
    if spec.cache is not None:
        cached = open_cached(spec.cache, key, records)
        if cached is not None:
            return cached
    first = int(rows[0])
    if shape is None:
        shape, reference = first_shape(records, first, spec.size, spec.channels), records.describe(first)
    else:
        reference = "the first training image"
    store = DecodingStore(records, shape, spec.size is not None, reference)
    store.check_sizes(rows)
    if spec.cache is not None:
        return build_cached(spec.cache, key, store, set(range(len(records))) - set(rows.tolist()))
    records.prepare()
    return store


def _refuse_idle_fraction(spec: DataSpec, name: str, exists: bool) -> None:
    if exists and name in spec.given:
        raise ValueError(f"{name}= has no effect on '{spec.text}', which has its own {name} split: leave it out")


def _refuse_empty_classes(train: ImageSource, classes: tuple[str, ...]) -> None:
    empty = [name for k, name in enumerate(classes) if not (train.labels == k).any()]
    if empty and not (train.labels == UNKNOWN).any():
        raise ValueError(f"class '{empty[0]}' has no images in the training split ({len(empty)} such classes)")
