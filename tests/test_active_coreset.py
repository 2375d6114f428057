"""Greedy k-centre: row for row the textbook's choice, whatever the data; near the optimum; within its memory."""

import itertools
import tracemalloc

import numpy as np
import pytest

import dataeff.active.coreset as coreset
from dataeff.active.coreset import greedy_k_centre, textbook_k_centre


def mixture(rng: np.random.Generator, size: int, dimensions: int) -> np.ndarray:
    centres = 3 * rng.normal(size=(20, dimensions))
    return centres[rng.integers(20, size=size)] + rng.normal(size=(size, dimensions)) * rng.uniform(0.1, 1, (size, 1))


def brute_force(features: np.ndarray, k: int, priority: np.ndarray, centres: np.ndarray) -> list[int]:
    """No running minimum, no arrays: every distance of every point to every centre, at every choice."""
    chosen: list[int] = []
    while len(chosen) < k:
        spots = [*centres, *features[chosen]]
        left = [row for row in range(len(features)) if row not in chosen]
        reach = {row: min(float(((features[row] - c) ** 2).sum()) for c in spots) for row in left}
        chosen.append(min(left, key=lambda row: (-reach[row], priority[row])))
    return chosen


def test_the_farthest_points_by_hand() -> None:
    line = np.array([[0.0], [1.0], [4.0], [9.0], [10.0]])
    picked = greedy_k_centre(line, 3, np.arange(5), centres=np.array([[0.0]]))
    # 10 is 10 away; then 4 is 4 from 0; then 1 is 1 from 0 and 9 is 1 from 10: a tie.
    assert picked.indices.tolist() == [4, 2, 1] and picked.distances.tolist() == [10, 4, 1]
    assert greedy_k_centre(line, 3, np.arange(5)[::-1], np.array([[0.0]])).indices.tolist() == [4, 2, 3]
    first = greedy_k_centre(line, 2, np.array([3, 4, 0, 1, 2]))
    assert first.indices.tolist() == [2, 4] and first.distances.tolist() == [np.inf, 6]


def test_both_ways_agree_with_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        features, centres, priority = rng.normal(size=(25, 3)), rng.normal(size=(4, 3)), rng.permutation(25)
        expected = brute_force(features, 25, priority, centres)
        assert greedy_k_centre(features, 25, priority, centres).indices.tolist() == expected
        assert textbook_k_centre(features, 25, priority, centres).indices.tolist() == expected


def test_the_choice_covers_within_twice_the_optimum() -> None:
    rng = np.random.default_rng(1)
    for seed in range(20):
        points = rng.normal(size=(12, 2)) * rng.uniform(0.2, 3, size=(12, 1))
        distances = np.linalg.norm(points[:, None] - points, axis=2)
        chosen = greedy_k_centre(points, 3, np.random.default_rng(seed).permutation(12)).indices
        optimum = min(distances[:, list(c)].min(axis=1).max() for c in itertools.combinations(range(12), 3))
        assert distances[:, chosen].min(axis=1).max() <= 2 * optimum + 1e-12


RNG = np.random.default_rng(2)
HARD_CASES = {
    "gaussian float32": RNG.normal(size=(3000, 24)).astype(np.float32),
    "mixture": mixture(RNG, 3000, 24),
    "rectified": np.maximum(mixture(RNG, 3000, 32), 0).astype(np.float32),
    "whole numbers, ties everywhere": RNG.integers(0, 3, size=(2000, 5)).astype(np.float64),
    "integers": RNG.integers(-50, 50, size=(1500, 6)),
    "halves": RNG.normal(size=(1500, 6)).astype(np.float16),
    "subnormal": (1e-40 * RNG.normal(size=(1500, 4))).astype(np.float32),
    "bits": RNG.integers(0, 2, size=(2000, 24)).astype(np.float32),
    "duplicates of 40 points": RNG.normal(size=(40, 8))[RNG.integers(40, size=2000)],
    "all equal": np.ones((600, 4)),
    "closer than float32 can tell": 1 + 1e-9 * RNG.normal(size=(1500, 8)),
    "far from the origin": 1e5 + RNG.normal(size=(1500, 8)),
    "one far outlier": np.concatenate([RNG.normal(size=(1500, 8)), np.full((1, 8), 1e9)]),
    "tiny": 1e-25 * RNG.normal(size=(1500, 8)),
    "huge": 1e25 * RNG.normal(size=(1500, 8)),
    "one dimension": RNG.normal(size=(1500, 1)),
}


@pytest.mark.parametrize("name", HARD_CASES)
@pytest.mark.parametrize("memory_mb", [256.0, 0.05])
def test_the_selection_is_the_textbooks_bit_for_bit(name: str, memory_mb: float) -> None:
    features = HARD_CASES[name]
    rng = np.random.default_rng(3)
    priority = rng.permutation(len(features))
    ours, textbook = (
        greedy_k_centre(features, 250, priority, memory_mb=memory_mb),
        textbook_k_centre(features, 250, priority),
    )
    assert ours.indices.tolist() == textbook.indices.tolist()
    assert ours.distances.tolist() == textbook.distances.tolist()
    centres = features[rng.permutation(len(features))[:60]] * 1.1
    ours = greedy_k_centre(features, 100, priority, centres, memory_mb)
    assert ours.indices.tolist() == textbook_k_centre(features, 100, priority, centres).indices.tolist()


def test_neighbouring_values_are_told_apart_in_float64() -> None:
    """Two candidates whose distances differ by one part in 10^12, far below what float32 resolves."""
    features = np.zeros((500, 2))
    features[7], features[300] = (5.0, 0.0), (0.0, 5.0 + 1e-12)
    for priority in (np.arange(500), np.arange(500)[::-1]):
        assert greedy_k_centre(features, 1, priority, np.zeros((1, 2))).indices.tolist() == [300]


def test_most_distances_are_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = 0
    distances = coreset._Search._distances

    def counted(self: coreset._Search, points: np.ndarray, *rest: int) -> np.ndarray:
        nonlocal computed
        found = distances(self, points, *rest)
        computed += found.size
        return found

    monkeypatch.setattr(coreset._Search, "_distances", counted)
    features = mixture(np.random.default_rng(4), 20_000, 16).astype(np.float32)
    greedy_k_centre(features, 400, np.arange(20_000))
    assert computed < 0.5 * 400 * 20_000


def test_work_space_stays_within_the_bound() -> None:
    features = mixture(np.random.default_rng(5), 40_000, 32).astype(np.float32)
    centres = features[:2000] + 0.5  # 40,000 x 2,000 distances would take 305 MiB in float32
    peaks = []
    for memory_mb in (4.0, 64.0):
        tracemalloc.start()
        greedy_k_centre(features, 50, np.arange(40_000), centres, memory_mb)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    own = features.nbytes / 2**20 + 60 * len(features) / 2**20 + 4 * centres.nbytes / 2**20
    assert peaks[0] <= own + 4 and peaks[0] < peaks[1] <= own + 64


@pytest.mark.parametrize("k", [0, 6])
def test_more_points_than_there_are_cannot_be_chosen(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} with 5 points: must be from 1 to 5"):
        greedy_k_centre(np.zeros((5, 2)), k, np.arange(5))


def test_a_memory_bound_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_mb = 0: must be above 0"):
        greedy_k_centre(np.zeros((5, 2)), 1, np.arange(5), memory_mb=0)
