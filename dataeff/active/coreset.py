"""Greedy k-centre selection: the core-set query (spec initial_pools section 2.3, `coreset`).

The textbook computes the distance of every point to every new centre in float64. Here the same points come out of far
less work, because a point's distance to its nearest centre can only shrink as centres are added:

- An old value is an upper bound. Only points whose bound reaches the threshold of the current round are brought up to
  date, and most points of most pools are left alone for most of the time.
- A point that returns after many centres meets all of them in one matrix product, in float32.
- Every float32 value comes with a bound on its rounding error. Where that leaves more than one possible winner, the
  candidates are compared in float64, by the textbook's own formula, ties by priority. So the choice is the textbook's.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

DEFAULT_MEMORY_MB = 256.0
_BLOCK_MB = 8.0  # of a matrix product; larger ones leave the processor's cache
_ROUND = 2048  # points that a round looks at, and chooses among, to begin with
_WIDTH = 256  # centres in a matrix product
_TIDY = 32  # choices after which points below the threshold are put aside
_SAMPLE = 1024  # points that say where the middle is
_UNIT = 2.0**-24  # rounding error of float32, relative
_TINY = 1e-30  # and what underflow adds


class KCentre(NamedTuple):
    """Chosen rows in the order of choice, int64 [k], and the Euclidean distance of each to its nearest centre when it
    was chosen, float64 [k]; infinite for a first point chosen without any centre."""

    indices: IntArray
    distances: FloatArray


def greedy_k_centre(
    features: np.ndarray,
    k: int,
    priority: IntArray,
    centres: np.ndarray | None = None,
    memory_mb: float = DEFAULT_MEMORY_MB,
) -> KCentre:
    """Repeat k times: choose the point farthest from its nearest centre, and make it a centre.

    Equal to `textbook_k_centre`, row for row. The chosen points are within a factor of 2 of the smallest covering
    radius that any k points reach (Gonzalez 1985).

    Args:
        features: finite numbers [N, D].
        k: from 1 to N.
        priority: different whole numbers [N]; among points at the same distance the smallest is chosen. Without
            centres it also names the first point, so give a random permutation.
        centres: finite float [L, D], where the search starts, or None.
        memory_mb: bound on its work space in MiB, beyond a float32 copy of the features, 60 bytes a point, and the
            coordinates of the centres in float64 and float32.

    Raises:
        ValueError: k, or the memory, is out of range.
    """
    if not 1 <= k <= len(features):
        raise ValueError(f"k = {k} with {len(features)} points: must be from 1 to {len(features)}")
    if not memory_mb > 0:
        raise ValueError(f"memory_mb = {memory_mb}: must be above 0")
    return _Search(features, k, priority, centres, memory_mb).run(k)


def textbook_k_centre(features: np.ndarray, k: int, priority: IntArray, centres: np.ndarray | None = None) -> KCentre:
    """The definition that `greedy_k_centre` must agree with: every distance in float64, one centre at a time."""
    points = np.asarray(features, dtype=np.float64)
    nearest = np.full(len(points), np.inf)
    for centre in () if centres is None else np.asarray(centres, dtype=np.float64):
        nearest = np.minimum(nearest, ((points - centre) ** 2).sum(axis=1))
    chosen, distances = np.empty(k, np.int64), np.empty(k)
    for number in range(k):
        farthest = np.flatnonzero(nearest == nearest.max())
        index = farthest[np.argmin(priority[farthest])]
        chosen[number], distances[number] = index, np.sqrt(nearest[index])
        nearest = np.minimum(nearest, ((points - points[index]) ** 2).sum(axis=1))
        nearest[index] = -np.inf
    return KCentre(chosen, distances)


class _Search:
    """State of one search. Distances are squared, and in units of `scale`, but for those in `exact`.

    nearest: float64 [N], float32 distance of a point to the nearest of the first `seen` centres; -inf once chosen.
    upper: float64 [N], no less than the exact value of that; it stays true when there are more centres.
    exact: float64 [N], in float64 arithmetic to the first `exact_seen` centres, for the few points compared that way.
    """

    def __init__(
        self, features: np.ndarray, k: int, priority: IntArray, centres: np.ndarray | None, memory_mb: float
    ) -> None:
        given = np.empty((0, features.shape[1])) if centres is None else np.asarray(centres, dtype=np.float64)
        if features.dtype not in (np.float32, np.float64):
            features = features.astype(np.float64)
        self.features = features
        self.priority = priority
        numbers = memory_mb * 2**20 / 4  # of float32
        self.room = int(numbers / 2)  # for the points of a round
        self.block = int(min(_BLOCK_MB * 2**20 / 4, numbers / 8))  # for a product
        # Distances are the same from any origin and in any unit; float32 is at its best near 0 and around 1. The origin
        # is a median, so that a few outliers do not move it away from the others.
        self.origin = np.median(features[:: -(-len(features) // _SAMPLE)], axis=0)
        reach = max(self._reach(features), self._reach(given), 4 * float(np.finfo(features.dtype).tiny))
        self.scale = 2.0 ** math.ceil(math.log2(reach))  # a power of two: exact
        self.points = self._float32(features)
        self.norms = _squares(self.points)
        self.count = len(given)
        self.centres64 = np.empty((self.count + k, features.shape[1]))
        self.centres64[: self.count] = given
        self.centres = np.empty((features.shape[1], self.count + k), np.float32)  # columns -2 c: |x|^2 + |c|^2 - 2 x c
        shifted = self._float32(given)
        self.centres[:, : self.count] = -2 * shifted.T
        self.centre_norms = np.empty(self.count + k, np.float32)
        self.centre_norms[: self.count] = _squares(shifted)
        self.nearest = np.full(len(features), np.inf)
        self.upper = np.full(len(features), np.inf)
        self.seen = np.zeros(len(features), np.int64)
        self.exact = np.full(len(features), np.inf)
        self.exact_seen = np.zeros(len(features), np.int64)

    def run(self, k: int) -> KCentre:
        chosen: list[int] = []
        distances: list[float] = []
        if not self.count:
            chosen.append(int(np.argmin(self.priority)))
            distances.append(np.inf)
            self._add(chosen[0])
        self._bring_up_to_date(np.arange(len(self.points)), -np.inf)
        looked_at = kept = _ROUND
        while len(chosen) < k:
            before = len(chosen)
            threshold = self._threshold(looked_at, len(self.points) - before)
            rows = np.flatnonzero(self.upper >= threshold)
            self._bring_up_to_date(rows, threshold)
            rows = rows[self.upper[rows] >= threshold]
            crowded = len(rows) > kept
            if crowded:
                threshold = float(np.partition(self.upper[rows], -kept)[-kept])
                rows = rows[self.upper[rows] >= threshold]
            self._round(rows, threshold, k, chosen, distances)
            # A round that ends early had few points left once they were up to date, so the next looks at more. If it
            # chose none among many, float32 cannot tell them apart, and all those at the same distance must be there.
            short = len(chosen) - before < _TIDY
            looked_at = 2 * looked_at if short else max(_ROUND, looked_at // 2)
            kept = 2 * kept if crowded and len(chosen) == before else _ROUND
        return KCentre(np.array(chosen), np.sqrt(distances))

    def _blocks(self, rows: np.ndarray) -> Iterator[slice]:
        height = max(1, self.block // (4 * rows.shape[1]))
        return (slice(start, start + height) for start in range(0, len(rows), height))

    def _reach(self, rows: np.ndarray) -> float:
        """Largest coordinate as seen from the origin."""
        return max((float(np.abs(rows[part] - self.origin).max()) for part in self._blocks(rows)), default=0.0)

    def _float32(self, rows: np.ndarray) -> np.ndarray:
        converted = np.empty(rows.shape, np.float32)
        for part in self._blocks(rows):
            converted[part] = (rows[part] - self.origin) * rows.dtype.type(1 / self.scale)
        return converted

    def _threshold(self, size: int, left: int) -> float:
        """Upper bound of the point that is `size` from the top; of `left` points or more, below all of them."""
        if size >= left:
            return -np.finfo(np.float64).max
        return float(np.partition(self.upper, -size)[-size])

    def _error(self, nearest: FloatArray, norms: np.ndarray) -> FloatArray:
        """How far `nearest` may be from the exact value.

        A float32 product of D terms, norms and inputs are off by no more than unit * (D + 12) * (|x| + |c|)^2, and |c|
        is at most |x| + distance. Holds for later, smaller values too.
        """
        share = (self.points.shape[1] + 12) * _UNIT
        reach = 2 * np.sqrt(norms, dtype=np.float64) + np.sqrt(np.maximum(nearest, 0))
        return np.asarray(share / (1 - np.sqrt(share)) ** 2 * reach**2 + _TINY)

    def _distances(self, points: np.ndarray, norms: np.ndarray, first: int, last: int) -> np.ndarray:
        """Of `points` to the centres from `first` to before `last`, float32 [len(points), last - first]."""
        product = points @ self.centres[:, first:last]
        product += self.centre_norms[first:last]
        product += norms[:, None]
        return np.asarray(product)

    def _bring_up_to_date(self, rows: IntArray, threshold: float) -> None:
        """Let `rows` meet the centres they have missed, oldest first, until they fall below the threshold."""
        rows = rows[np.argsort(self.seen[rows], kind="stable")]
        height = max(1, self.block // _WIDTH)
        for start in range(0, len(rows), height):
            block = rows[start : start + height]
            first = int(self.seen[block[0]])
            while len(block) and first < self.count:
                last = min(first + _WIDTH, self.count)
                norms = self.norms[block]
                found = self._distances(self.points[block], norms, first, last).min(axis=1)
                self._record(block, np.minimum(self.nearest[block], found), last)
                block, first = block[self.upper[block] >= threshold], last

    def _record(self, rows: IntArray, nearest: FloatArray, seen: int) -> None:
        self.nearest[rows] = nearest
        self.upper[rows] = nearest + self._error(nearest, self.norms[rows])
        self.seen[rows] = seen

    def _round(self, rows: IntArray, threshold: float, k: int, chosen: list[int], distances: list[float]) -> None:
        """Choose among `rows`, which are up to date, while it is sure that no other point is farther."""
        norms, nearest = self.norms[rows], self.nearest[rows]
        points = self.points[rows] if len(rows) * self.points.shape[1] <= self.room else None
        errors = self._error(nearest, norms)
        while len(chosen) < k and len(rows):
            surely = float((nearest - errors).max())
            if surely < threshold:
                break
            candidates = np.flatnonzero(nearest + errors >= surely)
            winner = candidates[self._farthest(rows[candidates], nearest[candidates] + 2 * errors[candidates])]
            chosen.append(int(rows[winner]))
            distances.append(float(self.exact[rows[winner]]))
            self._add(chosen[-1])
            nearest = np.minimum(nearest, self._to_newest(rows, points, norms))
            nearest[winner] = -np.inf
            if len(chosen) % _TIDY == 0:
                keep = nearest + errors >= threshold
                self._record(rows[~keep], nearest[~keep], self.count)
                rows, norms, nearest, errors = rows[keep], norms[keep], nearest[keep], errors[keep]
                points = None if points is None else points[keep]
        self._record(rows, nearest, self.count)

    def _to_newest(self, rows: IntArray, points: np.ndarray | None, norms: np.ndarray) -> np.ndarray:
        """Float32 distances of `rows` to the newest centre; `points` is their copy, if there was room for one."""
        if points is not None:
            return np.asarray(self._distances(points, norms, self.count - 1, self.count)[:, 0])
        found = np.empty(len(rows), np.float32)
        height = max(1, self.block // self.points.shape[1])
        for start in range(0, len(rows), height):
            part = slice(start, start + height)
            found[part] = self._distances(self.points[rows[part]], norms[part], self.count - 1, self.count)[:, 0]
        return found

    def _add(self, row: int) -> None:
        self.centres64[self.count] = self.features[row]
        self.centres[:, self.count] = -2 * self.points[row]
        self.centre_norms[self.count] = self.norms[row]
        self.count += 1
        self.nearest[row] = self.upper[row] = -np.inf

    def _farthest(self, rows: IntArray, limits: FloatArray) -> int:
        """Position in `rows` of the exactly farthest point, ties by priority.

        Args:
            limits: a centre of a larger float32 distance is not the nearest.
        """
        stale = np.flatnonzero((self.exact_seen[rows] < self.count) & (self.exact[rows] > 0))
        height = max(1, self.block // max(_WIDTH, self.points.shape[1]))
        for start in range(0, len(stale), height):
            part = stale[start : start + height]
            self._meet_exactly(rows[part], limits[part])
        exact = self.exact[rows]
        farthest = np.flatnonzero(exact == exact.max())
        return int(farthest[np.argmin(self.priority[rows[farthest]])])

    def _meet_exactly(self, rows: IntArray, limits: FloatArray) -> None:
        """Bring `exact` of `rows` up to date: in float64, but only to centres that float32 cannot rule out."""
        points, norms = self.points[rows], self.norms[rows]
        for first in range(int(self.exact_seen[rows].min()), self.count, _WIDTH):
            last = min(first + _WIDTH, self.count)
            near, centres = np.nonzero(self._distances(points, norms, first, last) <= limits[:, None])
            step = max(1, self.block // self.points.shape[1] // 2)
            for start in range(0, len(near), step):
                pair = slice(start, start + step)
                mine, theirs = rows[near[pair]], centres[pair] + first
                difference = np.asarray(self.features[mine], dtype=np.float64) - self.centres64[theirs]
                np.minimum.at(self.exact, mine, (difference**2).sum(axis=1))
        self.exact_seen[rows] = self.count


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nd,nd->n", rows, rows, dtype=np.float64), dtype=np.float32)
