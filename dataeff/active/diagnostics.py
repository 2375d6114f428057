"""What pools and learning curves look like, beside what chance alone gives (spec initial_pools sections 2.6 and 5)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from dataeff.active.scores import FloatArray
from dataeff.core.plots import new_figure

IntArray = NDArray[np.int64]

LEVEL = 0.05  # of significance


# --- pools --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Shared images of pools of one size.

    Args:
        names: of the P pools.
        shares: |a and b| / B, float64 [P, P].
        chance: what independent random pools share on average, B / |U|.
    """

    names: tuple[str, ...]
    shares: FloatArray
    chance: float

    def __str__(self) -> str:
        width = max(map(len, self.names)) + 2
        lines = ["".join(f"{name:>{width}}" for name in ("", *self.names))]
        for name, row in zip(self.names, self.shares, strict=True):
            lines.append(f"{name:>{width}}" + "".join(f"{share:>{width}.3f}" for share in row))
        return "\n".join([*lines, f"chance level of independent random pools: {self.chance:.3f}"])


def pool_overlap(pools: Mapping[str, IntArray], available: int) -> Overlap:
    """How much pools, or the labelled sets of several runs in one cycle, have in common.

    Args:
        pools: name -> different indices, int64 [B], of one size.
        available: |U|, images they were chosen from.

    Raises:
        ValueError: the sizes differ.
    """
    sizes = {name: len(indices) for name, indices in pools.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"pools of different sizes: {sizes}; compare pools of one budget")
    size = next(iter(sizes.values()))
    shared = [[len(np.intersect1d(a, b)) / size for b in pools.values()] for a in pools.values()]
    return Overlap(tuple(pools), np.array(shared), size / available)


