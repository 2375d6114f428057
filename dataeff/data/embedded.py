"""The data sets that need no files: scikit-learn's handwritten digits, plain and with a known difficulty."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dataeff.data.sources import ArrayStore, RawData, RawSplit
from dataeff.data.spec import DataSpec
from dataeff.data.subsets import IntArray, stratified_split

CLASSES = tuple(str(digit) for digit in range(10))


def open_digits(spec: DataSpec) -> RawData:
    """`digits`: 1,797 real 8x8 digits, uint8 0..255, 70 % train and 30 % test, stratified, always the same cut."""
    (train_images, train_labels), (test_images, test_labels) = _original_sides()
    train = RawSplit(_store(_to_uint8(train_images), "digits train"), train_labels)
    test = RawSplit(_store(_to_uint8(test_images), "digits test"), test_labels)
    return RawData(CLASSES, train, None, test, _content(train, test))


def open_digits_easy_hard(spec: DataSpec) -> RawData:
    """`digits-easy-hard`: DigitsEasyHard of spec/skipnet.md, section 8.1, as uint8 images of 12x12 pixels.

    3,000 training and 1,000 test draws with replacement, each from its own side of the 70/30 cut. With probability 0.4
    an image is hard (flag `hard`): at a uniform offset in {0..4}^2 with Gaussian noise of standard deviation 0.25 (of
    the 0..1 range, clipped to it); otherwise it is centred and clean. `seed` draws images, offsets and noise.
    The validation images (`val` times 3,000) are drawn from originals cut off the training side first, so that no
    original is in both.
    """
    (images, labels), test_side = _original_sides()
    rest, cut = stratified_split(labels, spec.val, spec.seed)
    train = _easy_hard(images[rest], labels[rest], 3000, "digits-easy-hard train", (spec.seed, 0))
    test = _easy_hard(*test_side, 1000, "digits-easy-hard test", (spec.seed, 1))
    count = round(3000 * spec.val)
    val = _easy_hard(images[cut], labels[cut], count, "digits-easy-hard val", (spec.seed, 2)) if count else None
    return RawData(CLASSES, train, val, test, _content(train, test))


Side = tuple[NDArray[np.float64], IntArray]


def _original_sides() -> tuple[Side, Side]:
    """((images, labels), (images, labels)) for train and test; images float64 [N, 8, 8] in 0..1."""
    digits = load_digits()
    parts = train_test_split(
        digits.images / 16.0, digits.target.astype(np.int64), test_size=0.3, stratify=digits.target, random_state=0
    )
    return (parts[0], parts[2]), (parts[1], parts[3])


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
    return RawSplit(_store(_to_uint8(canvas), name), labels[chosen], {"hard": hard})


def _to_uint8(images: NDArray[np.float64]) -> NDArray[np.uint8]:
    scaled: NDArray[np.uint8] = np.rint(images.clip(0, 1) * 255).astype(np.uint8)
    return scaled


def _store(images: NDArray[np.uint8], name: str) -> ArrayStore:
    return ArrayStore(torch.from_numpy(images[:, None]), name)


def _content(*splits: RawSplit) -> str:
    digest = hashlib.sha256()
    for split in splits:
        assert isinstance(split.pixels, ArrayStore)
        digest.update(split.pixels.read(np.arange(len(split.labels))).numpy().tobytes())
        digest.update(split.labels.tobytes())
    return digest.hexdigest()
