"""What a trained AdaSkips network does with its skips (spec adaskips sections 5 and 6.7)."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataeff.core.plots import new_figure
from dataeff.dynamic.adaskips.model import AdaSkipResNet
from dataeff.dynamic.adaskips.predictor import as_matrix

UNUSED = 0.05
EXPLOSION = 1e4  # variance of a module's output over that of its input, spec section 10


@dataclass(frozen=True)
class SkipStatistics:
    """lambda of one module over a data set: mean and standard deviation of each skip, (n,); where skips lead, and the
    share of skips whose mean is below 0.05."""

    module: int
    pairs: list[tuple[int, int]]
    mean: Tensor
    std: Tensor

    @property
    def unused(self) -> float:
        return float((self.mean < UNUSED).double().mean())


def skip_statistics(model: AdaSkipResNet, weights: Sequence[Sequence[Tensor]]) -> list[SkipStatistics]:
    """Statistics from lambda of each batch and changed module, each (B, n)."""
    joined = [torch.cat(list(parts)).double().cpu() for parts in zip(*weights, strict=True)]
    modules = [model.stages[number - 1] for number in sorted(model.cfg.modules)]
    return [
        SkipStatistics(number, module.pairs, values.mean(0), values.std(0))
        for number, module, values in zip(sorted(model.cfg.modules), modules, joined, strict=True)
    ]


def variance_growth(model: AdaSkipResNet, x: Tensor) -> list[float]:
    """Variance of each module's output over that of its input, for images (B, C, H, W)."""
    with torch.no_grad():
        before = model.stem(x)
        ratios = []
        for after in model.run(x).maps:
            ratios.append(float(after.float().var() / before.float().var().clamp_min(1e-12)))
            before = after
    return ratios


def warn_of_explosion(ratios: Sequence[float]) -> None:
    """Say so when a module multiplies the variance of its activations by more than 1e4 (spec sections 2.4 and 10)."""
    worst = max(ratios)
    if not worst <= EXPLOSION:
        warnings.warn(
            f"VarianceExplosion: module {ratios.index(worst) + 1} multiplies the variance of its activations by "
            f"{worst:.3g}; set module_bn: true",
            stacklevel=2,
        )


def write_figures(directory: Path, statistics: Sequence[SkipStatistics], growth: Sequence[float]) -> None:
    """The heat maps of mean lambda as `skip_weights.png`, and all numbers as `analysis.json`.

    Args:
        growth: of `variance_growth`.
    """
    _plot_heat_maps(statistics, directory / "skip_weights.png")
    numbers = {
        "modules": {
            str(one.module): {
                "pairs": [list(pair) for pair in one.pairs],
                "mean": one.mean.tolist(),
                "std": one.std.tolist(),
                "unused_share": one.unused,
            }
            for one in statistics
        },
        "variance_growth": list(growth),
    }
    (directory / "analysis.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _plot_heat_maps(statistics: Sequence[SkipStatistics], path: Path) -> None:
    figure = new_figure(3.2 * len(statistics))
    for place, one in enumerate(statistics, start=1):
        axes = figure.add_subplot(1, len(statistics), place)
        matrix = as_matrix(one.mean, one.pairs).numpy()
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white")
        axes.set_title(f"module {one.module}", fontsize=9)
        axes.set_xlabel("from node")
        axes.set_ylabel("to node" if place == 1 else "")
        axes.set_xticks(range(matrix.shape[1]))
        axes.set_yticks(range(matrix.shape[0]), [str(row + 1) for row in range(matrix.shape[0])])
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="mean skip weight")
    figure.savefig(path, dpi=120)
