"""k-means over points that may not fit into memory: k-means++ seeding, restarts, Lloyd's iterations block by block.

scikit-learn's KMeans copies all points and moves an empty cluster to a far point; here memory has a bound, and an empty
cluster starts again beside a non-empty one (spec initial_pools_active_learning section 2.2 h).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus

from dataeff.metrics.neighbours import MEMORY_MIB, FloatArray, block_rows, blocks, squared_distances

PERTURBATION = 1e-4
MAX_ITERATIONS = 300


@dataclass(frozen=True)
class KMeans:
    """What `kmeans` found.

    centres: float (K, D); labels: int64 (N,); inertia: sum of squared distances of the points to their centres.
    """

    centres: FloatArray
    labels: NDArray[np.int64]
    inertia: float


def kmeans(
    points: FloatArray,
    n_clusters: int,
    seed: int,
    restarts: int = 4,
    tolerance: float = 1e-4,
    memory_mib: float = MEMORY_MIB,
) -> KMeans:
    """The best of several runs of Lloyd's algorithm, each from a k-means++ seeding.

    Args:
        points: float (N, D), also memory-mapped.
        n_clusters: K.
        seed: the result is a pure function of the arguments.
        restarts: runs; the one of the least inertia is kept.
        tolerance: a run ends when the centres move by less than this, squared, times the points' mean variance.
        memory_mib: bound on what is held besides the points and the labels; seeding looks at as many points as fit.

    Raises:
        ValueError: fewer points than clusters, points that are not finite, or a bound that holds no point.
    """
    if not 1 <= n_clusters <= len(points):
        raise ValueError(f"n_clusters = {n_clusters} must be from 1 to {len(points)}, the number of points")
    if restarts < 1:
        raise ValueError(f"restarts = {restarts} must be at least 1")
    variance = _mean_variance(points, memory_mib)
    if not math.isfinite(variance):
        raise ValueError("k-means needs finite points; some are NaN or infinite")
    runs = (
        _lloyd(points, _seeding(points, n_clusters, rng, memory_mib), rng, tolerance * variance, memory_mib)
        for rng in np.random.default_rng(seed).spawn(restarts)
    )
    return min(runs, key=lambda run: run.inertia)


def assign_to_centres(points: FloatArray, centres: FloatArray, memory_mib: float = MEMORY_MIB) -> NDArray[np.int64]:
    """(N,) number of the nearest centre of each point (N, D), ties by the lower number."""
    rows = block_rows(_row_bytes(points, len(centres)), memory_mib)
    parts = [squared_distances(np.asarray(points[part]), centres).argmin(1) for part in blocks(len(points), rows)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _row_bytes(points: FloatArray, n_clusters: int) -> float:
    return float(points.dtype.itemsize * (points.shape[1] + 2 * n_clusters))


def _mean_variance(points: FloatArray, memory_mib: float) -> float:
    sums = np.zeros((2, points.shape[1]))
    for part in blocks(len(points), block_rows(24 * points.shape[1], memory_mib)):
        block = np.asarray(points[part], np.float64)
        sums += [block.sum(0), np.square(block).sum(0)]
    mean, square = sums / len(points)
    variance: NDArray[np.float64] = np.maximum(square - mean**2, 0)
    mean_variance: float = variance.mean().item()
    return mean_variance


def _seeding(points: FloatArray, n_clusters: int, rng: np.random.Generator, memory_mib: float) -> FloatArray:
    # scikit-learn holds the distances of a few candidates to all points in float64.
    per_row = 8 * (points.shape[1] + 2 * (3 + math.log(n_clusters)))
    rows = max(n_clusters, block_rows(per_row, memory_mib))
    looked_at = points if rows >= len(points) else points[np.sort(rng.choice(len(points), rows, replace=False))]
    centres, _ = kmeans_plusplus(np.asarray(looked_at), n_clusters, random_state=int(rng.integers(2**31)))
    found: FloatArray = centres
    return found


def _lloyd(
    points: FloatArray, centres: FloatArray, rng: np.random.Generator, tolerance: float, memory_mib: float
) -> KMeans:
    n_clusters = len(centres)
    rows = block_rows(_row_bytes(points, n_clusters), memory_mib)
    for _ in range(MAX_ITERATIONS):
        sums, counts = np.zeros(centres.shape), np.zeros(n_clusters, np.int64)
        for part in blocks(len(points), rows):
            block = np.asarray(points[part])
            labels = squared_distances(block, centres).argmin(1)
            members = np.zeros((n_clusters, len(block)), points.dtype)
            members[labels, np.arange(len(block))] = 1
            sums += members @ block
            counts += np.bincount(labels, minlength=n_clusters)
        moved = reseed_empty(sums / np.maximum(counts, 1)[:, None], counts, rng).astype(points.dtype)
        shift = float(np.square(moved - centres, dtype=np.float64).sum())
        centres = moved
        if shift <= tolerance and counts.all():
            break
    labels = assign_to_centres(points, centres, memory_mib)
    inertia = 0.0
    # A block, its centres, the differences, and their squares in float64.
    rows = block_rows(points.shape[1] * (3 * points.dtype.itemsize + 8), memory_mib)
    for part in blocks(len(points), rows):
        inertia += float(np.square(np.asarray(points[part]) - centres[labels[part]], dtype=np.float64).sum())
    return KMeans(centres, labels, inertia)


def reseed_empty(centres: NDArray[np.float64], counts: NDArray[np.int64], rng: np.random.Generator) -> FloatArray:
    """Centres (K, D) with every empty cluster's centre beside that of a non-empty one, drawn in proportion to its
    points (N of them in all, by `counts` (K,)); the perturbation splits the cluster."""
    centres = centres.copy()
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        parents = rng.choice(len(counts), len(empty), p=counts / counts.sum())
        scale = PERTURBATION * np.maximum(np.abs(centres[parents]), PERTURBATION)
        centres[empty] = centres[parents] + scale * rng.uniform(-1, 1, (len(empty), centres.shape[1]))
    return centres
