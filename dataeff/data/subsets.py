"""Choosing images by label: stratified splits, stratified labelled subsets, long tails."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def stratified_subset(labels: IntArray, n: int, seed: int) -> IntArray:
    """Draw `n` of the images so that every class keeps its share.

    Shares are rounded by largest remainder, and every class that occurs gets at least one image.

    Args:
        labels: int64 [N].
        n: images to keep, from the number of classes that occur to N.
        seed: the draw is a pure function of (labels, n, seed).

    Returns:
        Sorted indices, int64 [n].

    Raises:
        ValueError: `n` out of range.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if not len(classes) <= n <= len(labels):
        raise ValueError(
            f"labels={n}: must be from {len(classes)} (one a class) to {len(labels)} (all training images)"
        )
    return _draw(labels, classes, _quotas(counts, n, at_least=1), seed)


def stratified_split(labels: IntArray, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Cut `fraction` of the images off, every class by its share.

    Returns:
        (rest, cut): sorted indices, int64; `cut` has round(fraction * N) of them.
    """
    classes, counts = np.unique(labels, return_counts=True)
    cut = _draw(labels, classes, _quotas(counts, round(fraction * len(labels)), at_least=0), seed)
    return np.setdiff1d(np.arange(len(labels)), cut), cut


def longtail_subset(labels: IntArray, ratio: float, seed: int) -> IntArray:
    """Make the classes exponentially imbalanced: class k of K keeps n_0 * ratio ** (-k / (K - 1)) images.

    n_0 is the smallest class's count, so that the first class has `ratio` times the images of the last (Cui et al.,
    "Class-Balanced Loss", CVPR 2019, section 5.1); sizes are truncated. From 10 classes of 5000, ratio 50 leaves 5000,
    3237, 2096, 1357, 878, 568, 368, 238, 154 and 100 images (spec initial_pools section 2.5).

    Args:
        labels: int64 [N].
        ratio: largest class over smallest class, at least 1.
        seed: the draw is a pure function of (labels, ratio, seed).

    Returns:
        Sorted indices, int64.

    Raises:
        ValueError: `ratio` is below 1, or so large that it leaves a class without images.
    """
    if not ratio >= 1:
        raise ValueError(f"longtail={ratio}: must be at least 1 (largest class over smallest)")
    classes, counts = np.unique(labels, return_counts=True)
    decay = np.arange(len(classes)) / max(1, len(classes) - 1)
    # The small amount: a whole number on paper may come out just below it.
    quotas = np.floor(counts.min() * ratio**-decay + 1e-9).astype(np.int64)
    if (quotas < 1).any():
        raise ValueError(f"longtail={ratio}: leaves a class empty, must be at most {counts.min()} (its smallest class)")
    return _draw(labels, classes, quotas, seed)


def _quotas(counts: IntArray, n: int, at_least: int) -> IntArray:
    exact = counts * (n / counts.sum())
    quotas: IntArray = np.maximum(np.floor(exact).astype(np.int64), at_least)
    while quotas.sum() != n:
        step = 1 if quotas.sum() < n else -1
        movable = quotas < counts if step > 0 else quotas > at_least
        gap = np.where(movable, step * (exact - quotas), -np.inf)
        quotas[np.argmax(gap)] += step
    return quotas


def _draw(labels: IntArray, classes: IntArray, quotas: IntArray, seed: int) -> IntArray:
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(np.flatnonzero(labels == c))[:quota] for c, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
