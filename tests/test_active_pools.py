"""Initial pools: each against a hand-computed case, and every bad input of spec initial_pools section 10."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dataeff.active.pools import (
    ClusterPool,
    DegenerateScoreError,
    RandomPool,
    SelfSupervisedLossPool,
    check_budget,
    hardest,
    random_pool,
    spread_over_clusters,
)

IMAGES = torch.arange(10).float().view(10, 1, 1, 1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class FakeTask:
    """Loss, embedding and cluster are the image's only pixel."""

    n_clusters = 10

    def loss_per_sample(self, images: Tensor) -> np.ndarray:
        return images.flatten().double().numpy()

    def features(self, images: Tensor) -> np.ndarray:
        return images.flatten(1).numpy()

    def assign(self, images: Tensor) -> np.ndarray:
        return images.flatten().long().numpy() // 5


# --- random -------------------------------------------------------------------------------------------------------


def test_the_random_pool_is_uniform_without_replacement_and_repeats_with_its_seed() -> None:
    chosen = random_pool(100, 30, rng(1))
    assert len(set(chosen.tolist())) == 30 and chosen.dtype == np.int64
    assert (chosen == RandomPool().select(torch.zeros(100, 1, 1, 1), 30, 10, rng(1))).all()
    counts = sum(np.bincount(random_pool(20, 5, rng(seed)), minlength=20) for seed in range(2000))
    assert np.abs(counts / 2000 - 0.25).max() < 0.05


# --- highest losses -----------------------------------------------------------------------------------------------


def test_the_highest_losses_are_chosen_hardest_first() -> None:
    assert hardest(np.array([0.1, 5.0, 3.0, 4.0, 0.2]), 3, rng()).tolist() == [1, 3, 2]


def test_the_loss_pool_takes_a_task_or_its_losses() -> None:
    from_task = SelfSupervisedLossPool(FakeTask()).select(IMAGES, 3, 10, rng())
    from_losses = SelfSupervisedLossPool(np.arange(10.0)).select(IMAGES, 3, 10, rng())
    assert from_task.tolist() == from_losses.tolist() == [9, 8, 7]


def test_losses_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="9 scores given for 10 images"):
        SelfSupervisedLossPool(np.arange(9.0)).select(IMAGES, 3, 10, rng())
    with pytest.raises(ValueError, match="8 cluster ids given for 10 images"):
        ClusterPool(np.zeros(8, np.int64)).select(IMAGES, 3, 10, rng())


@pytest.mark.parametrize(
    ("n_bins", "budget", "expected"),
    [
        # 20 images with scores 19 .. 0: two bins of ten; the hardest of the first, the EASIEST of the last.
        (2, 4, [19, 18, 1, 0]),
        # Five bins of four: 19-16, 15-12, 11-8, 7-4, 3-0.
        (5, 5, [19, 15, 11, 7, 0]),
        # What does not divide goes to the first bins.
        (5, 7, [19, 18, 15, 14, 11, 7, 0]),
        (10, 10, [19, 17, 15, 13, 11, 9, 7, 5, 3, 0]),
        # Fewer images than bins: the first bins have one each.
        (10, 3, [19, 17, 15]),
    ],
)
def test_binned_sampling_takes_hard_images_of_every_level_and_the_easiest(
    n_bins: int, budget: int, expected: list[int]
) -> None:
    assert hardest(np.arange(20.0), budget, rng(), n_bins).tolist() == expected


@pytest.mark.parametrize("n_bins", [1, 2, 5, 10])
def test_binned_sampling_returns_the_budget_whatever_it_is(n_bins: int) -> None:
    for available in (10, 13, 27):
        scores = rng(available).normal(size=available)
        for budget in range(1, available + 1):
            assert len(set(hardest(scores, budget, rng(), n_bins).tolist())) == budget


def test_the_order_of_the_pool_does_not_change_which_images_are_hardest() -> None:
    scores, order = rng(3).normal(size=50), rng(4).permutation(50)
    for n_bins in (1, 5):
        there = hardest(scores, 12, rng(), n_bins)
        assert order[hardest(scores[order], 12, rng(1), n_bins)].tolist() == there.tolist()


