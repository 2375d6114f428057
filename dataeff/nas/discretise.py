"""From softmax weights to operations: dropping between phases, the genotype, the skip limit.

Source: spec ss_pcp_darts sections 2.6 and 2.7.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dataeff.nas.edges import cell_edges
from dataeff.nas.genotype import NODES, Genotype, Pair

SKIP = "skip_connect"
COLLAPSED = 6


class CellWeights(NamedTuple):
    """alpha (14, operations): softmax over an edge's surviving operations, 0 for the others. beta (14,): softmax over
    each node's edges; None without edge normalisation."""

    alpha: Tensor
    beta: Tensor | None

    def detached(self) -> "CellWeights":
        return CellWeights(self.alpha.detach().cpu(), None if self.beta is None else self.beta.detach().cpu())


def keep_operations(
    alpha: Tensor, sets: Sequence[Sequence[str]], operations: Sequence[str], count: int
) -> list[list[str]]:
    """The `count` operations of every edge with the largest softmax(alpha), in the order of `operations`.

    beta has no part in it: it is constant on an edge.
    """
    kept = []
    for weights, names in zip(alpha, sets, strict=True):
        ranked = sorted(names, key=lambda name: -float(weights[operations.index(name)]))
        kept.append([name for name in operations if name in ranked[:count]])
    return kept


def derive_cell(weights: CellWeights, operations: Sequence[str]) -> tuple[Pair, ...]:
    """The strongest operation but `none` of every edge, and of every node its two strongest edges.

    An edge's strength is its operation's softmax weight, times its normalised beta where there is one.
    """
    alpha = weights.alpha.clone()
    if "none" in operations:
        alpha[:, list(operations).index("none")] = -1.0  # below every weight
    best, chosen = alpha.max(1)
    # No weight at all: `restrict_skips` took that of an edge which holds nothing but a skip connection.
    chosen = torch.where(best > 0, chosen, list(operations).index(SKIP))
    score = best if weights.beta is None else best * weights.beta
    pairs: list[Pair] = []
    for target in range(2, 2 + NODES):
        edges = [edge for edge in cell_edges() if edge.target == target]
        strongest = sorted(edges, key=lambda edge: (-float(score[edge.index]), edge.source))[:2]
        pairs += [(operations[int(chosen[edge.index])], edge.source) for edge in strongest]
    return tuple(pairs)


def restrict_skips(weights: CellWeights, operations: Sequence[str], limit: int) -> tuple[Pair, ...]:
    """The cell with at most `limit` skip connections: while there are more, the weakest one's weight becomes 0.

    Warns where edges hold nothing but a skip connection, so that the limit cannot be reached.
    """
    weights = CellWeights(weights.alpha.clone(), weights.beta)
    skip = list(operations).index(SKIP)
    while True:
        pairs = derive_cell(weights, operations)
        found = [position for position, (name, _) in enumerate(pairs) if name == SKIP]
        if len(found) <= limit:
            return pairs
        edges = [_edge_of(pairs, position) for position in found]
        standing = [edge for edge in edges if weights.alpha[edge, skip] > 0]
        if not standing:
            warnings.warn(
                f"{len(found)} skip connections stay, more than max_skips = {limit}: their edges hold nothing else",
                stacklevel=2,
            )
            return pairs
        weakest = min(standing, key=lambda edge: float(weights.alpha[edge, skip]))
        weights.alpha[weakest, skip] = 0.0


def _edge_of(pairs: Sequence[Pair], position: int) -> int:
    target, source = 2 + position // 2, pairs[position][1]
    return next(edge.index for edge in cell_edges() if (edge.source, edge.target) == (source, target))


def derive_genotype(
    normal: CellWeights, reduce: CellWeights, operations: Sequence[str], max_skips: int | None = None
) -> Genotype:
    """The genotype of two cells' weights; `max_skips` limits the skip connections of the normal cell.

    Warns when most of the normal cell are skip connections (collapse).
    """
    pairs = derive_cell(normal, operations) if max_skips is None else restrict_skips(normal, operations, max_skips)
    genotype = Genotype(normal=pairs, reduce=derive_cell(reduce, operations))
    skips = sum(name == SKIP for name, _ in genotype.normal)
    if skips > COLLAPSED:
        snapshot = [[round(value, 3) for value in row] for row in normal.alpha.tolist()]
        warnings.warn(
            f"collapse: {skips} of 8 operations of the normal cell are skip connections; search shorter, set max_skips "
            f"or more skip_dropout. softmax(alpha): {snapshot}",
            stacklevel=2,
        )
    return genotype


def cell_weights_from(alpha: Tensor, beta: Tensor | None) -> CellWeights:
    """`CellWeights` of raw alpha (14, operations) and beta (14,)."""
    if beta is None:
        return CellWeights(alpha.softmax(1), None)
    return CellWeights(alpha.softmax(1), torch.cat([part.softmax(0) for part in beta.split(list(range(2, 2 + NODES)))]))
