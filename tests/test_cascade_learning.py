"""Learned add-ons (spec idk_cascades sections 2.5, 2.6, 2.8 and 10)."""

import numpy as np
import pytest
import torch

from dataeff.cascades.idk.fit import FitConfig, fit_cascade
from dataeff.cascades.idk.learning import (
    fit_cost_aware,
    fit_cost_oblivious,
    fit_joint,
    fit_scalars,
    joint_gradient,
    joint_loss,
    prepare_feature,
    two_stage_loss,
)
from dataeff.cascades.idk.uncertainty import IDKClassifier, entropy
from tests.test_cascade_search import synthetic


def random_problem(stages: int, count: int = 50) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(stages)
    h = [torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(stages - 1)]
    wrong = (torch.rand(stages, count, generator=generator) < 0.4).double()
    return h, wrong, torch.rand(stages, generator=generator, dtype=torch.float64)


def test_the_joint_loss_of_two_models_is_the_two_stage_loss() -> None:
    h, wrong, costs = random_problem(2)
    for weight in (0.0, 0.04, 1.3):
        two = two_stage_loss(h[0], wrong[0], wrong[1], costs, weight)
        assert abs(joint_loss(h, wrong, costs, weight) - two) < 1e-12


def test_the_joint_loss_of_three_models_is_eq_4_15_and_4_16_with_a_last_model_that_answers() -> None:
    h, wrong, costs = random_problem(3)
    p = [torch.ones_like(h[0]), h[0], h[1], torch.zeros_like(h[0])]
    loss, cost, reach = torch.zeros(50), torch.zeros(50), torch.ones(50)
    for stage in range(1, 4):
        reach = reach * p[stage - 1]
        loss = loss + reach * (1 - p[stage]) * wrong[stage - 1]
        cost = cost + reach * costs[stage - 1]
    assert abs(joint_loss(h, wrong, costs, 0.3) - (loss + 0.3 * cost).mean()) < 1e-12


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_gradient_that_is_written_out_is_the_one_of_autograd(stages: int) -> None:
    h, wrong, costs = random_problem(stages)
    weights = torch.tensor([0.0, 0.1, 2.0])
    leaves = [(part.expand(3, -1) * torch.tensor([[1.0], [0.9], [0.5]])).detach().requires_grad_() for part in h]
    expected = torch.autograd.grad(joint_loss(leaves, wrong, costs, weights).sum(), leaves)
    found = joint_gradient([leaf.detach() for leaf in leaves], wrong, costs, weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-14)


def test_the_two_stage_gradient_is_the_published_one() -> None:
    h, wrong, costs = random_problem(2)
    (found,) = joint_gradient(h, wrong, costs, 0.2)
    assert torch.allclose(found, (wrong[1] - wrong[0] + 0.2 * costs[1]) / 50, atol=1e-15)


def table_and_errors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tables, labels = synthetic(count=600, seed=seed)
    wrong = [torch.from_numpy(table.argmax(1).numpy() != labels) for table in tables]
    return tables[0], wrong[0], wrong[2]


@pytest.mark.parametrize("weight", [1.0, 1.1, 5.0])
def test_a_cost_of_one_or_more_is_never_worth_an_idk(weight: float) -> None:
    table, fast, accurate = table_and_errors()
    h = IDKClassifier("cost", 4)
    fit_cost_aware(h, table, fast, accurate, (0.1, 1.0), weight)
    assert not h.predict_idk(table).any()


def test_without_a_cost_nearly_everything_is_passed_on() -> None:
    table, fast, accurate = table_and_errors()
    h = IDKClassifier("cost", 4)
    fit_cost_aware(h, table, fast, accurate, (0.1, 1.0), 0.0)
    assert h.predict_idk(table).double().mean() > 0.9


def test_the_idk_rate_falls_with_the_cost_weight() -> None:
    table, fast, accurate = table_and_errors()
    rates = []
    for weight in (0.0, 0.05, 0.2, 0.4, 1.1):
        h = IDKClassifier("cost", 4)
        fit_cost_aware(h, table, fast, accurate, (0.1, 1.0), weight, steps=1000)
        rates.append(float(h.predict_idk(table).double().mean()))
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[2] > rates[4] == 0.0


def test_several_cost_weights_at_once_are_the_same_as_one_after_the_other() -> None:
    table, fast, accurate = table_and_errors()
    wrong, costs = torch.stack([fast, accurate]).double(), torch.tensor([0.1, 1.0], dtype=torch.float64)
    weights = torch.tensor([0.02, 0.3], dtype=torch.float64)
    feature = prepare_feature(IDKClassifier("cost", 4), table)
    together = fit_scalars([feature], wrong, costs, weights, 300, 0.05)
    for row, weight in enumerate(weights):
        alone = fit_scalars([feature], wrong, costs, weight[None], 300, 0.05)
        assert torch.allclose(together[row], alone[0], atol=1e-9)


def test_a_learned_threshold_lies_where_the_gain_in_accuracy_meets_the_cost() -> None:
    """Errors of the fast model grow linearly with its entropy, so that the best threshold is known."""
    rng = np.random.default_rng(0)
    p = np.linspace(0.5, 0.999, 4000)
    table = torch.from_numpy(np.stack([p, 1 - p], axis=1))
    h_values = entropy(table).numpy() / np.log(2)
    fast = torch.from_numpy(rng.random(4000) < h_values)
    h = IDKClassifier("cost", 2)
    fit_cost_aware(h, table, fast, torch.zeros(4000, dtype=torch.bool), (0.0, 1.0), 0.5, steps=3000)
    threshold = -float(h.alpha_0.detach()) / float(h.alpha_1.detach()) / np.log(2)
    assert threshold == pytest.approx(0.5, abs=0.05)


