"""The add-ons of a cascade and what they refuse (spec idk_cascades sections 2.1, 2.2 and 10)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dataeff.cascades.idk.calibration import entropy_histogram, overconfidence_gap, warn_of_leakage
from dataeff.cascades.idk.cascade import check_costs, check_tables
from dataeff.cascades.idk.fit import FitConfig, fit_cascade
from dataeff.cascades.idk.uncertainty import ALWAYS, IDKClassifier, check_probabilities, entropy
from dataeff.core.config import parse_config


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values)


def test_entropy_is_natural_and_a_one_hot_row_has_none() -> None:
    found = entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64))
    assert found[0].item() == pytest.approx(math.log(2), abs=1e-15)
    assert found[1].item() == 0.0
    assert found[2].item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), abs=1e-15)


def test_prob_says_idk_strictly_below_alpha_and_entropy_strictly_above() -> None:
    table = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    prob = IDKClassifier("prob", 2)
    prob.set_alpha(0.75)
    assert prob.predict_idk(table).tolist() == [False, True, False]
    by_entropy = IDKClassifier("entropy", 2)
    by_entropy.set_alpha(float(entropy(table)[0]))
    assert by_entropy.predict_idk(table).tolist() == [False, True, False]
    assert prob.uncertainty(table).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", ["prob", "entropy"])
def test_the_always_setting_passes_even_one_hot_rows_on(kind: str) -> None:
    h = IDKClassifier(kind, 3)  # type: ignore[arg-type]
    h.set_alpha(ALWAYS[kind])
    assert h.predict_idk(torch.eye(3)).all()


def test_equality_at_one_half_goes_to_the_fast_model() -> None:
    h = IDKClassifier("cost", 2)
    with torch.no_grad():
        h.alpha_1.fill_(0.0)
    table = rows([0.5, 0.5])
    assert h.uncertainty(table).item() == 0.5
    assert not h.predict_idk(table).item()


def test_the_learned_classifier_on_entropy_is_a_threshold_at_minus_alpha_0_over_alpha_1() -> None:
    h = IDKClassifier("cost", 4)
    with torch.no_grad():
        h.alpha_0.fill_(-2.0)
        h.alpha_1.fill_(4.0)
    table = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)).softmax(1) ** 3
    table = table / table.sum(1, keepdim=True)
    assert h.predict_idk(table).tolist() == (entropy(table.double()) > 0.5).tolist()


def test_the_neural_feature_has_seven_layers_of_the_published_widths() -> None:
    network = IDKClassifier("cost", 10, "nn").network
    assert network is not None
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in layers] == [1024, 1024, 512, 512, 128, 64, 1]
    assert layers[0].in_features == 10
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in network) == 6
    assert IDKClassifier("cost", 10, "nn", (4,)).macs == 10 * 4 + 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[0.5, 0.5], [0.6, 0.6]], "row 1 .*does not sum to 1"),
        ([[0.5, 0.5], [math.nan, 1.0]], "row 1 .*NaN"),
        ([[0.5, 0.5], [-0.2, 1.2]], "row 1 .*apply softmax"),
        ([[4.0, -3.0]], "row 0 .*apply softmax"),
        ([[1.0]], "k >= 2"),
    ],
)
def test_rows_that_are_no_distribution_are_refused_by_number(bad: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_probabilities(torch.tensor(bad))


def test_rows_within_the_tolerance_pass() -> None:
    assert check_probabilities(rows([0.5, 0.5009])).dtype == torch.float64


def test_models_of_different_classes_or_lengths_are_refused() -> None:
    two, three = torch.full((4, 2), 0.5), torch.full((4, 3), 1 / 3)
    labels = np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="model 2 has 3 classes and model 1 has 2"):
        check_tables([two, three], labels)
    with pytest.raises(ValueError, match="4 rows of probabilities, but 3 labels"):
        check_tables([two], labels[:3])
    with pytest.raises(ValueError, match="empty"):
        check_tables([two[:0]], labels[:0])


@pytest.mark.parametrize(("kind", "alpha"), [("prob", 1.1), ("prob", -0.1), ("entropy", -0.5), ("entropy", 2.0)])
def test_an_alpha_out_of_range_is_refused(kind: str, alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha = {alpha:g}"):
        IDKClassifier(kind, 3).set_alpha(alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 1.0}, "eps"),
        ({"eps": -0.1}, "eps"),
        ({"cost_weight": -1.0}, "cost_weight"),
        ({"accuracy_goal": 1.5}, "accuracy_goal"),
        ({"nn_hidden": [0]}, "nn_hidden"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(FitConfig, settings)


def test_a_single_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        IDKClassifier("entropy", 1)


def test_costs_that_are_missing_negative_or_not_increasing_are_reported() -> None:
    with pytest.raises(ValueError, match="2 models need 2 costs"):
        check_costs([1.0], 2)
    with pytest.raises(ValueError, match="cost -1 must be"):
        check_costs([-1.0, 2.0], 2)
    with pytest.warns(UserWarning, match="put the cheaper one first"):
        check_costs([3.0, 2.0], 2)


def test_a_worse_last_model_is_named_with_advice() -> None:
    labels = np.arange(20) % 2
    good = torch.nn.functional.one_hot(torch.from_numpy(labels), 2).double() * 0.8 + 0.1
    with pytest.warns(UserWarning, match="put the most accurate model last"):
        fit_cascade([good, good.flip(1)], labels, [1.0, 2.0])


def test_the_histogram_and_the_gap_show_an_over_confident_model() -> None:
    generator = torch.Generator().manual_seed(0)
    sure, unsure = torch.randn(300, 5, generator=generator) * 9, torch.randn(300, 5, generator=generator)
    histogram = entropy_histogram(sure.softmax(1), unsure.softmax(1), bins=10)
    assert histogram.train.sum() == pytest.approx(1) and histogram.held_out.sum() == pytest.approx(1)
    assert histogram.train[0] > histogram.held_out[0]
    assert overconfidence_gap(sure.softmax(1), unsure.softmax(1)) > 0.5


def test_calibration_images_that_the_model_knows_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="calibration leakage: fast has accuracy 0.990"):
        warn_of_leakage("fast", 0.99, 2000, 0.95)


@pytest.mark.filterwarnings("error")
def test_a_difference_within_three_points_or_by_chance_is_not_warned_of() -> None:
    warn_of_leakage("fast", 0.975, 2000, 0.95)
    warn_of_leakage("fast", 0.99, 50, 0.95)
