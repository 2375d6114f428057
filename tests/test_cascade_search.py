"""Thresholds by search, and the arithmetic of rates and costs (spec idk_cascades sections 2.3, 2.4, 2.8, 5 and 6)."""

import itertools

import numpy as np
import pytest
import torch

from dataeff.cascades.idk.cascade import (
    HumanExpert,
    Tally,
    agreement_profile,
    average_cost,
    evaluate_tables,
    exit_stages,
)
from dataeff.cascades.idk.fit import CurvePoint, FitConfig, fit_cascade
from dataeff.cascades.idk.search import (
    Settings,
    candidates,
    choose,
    fit_stagewise,
    fit_threshold_grid,
    product_grid,
    sweep,
)
from dataeff.cascades.idk.uncertainty import IDKClassifier, entropy
from dataeff.metrics.curve import pick_point

TABLE_4_2 = [  # IDK rate %, average FLOPs 1e7, relative cost
    (67.5, 4.198, 1.135),
    (51.7, 3.613, 0.977),
    (48.9, 3.509, 0.949),
    (40.1, 3.184, 0.861),
    (40.0, 3.179, 0.859),
    (36.5, 3.051, 0.824),
    (33.7, 2.947, 0.796),
    (32.8, 2.915, 0.788),
    (29.9, 2.806, 0.759),
    (30.6, 2.832, 0.766),
    (30.5, 2.827, 0.764),
]


