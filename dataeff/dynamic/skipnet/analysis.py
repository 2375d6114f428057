"""What a trained SkipNet skips: per block, per class, per input scale, and on which images (spec skipnet section 5)."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dataeff.core.plots import new_figure, plot_image_grid
from dataeff.data import Batch, ImageSource, Preprocess, eval_batches
from dataeff.dynamic.skipnet.model import SkipNet, SkipNetOutput

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
GRID_COLUMNS = 8


@dataclass(frozen=True)
class Profile:
    """Decisions on n images: executed bool [n, N] (column i for block i+2); labels, predicted, indices int64 [n]."""

    executed: NDArray[np.bool_]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    indices: NDArray[np.int64]

    @property
    def executed_count(self) -> NDArray[np.int64]:
        """Executed blocks of each image, the first block not counted."""
        return np.asarray(self.executed.sum(1), np.int64)

    @property
    def skipped_count(self) -> NDArray[np.int64]:
        return np.asarray(self.executed.shape[1] - self.executed_count, np.int64)


def collect(outputs: Iterable[tuple[SkipNetOutput, Batch]]) -> Profile:
    """A Profile of forward passes in evaluation."""
    parts: list[tuple[Tensor, ...]] = [
        ((output.gates > 0).cpu(), batch.labels.cpu(), output.logits.argmax(1).cpu(), batch.indices.cpu())
        for output, batch in outputs
    ]
    executed, labels, predicted, indices = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Profile(executed, labels, predicted, indices)


def skip_ratios(profile: Profile) -> NDArray[np.float64]:
    """Share of images that skip each gated block, [N]."""
    return np.asarray(1 - profile.executed.mean(0), np.float64)


def class_medians(profile: Profile, num_classes: int) -> NDArray[np.float64]:
    """Median number of skipped blocks of each class, [K]; NaN for a class without images."""
    skipped = profile.skipped_count
    return np.array(
        [np.median(skipped[profile.labels == k]) if (profile.labels == k).any() else np.nan for k in range(num_classes)]
    )


@torch.no_grad()
def executed_by_scale(
    model: SkipNet, source: ImageSource, preprocess: Preprocess, scales: Sequence[float] = SCALES, limit: int = 512
) -> dict[float, NDArray[np.int64]]:
    """Executed blocks of up to `limit` images resized by each scale.

    Gates pool globally, so any size runs; sizes are rounded to what the network's strides allow, and scales that
    round to a size below its minimum are left out.
    """
    multiple = model.backbone.size_multiple
    smallest = max(8, 2 * multiple)
    device = model.backbone.head.weight.device
    counts: dict[float, NDArray[np.int64]] = {}
    for scale in scales:
        found: list[NDArray[np.int64]] = []
        for batch in eval_batches(source, preprocess, 128):
            if sum(len(part) for part in found) >= limit:
                break
            size = [round(extent * scale / multiple) * multiple for extent in batch.images.shape[2:]]
            if min(size) < smallest:
                break
            images = batch.images.to(device)
            resized = F.interpolate(images, size=size, mode="bilinear", antialias=scale < 1, align_corners=False)
            found.append(model(resized, mode="hard").gates.sum(1).long().cpu().numpy())
        if found:
            counts[scale] = np.concatenate(found)[:limit]
    return counts


def easiest_and_hardest(profile: Profile, per_group: int = GRID_COLUMNS) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions in the profile of the correctly classified images with the fewest, and of the images with the most,
    executed blocks. Ties are broken by position."""
    order = np.argsort(profile.executed_count, kind="stable")
    correct = order[(profile.labels == profile.predicted)[order]]
    return correct[:per_group], order[::-1][:per_group]


def write_figures(
    directory: Path,
    model: SkipNet,
    preprocess: Preprocess,
    profile: Profile,
    source: ImageSource,
    classes: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
) -> None:
    """The four analyses as PNG files, and their numbers as `analysis.json`.

    Args:
        profile: of `source`.
        before, after: class medians of skipped blocks before and after stage 2, on one split; `before` may be empty.
    """
    scales = executed_by_scale(model, source, preprocess)
    ratios = skip_ratios(profile)
    _plot_skip_ratios(ratios, model.backbone.group_of_block[1:], directory / "skip_ratios.png")
    _plot_class_medians(classes, before, after, directory / "class_medians.png")
    _plot_scales(scales, directory / "input_scales.png")
    easy, hard = easiest_and_hardest(profile)
    plot_image_grid(
        {
            "fewest blocks (correct)": _captioned(easy, profile, source, classes),
            "most blocks": _captioned(hard, profile, source, classes),
        },
        directory / "easy_hard.png",
    )
    numbers = {
        "skip_ratio_by_block": ratios.tolist(),
        "group_of_block": model.backbone.group_of_block[1:],
        "class_medians_before": list(before),
        "class_medians_after": list(after),
        "mean_executed_by_scale": {str(scale): float(counts.mean()) for scale, counts in scales.items()},
    }
    (directory / "analysis.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _captioned(
    positions: NDArray[np.int64], profile: Profile, source: ImageSource, classes: Sequence[str]
) -> list[tuple[np.ndarray, str]]:
    images = source.images(profile.indices[positions])
    return [
        (image.permute(1, 2, 0).numpy(), f"{classes[profile.labels[position]]}: {profile.executed_count[position] + 1}")
        for image, position in zip(images, positions, strict=True)
    ]


def _plot_skip_ratios(ratios: NDArray[np.float64], groups: Sequence[int], path: Path) -> None:
    figure = new_figure()
    axes = figure.add_subplot()
    for group in sorted(set(groups)):
        blocks = [position for position, of in enumerate(groups) if of == group]
        axes.bar([position + 2 for position in blocks], ratios[blocks], label=f"group {group + 1}")
    axes.set_xlabel("block")
    axes.set_ylabel("share of test images that skip it")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_class_medians(classes: Sequence[str], before: Sequence[float], after: Sequence[float], path: Path) -> None:
    figure = new_figure(max(6.0, 0.5 * len(classes)))
    axes = figure.add_subplot()
    positions = np.arange(len(classes))
    if before:
        axes.bar(positions - 0.2, before, 0.4, label="after stage 1 (SP)")
    axes.bar(positions + (0.2 if before else 0), after, 0.4, label="at the end")
    axes.set_xticks(positions, classes, rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("median of skipped blocks (validation)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_scales(scales: dict[float, NDArray[np.int64]], path: Path) -> None:
    figure = new_figure()
    axes = figure.add_subplot()
    if scales:
        axes.boxplot(list(scales.values()), tick_labels=[f"{scale:g}" for scale in scales], showmeans=True)
    axes.set_xlabel("scale of the input")
    axes.set_ylabel("executed blocks")
    figure.savefig(path, dpi=120)
