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
class CascadeOutput:
    """Answers for B images.

    labels: int64 (B,). probabilities: float32 (B, k), of the last model that ran.
    stage: int64 (B,), which one that was, from 0. ran: bool (B, N).
    macs: float64 (B,), of all models and add-ons that ran.
    uncertainty: float64 (B, A), h of each of the A add-ons, NaN where it was not asked.
    score: float64 (B, A), what the thresholds are compared with, NaN likewise.
    idk: bool (B,), passed on by the last model as well: a person should answer.
    stopped: bool (B,), a budget or `max_stage` ended the cascade although an add-on said IDK.
    """

    labels: Tensor
    probabilities: Tensor
    stage: Tensor
    macs: Tensor
    ran: Tensor
    uncertainty: Tensor
    score: Tensor
    idk: Tensor
    stopped: Tensor


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
        count, asked = len(inputs), len(self.idk)
        limit = self._thresholds(thresholds, count)
        empty = torch.full((count, asked), math.nan, dtype=torch.float64)
        output = CascadeOutput(
            labels=torch.zeros(count, dtype=torch.int64),
            probabilities=torch.zeros(count, 0),
            stage=torch.zeros(count, dtype=torch.int64),
            macs=torch.zeros(count, dtype=torch.float64),
            ran=torch.zeros(count, len(self.models), dtype=torch.bool),
            uncertainty=empty,
            score=empty.clone(),
            idk=torch.zeros(count, dtype=torch.bool),
            stopped=torch.zeros(count, dtype=torch.bool),
        )
        left = torch.arange(count)
        for number, model in enumerate(self.models):
            if number:
                left = self._affordable(output, left, number, budget, max_stage)
                if not len(left):
                    break
            allowed = None if budget is None else budget[left] - output.macs[left]
            answer = model(inputs if len(left) == count else inputs[left.to(inputs.device)], allowed)
            left = self._record(output, number, left, answer, limit)
        output.idk[left] = asked == len(self.models)
        output.labels = output.probabilities.argmax(1) if count else output.labels
        return output

    def _thresholds(self, given: Tensor | None, count: int) -> Tensor:
        own = torch.tensor([classifier.threshold for classifier in self.idk], dtype=torch.float64)
        chosen = own if given is None else given.double()
        if chosen.shape not in ((len(self.idk),), (count, len(self.idk))):
            raise ValueError(
                f"thresholds must have shape ({len(self.idk)},) or ({count}, {len(self.idk)}), "
                f"got {tuple(chosen.shape)}"
            )
        return chosen.expand(count, -1)

    def _affordable(
        self, output: CascadeOutput, left: Tensor, number: int, budget: Tensor | None, max_stage: int | None
    ) -> Tensor:
        """Those of the images passed on to model `number` that it may run on; the others keep their answer."""
        if max_stage is not None and number > max_stage:
            output.stopped[left] = True
            return left[:0]
        if budget is None:
            return left
        fits = output.macs[left] + self.costs[number] <= budget[left]
        output.stopped[left[~fits]] = True
        return left[fits]

    def _record(self, output: CascadeOutput, number: int, rows: Tensor, answer: Prediction, limit: Tensor) -> Tensor:
        """Write a model's answers for `rows`, and return the rows that its add-on passes on."""
        if not number:
            output.probabilities = torch.zeros(len(output.labels), answer.probabilities.shape[1])
        output.probabilities[rows] = answer.probabilities.float().cpu()
        output.stage[rows] = number
        output.ran[rows, number] = True
        output.macs[rows] += answer.macs.cpu()
        if number == len(self.idk):
            return rows[:0]
        uncertainty, score = ask(self.idk[number], output.probabilities[rows])
        output.macs[rows] += self.idk[number].macs
        output.uncertainty[rows, number] = uncertainty
        output.score[rows, number] = score
        return rows[score > limit[rows, number]]


@torch.no_grad()
def ask(classifier: IDKClassifier, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """h and the score behind it, float64 (n,) each."""
    score = classifier.score(probabilities)
    h = torch.sigmoid(score) if classifier.kind == "cost" else (score > classifier.threshold).double()
    return h, score


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
