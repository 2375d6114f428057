"""The cascade itself: early exit on images, and its accuracy, rates and cost on stored answers (spec 2.3, 2.8, 5)."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataeff.cascades.idk.search import Bools, Floats, Ints, check_lengths
from dataeff.cascades.idk.uncertainty import IDKClassifier, check_probabilities
from dataeff.core.artifact import Prediction
from dataeff.data import uniform_draws
from dataeff.nn.cascade import CascadePrediction, Walk
from dataeff.nn.predictor import check_budget

Model = Callable[[Tensor, Tensor | None], Prediction]


def constant_cost(function: Callable[[Tensor], Tensor], macs: float) -> Model:
    """A model out of any function (B, ...) -> probabilities (B, k) that spends `macs` on every image."""

    def model(inputs: Tensor, budget: Tensor | None) -> Prediction:
        spent = torch.full((len(inputs),), macs, dtype=torch.float64)
        return Prediction(function(inputs), spent, torch.empty(len(inputs), 0, dtype=torch.bool))

    return model


@dataclass(frozen=True)
class HumanExpert:
    """A person as the last stage. accuracy: how often they are right (1 in the source). cost: of an intervention."""

    cost: float
    accuracy: float = 1.0

    def correct(self, count: int, seed: int = 0) -> Bools:
        """Which of `count` images they would answer correctly."""
        return uniform_draws(seed, 0, np.arange(count), 1)[:, 0] < self.accuracy


@dataclass
class CascadeOutput(CascadePrediction):
    """What a cascade says about B images; uncertainty: float64 (B, A), h of each add-on, NaN where it was not asked."""

    uncertainty: Tensor


class IDKCascade:
    """Models from cheap to expensive, each but the last with an add-on that may pass an image on.

    Args:
        models: N of them.
        idk: N - 1 add-ons; N with a human stage behind the last model.
        costs: of the models, in one unit; the most that a model spends on an image, where a budget is to be kept.

    Raises:
        ValueError: numbers of models, add-ons and costs that do not fit, or bad costs.

    Example:
        >>> cascade = IDKCascade([constant_cost(small, 1e6), constant_cost(large, 9e6)], [h], [1e6, 9e6])
        >>> cascade.predict(images).labels
    """

    def __init__(self, models: Sequence[Model], idk: Sequence[IDKClassifier], costs: Sequence[float]) -> None:
        check_costs(costs, len(models))
        if len(idk) not in (len(models) - 1, len(models)):
            raise ValueError(
                f"{len(models)} models need {len(models) - 1} IDK classifiers, or {len(models)} with a human stage, "
                f"got {len(idk)}"
            )
        self.models, self.idk, self.costs = list(models), list(idk), [float(cost) for cost in costs]

    def predict(
        self,
        inputs: Tensor,
        budget: Tensor | None = None,
        thresholds: Tensor | None = None,
        max_stage: int | None = None,
    ) -> CascadeOutput:
        """Run model 1 on all images, and every further one only on those that are passed on to it.

        Args:
            inputs: (B, ...).
            budget: float64 (B,), multiply-adds allowed per image: a model that could exceed it is not started (but for
                the first, which somebody must answer with). What is left of it is also handed to the model.
            thresholds: float64 (A,) or (B, A), in place of the add-ons' own; a point of the calibration curve.
            max_stage: the last model that may run, from 0.
        """
        check_budget(budget, len(inputs))
        with torch.inference_mode():
            walk = Walk(self._thresholds(thresholds, len(inputs)), len(self.models))
            for number, model in enumerate(self.models):
                if number:
                    self._stop(walk, number, budget, max_stage)
                    if not len(walk.rows):
                        break
                rows = walk.rows
                allowed = None if budget is None else budget[rows] - (walk.prediction.macs[rows] if number else 0)
                answer = model(inputs if len(rows) == len(inputs) else inputs[rows.to(inputs.device)], allowed)
                if number < len(self.idk):
                    score = self.idk[number].score(answer.probabilities.float().cpu())
                    walk.record(number, answer, score, self.idk[number].macs)
                else:
                    walk.record(number, answer)
            score = walk.prediction.score
            h = [
                add_on.h(column).masked_fill(column.isnan(), math.nan)
                for add_on, column in zip(self.idk, score.unbind(1), strict=True)
            ]
            return CascadeOutput(**vars(walk.prediction), uncertainty=torch.stack(h, 1) if h else score)

    def _stop(self, walk: Walk, number: int, budget: Tensor | None, max_stage: int | None) -> None:
        """End the walk of images that model `number` may not run on."""
        if max_stage is not None and number > max_stage:
            walk.stop()
        elif budget is not None:
            walk.stop(walk.prediction.macs[walk.rows] + self.costs[number] > budget[walk.rows])

    def _thresholds(self, given: Tensor | None, count: int) -> Tensor:
        own = torch.tensor([classifier.threshold for classifier in self.idk], dtype=torch.float64)
        chosen = own if given is None else given.double()
        if chosen.shape not in ((len(self.idk),), (count, len(self.idk))):
            raise ValueError(
                f"thresholds must have shape ({len(self.idk)},) or ({count}, {len(self.idk)}), "
                f"got {tuple(chosen.shape)}"
            )
        return chosen.expand(count, -1)


@torch.no_grad()
def ask(classifier: IDKClassifier, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """h and the score behind it, float64 (n,) each."""
    score = classifier.score(probabilities)
    return classifier.h(score), score


def check_costs(costs: Sequence[float], models: int) -> None:
    """Refuse costs that are missing, negative or not finite, and warn of models that are not in order of cost."""
    if len(costs) != models:
        raise ValueError(f"{models} models need {models} costs in one unit, got {len(costs)}")
    bad = [cost for cost in costs if not (math.isfinite(cost) and cost >= 0)]
    if bad:
        raise ValueError(f"cost {bad[0]:g} must be a finite number of at least 0, in the unit of the others")
    for number, (cost, following) in enumerate(zip(costs, costs[1:], strict=False), 1):
        if cost >= following:
            warnings.warn(
                f"model {number} costs {cost:g} and comes before one of {following:g}: put the cheaper one first",
                stacklevel=2,
            )


@dataclass(frozen=True)
class CascadeReport:
    """A cascade on n labelled images.

    accuracy; idk_level, idk_overall (A,): share passed on, of the images that reach the add-on (NaN where none do) and
    of all; reached (N,): images at each stage; average_cost, and relative_cost to the last model's; agreement (N,): see
    `agreement_profile`.
    """

    count: int
    accuracy: float
    idk_level: Floats
    idk_overall: Floats
    reached: Ints
    average_cost: float
    relative_cost: float
    agreement: Floats


@dataclass
class Tally:
    """Counts of a cascade over any number of parts of a data set; parts and workers may be added up."""

    reached: Ints
    correct: int = 0
    agreeing: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, stage: Ints, correct: Bools) -> "Tally":
        """Count one part: stage (n,) that answers each image, correct (N, n) of each model."""
        models, count = correct.shape
        reached = np.array([(stage >= number).sum() for number in range(models)], np.int64)
        right = int(correct[stage, np.arange(count)].sum())
        return cls(reached, right, np.bincount(correct.sum(0), minlength=models + 1).astype(np.int64))

    def to_array(self) -> Ints:
        return np.concatenate([self.reached, [self.correct], self.agreeing])

    @classmethod
    def from_array(cls, values: Ints) -> "Tally":
        models = (len(values) - 2) // 2
        return cls(values[:models], int(values[models]), values[models + 1 :])

    def report(self, costs: Sequence[float]) -> CascadeReport:
        count = int(self.reached[0])
        passed = self.reached[1:]
        with np.errstate(invalid="ignore"):
            level = passed / np.where(self.reached[:-1] > 0, self.reached[:-1], np.nan)
        average = average_cost(passed / count, costs)
        return CascadeReport(
            count=count,
            accuracy=self.correct / count,
            idk_level=level,
            idk_overall=passed / count,
            reached=self.reached,
            average_cost=average,
            relative_cost=average / costs[-1] if costs[-1] else math.nan,
            agreement=self.agreeing[::-1].cumsum()[::-1][1:] / count,
        )


def average_cost(overall_rates: Sequence[float] | Floats, costs: Sequence[float]) -> float:
    """c_1 + sum_j rate_j c_{j+1}, rates of all inputs: the first model is always paid (spec section 5)."""
    return float(costs[0] + np.dot(np.asarray(overall_rates, float), np.asarray(costs[1:], float)))


def exit_stages(scores: Sequence[Floats], thresholds: Sequence[float]) -> Ints:
    """The stage that answers each image, (n,): the first whose score is not above its threshold, or the last."""
    passed = np.ones(len(scores[0]), dtype=bool) if scores else np.ones(0, dtype=bool)
    stage = np.zeros(len(passed), dtype=np.int64)
    for score, threshold in zip(scores, thresholds, strict=True):
        passed = passed & (score > threshold)
        stage += passed
    return stage


def evaluate_tables(
    probabilities: Sequence[Tensor],
    labels: NDArray[np.int64],
    idk: Sequence[IDKClassifier],
    costs: Sequence[float],
    thresholds: Sequence[float] | None = None,
) -> CascadeReport:
    """A cascade's report from stored probabilities alone, with no model object.

    Args:
        probabilities: of the N models, each (n, k). labels: (n,).
        idk: N - 1 add-ons, or N with a human last stage, whose cost then stands last in `costs`.

    Raises:
        ValueError: bad probabilities, lengths, class counts or costs.
    """
    tables = check_tables(probabilities, labels)
    correct = correct_matrix(tables, labels, human=len(idk) == len(tables))
    check_costs(costs, len(correct))
    scores = [ask(classifier, table)[1].numpy() for classifier, table in zip(idk, tables, strict=False)]
    chosen = [classifier.threshold for classifier in idk] if thresholds is None else thresholds
    stage = exit_stages(scores, chosen) if scores else np.zeros(len(labels), np.int64)
    return Tally.of(stage, correct).report(costs)


def check_tables(probabilities: Sequence[Tensor], labels: NDArray[np.int64]) -> list[Tensor]:
    """Tables of all models over the same images and classes, as float64.

    Raises:
        ValueError: an empty set, different lengths or class counts, or bad rows.
    """
    tables = [check_probabilities(table, f"model {number}") for number, table in enumerate(probabilities, 1)]
    for number, table in enumerate(tables, 1):
        check_lengths(len(table), labels)
        if table.shape[1] != tables[0].shape[1]:
            raise ValueError(
                f"model {number} has {table.shape[1]} classes and model 1 has {tables[0].shape[1]}; a cascade's models "
                "must know the same classes"
            )
    return tables


def correct_matrix(tables: Sequence[Tensor], labels: NDArray[np.int64], human: bool = False) -> Bools:
    """Which model classifies which image correctly, bool (N, n); a human last stage is always right."""
    rows = [table.argmax(1).numpy() == labels for table in tables]
    return np.stack([*rows, np.ones(len(labels), dtype=bool)] if human else rows)


def agreement_profile(correct: Bools) -> Floats:
    """Share of images that at least j of the M models classify correctly, j = 1..M: (M, n) -> (M,)."""
    right = correct.sum(0)
    return np.array([(right >= number).mean() for number in range(1, len(correct) + 1)])
