"""The loss of joint training, and what describes a gate (spec hydranet sections 2.4, 2.10 and 5)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.dynamic.hydranet.model import LEARNED, PARTITIONED, HydraConfig, HydraOutput, selection_mask

BALANCE_WEIGHT = 0.01
COLLAPSED = 0.5


class HydraLoss:
    """Cross entropy of the classes, and what the strategy adds for the gate.

    "cluster", "random": + lambda_gate * cross entropy of the gate with the class's branch (section 2.4).
    "learn_balance": + lambda_bal * sum over branches of (sum over images of the gate's probability)^2 (section 2.10).
    "learn", "no_gating": nothing.

    Args:
        config: of the network.
        part: the branch of each class, int64 (K,).
        lambda_gate: weight of the gate's loss.
        lambda_bal: the balance term's weight as a multiple of n / N^2, N images over all workers: the term then lies
            between lambda_bal (balanced) and lambda_bal * n (collapsed).
        all_reduce: sum over workers, in place.
        workers: how many; gradients are averaged over them.

    Example:
        losses = HydraLoss(model.config, model.part)(model(images), labels)
        losses["total"].backward()
    """

    def __init__(
        self,
        config: HydraConfig,
        part: Tensor,
        lambda_gate: float = 1.0,
        lambda_bal: float = BALANCE_WEIGHT,
        all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        workers: int = 1,
    ):
        self.config, self.part = config, part
        self.lambda_gate, self.lambda_bal = lambda_gate, lambda_bal
        self.all_reduce, self.workers = all_reduce, workers

    def __call__(self, output: HydraOutput, labels: Tensor) -> dict[str, Tensor]:
        """Scalars "total", "cls", "gate" and "balance"; terms that the strategy lacks are 0.

        Raises:
            ValueError: an empty batch, labels outside 0..K-1, or no partition where the strategy needs one.
        """
        check_labels(labels, output.logits.shape[1])
        strategy = self.config.strategy
        cls = F.cross_entropy(output.logits.float(), labels)
        gate = balance = torch.zeros_like(cls)
        if strategy in PARTITIONED:
            if bool((self.part < 0).any()):
                raise ValueError(f"strategy {strategy!r} needs a partition before training: call set_partition")
            gate = F.cross_entropy(output.gate_logits.float(), self.part[labels])
        if strategy == "learn_balance":
            balance = self._balance(output.gate_probs)
        return {"total": cls + self.lambda_gate * gate + balance, "cls": cls, "gate": gate, "balance": balance}

    def _balance(self, probs: Tensor) -> Tensor:
        """The balance term over the batch of all workers; its gradient is this worker's part of the mean."""
        own = probs.float().sum(0)
        total = self.all_reduce(own.detach().clone())
        count, n = len(probs) * self.workers, probs.shape[1]
        weight = self.lambda_bal * n / count**2
        value = weight * total.square().sum()
        part = 2 * weight * self.workers * (total * own).sum()
        return value + part - part.detach()


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse an empty batch and labels outside 0..K-1."""
    if not len(labels):
        raise ValueError("empty batch: the loss needs at least one image")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {low if low < 0 else high}")


def gate_metrics(gate_probs: Tensor, labels: Tensor, part: Tensor, selected: Tensor) -> dict[str, Tensor]:
    """For each image float32 (B,): `gate_top1`, the best branch is the class's; `gate_recall`, it is selected.

    Args:
        gate_probs: (B, n).
        part: int64 (K,).
        selected: int64 (B, k), -1 for none.
    """
    target = part[labels][:, None]
    return {
        "gate_top1": (gate_probs.argmax(1, keepdim=True) == target)[:, 0].float(),
        "gate_recall": (selected == target).any(1).float(),
    }


def utilisation(selected: Tensor, n_branches: int) -> Tensor:
    """Share of images that execute each branch, float64 (n,)."""
    return selection_mask(selected, n_branches).double().mean(0)


def utilisation_entropy(shares: Tensor) -> float:
    """Entropy of the branches' shares of all executions, divided by log n: 0 collapsed, 1 balanced; 1 for n = 1."""
    if len(shares) == 1:
        return 1.0
    p = shares.double() / shares.sum()
    return float(-torch.xlogy(p, p).sum() / math.log(len(shares)))


def collapse_warning(shares: Tensor, strategy: str) -> str | None:
    """The message for a gate that sends most images to a few branches although groups are balanced."""
    entropy = utilisation_entropy(shares)
    if strategy not in PARTITIONED or entropy >= COLLAPSED:
        return None
    histogram = ", ".join(f"{share:.2f}" for share in shares.tolist())
    return (
        f"gate collapse: utilisation entropy {entropy:.2f} is below {COLLAPSED}; share of images a branch: {histogram}"
    )


def idle_warning(counts: Tensor, strategy: str) -> str | None:
    """The message for branches that no image of an epoch selected; `counts` (n,)."""
    idle = (counts == 0).nonzero().view(-1).tolist()
    if not idle:
        return None
    hint = "; learn_balance spreads them" if strategy in LEARNED else ""
    return f"branches never selected in this epoch: {', '.join(map(str, idle))}{hint}"
