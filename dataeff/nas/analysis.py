"""Drawings of cells, their evolution over epochs, class-wise metrics and structure.

Source: spec ss_pcp_darts section 5.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dataeff.core.plots import new_figure
from dataeff.nas.architecture import Architecture, Chain, parse_architecture
from dataeff.nas.genotype import PARAMETER_FREE, Genotype, Pair, structure_stats

STRIP = 8  # moments in the picture of a search


def classwise_metrics(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy, precision, recall and F1 of each class, and their micro-average "all".

    Args:
        confusion: (classes, classes), rows true, columns predicted. A class that is never predicted has precision 0.
    """
    counts = confusion.astype(np.float64)
    right = counts.diagonal()
    predicted, true, total = counts.sum(0), counts.sum(1), counts.sum()

    def row(tp: float, fp: float, fn: float, tn: float) -> dict[str, float]:
        precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
        f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
        return {"accuracy": (tp + tn) / (tp + fp + fn + tn), "precision": precision, "recall": recall, "f1": f1}

    table = {
        name: row(right[k], predicted[k] - right[k], true[k] - right[k], total - predicted[k] - true[k] + right[k])
        for k, name in enumerate(classes)
    }
    share = float(right.sum() / total)
    table["all"] = {"accuracy": share, "precision": share, "recall": share, "f1": share}
    return table


def structure(architecture: Architecture) -> dict[str, Any]:
    """`structure_stats` of both cells, or the blocks of a chain."""
    if isinstance(architecture, Chain):
        return {"blocks": [layer.model_dump(mode="json") for layer in architecture.layers]}
    return {"normal": structure_stats(architecture.normal), "reduce": structure_stats(architecture.reduce)}


def write_architecture(architecture: Architecture, directory: Path) -> None:
    """`cell_normal.svg` and `.png`, the same for `cell_reduce`; chains have no graph to draw."""
    if isinstance(architecture, Chain):
        return
    for kind, pairs, concat in _cells(architecture):
        figure = new_figure(8.0, 4.0)
        axes = figure.add_subplot()
        draw_cell(axes, pairs, concat)
        axes.set_title(f"{kind} cell")
        for suffix in ("svg", "png"):
            figure.savefig(directory / f"cell_{kind}.{suffix}", dpi=110)


def _cells(genotype: Genotype) -> list[tuple[str, tuple[Pair, ...], tuple[int, ...]]]:
    return [
        ("normal", genotype.normal, genotype.normal_concat),
        ("reduce", genotype.reduce, genotype.reduce_concat),
    ]


def draw_cell(axes: Axes, pairs: Sequence[Pair], concat: Sequence[int], small: bool = False) -> None:
    """The cell as a graph from left to right; operations without parameters are dashed."""
    count = len(pairs) // 2
    places = {0: (0.0, 1.0), 1: (0.0, -1.0)}
    depth = {0: 0, 1: 0}
    for node in range(2, 2 + count):
        depth[node] = 1 + max(depth[source] for _, source in pairs[2 * node - 4 : 2 * node - 2])
        # The offset keeps nodes of one depth, and arrows that pass a node, apart.
        places[node] = (2.0 * depth[node], 1.6 - 3.2 * (node - 2) / max(1, count - 1))
    places[-1] = (2.0 * (max(depth.values()) + 1), 0.0)
    names = {0: "k-2", 1: "k-1", -1: "k"} | {node: str(node - 2) for node in range(2, 2 + count)}
    for position, (operation, source) in enumerate(pairs):
        target = 2 + position // 2
        bend = 0.12 if position % 2 else -0.12
        _arrow(axes, places[source], places[target], bend, "--" if operation in PARAMETER_FREE else "-")
        if not small:
            (x0, y0), (x1, y1) = places[source], places[target]
            across = bend * np.hypot(x1 - x0, y1 - y0) / 2
            axes.text(0.55 * x1 + 0.45 * x0, 0.55 * y1 + 0.45 * y0 - across, operation, fontsize=7, ha="center")
    for node in concat:
        _arrow(axes, places[node], places[-1], 0.0, ":")
    for node, (x, y) in places.items():
        axes.text(
            x, y, names[node], fontsize=6 if small else 9, ha="center", va="center", zorder=3,
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "black"},
        )  # fmt: skip
    axes.set_xlim(-0.8, places[-1][0] + 0.8)
    axes.set_ylim(-2.2, 2.2)
    axes.set_axis_off()


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float, style: str) -> None:
    arrow = {"arrowstyle": "->", "linestyle": style, "connectionstyle": f"arc3,rad={bend}", "shrinkA": 9, "shrinkB": 9}
    axes.annotate("", end, start, arrowprops=arrow)


def write_evolution(history: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """`evolution.png`: both cells at up to eight moments of the search, and how many pairs changed every epoch."""
    moments = [(row, parse_architecture(row["architecture"])) for row in history]
    cells = [(row, found) for row, found in moments if isinstance(found, Genotype)]
    if not cells:
        return
    chosen = [cells[i] for i in np.unique(np.linspace(0, len(cells) - 1, STRIP).round().astype(int))]
    figure = new_figure(2.8 * len(chosen), 6.0)
    for column, (row, genotype) in enumerate(chosen):
        for line, (kind, pairs, concat) in enumerate(_cells(genotype)):
            axes = figure.add_subplot(3, len(chosen), line * len(chosen) + column + 1)
            draw_cell(axes, pairs, concat, small=True)
            axes.set_title(f"{kind}, phase {row['phase'] + 1}, epoch {row['epoch'] + 1}", fontsize=7)
    axes = figure.add_subplot(3, 1, 3)
    for kind in ("normal", "reduce"):
        axes.plot(_changes([getattr(genotype, kind) for _, genotype in cells]), marker=".", label=kind)
    axes.set_xlabel("epoch of the search")
    axes.set_ylabel("pairs changed")
    axes.legend(fontsize=8)
    figure.savefig(directory / "evolution.png", dpi=100)


def _changes(cells: Sequence[Sequence[Pair]]) -> list[int]:
    """How many (node, pair) of each cell the one before did not have."""
    placed = [{(position // 2, *pair) for position, pair in enumerate(pairs)} for pairs in cells]
    return [0, *(len(now - before) for before, now in zip(placed, placed[1:], strict=False))]
