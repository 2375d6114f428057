"""The super-network: cells whose edges hold all candidate operations, mixed by softmax(alpha) on C/K channels.

Source: spec ss_pcp_darts sections 2.3 and 2.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nas.discretise import CellWeights
from dataeff.nas.edges import EdgeGroup, ScaledBatchNorm, cell_edges
from dataeff.nas.genotype import CAPSULES, NODES
from dataeff.nas.network import check_image_side, reduction_cells
from dataeff.nas.operations import shifted
from dataeff.nn.pointwise import PointwiseConv2d

EDGES = cell_edges(NODES)
PROJECTOR_WIDTH = 512

OperationSets = Sequence[Sequence[str]]  # the operations of each edge of a cell type


@dataclass(frozen=True)
class SuperNetworkShape:
    """What a super-network is built from, besides the surviving operations."""

    channels: int
    cells: int
    num_classes: int
    in_channels: int = 3
    partial_k: int = 4
    edge_norm: bool = True
    embedding: Literal["pooled", "projector", "logits"] = "pooled"


class SearchPreprocess(nn.Module):
    """ReLU - 1x1 convolution (or factorised reduction) - BatchNorm without affine parameters."""

    def __init__(self, channels: int, width: int, halve: bool) -> None:
        super().__init__()
        if halve and width % 2:
            raise ValueError(f"a factorised reduction has an even number of channels, got {width}")
        self.halve = halve
        parts = [width // 2, width // 2] if halve else [width]
        self.convs = nn.ModuleList(PointwiseConv2d(channels, part, 2 if halve else 1) for part in parts)
        self.norm = ScaledBatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        parts = [conv(part) for conv, part in zip(self.convs, [x, shifted(x)] if self.halve else [x], strict=True)]
        out: Tensor = self.norm(torch.cat(parts, 1) if self.halve else parts[0])
        return out


class SearchCell(nn.Module):
    """A cell of the super-network: (B, before, ...) and (B, previous, ...) -> (B, 4C, ...).

    Every edge gives f(x) = sum_o alpha_o o(S x) + (1 - S) x for C/K selected channels S; a node is the sum of its edges
    times beta. With shuffling, S is the first C/K channels and the sum is shuffled with K groups, which is the same as
    shuffling every edge; with random sampling, S is `selected` and all channels keep their place.

    Raises:
        ValueError: C is not divisible by K, or C/K by two where a factorised reduction needs it.
    """

    def __init__(
        self,
        names: OperationSets,
        operations: Sequence[str],
        before: int,
        previous: int,
        channels: int,
        partial_k: int,
        reduction: bool,
        previous_reduced: bool,
    ) -> None:
        super().__init__()
        if channels % partial_k:
            raise ValueError(f"{channels} channels are not divisible by partial_k = {partial_k}")
        self.width, self.partial_k, self.reduction = channels // partial_k, partial_k, reduction
        self.preprocess = nn.ModuleList(
            [SearchPreprocess(before, channels, previous_reduced), SearchPreprocess(previous, channels, False)]
        )
        # Both inputs exist at once, the nodes one after another.
        together = [[edge for edge in EDGES if edge.source < 2]]
        together += [[edge for edge in EDGES if edge.source == node] for node in range(2, 1 + NODES)]
        self.groups = nn.ModuleList(
            EdgeGroup(edges, names, operations, self.width, 2 if reduction and edges[0].source < 2 else 1)
            for edges in together
        )

    def forward(
        self, s0: Tensor, s1: Tensor, weights: Tensor, beta: Tensor, drop: Tensor | None, selected: Tensor | None
    ) -> Tensor:
        """
        Args:
            weights: alpha (14, operations), not yet times beta.
            beta: (14,), normalised over the edges into a node.
            drop: float (B, 14), factors of the identities; None: 1.
            selected: permutation of the channels whose first C/K are sampled; None: shuffle.
        """
        weights = weights * beta[:, None]
        states = {0: self.preprocess[0](s0), 1: self.preprocess[1](s1)}
        mixed: dict[int, Tensor] = {}
        bypass: dict[int, Tensor] = {}
        for group, node in zip(self.groups, range(2, 2 + NODES), strict=True):
            inputs = {}
            for source in group.sources:  # type: ignore[union-attr]
                inputs[source], rest = self._split(states[source], selected)
                for edge in EDGES:
                    if edge.source == source and rest is not None:
                        part = beta[edge.index] * (self._halve(rest) if source < 2 and self.reduction else rest)
                        bypass[edge.target] = bypass[edge.target] + part if edge.target in bypass else part
            for target, part in group(inputs, weights, drop).items():
                mixed[target] = mixed[target] + part if target in mixed else part
            states[node] = self._join(mixed[node], bypass.get(node), selected)
        return torch.cat([states[node] for node in range(2, 2 + NODES)], 1)

    def _split(self, x: Tensor, selected: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.partial_k == 1:
            return x, None
        if selected is not None:
            x = x[:, selected]
        return x[:, : self.width], x[:, self.width :]

    def _halve(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, 2, ceil_mode=True)

    def _join(self, mixed: Tensor, bypass: Tensor | None, selected: Tensor | None) -> Tensor:
        if bypass is None:
            return mixed
        if selected is not None:
            return torch.cat([mixed, bypass], 1)[:, selected.argsort()]
        # Shuffle with K groups: channel g * k + c goes to c * K + g. Written channels-last, as the features lie.
        first, rest = mixed.permute(0, 2, 3, 1), bypass.permute(0, 2, 3, 1)
        rest = rest.unflatten(3, (self.partial_k - 1, self.width)).transpose(3, 4)
        return torch.cat([first[..., None], rest], 4).flatten(3).permute(0, 3, 1, 2)


class SuperNetwork(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, num_classes), with alpha and beta shared by all cells of a type.

    Args:
        shape: see `SuperNetworkShape`.
        normal, reduce: surviving operations of each of the 14 edges.
        operations: all candidates, the columns of alpha.
    """

    def __init__(
        self, shape: SuperNetworkShape, normal: OperationSets, reduce: OperationSets, operations: Sequence[str]
    ) -> None:
        super().__init__()
        self.shape, self.operations = shape, list(operations)
        channels, reductions = shape.channels, reduction_cells(shape.cells)
        stem = 3 * channels
        self.stem = nn.Sequential(nn.Conv2d(shape.in_channels, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem))
        before, previous, reduced = stem, stem, False
        self.cells = nn.ModuleList()
        for index in range(shape.cells):
            reduction = index in reductions
            channels *= 2 if reduction else 1
            names = reduce if reduction else normal
            try:
                cell = SearchCell(names, operations, before, previous, channels, shape.partial_k, reduction, reduced)
            except ValueError as error:
                raise ValueError(f"cell {index}: {error}; change init_channels or partial_k") from None
            self.cells.append(cell)
            before, previous, reduced = previous, NODES * channels, reduction
        self.classifier = nn.Linear(previous, shape.num_classes)
        self.projector = _projector(previous) if shape.embedding == "projector" else None
        for kind, sets in (("normal", normal), ("reduce", reduce)):
            self.register_parameter(f"alpha_{kind}", nn.Parameter(1e-3 * torch.randn(len(EDGES), len(operations))))
            self.register_parameter(f"beta_{kind}", nn.Parameter(1e-3 * torch.randn(len(EDGES))))
            mask = torch.tensor([[name in names for name in operations] for names in sets])
            assert bool(mask[:, 1:].any(1).all()), "every edge keeps an operation besides none"
            self.register_buffer(f"mask_{kind}", mask)

    def arch_parameters(self) -> list[nn.Parameter]:
        """alpha, and beta where edges are normalised."""
        names = ["alpha", "beta"] if self.shape.edge_norm else ["alpha"]
        return [self.get_parameter(f"{name}_{kind}") for name in names for kind in ("normal", "reduce")]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Everything that is not alpha or beta."""
        return [value for name, value in self.named_parameters() if not name.startswith(("alpha_", "beta_"))]

    def cell_weights(self, kind: str) -> CellWeights:
        """Softmax of alpha over the surviving operations, and of beta over each node's edges (None without)."""
        alpha = self.get_parameter(f"alpha_{kind}").masked_fill(~self.get_buffer(f"mask_{kind}"), -torch.inf).softmax(1)
        if not self.shape.edge_norm:
            return CellWeights(alpha, None)
        beta = self.get_parameter(f"beta_{kind}")
        return CellWeights(alpha, torch.cat([part.softmax(0) for part in beta.split(list(range(2, 2 + NODES)))]))

    def forward(self, x: Tensor, drop: Tensor | None = None, selections: Sequence[Tensor] | None = None) -> Tensor:
        return self.outputs(x, drop, selections)[0]

    def embed(self, x: Tensor) -> Tensor:
        """Images -> embeddings (B, D) of `shape.embedding`; D = 4 * C_last when pooled."""
        return self.outputs(x)[1]

    def outputs(
        self, x: Tensor, drop: Tensor | None = None, selections: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits and embeddings.

        Args:
            drop: float (B, cells, 14), factors of the identities.
            selections: for random sampling, a permutation of each cell's channels.
        """
        weights = {kind: self.cell_weights(kind) for kind in ("normal", "reduce")}
        s0 = s1 = self.stem(x)
        ones = torch.ones(len(EDGES), device=x.device, dtype=self.get_parameter("alpha_normal").dtype)
        for index, cell in enumerate(self.cells):
            alpha, beta = weights["reduce" if cell.reduction else "normal"]
            part = None if drop is None else drop[:, index]
            selected = None if selections is None else selections[index]
            s0, s1 = s1, cell(s0, s1, alpha, ones if beta is None else beta, part, selected)
        pooled = s1.mean((2, 3))
        logits = self.classifier(pooled)
        if self.shape.embedding == "logits":
            return logits, logits
        return logits, pooled if self.projector is None else self.projector(pooled)

    def cell_channels(self) -> list[int]:
        """C of every cell."""
        return [cell.width * cell.partial_k for cell in self.cells]  # type: ignore[operator, misc]


def _projector(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, PROJECTOR_WIDTH, bias=False),
        nn.BatchNorm1d(PROJECTOR_WIDTH),
        nn.ReLU(),
        nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH),
    )


def build_supernet(
    shape: SuperNetworkShape, normal: OperationSets, reduce: OperationSets, operations: Sequence[str], side: int
) -> SuperNetwork:
    """A checked super-network for images of `side` pixels.

    Raises:
        ValueError: images too small for two reductions, or capsules that do not divide C/K.
    """
    check_image_side(side)
    unknown = set(operations) & set(CAPSULES)
    if unknown and (shape.channels // shape.partial_k) < 4:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: C/K = {shape.channels // shape.partial_k} is below the capsule dimension; "
            "raise init_channels or lower partial_k"
        )
    return SuperNetwork(shape, normal, reduce, operations)
