"""Adaptive computation time in residual networks: per image (ACT) and per position (SACT).

Source: spec skipnet section 5, baselines ACT and SACT; "Spatially Adaptive Computation Time for Residual Networks"
(Figurnov et al., 2017). In training all images pass through all units (masked execution), so that batch statistics
include halted images and every parameter gets a gradient. `inference.HaltingInference` is the version that stops.
"""

from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.backbone import residual_blocks
from dataeff.nn.positions import count_positions, needed_positions
from dataeff.nn.resnet import ResidualBlock, ResNet, conv2d

EPSILON = 0.01  # a unit is the last one where the halting scores reach 1 - EPSILON
BIAS_INIT = -3.0
WEIGHT_STD = 0.01


@dataclass
class HaltingOutput:
    """One forward pass.

    Attributes:
        logits: class logits, float32 (B, K).
        ponder: sum over groups of executed units and remainder R, mean over positions, float32 (B,); differentiable
            through R.
        executed: share of positions at which each unit ran, float32 (B, M), column i for block i+1. ACT: 0 or 1.
        macs: convolution multiply-adds spent on each image, float64 (B,), with those of the halting scores.
    """

    logits: Tensor
    ponder: Tensor
    executed: Tensor
    macs: Tensor


class HaltingUnit(nn.Module):
    """Features (B, C, H, W) -> halting score in (0, 1).

    Args:
        channels: C.
        spatial: False: sigmoid(w . pool(x) + b), (B, 1, 1, 1). True: sigmoid(conv3x3(x) + w . pool(x) + b),
            (B, 1, H, W).
    """

    def __init__(self, channels: int, spatial: bool):
        super().__init__()
        self.output = nn.Linear(channels, 1)
        self.conv = conv2d(channels, 1, 3) if spatial else None
        # Small, so that the bias decides at the start and all units run.
        for weight in [self.output.weight] + ([] if self.conv is None else [self.conv.weight]):
            nn.init.normal_(weight, std=WEIGHT_STD)
        nn.init.constant_(self.output.bias, BIAS_INIT)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            score: Tensor = self.output(x.mean((2, 3)))[:, :, None, None]
            if self.conv is not None:
                score = score + self.conv(x)
        return torch.sigmoid(score)


@dataclass
class UnitCosts:
    """Multiply-adds of one unit for one image.

    Attributes:
        kernels, per_position: of each convolution, and its multiply-adds at one position of the unit's output.
        score: of the halting score at one position (SACT's convolution).
        dense: of the whole unit with its shortcut and its score.
    """

    kernels: list[int]
    per_position: list[float]
    score: float
    dense: float

    def spent(self, active: Tensor) -> Tensor:
        """Multiply-adds of each image, float64 (B,), when the unit runs at `active`.

        Args:
            active: bool (B, 1, 1, 1) for units that run on whole images; (B, 1, H, W) for a unit of stride 1 that runs
                at single positions. A convolution is computed wherever a later one of the unit reads it.
        """
        if active.shape[2:].numel() == 1:
            return active.flatten(1).sum(1) * self.dense
        total = self.score * count_positions(active)
        for macs, needed in zip(self.per_position, needed_positions(self.kernels, active), strict=True):
            total = total + macs * count_positions(needed)
        return total


