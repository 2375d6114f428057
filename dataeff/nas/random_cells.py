"""Networks of random cells: one alone, and an ensemble of small ones behind a linear combiner.

Source: spec nas_adversarial_robustness section 2.5.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dataeff.core.config import Config
from dataeff.nas.genotype import Genotype, random_genotype
from dataeff.nas.network import CellNetwork


class EnsembleSettings(Config):
    """The ensemble's members and its combiner."""

    cells: tuple[int, ...] = Field((12, 6, 2), min_length=2, description="of each member; their sum is the target")
    hidden: int = Field(64, ge=1, description="width of the combiner")
    epochs: int = Field(2, ge=1, description="of the combiner alone, behind the members' training")
    lr: float = Field(0.025, gt=0, le=10, description="the combiner's learning rate")


class RandomCellEnsemble(nn.Module):
    """Members' logits, side by side, through two linear layers with batch norm and a last linear layer.

    One network, differentiable from end to end: images (B, C, H, W) -> logits (B, num_classes).
    """

    def __init__(self, members: Sequence[CellNetwork], num_classes: int, hidden: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combiner = nn.Sequential(
            nn.Linear(len(members) * num_classes, hidden),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor, keep: Tensor | None = None, both: bool = False, member: int | None = None) -> Any:
        """Logits of the whole, or of one member in its own training (with `keep` and `both` of `CellNetwork`)."""
        if member is not None:
            return self.members[member](x, keep, both)
        logits = self.combiner(torch.cat([network(x) for network in self.members], 1))
        return (logits, None) if both else logits


def random_cells(seed: int, member: int | None = None) -> Genotype:
    """The cells that `seed` draws: of a network alone (as method `nas_train` draws them), or of a member."""
    return random_genotype(np.random.default_rng([seed, 23] if member is None else [seed, 23, 1 + member]))


def check_split(cells: Sequence[int], target: int) -> None:
    """Refuse members that are not together as deep as the network they are compared with.

    Raises:
        ValueError: a member without cells, or another sum.
    """
    if min(cells) < 1 or sum(cells) != target:
        raise ValueError(
            f"ensemble.cells = {list(cells)} has {sum(cells)} cells; each member needs at least 1 and all together "
            f"cells = {target}"
        )


def member_iterations(total: int, cells: Sequence[int]) -> list[int]:
    """`total` mini-batches shared out among the members by their cells, so that both arms cost the same."""
    ends = [round(total * sum(cells[: number + 1]) / sum(cells)) for number in range(len(cells))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
