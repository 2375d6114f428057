"""Thresholds of scalar IDK classifiers by search under an accuracy goal (spec idk_cascades sections 2.4 and 2.8).

Everything here works on counts of a calibration set of n images, so that accuracies are compared exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dataeff.cascades.idk.uncertainty import ALWAYS, IDKClassifier, Kind, check_probabilities

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
TOLERANCE = 1e-12
PRODUCT_LIMIT = 10_000  # settings that a product of grids may have


@dataclass(frozen=True)
class GridResult:
    """Outcome of a search over one alpha.

    alpha: the chosen one, "always IDK" when no candidate reaches the goal; accuracy and idk_rate belong to it.
    best_accuracy: the highest over all candidates. table: (candidates, 3), alpha, accuracy and IDK rate.
    """

    alpha: float
    feasible: bool
    accuracy: float
    idk_rate: float
    best_accuracy: float
    table: Floats


def fit_threshold_grid(
    kind: Literal["prob", "entropy"],
    probabilities: Tensor,
    correct_fast: Bools,
    correct_next: Bools,
    desired_accuracy: float | None = None,
    eps: float = 0.0,
    n_grid: int = 100,
    search: Literal["grid", "exact"] = "grid",
    spacing: Literal["even", "quantile"] = "even",
    strict: bool = False,
) -> GridResult:
    """The alpha with the lowest IDK rate among those that reach the goal; ties: higher accuracy (Eq. 4.11).

    Args:
        probabilities: of the fast model, (n, k).
        correct_fast, correct_next: whether each model classifies each image correctly, (n,).
        desired_accuracy: the goal; None: (1 - eps) times the next model's accuracy.
        search: `n_grid` candidates, or every threshold that the data distinguish.
        strict: raise when no candidate reaches the goal.

    Raises:
        ValueError: empty or mismatched input, eps outside [0, 1), or (strict) no feasible candidate.

    Example:
        >>> result = fit_threshold_grid("entropy", probs, fast == labels, accurate == labels, eps=0.01)
        >>> result.alpha, result.idk_rate
    """
    probs = check_probabilities(probabilities)
    check_lengths(len(probs), correct_fast, correct_next)
    goal = accuracy_goal(desired_accuracy, eps, correct_next)
    classifier = IDKClassifier(kind, probs.shape[1])
    scores = classifier.score(probs).numpy()
    thresholds = candidates(kind, probs.shape[1], scores, n_grid, search, spacing)
    correct, idk = sweep(scores, correct_fast, correct_next, thresholds)
    chosen, feasible = choose(correct, idk, goal * len(probs))
    sign = -1.0 if kind == "prob" else 1.0
    count = len(probs)
    result = GridResult(
        alpha=sign * float(thresholds[chosen]),
        feasible=feasible,
        accuracy=correct[chosen] / count,
        idk_rate=idk[chosen] / count,
        best_accuracy=correct.max() / count,
        table=np.stack([sign * thresholds, correct / count, idk / count], axis=1),
    )
    if strict and not feasible:
        raise ValueError(infeasible(goal, result.best_accuracy))
    return result


def infeasible(goal: float, best: float) -> str:
    return (
        f"no threshold reaches accuracy {goal:.4f} on the calibration set, the best is {best:.4f}; lower accuracy_goal "
        "or raise eps"
    )


def check_lengths(count: int, *columns: Sequence[object] | NDArray[np.generic]) -> None:
    """Refuse an empty calibration set, or columns of different lengths."""
    if not count:
        raise ValueError("the calibration set is empty")
    for column in columns:
        if len(column) != count:
            raise ValueError(f"{count} rows of probabilities, but {len(column)} labels; both need one row an image")


def accuracy_goal(desired: float | None, eps: float, correct_last: Bools) -> float:
    """The absolute goal, or (1 - eps) times the last model's accuracy (Eq. 4.11)."""
    if not 0 <= eps < 1:
        raise ValueError(f"eps = {eps:g} must be in [0, 1)")
    if desired is None:
        return (1 - eps) * float(correct_last.mean())
    if not 0 < desired <= 1:
        raise ValueError(f"accuracy_goal = {desired:g} must be in (0, 1]")
    return desired


def candidates(
    kind: Kind,
    classes: int,
    scores: Floats,
    n_grid: int = 100,
    search: str = "grid",
    spacing: str = "even",
) -> Floats:
    """Thresholds on the score, ascending; the first one passes every image on.

    Even: 1/k to 1 (prob), 0 to ln k (entropy); kind "cost" has no natural range and is spaced by quantiles.
    """
    if not len(scores):
        return np.array([_always(kind, scores)])
    if search == "exact":
        inner = np.unique(scores)
    elif spacing == "quantile" or kind == "cost":
        inner = np.unique(np.quantile(scores, np.linspace(0, 1, n_grid - 1), method="inverted_cdf"))
    elif kind == "prob":
        inner = -np.linspace(1, 1 / classes, n_grid - 1)
    else:
        inner = np.linspace(0, math.log(classes), n_grid - 1)
    return np.concatenate([[_always(kind, scores)], inner])


