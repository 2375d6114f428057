"""All candidate operations of many edges at once.

An edge of a super-network adds softmax(alpha)-weighted operations on C/K channels: tensors so narrow that the time goes
into calls, not into arithmetic. Edges whose sources exist at the same moment are therefore stacked along the channels:
a depthwise or grouped convolution over the stack is exactly the edges' own convolutions, and BatchNorm statistics are
per channel anyway. Poolings and identities have no weights and are computed once a source. The edge's weight is the
scale of its last BatchNorm, so that multiplying costs nothing, in the gradient neither.

Shapes: E edges, k channels an edge (C/K), S sources, T targets (the nodes that the edges lead to).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nas.genotype import CAPSULES
from dataeff.nas.operations import make_operation


@dataclass(frozen=True)
class Edge:
    """Position in the cell's list of edges, and the two nodes."""

    index: int
    source: int
    target: int


def cell_edges(nodes: int = 4) -> list[Edge]:
    """The edges in the order of alpha's rows: node 2 from 0, 1; node 3 from 0, 1, 2; ..."""
    pairs = [(source, target) for target in range(2, 2 + nodes) for source in range(target)]
    return [Edge(index, source, target) for index, (source, target) in enumerate(pairs)]


class ScaledBatchNorm(nn.BatchNorm2d):
    """BatchNorm without its own affine parameters, times a given scale (C,)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return F.batch_norm(x, self.running_mean, self.running_var, scale, None, self.training, 0.1, self.eps)


class StackedSeparable(nn.Module):
    """sep_conv or dil_conv of E edges; expects its input behind the first ReLU."""

    def __init__(self, name: str, edges: int, width: int, stride: int) -> None:
        super().__init__()
        kernel, dilation = int(name[-1]), 2 if name.startswith("dil") else 1
        channels = edges * width
        strides = [stride] if dilation == 2 else [stride, 1]
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, step, dilation * (kernel // 2), dilation, channels, bias=False)
            for step in strides
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1, groups=edges, bias=False) for _ in strides)
        self.norms = nn.ModuleList(ScaledBatchNorm(channels) for _ in strides)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        last = len(self.norms) - 1
        for number, (depthwise, pointwise, norm) in enumerate(
            zip(self.depthwise, self.pointwise, self.norms, strict=True)
        ):
            x = norm(pointwise(depthwise(x)), scale if number == last else None)
            if number < last:
                x = F.relu(x)
        return x


class StackedReduce(nn.Module):
    """Factorised reduction of E edges; expects its input behind the ReLU. The two 1x1 convolutions of an edge, on even
    and on odd pixels, are the two corners of one 2x2 kernel."""

    def __init__(self, edges: int, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"a factorised reduction has an even number of channels, got {width}")
        self.edges, self.width = edges, width
        bound = width**-0.5  # of PyTorch's own initialisation of a 1x1 convolution
        self.first = nn.Parameter(torch.empty(edges, width // 2, width).uniform_(-bound, bound))
        self.second = nn.Parameter(torch.empty(edges, width // 2, width).uniform_(-bound, bound))
        self.norm = ScaledBatchNorm(edges * width)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        even = F.pad(self.first[..., None, None], (0, 1, 0, 1))
        odd = F.pad(self.second[..., None, None], (1, 0, 1, 0))
        kernel = torch.cat([even, odd], 1).flatten(0, 1)
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        out: Tensor = self.norm(F.conv2d(x, kernel, stride=2, groups=self.edges), scale)
        return out


class EdgeGroup(nn.Module):
    """The edges that leave some sources, with all their operations.

    Args:
        edges: whose sources exist at the same moment.
        names: operations of each edge, by `Edge.index`.
        operations: names in the order of the columns of alpha.
        width: k.
        stride: of every edge.
    """

    def __init__(
        self, edges: Sequence[Edge], names: Sequence[Sequence[str]], operations: Sequence[str], width: int, stride: int
    ) -> None:
        super().__init__()
        self.edges = sorted(edges, key=lambda edge: (edge.source, edge.target))
        self.width, self.stride, self.column = width, stride, {name: i for i, name in enumerate(operations)}
        self.sources = sorted({edge.source for edge in edges})
        self.targets = sorted({edge.target for edge in edges})
        self.having = {
            name: [edge for edge in self.edges if name in names[edge.index]] for name in operations if name != "none"
        }
        self.stacked, self.pool_norms, self.single = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for name, having in self.having.items():
            if not having:
                continue
            if name in CAPSULES:
                self.single[name] = nn.ModuleList(make_operation(name, width, stride, False) for _ in having)
            elif name == "skip_connect" and stride == 2:
                self.stacked[name] = StackedReduce(len(having), width)
            elif "conv" in name:
                self.stacked[name] = StackedSeparable(name, len(having), width, stride)
            elif "pool" in name:
                count = len({edge.source for edge in having})
                self.pool_norms[name] = nn.ModuleList(ScaledBatchNorm(width) for _ in range(count))

    def forward(self, inputs: dict[int, Tensor], weights: Tensor, drop: Tensor | None) -> dict[int, Tensor]:
        """
        Args:
            inputs: source -> its k channels (B, k, H, W).
            weights: (edges of the cell, operations), what each operation's result is multiplied by.
            drop: float (B, edges of the cell), factors of the identities (skip dropout); None: 1.

        Returns:
            target -> (B, k, H / stride, W / stride), the sum over this group's edges.
        """
        sums = _Sums(self.targets, self.width)
        behind_relu = {source: F.relu(x) for source, x in inputs.items()} if self.stacked else {}
        stacks: dict[tuple[int, ...], Tensor] = {}
        for name, operation in self.stacked.items():
            having = self.having[name]
            key = tuple(edge.index for edge in having)
            if key not in stacks:
                stacks[key] = torch.cat([behind_relu[edge.source] for edge in having], 1)
            scale = weights[list(key), self.column[name]].repeat_interleave(self.width)
            sums.add_stack(operation(stacks[key], scale), having)
        for name, norms in self.pool_norms.items():
            for norm, source in zip(cast(nn.ModuleList, norms), self._sources_of(name), strict=True):
                self._share(sums, norm(self._pool(name, inputs[source])), name, source, weights, None)
        if self.stride == 1:
            for source in self._sources_of("skip_connect"):
                self._share(sums, inputs[source], "skip_connect", source, weights, drop)
        for name, modules in self.single.items():
            for module, edge in zip(cast(nn.ModuleList, modules), self.having[name], strict=True):
                sums.add(edge.target, weights[edge.index, self.column[name]] * module(inputs[edge.source]))
        return sums.parts

    def _sources_of(self, name: str) -> list[int]:
        return sorted({edge.source for edge in self.having[name]})

    def _pool(self, name: str, x: Tensor) -> Tensor:
        if name == "max_pool_3x3":
            return F.max_pool2d(x, 3, self.stride, 1)
        return F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)

    def _share(self, sums: "_Sums", y: Tensor, name: str, source: int, weights: Tensor, drop: Tensor | None) -> None:
        """Add what was computed once a source to all targets that take it."""
        for edge in self.having[name]:
            if edge.source == source:
                weight = weights[edge.index, self.column[name]]
                sums.add(
                    edge.target, y * (weight if drop is None else (weight * drop[:, edge.index])[:, None, None, None])
                )


class _Sums:
    """Sums of results by target."""

    def __init__(self, targets: Sequence[int], width: int) -> None:
        self.targets, self.width = list(targets), width
        self.parts: dict[int, Tensor] = {}

    def add(self, target: int, y: Tensor) -> None:
        self.parts[target] = self.parts[target] + y if target in self.parts else y

    def add_stack(self, y: Tensor, edges: Sequence[Edge]) -> None:
        """`y` (B, E * k, H, W), a slice an edge."""
        for piece, edge in zip(y.split(self.width, 1), edges, strict=True):
            self.add(edge.target, piece)