def test_equal_scores_go_by_the_seed_and_not_by_place() -> None:
    scores = np.array([1.0] * 100 + [0.0])
    first, again, other = (hardest(scores, 10, rng(seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other
    counts = sum(np.bincount(hardest(scores, 10, rng(seed)), minlength=101) for seed in range(1000))
    assert counts[100] == 0 and counts[:100].min() > 60 and counts[:100].max() < 145


@pytest.mark.parametrize("n_bins", [0, 3, 20])
def test_another_number_of_bins_is_refused(n_bins: int) -> None:
    with pytest.raises(ValueError, match=f"n_bins = {n_bins}: must be one of 1, 2, 5, 10"):
        hardest(np.arange(20.0), 4, rng(), n_bins)


def test_scores_that_rank_nothing_are_an_error_of_their_own() -> None:
    with pytest.raises(DegenerateScoreError, match="all 20 scores equal 0.25"):
        hardest(np.full(20, 0.25), 4, rng())
    with pytest.raises(DegenerateScoreError, match="2 of 4 scores are not finite"):
        hardest(np.array([1.0, np.nan, np.inf, 2.0]), 2, rng())
    hardest(rng().normal(size=20) * 3e-8, 4, rng())  # the published single-pair score: noise, but it can be compared


# --- clusters -----------------------------------------------------------------------------------------------------


def counts_of(clusters: np.ndarray, chosen: np.ndarray, n_clusters: int) -> list[int]:
    return np.bincount(clusters[chosen], minlength=n_clusters).tolist()


def test_equal_allocation_takes_the_same_number_of_each_cluster() -> None:
    clusters = np.repeat(np.arange(4), [40, 30, 20, 10])
    chosen = spread_over_clusters(clusters, 20, 4, rng())
    assert counts_of(clusters, chosen, 4) == [5, 5, 5, 5] and len(set(chosen.tolist())) == 20


def test_the_remainder_goes_one_by_one_to_random_clusters() -> None:
    clusters = np.repeat(np.arange(4), 25)
    seen = {tuple(counts_of(clusters, spread_over_clusters(clusters, 22, 4, rng(s)), 4)) for s in range(40)}
    assert len(seen) == 6 and all(sorted(counts) == [5, 5, 6, 6] for counts in seen)


def test_a_small_cluster_is_taken_whole_and_its_deficit_goes_to_the_others() -> None:
    clusters = np.repeat(np.arange(4), [40, 30, 2, 0])
    for seed in range(10):
        first, second, third, fourth = counts_of(clusters, spread_over_clusters(clusters, 20, 4, rng(seed)), 4)
        assert third == 2 and fourth == 0 and first + second == 18 and abs(first - second) <= 1


def test_proportional_allocation_rounds_by_largest_remainder() -> None:
    clusters = np.repeat(np.arange(3), [50, 34, 16])  # of 10: 5, 3.4, 1.6
    assert counts_of(clusters, spread_over_clusters(clusters, 10, 3, rng(), "proportional"), 3) == [5, 3, 2]
    clusters = np.repeat(np.arange(3), [5, 5, 5])  # of 10: 3 1/3 each, ties by the seed
    seen = {
        tuple(counts_of(clusters, spread_over_clusters(clusters, 10, 3, rng(s), "proportional"), 3)) for s in range(30)
    }
    assert seen == {(4, 3, 3), (3, 4, 3), (3, 3, 4)}


@pytest.mark.parametrize("allocation", ["equal", "proportional"])
@pytest.mark.filterwarnings("ignore:budget =", "ignore:cluster ")
def test_every_budget_is_met_exactly(allocation: str) -> None:
    clusters = rng(5).choice(6, size=40, p=[0.6, 0.2, 0.1, 0.05, 0.05, 0])
    for budget in range(1, 41):
        chosen = spread_over_clusters(clusters, budget, 6, rng(budget), allocation)  # type: ignore[arg-type]
        assert len(chosen) == len(set(chosen.tolist())) == budget


def test_images_of_a_cluster_are_drawn_at_random() -> None:
    clusters = np.repeat(np.arange(2), 50)
    picked = {tuple(sorted(spread_over_clusters(clusters, 4, 2, rng(seed)).tolist())) for seed in range(20)}
    assert len(picked) == 20


def test_the_cluster_pool_takes_a_clustering_or_its_ids() -> None:
    a = ClusterPool(FakeTask()).select(IMAGES, 4, 2, rng())
    b = ClusterPool(np.repeat(np.arange(2), 5)).select(IMAGES, 4, 2, rng())
    assert a.tolist() == b.tolist() and (a < 5).sum() == 2


def test_fewer_labels_than_clusters_is_one_each_at_random_with_a_warning() -> None:
    clusters = np.repeat(np.arange(10), 5)
    with pytest.warns(UserWarning, match="budget = 3 is below the 10 clusters"):
        chosen = [spread_over_clusters(clusters, 3, 10, rng(seed)) for seed in range(40)]
    assert all(len(set(clusters[c].tolist())) == 3 for c in chosen)
    assert set(clusters[np.concatenate(chosen)].tolist()) == set(range(10))


def test_one_cluster_that_holds_nearly_everything_is_reported() -> None:
    clusters = np.array([0] * 95 + [1] * 5)
    with pytest.warns(UserWarning, match="cluster 0 holds 95 of 100 images"):
        chosen = spread_over_clusters(clusters, 20, 2, rng())
    assert counts_of(clusters, chosen, 2) == [15, 5]
    with pytest.warns(UserWarning, match="cluster 1 holds 100 of 100"):
        assert len(spread_over_clusters(np.ones(100, np.int64), 20, 3, rng())) == 20


def test_cluster_ids_and_allocations_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="cluster ids from 0 to 3 with n_clusters = 3: must be from 0 to 2"):
        spread_over_clusters(np.arange(4), 2, 3, rng())
    with pytest.raises(ValueError, match="allocation = 'even': must be 'equal' or 'proportional'"):
        spread_over_clusters(np.arange(3), 3, 3, rng(), "even")  # type: ignore[arg-type]


# --- budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, -1, 11, 2.5, True, "3"])
def test_a_budget_out_of_range_is_refused_with_both_numbers(budget: object) -> None:
    match = f"budget = {budget!r} with 10 unlabelled images: must be a whole number from 1 to 10"
    pools = [RandomPool(), SelfSupervisedLossPool(np.arange(10.0)), ClusterPool(np.arange(10))]
    for pool in pools:
        with pytest.raises(ValueError, match=match):
            pool.select(IMAGES, budget, 10, rng())  # type: ignore[arg-type]


def test_numpy_whole_numbers_are_budgets_too() -> None:
    check_budget(np.int64(3), 10)  # type: ignore[arg-type]