def _always(kind: Kind, scores: Floats) -> float:
    if kind == "cost":
        return float(scores.min(initial=0.0)) - 1.0
    return -ALWAYS["prob"] if kind == "prob" else ALWAYS["entropy"]


def sweep(scores: Floats, correct_here: Bools, correct_next: Bools, thresholds: Floats) -> tuple[Ints, Ints]:
    """For each threshold: images classified correctly, and images passed on. O((n + candidates) log n)."""
    order = np.argsort(scores, kind="stable")
    kept = np.searchsorted(scores[order], thresholds, side="right")
    here = np.concatenate([[0], np.cumsum(correct_here[order])])
    later = np.concatenate([[0], np.cumsum(correct_next[order])])
    return (here[kept] + later[-1] - later[kept]).astype(np.int64), (len(scores) - kept).astype(np.int64)


def choose(correct: Ints, cost: Ints | Floats, needed: float) -> tuple[int, bool]:
    """Position of the cheapest setting with `needed` correct images (ties: the more accurate); the first if none."""
    feasible = correct >= needed - TOLERANCE * max(1.0, needed)
    if not feasible.any():
        return 0, False
    order = np.lexsort((-correct, cost))
    return int(order[feasible[order]][0]), True


def fit_stagewise(
    kind: Kind,
    classes: int,
    scores: Sequence[Floats],
    correct: Bools,
    needed: float,
    n_grid: int = 100,
    search: str = "grid",
    spacing: str = "even",
) -> tuple[list[float], bool]:
    """Thresholds stage by stage, from the first model on (spec section 2.8, `stagewise_grid`).

    Pass j keeps the earlier thresholds, looks at the images that reach stage j, and lets the last model answer what j
    passes on; the goal is on the whole set.

    Args:
        scores: of the N - 1 add-ons, each (n,). correct: (N, n). needed: correct images that the goal asks for.

    Returns:
        N - 1 thresholds, and whether every pass reached the goal.
    """
    reached = np.ones(correct.shape[1], dtype=bool)
    answered, all_feasible = 0, True
    thresholds: list[float] = []
    for stage, score in enumerate(scores):
        here = score[reached]
        tried = candidates(kind, classes, here, n_grid, search, spacing)
        right, idk = sweep(here, correct[stage][reached], correct[-1][reached], tried)
        chosen, feasible = choose(right, idk, needed - answered)
        all_feasible &= feasible
        thresholds.append(float(tried[chosen]))
        leaving = reached & (score <= tried[chosen])
        answered += int(correct[stage][leaving].sum())
        reached &= ~leaving
    return thresholds, all_feasible


@dataclass(frozen=True)
class Settings:
    """S settings of a cascade's thresholds on a calibration set: thresholds (S, N - 1), correct images (S,), and the
    cost of all images together (S,)."""

    thresholds: Floats
    correct: Ints
    cost: Floats

    def rows(self, rows: Ints | Bools) -> "Settings":
        return Settings(self.thresholds[rows], self.correct[rows], self.cost[rows])

    def pareto(self) -> "Settings":
        """Those that no other beats in both accuracy and cost, in order of cost."""
        ordered = self.rows(np.lexsort((-self.correct, self.cost)))
        best_before = np.concatenate([[-1], np.maximum.accumulate(ordered.correct)[:-1]])
        return ordered.rows(ordered.correct > best_before)


def product_grid(
    kind: Kind, classes: int, scores: Sequence[Floats], correct: Bools, costs: Floats, n_grid: int = 100
) -> Settings:
    """All combinations of candidate thresholds; the grids are coarser where there would be too many of them.

    Args:
        scores: of the N - 1 add-ons. correct: (N, n). costs: (N,).
    """
    size = n_grid if len(scores) < 2 else max(3, min(n_grid, round(PRODUCT_LIMIT ** (1 / len(scores)))))
    spacing = "even" if len(scores) < 2 else "quantile"
    tried = [candidates(kind, classes, score, size, spacing=spacing) for score in scores]
    found = _explore(tried, list(scores), correct, costs, np.arange(correct.shape[1]))
    return Settings(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _explore(
    tried: list[Floats], scores: list[Floats], correct: Bools, costs: Floats, reached: Ints
) -> list[tuple[Floats, Ints, Floats]]:
    """Settings of the add-ons that are left, for the images that reach the first of them."""
    paid = costs[0] * len(reached)
    here = scores[0][reached]
    if len(scores) == 1:
        right, idk = sweep(here, correct[0][reached], correct[1][reached], tried[0])
        return [(tried[0][:, None], right, paid + costs[1] * idk)]
    found = []
    for threshold in tried[0]:
        leaving = here <= threshold
        answered = int(correct[0][reached[leaving]].sum())
        for thresholds, right, cost in _explore(tried[1:], scores[1:], correct[1:], costs[1:], reached[~leaving]):
            first = np.full((len(thresholds), 1), threshold)
            found.append((np.concatenate([first, thresholds], axis=1), right + answered, cost + paid))
    return found