def test_a_cost_oblivious_classifier_matches_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    table, fast, _ = table_and_errors()
    h = IDKClassifier("cost", 4)
    fit_cost_oblivious(h, table, fast, steps=4000)
    features = entropy(table.double()).numpy()[:, None]
    reference = LogisticRegression(C=1e9).fit(features, fast.numpy())
    assert float(h.alpha_1.detach()) == pytest.approx(float(reference.coef_[0, 0]), abs=0.02)
    assert float(h.alpha_0.detach()) == pytest.approx(float(reference.intercept_[0]), abs=0.02)


def test_the_neural_feature_learns_and_is_reproducible() -> None:
    table, fast, accurate = table_and_errors()
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        h = IDKClassifier("cost", 4, "nn", (32, 32, 16))
        fit_joint([h], [table], torch.stack([fast, accurate]), [0.1, 1.0], 0.1, steps=150, lr=0.05, seed=3)
        states.append(h.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    idk = h.predict_idk(table)
    assert 0 < idk.double().mean() < 1
    assert fast[idk].double().mean() > fast[~idk].double().mean() + 0.1


def test_all_stages_are_learned_together() -> None:
    tables, labels = synthetic(count=600)
    costs = [0.05, 0.2, 1.0]
    spent = []
    for weight in (0.02, 0.3):
        fitted = fit_cascade(tables, labels, costs, FitConfig(kind="cost", cost_weight=weight, steps=1000))
        assert len(fitted.idk) == 2
        spent.append((fitted.report.accuracy, fitted.report.average_cost))
    assert spent[0][0] > spent[1][0] and spent[0][1] > spent[1][1]


def test_without_a_weight_the_cheapest_one_that_reaches_the_goal_is_taken() -> None:
    tables, labels = synthetic(count=600)
    pair = [tables[0], tables[2]]
    accuracy = (tables[2].argmax(1).numpy() == labels).mean()
    fitted = fit_cascade(pair, labels, [0.1, 1.0], FitConfig(kind="cost", eps=0.02, steps=600))
    assert fitted.feasible and fitted.report.accuracy >= 0.98 * accuracy - 1e-12
    assert fitted.cost_weight is not None
    heavier = FitConfig(kind="cost", cost_weight=min(1.0, fitted.cost_weight * 1.5), steps=600)
    assert fit_cascade(pair, labels, [0.1, 1.0], heavier).report.accuracy < 0.98 * accuracy


def test_costs_in_another_unit_give_the_same_relative_cascade() -> None:
    tables, labels = synthetic(count=400)
    pair = [tables[0], tables[2]]
    config = FitConfig(kind="cost", cost_weight=0.1, steps=300)
    alphas = [fit_cascade(pair, labels, [c, 10 * c], config).idk[0].state_dict() for c in (1.0, 3.7e7)]
    assert alphas[0]["alpha_0"].item() == pytest.approx(alphas[1]["alpha_0"].item(), rel=1e-9)
    absolute = config.model_copy(update={"cost_unit": "absolute"})
    never = fit_cascade(pair, labels, [3.7e7, 3.7e8], absolute)
    assert never.report.idk_overall[0] == 0


def test_collapse_inversion_and_a_constant_feature_are_warned_of() -> None:
    tables, labels = synthetic(count=300)
    pair = [tables[0], tables[2]]
    with pytest.warns(UserWarning, match="collapsed add-on: number 1 passes nothing on"):
        fit_cascade(pair, labels, [0.1, 1.0], FitConfig(kind="cost", cost_weight=2.0, steps=500))
    flat = torch.full((300, 4), 0.2)
    flat[:, 0] = 0.4
    with pytest.warns(UserWarning, match="constant entropy"):
        fit_cascade([flat, tables[2]], labels, [0.1, 1.0], FitConfig(kind="cost", cost_weight=0.1, steps=10))
    sure_when_wrong = tables[0].clone()
    wrong = torch.from_numpy(tables[0].argmax(1).numpy() != labels)
    sure_when_wrong[wrong] = (sure_when_wrong[wrong].log() * 9).softmax(1)
    sure_when_wrong[~wrong] = (sure_when_wrong[~wrong].log() * 0.1).softmax(1)
    with pytest.warns(UserWarning, match="inverted IDK classifier"):
        fit_cascade([sure_when_wrong, tables[2]], labels, [0.1, 1.0], FitConfig(kind="cost", cost_weight=0.2))


def test_a_standardised_feature_has_a_floor_under_its_deviation() -> None:
    h = IDKClassifier("cost", 4)
    flat = torch.full((10, 4), 0.25)
    with pytest.warns(UserWarning, match="constant entropy"):
        values = prepare_feature(h, flat, standardise=True)
    assert float(h.std) == 1e-6
    assert torch.isfinite(values).all()


def test_a_negative_cost_weight_is_refused() -> None:
    table, fast, accurate = table_and_errors()
    with pytest.raises(ValueError, match="cost_weight = -1"):
        fit_cost_aware(IDKClassifier("cost", 4), table, fast, accurate, (0.1, 1.0), -1.0)
