"""What DeepMoE's gates do: balance of the channels, embedding swaps, expressive power (spec sections 2.8, 5 and 10)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataeff.core.plots import new_figure
from dataeff.data import ImageSource, Preprocess, eval_batches
from dataeff.dynamic.deepmoe.model import DeepMoE

# Coarse group of each of the 100 classes of CIFAR-100, in alphabetical order of the classes (20 groups of 5).
CIFAR100_GROUPS = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)


@dataclass(frozen=True)
class BalanceReport:
    """Shares of the channels by layer, each (L,): never active, active for every image, and active for between 5 and
    95 % of the images ("input-dependent")."""

    dead: NDArray[np.float64]
    always_on: NDArray[np.float64]
    input_dependent: NDArray[np.float64]


def gate_balance_report(on_share: Sequence[Tensor]) -> BalanceReport:
    """
    Args:
        on_share: per layer, the share of images that each channel is active for, (C_l,).
    """

    def by_layer(test: str) -> NDArray[np.float64]:
        tests = {
            "dead": lambda share: share == 0,
            "always_on": lambda share: share == 1,
            "input_dependent": lambda share: (share >= 0.05) & (share <= 0.95),
        }
        return np.array([float(tests[test](share).double().mean()) for share in on_share])

    return BalanceReport(by_layer("dead"), by_layer("always_on"), by_layer("input_dependent"))


def balance_totals(on_share: Sequence[Tensor]) -> dict[str, float]:
    """The three shares over all channels."""
    share = torch.cat(list(on_share))
    return {
        "dead_share": float((share == 0).double().mean()),
        "always_on_share": float((share == 1).double().mean()),
        "input_dependent_share": float(((share >= 0.05) & (share <= 0.95)).double().mean()),
    }


@torch.no_grad()
def shuffle_embeddings(
    model: DeepMoE, source: ImageSource, preprocess: Preprocess, repeats: int = 20, seed: int = 0, limit: int = 2000
) -> NDArray[np.float64]:
    """Accuracy of the images of class A when their embedding is replaced by that of a random image of class B, (K, K).

    Args:
        source: images, the first `limit` of them; classes that do not occur give NaN.
        repeats: draws of another image for each image and class.
        seed: of the draws.
    """
    device = next(model.parameters()).device
    images, labels, embeddings = [], [], []
    for batch in eval_batches(source.subset(np.arange(min(limit, len(source)))), preprocess, 256):
        images.append(batch.images.to(device))
        labels.append(batch.labels)
        embeddings.append(model.embedding(images[-1])[1])
    x, e, y = torch.cat(images), torch.cat(embeddings), torch.cat(labels).numpy()
    generator = np.random.default_rng(seed)
    classes = model.network.num_classes
    accuracy = np.full((classes, classes), np.nan)
    for b in range(classes):
        donors = np.flatnonzero(y == b)
        if not len(donors):
            continue
        correct = np.zeros(len(y))
        for _ in range(repeats):
            chosen = torch.from_numpy(generator.choice(donors, len(y))).to(device)
            for start in range(0, len(y), 256):
                part = slice(start, start + 256)
                predicted = model(x[part], embedding=e[chosen[part]]).logits.argmax(1).cpu().numpy()
                correct[part] += predicted == y[part]
        for a in range(classes):
            if (y == a).any():
                accuracy[a, b] = correct[y == a].mean() / repeats
    return accuracy


def swap_summary(accuracy: NDArray[np.float64], groups: Sequence[int] | None = None) -> dict[str, float]:
    """Mean accuracy of a swap matrix (K, K): "same_class", "other_class", and with coarse `groups` (K,) "in_group"
    (other classes of the same group) and "out_of_group"."""
    same = np.eye(len(accuracy), dtype=bool)
    summary = {"same_class": _mean(accuracy[same]), "other_class": _mean(accuracy[~same])}
    if groups is not None:
        together = np.equal.outer(groups, groups)
        summary |= {"in_group": _mean(accuracy[together & ~same]), "out_of_group": _mean(accuracy[~together])}
    return summary


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def expressive_power_probability(n: int, m: int, layers: int) -> float:
    """P = 1 - binom(n, m)^(-L): that two independent uniform choices of m of n channels in each of L layers differ.

    Then DeepMoE keeps the rank n^(2^L) of the unpruned network (spec section 2.8; the source prints the arguments of
    the binomial the other way round, which would be 0).

    Raises:
        ValueError: m outside [0, n], or fewer than 1 layer.
    """
    if not 0 <= m <= n or layers < 1:
        raise ValueError(f"needs 0 <= m <= n and at least 1 layer, got n = {n}, m = {m}, {layers} layers")
    log_choices = math.lgamma(n + 1) - math.lgamma(m + 1) - math.lgamma(n - m + 1)
    return -math.expm1(-layers * log_choices)


def write_figures(
    directory: Path, on_share: Sequence[Tensor], accuracy: NDArray[np.float64], classes: Sequence[str]
) -> None:
    """Channel balance by layer and the swap matrix as PNG files, and their numbers as `analysis.json`.

    Args:
        accuracy: of `shuffle_embeddings`.
    """
    report = gate_balance_report(on_share)
    figure = new_figure()
    axes = figure.add_subplot()
    layers = np.arange(1, len(on_share) + 1)
    bottom = np.zeros(len(layers))
    other = 1 - report.dead - report.always_on - report.input_dependent
    parts = {
        "always on": report.always_on,
        "nearly static": other,
        "input-dependent": report.input_dependent,
        "dead": report.dead,
    }
    for name, share in parts.items():
        axes.bar(layers, share, bottom=bottom, label=name)
        bottom += share
    axes.set_xlabel("gated layer")
    axes.set_ylabel("share of channels")
    axes.legend(fontsize=8)
    figure.savefig(directory / "gate_balance.png", dpi=120)
    figure = new_figure()
    axes = figure.add_subplot()
    shown = axes.imshow(accuracy, vmin=0, vmax=1)
    axes.set_xlabel("class that the gates come from")
    axes.set_ylabel("class of the image")
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
    figure.colorbar(shown, label="accuracy")
    figure.savefig(directory / "embedding_swap.png", dpi=120)
    groups = CIFAR100_GROUPS if len(classes) == 100 else None
    numbers = {
        "dead_share_by_layer": report.dead.tolist(),
        "always_on_share_by_layer": report.always_on.tolist(),
        "input_dependent_share_by_layer": report.input_dependent.tolist(),
        "swap": {name: value for name, value in swap_summary(accuracy, groups).items() if not math.isnan(value)},
    }
    (directory / "analysis.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
