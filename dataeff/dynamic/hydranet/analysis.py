"""What a trained HydraNet's branches do: utilisation, accuracy by k and by group, specialisation (spec section 5)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataeff.core.plots import new_figure, plot_scatter
from dataeff.data import Batch
from dataeff.dynamic.hydranet.inference import HydraInference
from dataeff.dynamic.hydranet.losses import gate_metrics, utilisation, utilisation_entropy
from dataeff.dynamic.hydranet.model import PARTITIONED, HydraNet, selection_mask


@dataclass(frozen=True)
class Profile:
    """Answers to N images: labels, predicted int64 (N,); selected int64 (N, k); gate_probs float32 (N, n)."""

    labels: Tensor
    predicted: Tensor
    selected: Tensor
    gate_probs: Tensor

    @property
    def correct(self) -> Tensor:
        return self.labels == self.predicted

    @property
    def accuracy(self) -> float:
        return float(self.correct.double().mean())


def collect(fast: HydraInference, batches: Sequence[Batch], k: int | None = None, rescale: bool = False) -> Profile:
    """A Profile of all images of some batches; k as for `HydraInference`."""
    parts = []
    for batch in batches:
        output = fast(batch.images, k=k, rescale=rescale)
        parts.append((batch.labels, output.logits.argmax(1), output.selected, output.gate_probs))
    return Profile(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def accuracy_by_k(fast: HydraInference, batches: Sequence[Batch], rescale: bool) -> dict[int, float]:
    """Accuracy with other numbers of branches than trained: what a budget costs."""
    config = fast.model.config
    numbers = sorted({1, 2, 4, 8, config.k, config.n_branches})
    return {k: collect(fast, batches, k, rescale).accuracy for k in numbers if k <= config.n_branches}


def accuracy_by_group(profile: Profile, part: Tensor, n_branches: int) -> list[float]:
    """Accuracy on the classes of each branch; NaN without images."""
    groups = part.cpu()[profile.labels]
    return [float(profile.correct[groups == branch].double().mean()) for branch in range(n_branches)]


def specialisation(fast: HydraInference, batches: Sequence[Batch], part: Tensor) -> dict[str, float]:
    """Accuracy on images whose class's branch is selected: with all their branches, without that branch, and without
    another one of those selected, drawn at random."""
    n = fast.model.config.n_branches
    generator = torch.Generator().manual_seed(0)
    right = {"all_branches": 0, "without_own_branch": 0, "without_another_branch": 0}
    count = 0
    for batch in batches:
        output = fast(batch.images)
        executed = selection_mask(output.selected, n)
        own = part[batch.labels][:, None]
        chosen = (executed.gather(1, own)[:, 0] & (executed.sum(1) > 1)).nonzero().view(-1)
        if not len(chosen):
            continue
        executed, own, labels = executed[chosen], own[chosen], batch.labels[chosen]
        draws = torch.rand(executed.shape, generator=generator).to(executed.device)
        other = torch.where(executed, draws, -1.0).scatter(1, own, -1.0).argmax(1, keepdim=True)
        variants = {
            "all_branches": executed,
            "without_own_branch": executed.scatter(1, own, False),
            "without_another_branch": executed.scatter(1, other, False),
        }
        for name, mask in variants.items():
            logits = fast(batch.images[chosen], executed=mask).logits
            right[name] += int((logits.argmax(1) == labels).sum())
        count += len(chosen)
    return {name: value / count for name, value in right.items()} if count else {}


def write_figures(directory: Path, model: HydraNet, batches: Sequence[Batch], classes: Sequence[str]) -> None:
    """Utilisation, accuracy by k and by group as PNG files, and all numbers as `analysis.json`."""
    fast = HydraInference(model)
    n = model.config.n_branches
    profile = collect(fast, batches)
    shares = utilisation(profile.selected, n)
    curves = {
        "as it is": accuracy_by_k(fast, batches, rescale=False),
        "rescaled": accuracy_by_k(fast, batches, rescale=True),
    }
    numbers: dict[str, object] = {
        "share_of_images_by_branch": shares.tolist(),
        "utilisation_entropy": utilisation_entropy(shares),
        "trained_k": model.config.k,
        "accuracy_by_k": curves["as it is"],
        "accuracy_by_k_rescaled": curves["rescaled"],
    }
    _plot_bars(shares.tolist(), "share of test images that execute it", directory / "utilisation.png")
    plot_scatter(
        {name: list(curve.items()) for name, curve in curves.items()},
        directory / "accuracy_by_k.png",
        f"executed branches (trained with {model.config.k})",
        "test accuracy",
        joined=list(curves),
    )
    if model.config.strategy in PARTITIONED:
        part = model.part.cpu()
        by_group = accuracy_by_group(profile, part, n)
        gate = gate_metrics(profile.gate_probs, profile.labels, part, profile.selected)
        numbers |= {
            "classes_by_branch": [[classes[c] for c in (part == b).nonzero().view(-1).tolist()] for b in range(n)],
            "accuracy_by_group": [None if np.isnan(value) else value for value in by_group],
            **{name: float(values.mean()) for name, values in gate.items()},
            "specialisation": specialisation(fast, batches, model.part),
        }
        _plot_bars(by_group, "test accuracy on its classes", directory / "accuracy_by_group.png")
    (directory / "analysis.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _plot_bars(values: Sequence[float], label: str, path: Path) -> None:
    figure = new_figure()
    axes = figure.add_subplot()
    axes.bar(range(len(values)), values)
    axes.set_xlabel("branch")
    axes.set_ylabel(label)
    figure.savefig(path, dpi=120)
