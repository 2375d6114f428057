"""The data sets that need no files of the user's: handwritten digits, plain and with a known difficulty.

`digits.npz` holds the Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, UCI Machine Learning Repository,
CC BY 4.0) as scikit-learn's `load_digits` gives them, and two of its stratified cuts: importing scikit-learn for them
would cost every process of a job seconds. tests/test_data_sources.py makes the same arrays with scikit-learn.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dataeff.data.sources import ArrayStore, RawData, RawSplit
from dataeff.data.spec import DataSpec
from dataeff.data.subsets import IntArray, stratified_split

CLASSES = tuple(str(digit) for digit in range(10))
DIGITS = Path(__file__).with_name("digits.npz")


def open_digits(spec: DataSpec) -> RawData:
    """`digits`: 1,797 real 8x8 digits, uint8 0..255, 70 % train and 30 % test, stratified, always the same cut."""
    (train_images, train_labels), (test_images, test_labels) = _sides("train", "test")
    train = RawSplit(array_store(to_uint8(train_images), "digits train"), train_labels)
    test = RawSplit(array_store(to_uint8(test_images), "digits test"), test_labels)
    return RawData(CLASSES, train, None, test, content_of(train, test))


def open_digits_easy_hard(spec: DataSpec) -> RawData:
    """`digits-easy-hard`: DigitsEasyHard of spec/skipnet.md, section 8.1, as uint8 images of 12x12 pixels.

    3,000 training and 1,000 test draws with replacement, each from its own side of the 70/30 cut. With probability 0.4
    an image is hard (flag `hard`): at a uniform offset in {0..4}^2 with Gaussian noise of standard deviation 0.25 (of
    the 0..1 range, clipped to it); otherwise it is centred and clean. `seed` draws images, offsets and noise.
    The validation images (`val` times 3,000) are drawn from originals cut off the training side first, so that no
    original is in both.
    """
    (images, labels), test_side = _sides("train", "test")
    rest, cut = stratified_split(labels, spec.val, spec.seed)
    train = _easy_hard(images[rest], labels[rest], 3000, "digits-easy-hard train", (spec.seed, 0))
    test = _easy_hard(*test_side, 1000, "digits-easy-hard test", (spec.seed, 1))
    count = round(3000 * spec.val)
    val = _easy_hard(images[cut], labels[cut], count, "digits-easy-hard val", (spec.seed, 2)) if count else None
    return RawData(CLASSES, train, val, test, content_of(train, test))


def open_digit_pairs(spec: DataSpec) -> RawData:
    """`digit-pairs`: two-digit images of spec/hydranet.md, section 8.1, as uint8 images of 8x16 pixels in 100 classes.

    12,000 training and 3,000 test pairs, each side by side from its own side of a 1200/597 cut of the originals, label
    10 * left + right, with Gaussian noise of standard deviation 0.25 of the 0..1 range. The range -0.75 to 1.75 becomes
    0..255, so that noise is clipped beyond three deviations only. `seed` draws pairs and noise. The validation pairs
    (`val` times 12,000) are drawn from originals cut off the training side first.
    """
    (images, labels), (test_images, test_labels) = _sides("pairs_train", "pairs_test")
    rest, cut = stratified_split(labels, spec.val, spec.seed)
    train = _pairs(images[rest], labels[rest], 12_000, "digit-pairs train", (spec.seed, 0))
    test = _pairs(test_images, test_labels, 3_000, "digit-pairs test", (spec.seed, 1))
    count = round(12_000 * spec.val)
    val = _pairs(images[cut], labels[cut], count, "digit-pairs val", (spec.seed, 2)) if count else None
    classes = tuple(f"{number:02d}" for number in range(100))
    return RawData(classes, train, val, test, content_of(train, test))


def _pairs(images: NDArray[np.float64], labels: IntArray, count: int, name: str, seed: tuple[int, int]) -> RawSplit:
    rng = np.random.default_rng(seed)
    left, right = rng.integers(len(images), size=(2, count))
    pairs = np.concatenate([images[left], images[right]], axis=2) + rng.normal(0.0, 0.25, size=(count, 8, 16))
    return RawSplit(array_store(to_uint8((pairs + 0.75) / 2.5), name), 10 * labels[left] + labels[right])


Side = tuple[NDArray[np.float64], IntArray]


def _sides(train: str, test: str) -> tuple[Side, Side]:
    """((images, labels), (images, labels)) of two of the stored cuts' sides; images float64 [N, 8, 8] in 0..1."""
    with np.load(DIGITS) as stored:
        images, labels = stored["images"] / 16.0, stored["labels"].astype(np.int64)
        rows, test_rows = stored[train], stored[test]
    return (images[rows], labels[rows]), (images[test_rows], labels[test_rows])


def _easy_hard(images: NDArray[np.float64], labels: IntArray, count: int, name: str, seed: tuple[int, int]) -> RawSplit:
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(images), size=count)
    hard = rng.random(count) < 0.4
    offsets = np.where(hard[:, None], rng.integers(0, 5, size=(count, 2)), 2)
    noise = rng.normal(0.0, 0.25, size=(count, 12, 12))
    canvas = np.zeros((count, 12, 12))
    for image, original, (top, left) in zip(canvas, images[chosen], offsets, strict=True):
        image[top : top + 8, left : left + 8] = original
    canvas += noise * hard[:, None, None]
    return RawSplit(array_store(to_uint8(canvas), name), labels[chosen], {"hard": hard})


def to_uint8(images: NDArray[np.float64]) -> NDArray[np.uint8]:
    scaled: NDArray[np.uint8] = np.rint(images.clip(0, 1) * 255).astype(np.uint8)
    return scaled


def array_store(images: NDArray[np.uint8], name: str) -> ArrayStore:
    return ArrayStore(torch.from_numpy(images[:, None]), name)


def content_of(*splits: RawSplit) -> str:
    digest = hashlib.sha256()
    for split in splits:
        assert isinstance(split.pixels, ArrayStore)
        digest.update(split.pixels.read(np.arange(len(split.labels))).numpy().tobytes())
        digest.update(split.labels.tobytes())
    return digest.hexdigest()
