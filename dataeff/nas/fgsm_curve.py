"""How a network's belief in the true class falls with the budget of FGSM: one curve for each architecture.

Source: spec ss_pcp_darts section 2.9.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataeff.core.plots import new_figure
from dataeff.core.run import replace_text
from dataeff.data import ImageSource
from dataeff.nas.threat import AttackConfig, check_batch, clip, frozen, read_pixels, refuse_masked, respond

FGSM = "fgsm.json"
EPS_GRID = tuple(step / 255 for step in (0, 1, 2, 4, 8, 12, 16, 24, 32))


def fgsm_probability_curve(
    model: nn.Module, x: Tensor, y: Tensor, eps_grid: Sequence[float] = EPS_GRID
) -> dict[str, Tensor]:
    """What the network says of each image under FGSM at each budget; one gradient serves all budgets.

    Args:
        model: images in [0, 1] -> logits, with its normalisation; in training mode it is switched over and put back.
        x: float (B, C, H, W) in [0, 1].
        y: true classes, int64 (B,).
        eps_grid: E budgets, none negative; 0 is the image itself.

    Returns:
        "p_true" (E, B): probability of the true class; "pred" int64 (E, B) and "p_pred" (E, B): the predicted class
        and its probability.

    Raises:
        ValueError: images, labels or budgets of the wrong type, shape or range.
        GradientMaskingError: there is no gradient to follow.
    """
    if not eps_grid or min(eps_grid) < 0:
        raise ValueError(f"eps_grid needs budgets of at least 0, got {list(eps_grid)}")
    check_batch(x, y, AttackConfig(name="fgsm"), None)
    with frozen(model):
        gradient = respond(model, x, y, "ce").gradient
        refuse_masked(gradient)
        with torch.no_grad():
            moved = [clip(x + eps * gradient.sign()) for eps in eps_grid]
            p = torch.stack([model(images).float().softmax(1) for images in moved])
    found = p.max(2)
    return {
        "p_true": p.gather(2, y.expand(len(eps_grid), -1)[:, :, None])[:, :, 0],
        "pred": found.indices,
        "p_pred": found.values,
    }


def mean_curve(
    model: nn.Module, images: ImageSource, size: tuple[int, int], device: torch.device, chunk: int = 100
) -> dict[str, Any]:
    """Means over `images` at each budget of `EPS_GRID`, as plain values for JSON: `eps_255` in 255ths, `p_true`,
    `accuracy` in percent, and the number of images `n`.

    Args:
        size: (height, width) that the network takes, cut from the images' centres.
        chunk: images at a time.
    """
    p_true, right = (torch.zeros(len(EPS_GRID), dtype=torch.float64) for _ in range(2))
    for rows in torch.arange(len(images)).split(chunk):
        x, y = read_pixels(images, rows, size, device)
        curve = fgsm_probability_curve(model, x, y)
        p_true += curve["p_true"].double().sum(1).cpu()
        right += (curve["pred"] == y).double().sum(1).cpu()
    return {
        "eps_255": [255 * eps for eps in EPS_GRID],
        "p_true": (p_true / len(images)).tolist(),
        "accuracy": (100 * right / len(images)).tolist(),
        "n": len(images),
    }


def write_curve(found: Mapping[str, Any], directory: Path) -> None:
    """`fgsm.json`, and the curve as `fgsm.png`.

    Args:
        found: as `mean_curve` gives it.
    """
    replace_text(directory / FGSM, json.dumps(found, indent=2) + "\n")
    plot_fgsm({"": found}, directory / "fgsm.png")


def compare_curves(runs: Sequence[Path], directory: Path) -> None:
    """`fgsm_curves.png`: a line for each run that has a curve, by the name of its folder."""
    files = {run.name: run / FGSM for run in runs if (run / FGSM).is_file()}
    if files:
        curves = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
        directory.mkdir(parents=True, exist_ok=True)
        plot_fgsm(curves, directory / "fgsm_curves.png")


def plot_fgsm(curves: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Probability of the true class against the budget, a line for each architecture."""
    figure = new_figure(6.5, 4.0)
    axes = figure.add_subplot()
    for name, found in curves.items():
        axes.plot(found["eps_255"], found["p_true"], "o-", label=name, markersize=4, linewidth=1.2)
    axes.set_xlabel("budget of FGSM, 255ths")
    axes.set_ylabel("mean probability of the true class")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    if 1 < len(curves) <= 20:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
