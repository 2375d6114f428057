"""Early exit on images (spec idk_cascades sections 2.8, 2.9, 8.1 items 8 and 10, and 10)."""

import math

import pytest
import torch
from torch import Tensor, nn

from dataeff.cascades.idk.cascade import IDKCascade, Model, constant_cost, evaluate_tables
from dataeff.cascades.idk.uncertainty import IDKClassifier, entropy
from dataeff.core.artifact import Prediction

CLASSES = 3
MACS = (1.0, 4.0, 20.0)


class Counting:
    """A linear model that counts the images it is called on."""

    def __init__(self, seed: int, macs: float, strength: float) -> None:
        torch.manual_seed(seed)
        self.layer = nn.Linear(5, CLASSES)
        self.macs, self.strength = macs, strength
        self.images = 0
        self.calls = 0
        self.budgets: list[Tensor | None] = []

    def probabilities(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = (self.layer(inputs) * self.strength).softmax(1)
        return found

    def __call__(self, inputs: Tensor, budget: Tensor | None) -> Prediction:
        self.images += len(inputs)
        self.calls += 1
        self.budgets.append(budget)
        return constant_cost(self.probabilities, self.macs)(inputs, budget)


def add_on(alpha: float) -> IDKClassifier:
    h = IDKClassifier("entropy", CLASSES)
    h.set_alpha(alpha)
    return h


def cascade(alphas: tuple[float, ...] = (0.6, 0.5), models: int = 3) -> tuple[IDKCascade, list[Counting]]:
    counting = [Counting(number, MACS[number], 2.0 + number) for number in range(models)]
    found: list[Model] = list(counting)
    return IDKCascade(found, [add_on(alpha) for alpha in alphas], MACS[:models]), counting


@pytest.fixture
def images() -> Tensor:
    return torch.randn(200, 5, generator=torch.Generator().manual_seed(1))


def test_a_later_model_is_called_on_the_idk_images_only(images: Tensor) -> None:
    casc, models = cascade()
    output = casc.predict(images)
    first = casc.idk[0].predict_idk(models[0].probabilities(images))
    second = first & casc.idk[1].predict_idk(models[1].probabilities(images))
    assert 0 < second.sum() < first.sum() < 200
    assert [model.images for model in models] == [200, int(first.sum()), int(second.sum())]
    assert output.stage.tolist() == (first.long() + second.long()).tolist()


def test_answers_are_those_of_full_execution_with_selection_afterwards(images: Tensor) -> None:
    casc, models = cascade()
    output = casc.predict(images)
    tables = torch.stack([model.probabilities(images) for model in models])
    expected = tables[output.stage, torch.arange(200)]
    assert torch.allclose(output.probabilities, expected, atol=1e-5)
    assert output.labels.tolist() == expected.argmax(1).tolist()


def test_multiply_adds_are_the_sum_over_the_models_that_ran(images: Tensor) -> None:
    casc, _ = cascade()
    output = casc.predict(images)
    assert output.macs.dtype == torch.float64
    assert output.macs.tolist() == [sum(MACS[: stage + 1]) for stage in output.stage.tolist()]
    assert output.path.sum(1).tolist() == (output.stage + 1).tolist()


def test_images_and_stored_tables_give_the_same_report(images: Tensor) -> None:
    casc, models = cascade()
    labels = torch.randint(CLASSES, (200,), generator=torch.Generator().manual_seed(2)).numpy()
    output = casc.predict(images)
    report = evaluate_tables([model.probabilities(images) for model in models], labels, casc.idk, list(MACS))
    assert report.accuracy == pytest.approx((output.labels.numpy() == labels).mean())
    assert report.average_cost == pytest.approx(float(output.macs.mean()))
    assert report.reached.tolist() == [int(output.path[:, stage].sum()) for stage in range(3)]


def test_a_model_that_no_image_reaches_is_never_called_and_may_hold_nan(images: Tensor) -> None:
    casc, models = cascade(alphas=(math.log(CLASSES), 0.5))
    for model in models[1:]:
        nn.init.constant_(model.layer.weight, math.nan)
    output = casc.predict(images)
    assert [model.calls for model in models] == [1, 0, 0]
    assert torch.isfinite(output.probabilities).all()
    assert output.uncertainty[:, 1].isnan().all() and output.score[:, 1].isnan().all()


def test_a_batch_of_no_images_is_answered() -> None:
    casc, _ = cascade()
    output = casc.predict(torch.empty(0, 5))
    assert output.probabilities.shape == (0, CLASSES) and output.labels.shape == (0,)


def test_an_image_is_answered_alike_in_any_batch(images: Tensor) -> None:
    casc, _ = cascade()
    together = casc.predict(images)
    for row in range(0, 200, 23):
        alone = casc.predict(images[row : row + 1])
        assert torch.allclose(alone.probabilities[0], together.probabilities[row], atol=1e-6)
        assert alone.stage[0] == together.stage[row]


def test_the_output_says_the_uncertainty_of_every_add_on_that_was_asked(images: Tensor) -> None:
    casc, models = cascade()
    output = casc.predict(images)
    assert torch.allclose(output.score[:, 0], entropy(models[0].probabilities(images).double()))
    asked = output.stage >= 1
    assert output.score[asked, 1].isfinite().all() and output.score[~asked, 1].isnan().all()
    assert ((output.uncertainty[:, 0] > 0.5) == asked).all()


@pytest.mark.parametrize(("budget", "latest"), [(0.0, 0), (4.9, 0), (5.0, 1), (24.9, 1), (25.0, 2), (math.inf, 2)])
def test_a_budget_ends_the_cascade_before_the_model_that_would_exceed_it(
    images: Tensor, budget: float, latest: int
) -> None:
    casc, _ = cascade()
    free = casc.predict(images)
    output = casc.predict(images, torch.full((200,), budget, dtype=torch.float64))
    assert output.stage.tolist() == free.stage.clamp(max=latest).tolist()
    assert (output.macs <= max(budget, MACS[0])).all()
    assert output.stopped.tolist() == (free.stage > latest).tolist()


def test_every_image_has_its_own_budget_and_models_are_told_what_is_left(images: Tensor) -> None:
    casc, models = cascade()
    budget = torch.where(torch.arange(200) % 2 == 0, 1.0, 30.0).double()
    output = casc.predict(images, budget)
    assert (output.stage[::2] == 0).all() and (output.stage[1::2] > 0).any()
    left = models[1].budgets[0]
    assert left is not None and (left == 29.0).all()


def test_every_image_may_have_thresholds_of_its_own(images: Tensor) -> None:
    casc, _ = cascade()
    always, never = torch.tensor([-1.0, -1.0]), torch.tensor([9.0, 9.0])
    given = torch.where((torch.arange(200) % 2 == 0)[:, None], always, never).double()
    output = casc.predict(images, thresholds=given)
    assert (output.stage[::2] == 2).all() and (output.stage[1::2] == 0).all()
    assert (casc.predict(images, thresholds=always).stage == 2).all()
    with pytest.raises(ValueError, match=r"thresholds must have shape \(2,\) or \(200, 2\), got \(3,\)"):
        casc.predict(images, thresholds=torch.zeros(3))


def test_max_stage_forces_an_answer_by_the_last_allowed_model(images: Tensor) -> None:
    casc, models = cascade()
    output = casc.predict(images, max_stage=1)
    assert models[2].calls == 0 and int(output.stage.max()) == 1
    assert output.stopped.any() and not output.idk.any()


def test_idk_of_the_last_model_is_for_the_human_and_keeps_a_provisional_answer(images: Tensor) -> None:
    casc, models = cascade(alphas=(0.6, 0.5), models=2)
    output = casc.predict(images)
    asked = output.stage == 1
    expected = torch.zeros(200, dtype=torch.bool)
    expected[asked] = casc.idk[1].predict_idk(models[1].probabilities(images[asked]))
    assert 0 < expected.sum() < asked.sum()
    assert output.idk.tolist() == expected.tolist()
    assert torch.allclose(output.probabilities[asked], models[1].probabilities(images[asked]), atol=1e-6)
    without_human, _ = cascade(alphas=(0.6,), models=2)
    assert not without_human.predict(images).idk.any()


def test_an_image_that_a_budget_stopped_is_not_sent_to_the_human(images: Tensor) -> None:
    casc, _ = cascade(alphas=(0.6, -1e-12), models=2)
    assert casc.predict(images).idk.any()
    assert not casc.predict(images, torch.full((200,), 2.0, dtype=torch.float64)).idk.any()


def test_numbers_of_models_and_add_ons_must_fit() -> None:
    model = constant_cost(lambda x: x.softmax(1), 1.0)
    with pytest.raises(ValueError, match="3 models need 2 IDK classifiers, or 3 with a human stage, got 1"):
        IDKCascade([model] * 3, [add_on(0.1)], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="2 models need 2 costs"):
        IDKCascade([model] * 2, [add_on(0.1)], [1.0])
