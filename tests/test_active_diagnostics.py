"""Diagnostics by hand: overlap and its chance level, class histograms, curves, paired tests that may say no."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from dataeff.active.diagnostics import (
    ClassHistogram,
    area_under_curve,
    class_histogram,
    hard_class_overlap,
    mean_and_std,
    paired_difference,
    plot_learning_curves,
    plot_tsne,
    pool_overlap,
)
from dataeff.active.toy import plot_toy, toy_gaussians, toy_run
from dataeff.data import longtail_subset

# --- pools --------------------------------------------------------------------------------------------------------


def test_overlap_by_hand_with_its_chance_level() -> None:
    pools = {"a": np.array([1, 2, 3, 4]), "b": np.array([4, 3, 9, 8]), "c": np.array([5, 6, 7, 0])}
    overlap = pool_overlap(pools, available=40)
    assert overlap.shares.tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]] and overlap.chance == 0.1
    text = str(overlap)
    assert "0.500" in text and "chance level of independent random pools: 0.100" in text


def test_random_pools_overlap_by_chance() -> None:
    rng = np.random.default_rng(0)
    overlap = pool_overlap({str(n): rng.permutation(1000)[:100] for n in range(12)}, 1000)
    others = overlap.shares[~np.eye(12, dtype=bool)]
    assert others.mean() == pytest.approx(overlap.chance, abs=0.01)


def test_pools_of_different_budgets_are_not_compared() -> None:
    with pytest.raises(ValueError, match="pools of different sizes: {'a': 2, 'b': 3}"):
        pool_overlap({"a": np.arange(2), "b": np.arange(3)}, 10)


def test_class_histogram_by_hand() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2, 3])
    histogram = class_histogram(np.array([0, 1, 2, 3, 4, 5]), labels, 4)
    assert histogram.counts.tolist() == [2, 1, 3, 0] and histogram.missing == [3] and histogram.ratio == math.inf
    assert histogram.variation == pytest.approx(math.sqrt(1.25) / 1.5)
    shares = np.array([1 / 3, 1 / 6, 1 / 2])
    assert histogram.entropy == pytest.approx(-(shares * np.log(shares)).sum() / math.log(4))


def test_a_balanced_pool_and_one_of_a_single_class() -> None:
    balanced, single = ClassHistogram(np.array([5, 5, 5])), ClassHistogram(np.array([0, 9, 0]))
    assert (balanced.variation, balanced.ratio, balanced.missing) == (0, 1, []) and balanced.entropy == pytest.approx(1)
    assert (single.entropy, single.missing) == (0, [0, 2]) and single.variation == pytest.approx(math.sqrt(2))


def test_hard_classes_by_hand() -> None:
    counts = np.array([9, 1, 8, 2, 7, 3])
    accuracy = np.array([0.2, 0.9, 0.5, 0.1, 0.3, math.nan])
    found = hard_class_overlap(counts, accuracy, top=3)
    assert found.most_sampled == [0, 2, 4] and found.hardest == [3, 0, 4]
    assert found.shared == [0, 4] and found.chance == 1.5
    assert hard_class_overlap(np.arange(100), np.arange(100.0)).chance == 1.0  # the source's case
    with pytest.raises(ValueError, match="top = 10 with 6 classes: must be from 1 to 6"):
        hard_class_overlap(counts, accuracy)


# --- learning curves ----------------------------------------------------------------------------------------------


def test_mean_and_standard_deviation_over_seeds() -> None:
    mean, std = mean_and_std(np.array([[0.5, 0.8], [0.7, 0.8]]))
    np.testing.assert_allclose(mean, [0.6, 0.8])
    np.testing.assert_allclose(std, [math.sqrt(0.02), 0])
    mean, std = mean_and_std(np.array([[0.5, 0.8]]))
    assert mean.tolist() == [0.5, 0.8] and np.isnan(std).all()


def test_the_area_under_a_curve_by_hand() -> None:
    shares = np.array([0.1, 0.2, 0.4])
    # Trapezoids: 0.1 * 0.55 + 0.2 * 0.7, over a range of 0.3.
    assert float(area_under_curve(shares, np.array([0.5, 0.6, 0.8]))) == pytest.approx((0.055 + 0.14) / 0.3)
    assert area_under_curve(shares, np.full((2, 3), 0.7)) == pytest.approx([0.7, 0.7])
    assert area_under_curve(shares[:1], np.array([[0.3], [0.4]])).tolist() == [0.3, 0.4]


def test_a_paired_difference_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 10):
        a, b = rng.normal(size=seeds), rng.normal(size=seeds) + 0.5
        ours, theirs = paired_difference(a, b), stats.ttest_rel(a, b)
        assert ours.p_value == pytest.approx(theirs.pvalue) and ours.mean == pytest.approx((a - b).mean())
        interval = theirs.confidence_interval(0.95)
        assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
        assert ours.std == pytest.approx((a - b).std(ddof=1)) and ours.seeds == seeds


def test_pairing_removes_what_seeds_have_in_common() -> None:
    seeds = np.array([0.70, 0.80, 0.90, 0.75])
    difference = paired_difference(seeds + np.array([0.010, 0.011, 0.009, 0.010]), seeds)
    assert difference.significant and difference.mean == pytest.approx(0.01)
    assert "4 seeds: significant" in str(difference)


def test_one_seed_allows_no_statement() -> None:
    difference = paired_difference(np.array([0.9]), np.array([0.1]))
    assert difference.mean == pytest.approx(0.8) and not difference.significant
    assert all(map(math.isnan, (difference.std, difference.low, difference.high, difference.p_value)))
    assert str(difference) == "+0.8000 (1 seed: no standard deviation, no statement)"


def test_a_mean_below_its_standard_deviation_is_never_significant() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(0.5, 1, size=200)  # p far below 0.05, and yet most of it is noise
    difference = paired_difference(a, np.zeros(200))
    assert difference.p_value < 0.001 and abs(difference.mean) < difference.std and not difference.significant
    assert "not significant" in str(difference)


def test_equal_curves_do_not_differ() -> None:
    same = paired_difference(np.array([0.5, 0.6]), np.array([0.5, 0.6]))
    assert same.p_value == 1 and not same.significant


def test_noise_is_called_significant_no_more_often_than_the_level_says() -> None:
    rng = np.random.default_rng(2)
    found = [paired_difference(*rng.normal(size=(2, 5))).significant for _ in range(1000)]
    assert np.mean(found) < 0.075


def test_unpaired_seeds_are_refused() -> None:
    for a, b in ((3, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"{a} and {b} seeds: a paired difference needs the same seeds"):
            paired_difference(np.zeros(a), np.zeros(b))


# --- figures ------------------------------------------------------------------------------------------------------


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24) or [])


def test_learning_curves_are_drawn_with_bands_where_there_are_seeds(tmp_path: Path) -> None:
    shares, curves = np.array([0.05, 0.1, 0.15]), np.random.default_rng(0).random((3, 3))
    plot_learning_curves({"random": curves, "vae": curves[:1]}, shares, tmp_path / "with.png", "me")
    plot_learning_curves({"random": curves[:1], "vae": curves[:1]}, shares, tmp_path / "without.png")
    assert colours(tmp_path / "with.png") > 50 and colours(tmp_path / "without.png") > 50


def test_tsne_keeps_classes_together_and_draws_a_panel_a_pool(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    features = 10 * np.eye(3)[labels] + 0.1 * rng.normal(size=(120, 3))
    pools = {"random": rng.permutation(120)[:30], "first": np.arange(30)}
    places = plot_tsne(features, pools, labels, tmp_path / "tsne.png")
    union = np.unique(np.concatenate(list(pools.values())))
    assert places.shape == (len(union), 2) and colours(tmp_path / "tsne.png") > 3
    distances = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(len(union))
    assert (labels[union][distances.argmin(axis=1)] == labels[union]).mean() > 0.95
    assert (places == plot_tsne(features, pools, labels, tmp_path / "again.png")).all()


def test_the_toy_points_are_two_even_classes() -> None:
    points, labels = toy_gaussians(500, 0)
    assert points.shape == (500, 2) and np.bincount(labels).tolist() == [250, 250]
    assert (toy_gaussians(500, 0)[0] == points).all() and (toy_gaussians(500, 1)[0] != points).any()
    with pytest.raises(ValueError, match="n = 1: must be at least 2"):
        toy_gaussians(1)


def test_in_the_toy_lc_and_me_ask_for_the_same_points_near_the_boundary(tmp_path: Path) -> None:
    runs = plot_toy(tmp_path / "toy.png")
    assert colours(tmp_path / "toy.png") > 50
    assert runs["lc"].labelled.tolist() == runs["me"].labelled.tolist() != runs["random"].labelled.tolist()
    nearer = []
    for seed in range(5):
        points, labels = toy_gaussians(500, seed)
        uncertain, random = toy_run(points, labels, "lc", seed), toy_run(points, labels, "random", seed)
        assert len(set(uncertain.labelled.tolist())) == 35 and (uncertain.labelled[:5] == random.labelled[:5]).all()
        distance = [np.abs(run.model.decision_function(points[run.labelled[5:]])).mean() for run in (uncertain, random)]
        nearer.append(distance[0] < distance[1])
    assert all(nearer)


# --- long tails (spec section 2.5) --------------------------------------------------------------------------------


def test_the_long_tail_of_cifar_has_the_sizes_of_the_source() -> None:
    labels = np.repeat(np.arange(10), 5000)
    sizes = np.bincount(labels[longtail_subset(labels, 50, 0)])
    assert sizes.tolist() == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100] and sizes.sum() == 13_996


def test_an_imbalance_that_empties_a_class_or_is_below_one_is_refused() -> None:
    labels = np.repeat(np.arange(3), 20)
    assert np.bincount(labels[longtail_subset(labels, 20, 0)]).tolist() == [20, 4, 1]
    with pytest.raises(ValueError, match="longtail=21: leaves a class empty, must be at most 20"):
        longtail_subset(labels, 21, 0)
    with pytest.raises(ValueError, match="longtail=0.5: must be at least 1"):
        longtail_subset(labels, 0.5, 0)