@dataclass(frozen=True)
class ClassHistogram:
    """Images of each class in a pool.

    Args:
        counts: int64 [C].
    """

    counts: IntArray

    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation over mean of the counts; 0 for a balanced pool."""
        return float(self.counts.std() / self.counts.mean())

    @property
    def ratio(self) -> float:
        """Largest count over smallest; infinite where a class is missing."""
        return float(self.counts.max() / self.counts.min()) if self.counts.min() else math.inf

    @property
    def missing(self) -> list[int]:
        """Classes without an image."""
        return [int(label) for label in np.flatnonzero(self.counts == 0)]

    @property
    def entropy(self) -> float:
        """Of the class shares, over log C: 1 for a balanced pool, 0 for a single class."""
        shares = self.counts[self.counts > 0] / self.counts.sum()
        return float(-(shares * np.log(shares)).sum() / np.log(len(self.counts))) + 0.0


def class_histogram(indices: IntArray, labels: IntArray, num_classes: int) -> ClassHistogram:
    """Classes of the images at `indices`; `labels` are those of the whole training set, int64 [N]."""
    return ClassHistogram(np.bincount(labels[indices], minlength=num_classes).astype(np.int64))


@dataclass(frozen=True)
class HardClasses:
    """Classes that a pool samples most, classes of lowest test accuracy, their common ones, and how many of these two
    random sets of classes would have in common on average."""

    most_sampled: list[int]
    hardest: list[int]
    shared: list[int]
    chance: float


def hard_class_overlap(counts: IntArray, class_accuracy: FloatArray, top: int = 10) -> HardClasses:
    """Does a pool go for the difficult classes? (spec section 2.6, item 3)

    Args:
        counts: images of each class in the pool, int64 [C].
        class_accuracy: test accuracy of each class in the last cycle, float64 [C]; NaN (no test image) is never hard.
        top: classes to compare, from 1 to C; equals go by class number.

    Raises:
        ValueError: `top` is out of range.
    """
    if not 1 <= top <= len(counts):
        raise ValueError(f"top = {top} with {len(counts)} classes: must be from 1 to {len(counts)}")
    most = np.argsort(-counts, kind="stable")[:top].tolist()
    hardest = np.argsort(class_accuracy, kind="stable")[:top].tolist()  # NaN comes last
    return HardClasses(most, hardest, sorted(set(most) & set(hardest)), top * top / len(counts))


def plot_tsne(
    features: np.ndarray, pools: Mapping[str, IntArray], labels: IntArray, path: str | Path, seed: int = 0
) -> FloatArray:
    """Pools in one t-SNE map of their features, a panel each, coloured by class (spec section 2.6, item 4).

    Args:
        features: of the whole training set, float [N, D].
        pools: name -> indices; t-SNE sees the images of all pools together, at least 4.
        labels: int64 [N].
        path: of the PNG.

    Returns:
        Positions of the union of the pools in ascending order of index, float64 [M, 2].
    """
    from sklearn.manifold import TSNE  # seconds to import

    union = np.unique(np.concatenate(list(pools.values())))
    perplexity = min(30.0, (len(union) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    places = np.asarray(tsne.fit_transform(np.asarray(features[union], dtype=np.float64)), dtype=np.float64)
    figure = new_figure(3.2 * len(pools), 3.4)
    for number, (name, indices) in enumerate(pools.items()):
        axes = figure.add_subplot(1, len(pools), number + 1)
        mine = np.isin(union, indices)
        axes.scatter(places[~mine, 0], places[~mine, 1], s=3, color="0.85")
        colours = labels[union[mine]] % 20
        axes.scatter(places[mine, 0], places[mine, 1], s=8, c=colours, cmap="tab20", vmin=0, vmax=19)
        axes.set(title=name, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)
    return places


# --- learning curves ----------------------------------------------------------------------------------------------


def mean_and_std(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Over seeds, the first axis: mean, and sample standard deviation, NaN with fewer than 2 seeds."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return values.mean(axis=0), np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), values.std(axis=0, ddof=1)


def area_under_curve(shares: FloatArray, accuracy: FloatArray) -> FloatArray:
    """Mean accuracy over the labelling effort: the area by trapezoids over the range of `shares`.

    Args:
        shares: labelled share (or number) of images in each of E cycles, ascending, [E].
        accuracy: [..., E].

    Returns:
        float64 [...], in units of accuracy; with one cycle its accuracy.
    """
    accuracy = np.asarray(accuracy, dtype=np.float64)
    if accuracy.shape[-1] == 1:
        return accuracy[..., 0]
    return np.asarray(np.trapezoid(accuracy, shares, axis=-1) / (shares[-1] - shares[0]))


@dataclass(frozen=True)
class PairedDifference:
    """Of two methods over the same seeds.

    Args:
        mean: of method minus baseline.
        std: sample standard deviation of the differences; NaN with fewer than 2 seeds.
        low, high: 95 % confidence interval of the mean; NaN with fewer than 2 seeds.
        p_value: of the two-sided paired t-test; NaN with fewer than 2 seeds.
        seeds: how many.
    """

    mean: float
    std: float
    low: float
    high: float
    p_value: float
    seeds: int

    @property
    def significant(self) -> bool:
        """Whether a difference may be claimed: at least 2 seeds, p < 0.05 and |mean| >= std (spec section 6, R11)."""
        return self.seeds >= 2 and self.p_value < LEVEL and abs(self.mean) >= self.std

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:+.4f} (1 seed: no standard deviation, no statement)"
        verdict = "significant" if self.significant else "not significant"
        interval = f"95 % from {self.low:+.4f} to {self.high:+.4f}"
        return f"{self.mean:+.4f} +- {self.std:.4f} ({interval}, p = {self.p_value:.3g}, {self.seeds} seeds: {verdict})"


def paired_difference(method: FloatArray, baseline: FloatArray) -> PairedDifference:
    """Mean difference of two methods, with a paired t-test.

    Args:
        method, baseline: a figure (accuracy, area) for each seed, the same seeds in the same order, float64 [S].

    Raises:
        ValueError: no seeds, or different numbers of them.
    """
    if len(method) != len(baseline) or not len(method):
        raise ValueError(
            f"{len(method)} and {len(baseline)} seeds: a paired difference needs the same seeds, at least 1"
        )
    differences = np.asarray(method, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    seeds, mean = len(differences), float(differences.mean())
    if seeds < 2:
        return PairedDifference(mean, math.nan, math.nan, math.nan, math.nan, seeds)
    std = float(differences.std(ddof=1))
    error = std / math.sqrt(seeds)
    half = float(student_t.ppf(1 - LEVEL / 2, seeds - 1)) * error
    statistic = abs(mean) / error if error else (math.inf if mean else 0.0)
    p_value = float(2 * student_t.sf(statistic, seeds - 1))
    return PairedDifference(mean, std, mean - half, mean + half, p_value, seeds)


def plot_learning_curves(
    curves: Mapping[str, FloatArray], shares: FloatArray, path: str | Path, title: str = ""
) -> None:
    """Mean accuracy over the labelled share, with a band of one standard deviation over seeds.

    Args:
        curves: name -> accuracy, float64 [S, E]; one seed has no band.
        shares: labelled share in each cycle, [E].
        path: of the PNG.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    for name, accuracy in curves.items():
        mean, std = mean_and_std(accuracy)
        (line,) = axes.plot(100 * np.asarray(shares), mean, marker="o", markersize=4, label=f"{name} ({len(accuracy)})")
        if len(accuracy) > 1:
            axes.fill_between(100 * np.asarray(shares), mean - std, mean + std, alpha=0.15, color=line.get_color())
    axes.set(xlabel="labelled images, %", ylabel="test accuracy (mean, std; seeds in brackets)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
