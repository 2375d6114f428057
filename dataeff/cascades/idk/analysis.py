"""The eleven methods side by side (spec idk_cascades section 5), and a cascade's figures."""

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataeff.cascades.idk.calibration import entropy_histogram
from dataeff.cascades.idk.cascade import (
    CascadeReport,
    HumanExpert,
    Tally,
    check_tables,
    correct_matrix,
    evaluate_tables,
)
from dataeff.cascades.idk.fit import FitConfig, FittedCascade, fit_cascade
from dataeff.cascades.idk.search import Bools, Ints, accuracy_goal
from dataeff.core.plots import new_figure, plot_scatter
from dataeff.data import uniform_draws

FITTED: dict[str, dict[str, Any]] = {
    "prob + grid": {"kind": "prob"},
    "entropy + grid": {"kind": "entropy"},
    "entropy + cost": {"kind": "cost", "feature": "entropy"},
    "neural + cost": {"kind": "cost", "feature": "nn"},
    "entropy oblivious": {"kind": "oblivious", "feature": "entropy"},
    "neural oblivious": {"kind": "oblivious", "feature": "nn"},
}


def compare(
    calibration: Sequence[Tensor],
    calibration_labels: Ints,
    test: Sequence[Tensor],
    labels: Ints,
    costs: Sequence[float],
    config: FitConfig,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The fast and the accurate model alone, random IDK, the six designs of h, the oracle and a human behind the fast
    model, all fitted on the calibration set for one accuracy goal and measured on the test set.

    Args:
        calibration, test: probabilities of the two models, (n, k) each. config: the goal, and how add-ons are made.

    Returns:
        A row a method: method, accuracy, idk_rate, cost, relative_cost, and whether the goal was met on calibration.
    """
    correct = correct_matrix(check_tables(test, labels), labels)
    known = correct_matrix(check_tables(calibration, calibration_labels), calibration_labels)
    goal = accuracy_goal(config.accuracy_goal, config.eps, known[1])
    rows = [
        _row("fast alone", _report(np.zeros(len(labels), bool), correct, costs), known[0].mean() >= goal),
        _row("accurate alone", _report(np.ones(len(labels), bool), correct, [0.0, costs[1]]), known[1].mean() >= goal),
    ]
    settings = config.model_copy(update={"accuracy_goal": goal, "strict": False, "search": "grid"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # collapsed add-ons are a result here
        for name, changes in FITTED.items():
            fitted = fit_cascade(calibration, calibration_labels, costs, settings.model_copy(update=changes), seed=seed)
            rows.append(_row(name, evaluate_tables(test, labels, fitted.idk, costs), fitted.feasible))
        person = HumanExpert(costs[1])
        fitted = fit_cascade(calibration[:1], calibration_labels, costs[:1], settings, person.cost, seed)
        human = evaluate_tables(test[:1], labels, fitted.idk, [costs[0], person.cost])
    rate = rows[3]["idk_rate"]  # entropy + grid
    random = uniform_draws(seed, 0, np.arange(len(labels)), 1, stream=1)[:, 0] < rate
    rows.append(_row("random", _report(random, correct, costs), False))
    rows.append(_row("oracle", _report(~correct[0], correct, costs), bool((known.any(0)).mean() >= goal)))
    rows.append(_row("human", human, fitted.feasible))
    return [{**row, "goal": goal} for row in rows]


def _report(idk: Bools, correct: Bools, costs: Sequence[float]) -> CascadeReport:
    return Tally.of(idk.astype(np.int64), correct).report(costs)


def _row(name: str, report: CascadeReport, feasible: Any) -> dict[str, Any]:
    return {
        "method": name,
        "accuracy": report.accuracy,
        "idk_rate": float(report.idk_overall[0]),
        "cost": report.average_cost,
        "relative_cost": report.relative_cost,
        "feasible": bool(feasible),
    }


def plot_comparison(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy of each method against its cost."""
    points = {row["method"]: [(row["relative_cost"], row["accuracy"])] for row in rows}
    plot_scatter(points, path, "average cost over the accurate model's", "test accuracy")


def plot_curve(
    fitted: FittedCascade,
    test: Sequence[Tensor],
    labels: Ints,
    names: Sequence[str],
    costs: Sequence[float],
    path: Path,
) -> None:
    """Test accuracy against average cost along the calibration curve, with every single model as a point."""
    human = len(fitted.idk) == len(test)
    series: dict[str, list[tuple[float, float]]] = {}
    if not human:
        reports = [evaluate_tables(test, labels, fitted.idk, costs, point.thresholds) for point in fitted.curve]
        if reports:
            series["cascade"] = [(report.average_cost, report.accuracy) for report in reports]
            chosen = evaluate_tables(test, labels, fitted.idk, costs)
            series["chosen thresholds"] = [(chosen.average_cost, chosen.accuracy)]
    elif fitted.curve:
        series["cascade (calibration)"] = [(point.cost, point.accuracy) for point in fitted.curve]
    for name, table, cost in zip(names, test, costs, strict=True):
        series[f"{name} alone"] = [(cost, float((table.argmax(1).numpy() == labels).mean()))]
    plot_scatter(series, path, "average cost of an image", "accuracy", [name for name in series if "cascade" in name])


def plot_entropies(names: Sequence[str], calibration: Sequence[Tensor], test: Sequence[Tensor], path: Path) -> None:
    """Histograms of each model's entropies on calibration and test images; they differ where calibration leaks."""
    figure = new_figure(4.0 * len(names), 3.0)
    for number, (name, known, new) in enumerate(zip(names, calibration, test, strict=True), 1):
        histogram = entropy_histogram(known, new)
        axes = figure.add_subplot(1, len(names), number)
        axes.stairs(histogram.train, histogram.edges, label="calibration")
        axes.stairs(histogram.held_out, histogram.edges, label="test")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("entropy (nats)")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def throughput(models: Mapping[str, Any], inputs: Tensor, repeats: int = 3) -> dict[str, float]:
    """Images a second of each model, a function of inputs (B, ...), the median of `repeats` runs after a warm one."""
    rates = {}
    for name, model in models.items():
        model(inputs)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            with torch.inference_mode():
                model(inputs)
            seconds.append(time.perf_counter() - started)
        rates[name] = len(inputs) / float(np.median(seconds))
    return rates
