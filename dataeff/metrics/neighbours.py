"""Exact distances and nearest neighbours in blocks: never an N x N matrix, and memory within a bound.

Points are NumPy arrays, memory-mapped ones included: only a block of them is in memory at a time.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

FloatArray = NDArray[np.floating[Any]]

MEMORY_MIB = 256.0


def block_rows(bytes_per_row: float, memory_mib: float = MEMORY_MIB) -> int:
    """How many rows of `bytes_per_row` fit into `memory_mib`.

    Raises:
        ValueError: not even one row does.
    """
    rows = int(memory_mib * 2**20 // bytes_per_row)
    if rows < 1:
        raise ValueError(
            f"memory_mib = {memory_mib:g} does not hold one row of {bytes_per_row / 2**20:.3g} MiB; raise the bound"
        )
    return rows


def blocks(count: int, rows: int) -> Iterator[slice]:
    """Slices of `rows` rows that cover `count` rows in order."""
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def squared_distances(a: FloatArray, b: FloatArray) -> FloatArray:
    """Squared Euclidean distances (len(a), len(b)) by one matrix product; rounding never makes them negative."""
    distances: FloatArray = a @ b.T
    distances *= -2
    distances += np.einsum("ij,ij->i", a, a)[:, None]
    distances += np.einsum("ij,ij->i", b, b)
    np.maximum(distances, 0, out=distances)
    return distances


def nearest_neighbours(points: FloatArray, count: int, queries: FloatArray | None = None) -> NDArray[np.int64]:
    """The `count` nearest of `points` for each query, nearest first, by scikit-learn's exact search in blocks.

    Args:
        points: float (N, D).
        count: neighbours a query.
        queries: float (Q, D); None: the points themselves, without each point as its own neighbour.

    Returns:
        int64 (Q, count).

    Raises:
        ValueError: fewer than `count` (other) points.
    """
    others = len(points) - (queries is None)
    if not 1 <= count <= others:
        raise ValueError(f"neighbours = {count} must be from 1 to {others}, the number of other points")
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(points)
    found: NDArray[np.int64] = search.kneighbors(queries, return_distance=False)
    return found
