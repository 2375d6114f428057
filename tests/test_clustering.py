"""Cluster metrics, k-means in blocks, and exact nearest neighbours."""

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans as ScikitKMeans

from dataeff.metrics.clustering import cluster_accuracy, cluster_metrics, purity
from dataeff.metrics.kmeans import assign_to_centres, kmeans, reseed_empty
from dataeff.metrics.neighbours import block_rows, nearest_neighbours, squared_distances


def blobs(seed: int, count: int = 600, clusters: int = 5, dims: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, clusters, count)
    centres = rng.normal(size=(clusters, dims)) * 8
    return (centres[labels] + rng.normal(size=(count, dims))).astype(np.float32), labels


def test_accuracy_is_that_of_the_best_matching_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        predicted, true = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
        best = max(np.mean(np.array(names)[predicted] == true) for names in itertools.permutations(range(4)))
        assert cluster_accuracy(predicted, true) == pytest.approx(best)


def test_names_of_clusters_do_not_matter_and_chance_has_no_ari() -> None:
    true = np.repeat(np.arange(5), 200)
    perfect = cluster_metrics((true + 3) % 5, true)
    assert perfect == {"cluster_accuracy": 1.0, "nmi": pytest.approx(1.0), "ari": 1.0, "purity": 1.0}
    random = cluster_metrics(np.random.default_rng(0).integers(0, 5, 1000), true)
    assert abs(random["ari"]) < 0.02 and random["nmi"] < 0.03 and random["cluster_accuracy"] < 0.3


def test_more_clusters_than_classes_can_be_pure_but_not_accurate() -> None:
    predicted, true = np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])
    assert purity(predicted, true) == 1.0 and cluster_accuracy(predicted, true) == 0.5


def test_metrics_refuse_arrays_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="one entry an image, got 2 and 3"):
        cluster_accuracy(np.array([0, 1]), np.array([0, 1, 1]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_k_means_is_as_good_as_scikit_learn(seed: int) -> None:
    points, _ = blobs(seed)
    ours = kmeans(points, 5, seed)
    theirs = ScikitKMeans(5, n_init=4, random_state=seed).fit(points)
    assert ours.inertia <= theirs.inertia_ * 1.001
    assert np.array_equal(ours.labels, assign_to_centres(points, ours.centres))
    assert cluster_accuracy(ours.labels, theirs.labels_) == 1.0


def test_small_blocks_and_memory_mapped_points_give_the_same_clusters(tmp_path: Path) -> None:
    points, _ = blobs(3, count=2000)
    mapped = np.memmap(tmp_path / "points", np.float32, "w+", shape=points.shape)
    mapped[:] = points
    whole, part = kmeans(points, 5, 0), kmeans(mapped, 5, 0, memory_mib=0.02)
    assert cluster_accuracy(whole.labels, part.labels) == 1.0
    assert part.inertia == pytest.approx(whole.inertia, rel=1e-5)


def test_k_means_repeats_itself() -> None:
    points, _ = blobs(1)
    one, two = kmeans(points, 7, 5), kmeans(points, 7, 5)
    assert np.array_equal(one.centres, two.centres)


def test_an_empty_cluster_starts_again_beside_a_full_one() -> None:
    centres, counts = np.array([[1.0, 2.0], [9.0, 9.0], [5.0, 5.0]]), np.array([10, 0, 0])
    moved = reseed_empty(centres, counts, np.random.default_rng(0))
    assert np.array_equal(moved[0], centres[0])
    np.testing.assert_allclose(moved[1:], [[1.0, 2.0]] * 2, rtol=1e-3)
    assert len(np.unique(moved, axis=0)) == 3


def test_points_that_are_all_alike_end_in_one_cluster_without_error() -> None:
    found = kmeans(np.ones((20, 3), np.float32), 4, 0)
    assert np.isfinite(found.centres).all() and found.inertia < 1e-5 and set(found.labels) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_clusters": 0}, "n_clusters = 0 must be from 1 to 600"),
        ({"n_clusters": 601}, "n_clusters = 601 must be from 1 to 600"),
        ({"n_clusters": 3, "restarts": 0}, "restarts = 0 must be at least 1"),
        ({"n_clusters": 3, "memory_mib": 1e-6}, "does not hold one row"),
    ],
)
def test_k_means_refuses_what_it_cannot_do(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(blobs(0)[0], seed=0, **arguments)  # type: ignore[arg-type]


def test_k_means_refuses_points_that_are_not_finite() -> None:
    points = blobs(0)[0]
    points[3, 1] = np.nan
    with pytest.raises(ValueError, match="needs finite points"):
        kmeans(points, 3, 0)


def test_neighbours_are_those_of_the_full_matrix() -> None:
    points, _ = blobs(2, count=300)
    full = ((points[:, None].astype(np.float64) - points[None]) ** 2).sum(2)
    np.testing.assert_allclose(squared_distances(points, points), full, atol=1e-3)
    np.fill_diagonal(full, np.inf)
    assert np.array_equal(nearest_neighbours(points, 5), np.argsort(full, axis=1)[:, :5])
    queries = points[:7] + 0.01
    assert np.array_equal(nearest_neighbours(points, 1, queries)[:, 0], np.arange(7))


def test_neighbours_of_many_points_never_need_the_full_matrix() -> None:
    import tracemalloc

    points = np.random.default_rng(0).normal(size=(12_000, 8)).astype(np.float32)
    tracemalloc.start()
    nearest_neighbours(points, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000 * 12_000 * 4 / 20


def test_neighbours_refuse_more_than_there_are_and_blocks_a_bound_below_a_row() -> None:
    with pytest.raises(ValueError, match="neighbours = 5 must be from 1 to 4"):
        nearest_neighbours(np.zeros((5, 2)), 5)
    with pytest.raises(ValueError, match="memory_mib = 0.001 does not hold one row"):
        block_rows(4096, 0.001)


def test_k_means_keeps_its_memory_bound() -> None:
    points = np.random.default_rng(0).standard_normal((40_000, 64), dtype=np.float32)
    tracemalloc.start()
    kmeans(points, 5, seed=0, restarts=1, tolerance=1e9, memory_mib=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    labels = 8 * len(points)
    assert peak - 2 * labels < 1.2 * 2 * 2**20
