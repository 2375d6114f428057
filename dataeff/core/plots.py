"""Figures that any run can have. Files only: no window is opened and no global figure state is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """A figure that draws to files. Size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_curves(rows: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Every metric of a run over its steps, one small panel each."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("step", "seconds")]
    columns = min(3, max(1, len(keys)))
    lines = -(-len(keys) // columns) if keys else 1
    figure = new_figure(4 * columns, 2.6 * lines)
    for number, key in enumerate(keys):
        axes = figure.add_subplot(lines, columns, number + 1)
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), marker=".", linewidth=1)
        axes.set_title(key.replace("_", " "), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_scatter(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    x_label: str,
    y_label: str,
    joined: Sequence[str] = (),
    marked: Sequence[str] = (),
) -> None:
    """Points by series; those named in `joined` are connected in order of x (fronts, curves), those in `marked` are
    stars around points of other series."""
    figure = new_figure()
    axes = figure.add_subplot()
    for name, points in series.items():
        ordered = np.array(sorted(points)).reshape(-1, 2)
        if name in joined:  # hollow, so that points of other series show inside
            axes.plot(ordered[:, 0], ordered[:, 1], "o-", label=name, markersize=9, fillstyle="none", linewidth=1.2)
        elif name in marked:
            axes.plot(ordered[:, 0], ordered[:, 1], "k*", label=name, markersize=15, fillstyle="none")
        else:
            axes.plot(ordered[:, 0], ordered[:, 1], "o", label=name, markersize=5)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_image_grid(groups: Mapping[str, Sequence[tuple[np.ndarray, str]]], path: str | Path) -> None:
    """One row of captioned images a group.

    Args:
        groups: title of the row -> (uint8 [H, W, C] image, caption) pairs.
    """
    columns = max(1, max(len(images) for images in groups.values()))
    figure = new_figure(1.1 * columns, 1.5 * len(groups))
    for line, (title, images) in enumerate(groups.items()):
        for column, (image, caption) in enumerate(images):
            axes = figure.add_subplot(len(groups), columns, line * columns + column + 1)
            axes.imshow(image.squeeze(), cmap="gray" if image.shape[-1] == 1 else None, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(caption, fontsize=7)
            if column == 0:
                axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=120)