def synthetic(count: int = 400, classes: int = 4, seed: int = 0) -> tuple[list[torch.Tensor], np.ndarray]:
    """Three models of rising accuracy over random labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    truth = torch.nn.functional.one_hot(labels, classes)
    noise = [torch.randn(count, classes, generator=generator) for _ in range(3)]
    tables = [
        ((truth * strength + each) * 1.5).softmax(1) for strength, each in zip((1.5, 2.5, 3.2), noise, strict=True)
    ]
    return tables, labels.numpy()


def correct_of(tables: list[torch.Tensor], labels: np.ndarray) -> np.ndarray:
    return np.stack([table.argmax(1).numpy() == labels for table in tables])


@pytest.mark.parametrize(("rate", "flops", "relative"), TABLE_4_2)
def test_every_row_of_table_4_2_obeys_the_cost_identity(rate: float, flops: float, relative: float) -> None:
    average = average_cost([rate / 100], [1.7, 3.7])
    assert average == pytest.approx(flops, abs=0.002)
    assert average / 3.7 == pytest.approx(relative, abs=0.002)


def test_the_goals_of_table_4_2_are_multiples_of_the_accurate_model() -> None:
    for goal, eps in ((95.26, 0), (95.16, 0.0010), (95.05, 0.0022), (94.90, 0.0038)):
        assert (1 - eps) * 95.26 == pytest.approx(goal, abs=0.01)


def test_imagenets_reduction_of_37_percent_is_an_idk_rate_of_29_percent() -> None:
    assert average_cost([0.29], [3.8, 11.3]) / 11.3 == pytest.approx(0.63, abs=0.005)


def test_the_sorted_sweep_counts_what_a_loop_counts() -> None:
    tables, labels = synthetic()
    correct = correct_of(tables, labels)
    scores = entropy(tables[0].double()).numpy()
    thresholds = candidates("entropy", 4, scores)
    right, idk = sweep(scores, correct[0], correct[2], thresholds)
    assert len(thresholds) == 100
    for threshold, found, passed in zip(thresholds, right, idk, strict=True):
        away = scores > threshold
        assert passed == away.sum()
        assert found == np.where(away, correct[2], correct[0]).sum()


@pytest.mark.parametrize("kind", ["prob", "entropy"])
@pytest.mark.parametrize("eps", [0.0, 0.02])
def test_the_grid_returns_the_feasible_candidate_with_the_fewest_idk(kind: str, eps: float) -> None:
    tables, labels = synthetic()
    fast, _, accurate = correct_of(tables, labels)
    result = fit_threshold_grid(kind, tables[0], fast, accurate, eps=eps)  # type: ignore[arg-type]
    goal = (1 - eps) * accurate.mean()
    feasible = result.table[result.table[:, 1] >= goal - 1e-12]
    assert result.feasible and len(result.table) == 100
    assert result.idk_rate == feasible[:, 2].min()
    assert result.accuracy == feasible[feasible[:, 2] == result.idk_rate, 1].max()
    h = IDKClassifier(kind, 4)  # type: ignore[arg-type]
    h.set_alpha(result.alpha)
    assert h.predict_idk(tables[0]).double().mean().item() == pytest.approx(result.idk_rate, abs=1e-12)


def test_the_exact_search_is_never_worse_than_the_grid() -> None:
    for seed in range(5):
        tables, labels = synthetic(seed=seed)
        fast, _, accurate = correct_of(tables, labels)
        grid, exact = (
            fit_threshold_grid("entropy", tables[0], fast, accurate, eps=0.01, search=search)  # type: ignore[arg-type]
            for search in ("grid", "exact")
        )
        assert exact.idk_rate <= grid.idk_rate
        assert exact.accuracy >= 0.99 * accurate.mean()


def test_ties_of_the_idk_rate_go_to_the_more_accurate_setting() -> None:
    assert choose(np.array([9, 7, 8, 5]), np.array([5, 2, 2, 1]), 7) == (2, True)


def test_an_unreachable_goal_gives_always_idk_and_the_best_accuracy() -> None:
    tables, labels = synthetic()
    fast, _, accurate = correct_of(tables, labels)
    oracle = (fast | accurate).mean()
    result = fit_threshold_grid("entropy", tables[0], fast, accurate, desired_accuracy=min(1.0, oracle + 1e-3))
    assert not result.feasible and result.idk_rate == 1.0
    assert result.accuracy == accurate.mean()
    assert result.accuracy <= result.best_accuracy < oracle
    with pytest.raises(ValueError, match="no threshold reaches accuracy 1.0000 .* the best is"):
        fit_threshold_grid("prob", tables[0], fast, accurate, desired_accuracy=1.0, strict=True)


def test_accuracies_are_compared_as_counts() -> None:
    """0.07 * 100 is 7.000000000000001: a cascade with 7 of 100 right reaches the goal 0.07."""
    assert 0.07 * 100 > 7
    assert choose(np.array([7]), np.array([1]), 0.07 * 100) == (0, True)


def test_an_empty_or_mismatched_calibration_set_is_refused() -> None:
    tables, labels = synthetic()
    fast, _, accurate = correct_of(tables, labels)
    with pytest.raises(ValueError, match="empty"):
        fit_threshold_grid("prob", tables[0][:0], fast[:0], accurate[:0])
    with pytest.raises(ValueError, match="400 rows of probabilities, but 399"):
        fit_threshold_grid("prob", tables[0], fast[1:], accurate)
    with pytest.raises(ValueError, match="eps = 1"):
        fit_threshold_grid("prob", tables[0], fast, accurate, eps=1.0)


def test_a_two_stage_cascade_of_the_stagewise_search_is_the_grid_search() -> None:
    tables, labels = synthetic()
    correct = correct_of(tables, labels)[[0, 2]]
    scores = entropy(tables[0].double()).numpy()
    thresholds, feasible = fit_stagewise("entropy", 4, [scores], correct, 0.99 * correct[1].sum())
    assert feasible
    assert thresholds == [fit_threshold_grid("entropy", tables[0], correct[0], correct[1], eps=0.01).alpha]


def test_the_stagewise_search_holds_the_goal_on_the_whole_set_at_every_pass() -> None:
    tables, labels = synthetic()
    fitted = fit_cascade(tables, labels, [1.0, 2.0, 9.0], FitConfig(kind="entropy", eps=0.02))
    assert fitted.feasible
    assert fitted.report.accuracy >= 0.98 * correct_of(tables, labels)[2].mean() - 1e-12
    first_two = fit_cascade([tables[0], tables[2]], labels, [1.0, 9.0], FitConfig(kind="entropy", eps=0.02))
    assert fitted.idk[0].alpha == first_two.idk[0].alpha


def test_the_product_of_grids_is_what_brute_force_finds() -> None:
    tables, labels = synthetic(count=60)
    correct, costs = correct_of(tables, labels), np.array([1.0, 2.0, 9.0])
    scores = [entropy(table.double()).numpy() for table in tables[:2]]
    settings = product_grid("entropy", 4, scores, correct, costs, n_grid=12)
    tried = [candidates("entropy", 4, score, 12, spacing="quantile") for score in scores]
    assert len(settings.cost) == len(tried[0]) * len(tried[1])
    for row, thresholds in enumerate(itertools.product(*tried)):
        stage = exit_stages(scores, thresholds)
        assert settings.thresholds[row].tolist() == list(thresholds)
        assert settings.correct[row] == correct[stage, np.arange(60)].sum()
        assert settings.cost[row] == pytest.approx(costs.cumsum()[stage].sum())


def test_the_product_search_is_at_most_as_expensive_as_the_stagewise_one() -> None:
    for seed in range(3):
        tables, labels = synthetic(seed=seed)
        costs = [1.0, 2.0, 9.0]
        both = [
            fit_cascade(tables, labels, costs, FitConfig(kind="entropy", eps=0.02, search=search, spacing="quantile"))
            for search in ("grid", "product")
        ]
        assert both[1].report.average_cost <= both[0].report.average_cost + 0.05


def test_the_front_holds_only_settings_that_no_other_beats() -> None:
    cost, correct = np.array([3.0, 1.0, 2.0, 2.0, 4.0]), np.array([5, 2, 1, 4, 5])
    front = Settings(np.arange(5.0)[:, None], correct, cost).pareto()
    assert front.thresholds[:, 0].tolist() == [1.0, 3.0, 0.0]


def test_rates_levels_and_costs_of_three_stages_by_hand() -> None:
    stage = np.array([0, 0, 1, 2, 2])
    correct = np.array([[1, 0, 1, 0, 0], [1, 1, 1, 0, 1], [1, 1, 0, 1, 0]], bool)
    report = Tally.of(stage, correct).report([1.0, 2.0, 10.0])
    assert report.accuracy == pytest.approx(3 / 5)
    assert report.idk_overall.tolist() == pytest.approx([3 / 5, 2 / 5])
    assert report.idk_level.tolist() == pytest.approx([3 / 5, 2 / 3])
    assert report.average_cost == pytest.approx(1 + 3 / 5 * 2 + 2 / 5 * 10)
    assert report.relative_cost == pytest.approx(report.average_cost / 10)
    assert report.agreement.tolist() == pytest.approx(agreement_profile(correct).tolist())


def test_parts_of_a_data_set_add_up() -> None:
    tables, labels = synthetic()
    correct = correct_of(tables, labels)
    stage = np.random.default_rng(0).integers(0, 3, 400)
    whole = Tally.of(stage, correct).to_array()
    parts = Tally.of(stage[:150], correct[:, :150]).to_array() + Tally.of(stage[150:], correct[:, 150:]).to_array()
    assert whole.tolist() == parts.tolist()
    assert Tally.from_array(whole).report([1, 2, 3]).count == 400


def test_a_level_that_no_image_reaches_has_no_rate_and_count_zero() -> None:
    report = Tally.of(np.zeros(5, np.int64), np.ones((3, 5), bool)).report([1.0, 2.0, 3.0])
    assert report.reached.tolist() == [5, 0, 0]
    assert report.idk_level[0] == 0.0 and np.isnan(report.idk_level[1])


def test_the_agreement_profile_counts_images_correct_by_at_least_j_models() -> None:
    correct = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], bool)
    assert agreement_profile(correct).tolist() == [0.75, 0.25, 0.25]


def test_a_human_last_stage_makes_only_the_fast_models_errors_count() -> None:
    tables, labels = synthetic()
    for goal in (0.9, 0.97, 1.0):
        fitted = fit_cascade(tables[:1], labels, [1.0], FitConfig(kind="entropy", accuracy_goal=goal), human_cost=50.0)
        assert fitted.feasible and fitted.report.accuracy >= goal - 1e-12
        h = fitted.idk[0]
        wrong = (tables[0].argmax(1).numpy() != labels) & ~h.predict_idk(tables[0]).numpy()
        assert fitted.report.accuracy == pytest.approx(1 - wrong.mean())
        report = evaluate_tables(tables[:1], labels, fitted.idk, [1.0, 50.0])
        assert report.average_cost == pytest.approx(1 + 50 * report.idk_overall[0])


def test_a_human_of_lower_accuracy_errs_at_that_rate() -> None:
    assert HumanExpert(1.0).correct(1000).all()
    assert HumanExpert(1.0, 0.9).correct(20_000).mean() == pytest.approx(0.9, abs=0.01)


def point(accuracy: float, cost: float) -> CurvePoint:
    return CurvePoint(thresholds=(cost,), accuracy=accuracy, cost=cost, relative_cost=cost / 10, idk_rates=(0.5,))


def test_a_request_gets_the_cheapest_point_of_its_accuracy_or_the_best_of_its_cost() -> None:
    curve = [point(0.8, 1), point(0.9, 3), point(0.95, 6)]
    assert pick_point(curve, accuracy=0.85).cost == 3
    assert pick_point(curve, accuracy=0.99).cost == 6
    assert pick_point(curve, relative_cost=0.5).cost == 3
    assert pick_point(curve, relative_cost=0.05).cost == 1
    assert pick_point(curve, accuracy=0.8, relative_cost=0.5).cost == 1
    assert pick_point(curve, accuracy=0.99, relative_cost=0.5).cost == 3
    with pytest.raises(ValueError, match="give an accuracy or a cost"):
        pick_point(curve)


def test_a_point_of_the_curve_gives_what_it_says_on_the_calibration_set() -> None:
    tables, labels = synthetic()
    for kind in ("prob", "entropy", "cost"):
        config = FitConfig(kind=kind, eps=0.01, cost_weight=0.05, steps=200)  # type: ignore[arg-type]
        fitted = fit_cascade(tables, labels, [1.0, 2.0, 9.0], config)
        assert len(fitted.curve) > 5
        for entry in fitted.curve:
            report = evaluate_tables(tables, labels, fitted.idk, [1.0, 2.0, 9.0], entry.thresholds)
            assert (report.accuracy, report.average_cost) == pytest.approx((entry.accuracy, entry.cost))
        costs = [entry.cost for entry in fitted.curve]
        assert costs == sorted(costs)


def test_a_strict_fit_refuses_a_goal_out_of_reach() -> None:
    tables, labels = synthetic()
    config = FitConfig(kind="entropy", accuracy_goal=1.0, strict=True)
    with pytest.raises(ValueError, match="no threshold reaches accuracy 1.0000"):
        fit_cascade(tables, labels, [1.0, 2.0, 9.0], config)
    with pytest.warns(UserWarning, match="goal not reached"):
        assert not fit_cascade(tables, labels, [1.0, 2.0, 9.0], FitConfig(kind="entropy", accuracy_goal=1.0)).feasible


def test_a_single_model_is_a_cascade_without_add_ons() -> None:
    tables, labels = synthetic()
    fitted = fit_cascade(tables[:1], labels, [3.0])
    assert fitted.idk == [] and fitted.curve == []
    assert fitted.report.average_cost == 3.0
    assert fitted.report.accuracy == correct_of(tables, labels)[0].mean()
