"""Which points are hard and which a query asks for, in two dimensions (spec initial_pools section 2.6, item 5; the
source's figure 3.1)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from dataeff.active.queries import QUERIES, ALContext
from dataeff.active.scores import FloatArray
from dataeff.core.plots import new_figure

IntArray = NDArray[np.int64]

LABELS = 35
FIRST, STEP = 5, 5  # labels at random, then in batches
CHOSEN_BY = ("random", "lc", "me")


def toy_gaussians(n: int = 500, seed: int = 0) -> tuple[FloatArray, IntArray]:
    """Two overlapping Gaussian classes of equal size in the plane.

    Returns:
        Points float64 [n, 2] and labels int64 [n] in {0, 1}, in random order.

    Raises:
        ValueError: n is below 2.
    """
    if n < 2:
        raise ValueError(f"n = {n}: must be at least 2, one point a class")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 2)
    centres = np.array([[-1.0, -0.5], [1.0, 0.5]])
    return centres[labels] + rng.normal(size=(n, 2)), labels


@dataclass(frozen=True)
class ToyRun:
    """Labelled points in the order of asking, int64 [35], the regression on them, and its accuracy on all points."""

    labelled: IntArray
    model: Any
    accuracy: float


def toy_run(points: FloatArray, labels: IntArray, query: str, seed: int = 0) -> ToyRun:
    """Logistic regression from 35 labels: 5 at random (both classes), then 5 at a time as `query` asks."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(points))
    second = next(place for place in order if labels[place] != labels[order[0]])
    rest = order[(order != order[0]) & (order != second)]
    labelled = np.array([order[0], second, *rest[: FIRST - 2]])
    while True:
        model = LogisticRegression().fit(points[labelled], labels[labelled])
        if len(labelled) == LABELS:
            return ToyRun(labelled, model, float(model.score(points, labels)))
        unlabelled = np.setdiff1d(np.arange(len(points)), labelled)
        ctx = ALContext(unlabelled, labelled, rng, probabilities=model.predict_proba(points[unlabelled]))
        labelled = np.concatenate([labelled, QUERIES[query]().query(ctx, STEP)])


def plot_toy(path: str | Path, n: int = 500, seed: int = 0) -> dict[str, ToyRun]:
    """The figure: all points by the cross-entropy of a regression on all labels; then the 35 points and the boundary of
    each way to choose them. Returns the runs by query."""
    points, labels = toy_gaussians(n, seed)
    full = LogisticRegression().fit(points, labels)
    losses = -np.log(full.predict_proba(points)[np.arange(n), labels])
    runs = {query: toy_run(points, labels, query, seed) for query in CHOSEN_BY}
    figure = new_figure(3.4 * (1 + len(runs)), 3.4)
    axes = figure.add_subplot(1, 1 + len(runs), 1)
    shown = axes.scatter(points[:, 0], points[:, 1], c=losses, s=8, cmap="viridis")
    figure.colorbar(shown, ax=axes, label="cross-entropy")
    axes.set_title("all labels")
    for number, (query, run) in enumerate(runs.items()):
        axes = figure.add_subplot(1, 1 + len(runs), number + 2)
        axes.scatter(points[:, 0], points[:, 1], c=labels, s=4, alpha=0.25, cmap="coolwarm")
        chosen = points[run.labelled]
        axes.scatter(chosen[:, 0], chosen[:, 1], c=labels[run.labelled], s=28, edgecolors="black", cmap="coolwarm")
        x = np.array([points[:, 0].min(), points[:, 0].max()])
        for model, style in ((full, "k:"), (run.model, "k-")):
            (a, b), c = model.coef_[0], model.intercept_[0]
            axes.plot(x, -(a * x + c) / b, style, linewidth=1.2)
        axes.set(title=f"{query}: {run.accuracy:.3f}", ylim=(points[:, 1].min() - 0.3, points[:, 1].max() + 0.3))
    figure.savefig(path, dpi=120)
    return runs
