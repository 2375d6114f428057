"""The three-term loss of DeepMoE, and what can be seen to go wrong with its gates (spec sections 2.4, 10)."""

import math
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.dynamic.deepmoe.model import MoEOutput, active_counts

Reduction = Literal["mean", "sum"]
MuMode = Literal["labels", "presence"]
IGNORE = 255
COLLAPSED_SHARE = 0.02
STATIC_SHARE = 0.05


def gate_loss(gates: list[Tensor], reduction: Reduction = "mean") -> Tensor:
    """L1 norm of the gates, averaged over the batch (Eq. 3.8).

    "sum": over channels and layers, as printed (sensible lambda 1e-4 to 1e-2); "mean": mean over the channels of a
    layer, then over layers (sensible lambda 0.5 to 8). Report lambda together with the reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"gate_loss_reduction must be 'mean' or 'sum', got {reduction!r}")
    if reduction == "sum":
        return torch.stack([gate.sum(1).mean() for gate in gates]).sum()
    return torch.stack([gate.mean() for gate in gates]).mean()


def deepmoe_loss(
    output: MoEOutput,
    targets: Tensor,
    lam: float,
    mu: float,
    reduction: Reduction = "mean",
    mu_mode: MuMode = "labels",
    pixels: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """J = L_b + lambda * L_g + mu * L_e (Eq. 3.7).

    Args:
        output: of a forward pass.
        targets: int64 (B,) in [0, K), or for dense answers (B, H, W) with `IGNORE` for pixels that do not count.
        lam, mu: weights, at least 0.
        mu_mode: "labels": L_e is the cross-entropy of the embedding's class logits; "presence": the binary
            cross-entropy of which classes an image holds, the only one that dense answers allow.
        pixels: dense answers: see `pixel_cross_entropy`.

    Returns:
        The loss and its parts as detached scalars: "base", "gates", "embedding" (0 with mu = 0), "active_share" and
        "mean_gate" (of the positive gates: it shows a penalty lowered by scale instead of sparsity).

    Raises:
        ValueError: for arguments outside the above.
    """
    for name, value in (("lambda", lam), ("mu", mu)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    dense = output.logits.dim() == 4
    if dense and mu > 0 and mu_mode != "presence":
        raise ValueError("mu above 0 needs class labels of images; dense labels allow mu_mode='presence' or mu = 0")
    base = pixel_cross_entropy(output.logits, targets, pixels) if dense else _cross_entropy(output.logits, targets)
    sparsity = gate_loss(output.gates, reduction)
    embedding = torch.zeros_like(base)
    if mu > 0:
        embedding = _embedding_loss(output, targets, mu_mode)
    loss = base + lam * sparsity + mu * embedding
    positive = torch.cat([gate.detach()[gate.detach() > 0] for gate in output.gates])
    parts = {
        "base": base.detach(),
        "gates": sparsity.detach(),
        "embedding": embedding.detach(),
        "active_share": output.active_share.mean(),
        "mean_gate": positive.mean() if len(positive) else torch.zeros_like(base.detach()),
    }
    return loss, parts


def pixel_cross_entropy(logits: Tensor, targets: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Mean over the pixels that are not `IGNORE`; 0 with a warning where none is left.

    Args:
        logits: (B, K, H, W).
        targets: int64 (B, H, W).
        pixels: how many to divide by, in place of those counted here: with several workers their mean number, so that
            the mean of the workers' gradients is that of the whole batch.
    """
    counted = targets != IGNORE
    _check_labels(targets[counted], logits.shape[1], targets.dtype)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    if targets.device.type == "cpu" and not bool(counted.any()):
        warnings.warn(f"every pixel of the batch has the ignore label {IGNORE}: its loss is 0", stacklevel=2)
    return total / (counted.sum() if pixels is None else pixels).clamp(min=1)


def class_presence(targets: Tensor, num_classes: int) -> Tensor:
    """Which classes the pixels of each image have, float32 (B, K), from int64 (B, H, W)."""
    flat = torch.where(targets == IGNORE, num_classes, targets).flatten(1)
    presence = torch.zeros(len(flat), num_classes + 1, device=targets.device)
    return presence.scatter_(1, flat, 1.0)[:, :num_classes]


def _embedding_loss(output: MoEOutput, targets: Tensor, mu_mode: MuMode) -> Tensor:
    if mu_mode == "labels":
        return F.cross_entropy(output.embedding_logits, targets)
    classes = output.logits.shape[1]
    presence = class_presence(targets, classes) if targets.dim() == 3 else F.one_hot(targets, classes).float()
    return F.binary_cross_entropy_with_logits(output.embedding_logits, presence)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.dim() != 1 or len(targets) != len(logits):
        raise ValueError(f"targets must be int64 ({len(logits)},), got shape {tuple(targets.shape)}")
    _check_labels(targets, logits.shape[1], targets.dtype)
    return F.cross_entropy(logits, targets)


def _check_labels(labels: Tensor, num_classes: int, dtype: torch.dtype) -> None:
    """On an accelerator the values are not read: every step would wait for the device."""
    if dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {dtype}")
    if labels.device.type == "cpu" and len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must be in [0, {num_classes}), got values from {low} to {high}")


def ramped(lam: float, progress: float, ramp: float) -> float:
    """lambda after the share `progress` of the stage, raised linearly from 0 over the first share `ramp`, so that
    gates do not close before the base network has learnt (open choice, spec section 8.1)."""
    return lam if ramp == 0 or progress >= ramp else lam * progress / ramp


def adapted(lam: float, active_share: float, target: float, factor: float = 1.1) -> float:
    """lambda of the next epoch: larger while more than the target share of channels is active, else smaller."""
    if not 0 < target <= 1:
        raise ValueError(f"target_share must be in (0, 1], got {target}")
    return lam * factor if active_share > target else lam / factor


@torch.no_grad()
def gate_warnings(on_share: list[Tensor], dead_layers: int, learns: bool = True) -> list[str]:
    """Say what is wrong with the gates of a split; an empty list means nothing is.

    Args:
        on_share: per layer, the share of images that each channel is active for, (C_l,).
        dead_layers: pairs of image and layer without one active channel.
        learns: whether the gates are penalised; without that a static pattern is no failure.
    """
    shares = torch.cat(on_share)
    found = []
    active = float(torch.stack([share.mean() for share in on_share]).mean())
    if active < COLLAPSED_SHARE:
        found.append(
            f"lambda collapse: only {active:.1%} of the channels are active; use a smaller lambda or a longer ramp"
        )
    dependent = float(((shares > 0.05) & (shares < 0.95)).float().mean())
    if learns and dependent < STATIC_SHARE:
        found.append(
            f"static gating: {dependent:.1%} of the channels depend on the image, the rest is static pruning; causes: "
            "a flat softmax (temperature, mu = 0, a large latent) or too small an embedding network"
        )
    if dead_layers:
        found.append(
            f"dead layer: {dead_layers} times an image had no active channel in a layer, whose output is then constant;"
            " use a smaller lambda or keep_top"
        )
    return found


def dead_layer_count(gates: list[Tensor]) -> Tensor:
    """Pairs of image and layer without one active channel, int64 scalar."""
    return (active_counts(gates) == 0).sum()
