"""What a search finds: a pair of cells, written as operations and predecessors, and the published ones.

Source: spec ss_pcp_darts sections 2.2 and 2.3, spec nas_adversarial_robustness sections 2.4 and 2.5.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import model_validator

from dataeff.core.config import Config, nearest

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
CAPSULES = ("caps_dynamic", "caps_em", "caps_self")
PARAMETER_FREE = ("max_pool_3x3", "avg_pool_3x3", "skip_connect")
ALLOWED = PRIMITIVES[1:] + CAPSULES
NODES = 4

Pair = tuple[str, int]


class Genotype(Config):
    """A normal and a reduction cell. Node j (from 2; 0 and 1 are the cell's inputs) is the sum of its two pairs
    (operation, predecessor); the cell's output is the concatenation of the nodes in `concat`.

    Raises:
        ValueError: an unknown operation, a predecessor that is not before its node, a node that nothing uses.
    """

    normal: tuple[Pair, ...]
    normal_concat: tuple[int, ...] = (2, 3, 4, 5)
    reduce: tuple[Pair, ...]
    reduce_concat: tuple[int, ...] = (2, 3, 4, 5)

    @model_validator(mode="after")
    def _check(self) -> "Genotype":
        _check_cell("normal", self.normal, self.normal_concat)
        _check_cell("reduce", self.reduce, self.reduce_concat)
        return self


def _check_cell(name: str, pairs: Sequence[Pair], concat: Sequence[int]) -> None:
    if not pairs or len(pairs) % 2:
        raise ValueError(f"{name} cell has {len(pairs)} pairs; it needs two a node")
    nodes = range(2, 2 + len(pairs) // 2)
    for position, (operation, predecessor) in enumerate(pairs):
        node = 2 + position // 2
        if operation not in ALLOWED:
            raise ValueError(f"{name} cell: unknown operation {operation!r} ({nearest(operation, ALLOWED)})")
        if not 0 <= predecessor < node:
            raise ValueError(
                f"{name} cell: node {node} cannot take node {predecessor}; it must be from 0 to {node - 1}"
            )
    if not concat or not set(concat) <= set(nodes) or len(set(concat)) < len(concat):
        raise ValueError(f"{name} cell: concat {list(concat)} must be different nodes of {list(nodes)}")
    unused = set(nodes) - set(concat) - {predecessor for _, predecessor in pairs}
    if unused:
        raise ValueError(f"{name} cell: nothing uses the nodes {sorted(unused)}; put them into concat")


def structure_stats(pairs: Sequence[Pair]) -> dict[str, float]:
    """Of one cell: depth (operations on the longest path from an input to a node), skip connections, operations without
    parameters, and dilated convolutions (spec ss_pcp_darts section 5)."""
    depth = [0, 0]
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        depth.append(1 + max(depth[first[1]], depth[second[1]]))
    names = [operation for operation, _ in pairs]
    return {
        "depth": float(max(depth)),
        "skips": float(names.count("skip_connect")),
        "param_free": float(sum(name in PARAMETER_FREE for name in names)),
        "dilated": float(sum(name.startswith("dil") for name in names)),
    }


def random_genotype(rng: np.random.Generator, nodes: int = NODES) -> Genotype:
    """Two different predecessors a node and an operation an edge, all uniform (spec nas_adversarial_robustness 2.5)."""
    cells = [
        [
            (PRIMITIVES[1:][rng.integers(7)], int(predecessor))
            for node in range(2, 2 + nodes)
            for predecessor in rng.choice(node, 2, replace=False)
        ]
        for _ in range(2)
    ]
    concat = tuple(range(2, 2 + nodes))
    return Genotype(normal=tuple(cells[0]), normal_concat=concat, reduce=tuple(cells[1]), reduce_concat=concat)


_SHORT = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}


def _pairs(text: str) -> tuple[Pair, ...]:
    """ "sep3,0 skip,1" -> pairs."""
    entries = [entry.split(",") for entry in text.split()]
    return tuple((_SHORT[operation], int(predecessor)) for operation, predecessor in entries)


GENOTYPES: dict[str, Genotype] = {
    "darts_v2": Genotype(
        normal=_pairs("sep3,0 sep3,1 sep3,0 sep3,1 sep3,1 skip,0 skip,0 dil3,2"),
        reduce=_pairs("max,0 max,1 skip,2 max,1 max,0 skip,2 skip,2 max,1"),
    ),
    "p_darts": Genotype(
        normal=_pairs("skip,0 dil3,1 skip,0 sep3,1 sep3,1 sep3,3 sep3,0 dil5,4"),
        reduce=_pairs("avg,0 sep5,1 sep3,0 dil5,2 max,0 dil3,1 dil3,1 dil5,3"),
    ),
    "pc_darts": Genotype(
        normal=_pairs("sep3,1 skip,0 sep3,0 dil3,1 sep5,0 sep3,1 avg,0 dil3,1"),
        reduce=_pairs("sep5,1 max,0 sep5,1 sep5,2 sep3,0 sep3,3 sep3,1 sep3,2"),
    ),
    "pc_darts_imagenet": Genotype(
        normal=_pairs("skip,1 sep3,0 sep3,0 skip,1 sep3,1 sep3,3 sep3,1 dil5,4"),
        reduce=_pairs("sep3,0 skip,1 dil5,2 max,1 sep3,2 sep3,1 sep5,0 sep3,3"),
    ),
    "nsga_net": Genotype(
        normal=_pairs("skip,0 max,0 dil5,0 max,0 dil5,1 sep3,3 max,1 sep5,3 sep3,1 sep3,0"),
        normal_concat=(2, 4, 5, 6),
        reduce=_pairs("avg,0 sep3,1 dil3,1 max,0 skip,2 dil5,1 skip,2 avg,1 dil5,1 dil3,1"),
        reduce_concat=(3, 4, 5, 6),
    ),
}


def named_genotype(name: str) -> Genotype:
    """A published genotype.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in GENOTYPES:
        raise ValueError(f"unknown genotype {name!r} ({nearest(name, [*GENOTYPES, 'random'])})")
    return GENOTYPES[name]