class HaltingResNet(nn.Module):
    """A `ResNet` (`backbone`) whose groups stop early.

    Args:
        backbone: the base network.
        spatial: False for ACT (each image halts as a whole), True for SACT (each position halts).
    """

    def __init__(self, backbone: ResNet, spatial: bool):
        super().__init__()
        self.backbone, self.spatial = backbone, spatial
        self.groups: list[list[int]] = [[] for _ in range(max(backbone.group_of_block) + 1)]
        for number, group in enumerate(backbone.group_of_block):
            self.groups[group].append(number)
        blocks = residual_blocks(backbone)
        # The last unit of a group takes what remains and needs no score.
        self.halting = nn.ModuleDict(
            {str(number): HaltingUnit(blocks[number].out_channels, spatial) for g in self.groups for number in g[:-1]}
        )

    def forward(self, x: Tensor) -> HaltingOutput:
        """Images float (B, C, H, W) -> answers.

        Raises:
            ValueError: for images that `ResNet.check_images` refuses.
        """
        self.backbone.check_images(x)
        size = (x.shape[2], x.shape[3])
        blocks = residual_blocks(self.backbone)
        costs = self.costs(*size)
        x = self.backbone.stem(x)
        ponder = x.new_zeros(len(x), dtype=torch.float32)
        macs = torch.full((len(x),), self.backbone.stem_macs(*size)[0], dtype=torch.float64, device=x.device)
        executed = []
        for group in self.groups:
            state: GroupState | None = None
            for number in group:
                new = blocks[number](x)
                if state is None:
                    x, state = new, GroupState(new, self.spatial)
                    macs = macs + costs[number].dense
                else:
                    x = torch.where(state.active, new, x)
                    macs = macs + costs[number].spent(state.active)
                executed.append(state.active.flatten(1).float().mean(1))
                state.add(x, None if number == group[-1] else self.halting[str(number)](x))
            assert state is not None
            x = state.mixed.to(x.dtype)
            ponder = ponder + state.ponder.flatten(1).mean(1)
        return HaltingOutput(self.backbone.classify(x), ponder, torch.stack(executed, 1), macs)

    @property
    def first_units(self) -> list[int]:
        """Numbers, from 0, of the units that no image can leave out: the first of each group."""
        return [group[0] for group in self.groups]

    def costs(self, height: int, width: int) -> list[UnitCosts]:
        """Costs of the units 1..M for images of `height` x `width`."""
        _, height, width = self.backbone.stem_macs(height, width)
        costs = []
        for number, block in enumerate(residual_blocks(self.backbone)):
            residual, shortcut, height, width = block.macs(height, width)
            unit = dict(self.halting.items()).get(str(number))
            conv = unit.conv if isinstance(unit, HaltingUnit) else None
            per_position = 0.0 if conv is None else float(conv.weight.numel())
            costs.append(
                UnitCosts(
                    kernels=[conv.kernel_size[0] for conv in _convs(block)],
                    per_position=[float(conv.weight.numel()) for conv in _convs(block)],
                    score=per_position,
                    dense=residual + shortcut + per_position * height * width,
                )
            )
        return costs


class GroupState:
    """What a group has gathered so far: which images or positions go on, their scores, and the weighted features.

    The tensors of scores are (B, 1, 1, 1) for ACT and (B, 1, H, W) for SACT.
    """

    def __init__(self, first: Tensor, spatial: bool):
        shape = (len(first), 1, *first.shape[2:]) if spatial else (len(first), 1, 1, 1)
        self.active = torch.ones(shape, dtype=torch.bool, device=first.device)
        self.cumulative = torch.zeros(shape, device=first.device)
        self.ponder = torch.zeros(shape, device=first.device)
        self.mixed = torch.zeros((), device=first.device)

    def going_on(self, score: Tensor) -> Tensor:
        """Where the unit after one with this score runs, unless something else stops it; bool."""
        return self.active & (self.cumulative + score < 1 - EPSILON)

    def add(self, x: Tensor | None, score: Tensor | None, stop: Tensor | None = None) -> Tensor:
        """Count a unit that ran at `active`.

        Args:
            x: its output, which is weighted and added to `mixed`; None where the caller does that.
            score: its halting score; None after the group's last unit, where everything halts.
            stop: bool (B, 1, 1, 1), images that halt here whatever their score (their budget is spent).

        Returns:
            The weight of the unit's output.
        """
        remainder = 1 - self.cumulative
        if score is None:
            score, active = torch.zeros_like(remainder), torch.zeros_like(self.active)
        else:
            active = self.going_on(score)
            if stop is not None:
                active = active & ~stop
        halts = self.active & ~active
        weight = torch.where(halts, remainder, score * active)
        if x is not None:
            self.mixed = self.mixed + weight * x.float()
        self.ponder = self.ponder + self.active + halts * remainder
        self.active = active
        self.cumulative = self.cumulative + score * active
        return weight

    def select(self, images: Tensor) -> "GroupState":
        """The part of some images, int64 (n,)."""
        part = copy(self)
        part.active, part.cumulative = self.active[images], self.cumulative[images]
        part.ponder, part.mixed = self.ponder[images], take_images(self.mixed, images)
        return part


def take_images(x: Tensor, images: Tensor) -> Tensor:
    """Features of some images, int64 (n,), of channels-last (B, C, H, W); again channels-last."""
    rows = x.permute(0, 2, 3, 1)
    return rows.reshape(len(x), -1).index_select(0, images).view(-1, *rows.shape[1:]).permute(0, 3, 1, 2)


def _convs(block: ResidualBlock) -> list[nn.Conv2d]:
    return [conv for conv in block.convs if isinstance(conv, nn.Conv2d)]


def ponder_loss(output: HaltingOutput, labels: Tensor, tau: float) -> tuple[Tensor, dict[str, Tensor]]:
    """mean(cross-entropy) + tau * mean(ponder), and its parts without gradient.

    Args:
        tau: price of one executed unit, at least 0.
    """
    classification, ponder = F.cross_entropy(output.logits, labels), output.ponder.mean()
    parts = {"cross_entropy": classification.detach(), "ponder": ponder.detach()}
    return classification + tau * ponder, parts
