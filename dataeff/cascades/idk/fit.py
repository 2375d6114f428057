"""From stored probabilities to a fitted cascade: every design of h, search or learning, and the calibration curve."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from dataeff.cascades.idk.cascade import (
    CascadeReport,
    Tally,
    ask,
    check_costs,
    check_tables,
    correct_matrix,
    exit_stages,
)
from dataeff.cascades.idk.learning import (
    check_cost_weight,
    fit_cost_oblivious,
    fit_joint,
    fit_scalars,
    prepare_feature,
    set_scalars,
)
from dataeff.cascades.idk.search import (
    Bools,
    Floats,
    Ints,
    Settings,
    accuracy_goal,
    choose,
    fit_stagewise,
    infeasible,
    product_grid,
)
from dataeff.cascades.idk.uncertainty import NN_HIDDEN, IDKClassifier
from dataeff.core.config import Config

COARSE_WEIGHTS = np.logspace(-3, 0, 13)
FINE_WEIGHTS = 9
CURVE_POINTS = 40


class FitConfig(Config):
    """How the add-ons are made (spec idk_cascades section 4)."""

    kind: Literal["prob", "entropy", "cost", "oblivious"] = Field(
        "entropy",
        description="prob, entropy: a threshold by search; cost: learned with both models' errors and the cost; "
        "oblivious: learned from the model's own errors alone",
    )
    feature: Literal["entropy", "nn"] = Field("entropy", description="of cost and oblivious; nn: a 7-layer network")
    standardise: bool = Field(False, description="the entropy feature: less its mean, over its standard deviation")
    nn_hidden: tuple[int, ...] = Field(NN_HIDDEN, min_length=1, description="its hidden widths")
    search: Literal["grid", "exact", "product"] = Field(
        "grid",
        description="grid: n_grid thresholds, stage by stage; exact: every threshold, stage by stage; product: all "
        "combinations of the stages' grids",
    )
    n_grid: int = Field(100, ge=3, le=10_000, description="candidate thresholds of a stage")
    spacing: Literal["even", "quantile"] = Field("even", description="of the candidates")
    eps: float = Field(0.0, ge=0, lt=1, description="accuracy goal: (1 - eps) times the last model's (Eq. 4.11)")
    accuracy_goal: float | None = Field(None, gt=0, le=1, description="an absolute goal instead")
    cost_weight: float | None = Field(
        None, ge=0, le=100, description="lambda of kind cost; none: the cheapest of a grid that reaches the goal"
    )
    cost_unit: Literal["relative", "absolute"] = Field(
        "relative", description="in the loss: costs over the last stage's, or as given"
    )
    lr: float = Field(0.05, gt=0, le=10, description="learning rate of cost and oblivious")
    steps: int = Field(2000, ge=1, description="of Adam on the whole calibration set, for the entropy feature")
    nn_steps: int = Field(300, ge=1, description="mini-batches of SGD, for the neural feature")
    strict: bool = Field(False, description="an accuracy goal out of reach is an error instead of a warning")

    @field_validator("nn_hidden")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(width < 1 for width in value):
            raise ValueError(f"nn_hidden must be widths of at least 1, got {list(value)}")
        return value


class CurvePoint(Config):
    """A setting of all thresholds, and what it gave on the calibration set."""

    thresholds: tuple[float, ...]
    accuracy: float
    cost: float = Field(description="average, in the unit of the stages' costs")
    relative_cost: float = Field(description="over the last stage's cost")
    idk_rates: tuple[float, ...] = Field(description="of all images, passed on at each add-on")


@dataclass
class FittedCascade:
    """Add-ons with their thresholds inside, the goal, what they reach on the calibration set, and the curve."""

    idk: list[IDKClassifier]
    goal: float
    feasible: bool
    report: CascadeReport
    curve: list[CurvePoint]
    cost_weight: float | None


def fit_cascade(
    probabilities: Sequence[Tensor],
    labels: Ints,
    costs: Sequence[float],
    config: FitConfig | None = None,
    human_cost: float | None = None,
    seed: int = 0,
) -> FittedCascade:
    """Fit a cascade to stored probabilities of its models, cheapest first; models themselves are not needed.

    Args:
        probabilities: of each of the N models, (n, k). labels: (n,).
        costs: of the N models, in one unit.
        human_cost: add a person who is always right behind the last model, at this cost an intervention.

    Raises:
        ValueError: bad probabilities, lengths, classes or costs, or (strict) a goal out of reach.

    Example:
        >>> fitted = fit_cascade([fast, accurate], labels, [1.0, 9.0], FitConfig(kind="cost", eps=0.01))
        >>> evaluate_tables([fast_test, accurate_test], test_labels, fitted.idk, [1.0, 9.0]).relative_cost
    """
    config = config or FitConfig()
    tables = check_tables(probabilities, labels)
    human = human_cost is not None
    all_costs = [*costs, *([human_cost] if human_cost is not None else [])]
    check_costs(all_costs, len(tables) + human)
    correct = correct_matrix(tables, labels, human)
    goal = accuracy_goal(config.accuracy_goal, config.eps, correct[-1])
    problem = Problem(tables[: len(correct) - 1], correct, np.array(all_costs, float), goal * len(labels), config, seed)
    problem.warn_of_order()
    idk, reached_goal, weight = problem.fit()
    scores = [ask(classifier, table)[1].numpy() for classifier, table in zip(idk, problem.tables, strict=True)]
    stage = exit_stages(scores, [h.threshold for h in idk]) if idk else np.zeros(len(labels), np.int64)
    report = Tally.of(stage, correct).report(all_costs)
    _warn_of_result(idk, report, goal, reached_goal, config)
    curve = _curve(idk, problem, scores, config.n_grid)
    if config.strict and not reached_goal:
        raise ValueError(infeasible(goal, max((point.accuracy for point in curve), default=report.accuracy)))
    return FittedCascade(idk, goal, reached_goal, report, curve, weight)


@dataclass
class Problem:
    """What a fit starts from: tables of the models with an add-on (A of (n, k)), correct (N, n), costs (N,), and how
    many images must come out right."""

    tables: Sequence[Tensor]
    correct: Bools
    costs: Floats
    needed: float
    config: FitConfig
    seed: int

    @property
    def classes(self) -> int:
        return self.tables[0].shape[1]

    def warn_of_order(self) -> None:
        accuracies = self.correct.mean(1)
        if len(accuracies) > 1 and accuracies[-1] < accuracies[0]:
            warnings.warn(
                f"stage order: the last model is less accurate on the calibration set ({accuracies[-1]:.3f}) than the "
                f"first ({accuracies[0]:.3f}), so that a cascade will hardly use it; put the most accurate model last",
                stacklevel=3,
            )

    def fit(self) -> tuple[list[IDKClassifier], bool, float | None]:
        """Add-ons, whether the goal is reached, and the cost weight that was taken."""
        if not self.tables:
            return [], self.reaches([]), None
        if self.config.kind in ("prob", "entropy"):
            return (*self._search(), None)
        idk = [self._new() for _ in self.tables]
        if self.config.kind == "oblivious":
            for h, table, right in zip(idk, self.tables, self.correct, strict=False):
                fit_cost_oblivious(h, table, torch.from_numpy(~right), **self._recipe)
            return idk, self.reaches(idk), None
        if self.config.cost_weight is not None:
            check_cost_weight(self.config.cost_weight)
            self._learn(idk, np.array([self.config.cost_weight]))
            return idk, self.reaches(idk), self.config.cost_weight
        return self._search_weight()

    def _search(self) -> tuple[list[IDKClassifier], bool]:
        config = self.config
        assert config.kind in ("prob", "entropy")
        idk = [IDKClassifier(config.kind, self.classes) for _ in self.tables]
        scores = [h.score(table).numpy() for h, table in zip(idk, self.tables, strict=True)]
        if config.search == "product":
            settings = product_grid(config.kind, self.classes, scores, self.correct, self.costs, config.n_grid)
            chosen, feasible = choose(settings.correct, settings.cost, self.needed)
            thresholds = settings.thresholds[chosen].tolist()
        else:
            thresholds, feasible = fit_stagewise(
                config.kind,
                self.classes,
                scores,
                self.correct,
                self.needed,
                config.n_grid,
                config.search,
                config.spacing,
            )
        for h, threshold in zip(idk, thresholds, strict=True):
            h.set_alpha(-threshold if config.kind == "prob" else threshold)
        return idk, feasible

    @property
    def _recipe(self) -> dict[str, Any]:
        config = self.config
        steps = config.nn_steps if config.feature == "nn" else config.steps
        return {"steps": steps, "lr": config.lr, "seed": self.seed, "standardise": config.standardise}

    def _new(self) -> IDKClassifier:
        torch.manual_seed(self.seed)  # initial weights of the neural feature
        return IDKClassifier("cost", self.classes, self.config.feature, self.config.nn_hidden)

    def _learn(self, idk: Sequence[IDKClassifier], weights: Floats) -> Tensor | None:
        """Fit one weight in place, or the scalars (L, A, 2) of several."""
        config = self.config
        wrong = torch.from_numpy(~self.correct).double()
        costs = self.costs / (self.costs[-1] or 1.0) if config.cost_unit == "relative" else self.costs
        if len(weights) == 1:
            fit_joint(idk, self.tables, wrong, costs.tolist(), float(weights[0]), **self._recipe)
            return None
        features = [prepare_feature(h, table, config.standardise) for h, table in zip(idk, self.tables, strict=True)]
        return fit_scalars(features, wrong, torch.from_numpy(costs), torch.from_numpy(weights), config.steps, config.lr)

    def _search_weight(self) -> tuple[list[IDKClassifier], bool, float | None]:
        """The cheapest of a coarse grid of weights that reaches the goal, then of a fine one above it; a coarse grid
        alone can skip the goal (spec section 8.2)."""
        neural = self.config.feature == "nn"  # every weight is a training of its own
        tried = self._try(COARSE_WEIGHTS[::3] if neural else COARSE_WEIGHTS)
        good = [entry for entry in tried if entry[1] >= self.needed - 1e-9]
        if good:
            weight = min(good, key=lambda entry: entry[2])[3]
            above = COARSE_WEIGHTS[np.searchsorted(COARSE_WEIGHTS, weight) + 1 :][:1]
            if len(above) and not neural:
                good += [
                    entry
                    for entry in self._try(np.geomspace(weight, above[0], FINE_WEIGHTS)[1:-1])
                    if entry[1] >= self.needed - 1e-9
                ]
            idk, _, _, weight = min(good, key=lambda entry: (entry[2], -entry[1]))
            return idk, True, float(weight)
        idk, _, _, weight = max(tried, key=lambda entry: (entry[1], -entry[2]))
        return idk, False, float(weight)

    def _try(self, weights: Floats) -> list[tuple[list[IDKClassifier], int, float, float]]:
        """Add-ons, correct images, cost and weight of each fit."""
        found = []
        if self.config.feature == "nn":
            for weight in weights:
                idk = [self._new() for _ in self.tables]
                self._learn(idk, np.array([weight]))
                found.append((idk, *self._outcome(idk), float(weight)))
            return found
        first = [self._new() for _ in self.tables]
        alphas = self._learn(first, weights)
        assert alphas is not None
        for row, weight in zip(alphas, weights, strict=True):
            idk = [self._new() for _ in self.tables]
            for h, fitted in zip(idk, first, strict=True):
                h.load_state_dict(fitted.state_dict())
            set_scalars(idk, row)
            found.append((idk, *self._outcome(idk), float(weight)))
        return found

    def _outcome(self, idk: Sequence[IDKClassifier]) -> tuple[int, float]:
        scores = [ask(h, table)[1].numpy() for h, table in zip(idk, self.tables, strict=True)]
        count = self.correct.shape[1]
        stage = exit_stages(scores, [h.threshold for h in idk]) if idk else np.zeros(count, np.int64)
        right = int(self.correct[stage, np.arange(count)].sum())
        return right, float(self.costs.cumsum()[stage].sum())

    def reaches(self, idk: Sequence[IDKClassifier]) -> bool:
        return self._outcome(idk)[0] >= self.needed - 1e-9


def _warn_of_result(
    idk: Sequence[IDKClassifier], report: CascadeReport, goal: float, feasible: bool, config: FitConfig
) -> None:
    chosen_weight = config.kind == "cost" and config.cost_weight is not None and config.accuracy_goal is None
    if not feasible and config.kind != "oblivious" and not chosen_weight:
        warnings.warn(
            f"goal not reached: accuracy {report.accuracy:.4f} on the calibration set, asked for {goal:.4f}; lower "
            "accuracy_goal, raise eps or lower cost_weight",
            stacklevel=3,
        )
    for number, (h, level) in enumerate(zip(idk, report.idk_level, strict=True), 1):
        if level in (0.0, 1.0):
            what = "passes nothing on" if level == 0 else "passes everything on"
            warnings.warn(
                f"collapsed add-on: number {number} {what} (IDK rate {level:g}). IDK pays where the next model is "
                "right more often by over cost_weight (lambda) times its cost; another cost_weight or accuracy goal "
                "changes it",
                stacklevel=3,
            )
        if h.kind == "cost" and h.network is None and float(h.alpha_1.detach()) <= 0:
            warnings.warn(
                f"inverted IDK classifier: number {number} passes certain answers on (alpha_1 <= 0); use kind entropy",
                stacklevel=3,
            )


def _curve(idk: Sequence[IDKClassifier], problem: Problem, scores: Sequence[Floats], n_grid: int) -> list[CurvePoint]:
    """Accuracy against cost: up to `CURVE_POINTS` settings that no other beats in both, on the calibration set."""
    if not idk:
        return []
    settings = product_grid(idk[0].kind, problem.classes, scores, problem.correct, problem.costs, n_grid)
    best = settings.pareto()
    spread = np.unique(np.linspace(0, len(best.cost) - 1, min(CURVE_POINTS, len(best.cost))).round().astype(np.int64))
    return [_point(best, int(row), problem, scores) for row in spread]


def _point(settings: Settings, row: int, problem: Problem, scores: Sequence[Floats]) -> CurvePoint:
    thresholds = settings.thresholds[row].tolist()
    report = Tally.of(exit_stages(scores, thresholds), problem.correct).report(problem.costs.tolist())
    return CurvePoint(
        thresholds=tuple(thresholds),
        accuracy=report.accuracy,
        cost=report.average_cost,
        relative_cost=report.relative_cost,
        idk_rates=tuple(report.idk_overall.tolist()),
    )
