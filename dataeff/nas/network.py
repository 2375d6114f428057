"""Evaluation networks: a genotype's cells stacked, with auxiliary tower and drop-path.

Source: spec nas_adversarial_robustness section 2.4, spec ss_pcp_darts section 2.9.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from dataeff.nas.genotype import Genotype, Pair
from dataeff.nas.operations import FactorizedReduce, make_operation, relu_conv_norm


class Cell(nn.Module):
    """One cell of a genotype: features of the two cells before -> concatenated nodes.

    Args:
        before, previous: channels of the cell before the previous one, and of the previous one.
        channels: of every node.
        reduction: operations that leave the cell's inputs have stride 2.
        previous_reduced: the previous cell halved the resolution, so that `before` has twice its own.
    """

    def __init__(
        self,
        pairs: tuple[Pair, ...],
        concat: tuple[int, ...],
        before: int,
        previous: int,
        channels: int,
        reduction: bool,
        previous_reduced: bool,
    ) -> None:
        super().__init__()
        self.predecessors = [predecessor for _, predecessor in pairs]
        self.concat = concat
        self.out_channels = channels * len(concat)
        used = set(self.predecessors)
        # An input that no operation takes would have parameters without a gradient.
        self.preprocess = nn.ModuleList(
            [
                _preprocess(before, channels, previous_reduced) if 0 in used else nn.Identity(),
                _preprocess(previous, channels, False) if 1 in used else nn.Identity(),
            ]
        )
        self.operations = nn.ModuleList(
            make_operation(name, channels, 2 if reduction and predecessor < 2 else 1) for name, predecessor in pairs
        )

    def forward(self, s0: Tensor, s1: Tensor, keep: Tensor | None = None) -> Tensor:
        """
        Args:
            keep: float (B, operations), the factor of each operation's result for each image (drop-path); None: 1.
        """
        states = [self.preprocess[0](s0), self.preprocess[1](s1)]
        for node in range(0, len(self.predecessors), 2):
            first, second = (self._operate(index, states, keep) for index in (node, node + 1))
            states.append(first + second)
        return torch.cat([states[node] for node in self.concat], 1)

    def _operate(self, index: int, states: list[Tensor], keep: Tensor | None) -> Tensor:
        operation = self.operations[index]
        out: Tensor = operation(states[self.predecessors[index]])
        if keep is None or isinstance(operation, nn.Identity):  # a skip connection is never dropped
            return out
        return out * keep[:, index, None, None, None]


def _preprocess(channels: int, width: int, halve: bool) -> nn.Module:
    return FactorizedReduce(channels, width) if halve else relu_conv_norm(channels, width)


def auxiliary_tower(channels: int, side: int, num_classes: int) -> nn.Sequential:
    """The classifier beside cell 2L/3. Made for features of 8x8; other sizes are pooled to the same 2x2 positions."""
    pool = nn.AvgPool2d(5, 3, count_include_pad=False) if side == 8 else nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(
        nn.ReLU(),
        pool,
        nn.Conv2d(channels, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),
        nn.BatchNorm2d(768),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(768, num_classes),
    )


class CellNetwork(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, num_classes).

    Args:
        genotype: the cells.
        channels: C of the first cells; doubled in the reduction cells L//3 and 2L//3.
        cells: L.
        stem: cifar (3x3, stride 1, 3C channels) or imagenet (three convolutions, stride 8).
        auxiliary: build the tower.
        side: height of the images, for the tower's pooling.

    Raises:
        ValueError: an image that is too small for two reductions.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int,
        num_classes: int,
        cells: int,
        in_channels: int = 3,
        stem: Literal["cifar", "imagenet"] = "cifar",
        auxiliary: bool = False,
        side: int = 32,
    ) -> None:
        super().__init__()
        check_image_side(side if stem == "cifar" else side // 8)
        reductions = reduction_cells(cells)
        self.stem, self.second_stem, widths = _make_stem(stem, in_channels, channels)
        before, previous = widths
        reduced = self.second_stem is not None
        self.cells = nn.ModuleList()
        self.auxiliary: nn.Sequential | None = None
        self.auxiliary_cell = 2 * cells // 3
        side = side if stem == "cifar" else -(-side // 8)
        for index in range(cells):
            reduction = index in reductions
            channels, side = (2 * channels, -(-side // 2)) if reduction else (channels, side)
            pairs, concat = (
                (genotype.reduce, genotype.reduce_concat) if reduction else (genotype.normal, genotype.normal_concat)
            )
            cell = Cell(pairs, concat, before, previous, channels, reduction, reduced)
            self.cells.append(cell)
            before, previous, reduced = previous, cell.out_channels, reduction
            if auxiliary and index == self.auxiliary_cell:
                self.auxiliary = auxiliary_tower(previous, side, num_classes)
        self.classifier = nn.Linear(previous, num_classes)

    @property
    def drop_sites(self) -> tuple[int, int]:
        """Cells, and the most operations that one has: the shape of `keep` behind the batch."""
        return len(self.cells), max(len(cell.predecessors) for cell in self.cells)  # type: ignore[arg-type]

    def forward(self, x: Tensor, keep: Tensor | None = None, both: bool = False) -> Any:
        """Logits; with `both`, also the auxiliary tower's in training mode (else None).

        Args:
            keep: float (B, *drop_sites), factors of drop-path: 0, or 1 / (1 - probability).
        """
        s0 = s1 = self.stem(x)
        if self.second_stem is not None:
            s1 = self.second_stem(s0)
        auxiliary = None
        for index, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, None if keep is None else keep[:, index])
            if self.training and self.auxiliary is not None and index == self.auxiliary_cell:
                auxiliary = self.auxiliary(s1)
        logits = self.classifier(s1.mean((2, 3)))
        return (logits, auxiliary) if both else logits


def reduction_cells(cells: int) -> set[int]:
    """Cells that halve the resolution; with a single cell both are cell 0."""
    return {cells // 3, 2 * cells // 3}


def check_image_side(side: int) -> None:
    if side < 4:
        raise ValueError(f"images of {side} pixels are too small for two reductions; use a side of at least 4")


def _make_stem(kind: str, in_channels: int, channels: int) -> tuple[nn.Module, nn.Module | None, tuple[int, int]]:
    """First and second part of the stem, and the channels of the two inputs of the first cell."""

    def halve(first: int, second: int) -> list[nn.Module]:
        return [nn.Conv2d(first, second, 3, 2, 1, bias=False), nn.BatchNorm2d(second)]

    if kind == "cifar":
        width = 3 * channels
        stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        return stem, None, (width, width)
    first = nn.Sequential(*halve(in_channels, channels // 2), nn.ReLU(), *halve(channels // 2, channels))
    return first, nn.Sequential(nn.ReLU(), *halve(channels, channels)), (channels, channels)
