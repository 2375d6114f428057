"""Settings of a search, and the phases that they make.

Source: spec ss_pcp_darts sections 2.5, 2.6, 3, 4 and 9.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dataeff.core.config import Config, ExperimentConfig
from dataeff.nas.genotype import CAPSULES, PRIMITIVES

Arm = Literal["pcp_darts", "pc_darts", "p_darts", "darts", "random", "nsga2", "proxyless", "densenas"]
PARTIAL, PROGRESSIVE = ("pcp_darts", "pc_darts"), ("pcp_darts", "p_darts")
DIFFERENTIABLE = ("pcp_darts", "pc_darts", "p_darts", "darts")


class EvolutionSettings(Config):
    """NSGA-II over cells. Defaults: spec nas_adversarial_robustness section 2.4."""

    population: int = Field(40, ge=2, le=1000)
    generations: int = Field(30, ge=1, le=1000)
    crossover: float = Field(0.9, ge=0, le=1, description="probability of a two-point crossover")
    nodes: int = Field(5, ge=1, le=8, description="of a cell; each has two operations")
    channels: int = Field(16, ge=2, description="of the proxy network")
    cells: int = Field(8, ge=1, description="of the proxy network")
    iterations: int = Field(7800, ge=1, description="mini-batches of a proxy training; 20 epochs of 25,000 images")


class ChainSettings(Config):
    """The chains of ProxylessNAS and DenseNAS. Sizes are open choices of the spec."""

    widths: tuple[int, ...] = Field((16, 24, 40, 80), min_length=1, description="channels of the stages, growing")
    strides: tuple[int, ...] = Field((1, 2, 2, 1), min_length=1, description="1 or 2, of each stage's first layer")
    layers: int = Field(2, ge=1, le=8, description="layers of a stage or block, behind the first")
    space: Literal["mbconv", "resnet"] = Field("mbconv", description="candidates of a layer")
    cost_weight: float = Field(0.1, ge=0, le=100, description="weight of the expected cost in the architecture loss")
    reach: int = Field(4, ge=1, le=8, description="how many of the next blocks a block may feed (densenas)")

    @model_validator(mode="after")
    def _consistent(self) -> "ChainSettings":
        if len(self.widths) != len(self.strides):
            raise ValueError(f"widths and strides need the same length, got {len(self.widths)} and {len(self.strides)}")
        if list(self.widths) != sorted(self.widths) or min(self.widths) < 1:
            raise ValueError(f"widths must be positive and not fall, got {list(self.widths)}")
        if not set(self.strides) <= {1, 2}:
            raise ValueError(f"strides must be 1 or 2, got {list(self.strides)}")
        return self


class SearchSettings(ExperimentConfig):
    """What is searched, and how."""

    arm: Arm = Field(
        "pcp_darts",
        description="pcp_darts: partial channels, progressive; pc_darts: partial channels; p_darts: progressive; "
        "darts: neither; random: a random genotype; nsga2: evolution of cells; proxyless, densenas: chains of blocks",
    )
    partial_k: int = Field(
        4, ge=1, le=64, description="K: a 1/K share of the channels is mixed (arms pcp_darts, pc_darts)"
    )
    edge_norm: bool = Field(True, description="weigh edges by softmax(beta) (arms pcp_darts, pc_darts)")
    sampling: Literal["shuffle", "random"] = Field(
        "shuffle", description="which channels: the first and a shuffle, or a draw for each cell and mini-batch"
    )
    layers: int = Field(8, ge=1, le=100, description="cells (arms pc_darts, darts)")
    epochs: int = Field(40, ge=1, le=10_000, description="of arms without phases")
    arch_start: int = Field(16, ge=0, description="first epoch with architecture steps")
    phases: tuple[tuple[int, int], ...] = Field(
        ((5, 8), (11, 5), (17, 3)), min_length=1, description="(cells, operations an edge) of each phase"
    )
    phase_epochs: int = Field(25, ge=1, le=10_000)
    phase_arch_start: int = Field(10, ge=0, description="first epoch of a phase with architecture steps")
    phase_arch_end: int | None = Field(None, ge=1, description="epoch that ends them; None: the phase's last")
    skip_dropout: tuple[float, ...] = Field(
        (0.0, 0.4, 0.7), min_length=1, description="initial drop probability of skip connections, of each phase"
    )
    max_skips: Literal["auto"] | Annotated[int, Field(ge=0, le=8)] = Field(
        "auto",
        description="skip connections allowed in the normal cell; auto: 2 in progressive arms, no limit in others",
    )
    init_channels: int = Field(16, ge=1, le=1024, description="C of the first cells")
    ss_factor: float = Field(0.0, ge=0, le=1, description="share of the Barlow Twins loss; 1: no label is read")
    bt_lambda: float = Field(5e-3, gt=0, le=1)
    bt_embedding: Literal["pooled", "projector", "logits"] = "pooled"
    bt_normalize: bool = Field(False, description="divide the Barlow Twins loss by the number of features")
    second_order: bool = Field(False, description="unroll one weight step in the architecture's gradient")
    batch: int = Field(64, ge=2, description="images in a mini-batch over all workers; about K times more fit")
    w_lr: float = Field(0.025, gt=0, le=10)
    w_lr_min: float = Field(0.0, ge=0, le=10, description="at the end of the cosine")
    w_momentum: float = Field(0.9, ge=0, lt=1)
    w_decay: float = Field(3e-4, ge=0, le=1)
    arch_lr: float = Field(6e-4, gt=0, le=10)
    arch_betas: tuple[float, float] = (0.5, 0.999)
    arch_decay: float = Field(1e-3, ge=0, le=1)
    grad_clip: float = Field(5.0, gt=0)
    search_images: int | None = Field(
        None, ge=2, description="training images the search sees, half for weights, half for alpha; None: all"
    )
    augment: Literal["none", "shift", "shift_flip"] = Field("shift_flip", description="without views (ss_factor 0)")
    extra_ops: tuple[str, ...] = Field((), description="further candidates: caps_dynamic, caps_em, caps_self")
    evolution: EvolutionSettings = EvolutionSettings()
    chain: ChainSettings = ChainSettings()

    @field_validator("extra_ops")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not set(value) <= set(CAPSULES) or len(set(value)) < len(value):
            raise ValueError(f"extra_ops must be different ones of {', '.join(CAPSULES)}, got {list(value)}")
        return value

    @field_validator("arch_betas")
    @classmethod
    def _fractions(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"arch_betas must be two numbers from 0 to below 1, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "SearchSettings":
        cells, counts = [list(column) for column in zip(*self.phases, strict=True)]
        if min(cells) < 1 or cells != sorted(set(cells)):
            raise ValueError(f"phases must grow in cells, got {cells}")
        if min(counts) < 2 or counts != sorted(set(counts), reverse=True):
            raise ValueError(f"phases must fall in operations an edge, to at least 2, got {counts}")
        if counts[0] > len(self.operations):
            raise ValueError(f"phases ask for {counts[0]} operations an edge, there are {len(self.operations)}")
        if len(self.skip_dropout) != len(self.phases) or not all(0 <= p < 1 for p in self.skip_dropout):
            raise ValueError(
                f"skip_dropout needs a probability below 1 for each of {len(self.phases)} phases, "
                f"got {list(self.skip_dropout)}"
            )
        if self.ss_factor and self.arm not in DIFFERENTIABLE:
            raise ValueError(f"ss_factor is for the arms {', '.join(DIFFERENTIABLE)}, not {self.arm!r}")
        if self.second_order and (self.arm not in DIFFERENTIABLE or self.ss_factor):
            raise ValueError("second_order is for differentiable arms with ss_factor = 0")
        return self

    @property
    def operations(self) -> tuple[str, ...]:
        """All candidates of an edge."""
        return PRIMITIVES + self.extra_ops

    @property
    def channel_share(self) -> int:
        """K of the arm."""
        return self.partial_k if self.arm in PARTIAL else 1

    @property
    def normalises_edges(self) -> bool:
        return self.edge_norm and self.arm in PARTIAL

    @property
    def skip_limit(self) -> int | None:
        if self.max_skips == "auto":
            return 2 if self.arm in PROGRESSIVE else None
        return self.max_skips

    def plan(self) -> "list[Phase]":
        """The phases of a gradient-based arm; the first searches all operations."""
        if self.arm not in PROGRESSIVE:
            return [Phase(self.layers, len(self.operations), self.epochs, self.arch_start, self.epochs, 0.0)]
        end = min(self.phase_epochs, self.phase_arch_end or self.phase_epochs)
        return [
            Phase(cells, count if number else len(self.operations), self.phase_epochs, self.phase_arch_start, end, drop)
            for number, ((cells, count), drop) in enumerate(zip(self.phases, self.skip_dropout, strict=True))
        ]


@dataclass(frozen=True)
class Phase:
    """A stretch of the search on one super-network; the architecture learns in epochs arch_start to arch_end - 1."""

    cells: int
    count: int
    epochs: int
    arch_start: int
    arch_end: int
    skip_dropout: float

    def drop_probability(self, epoch: int) -> float:
        """Of a skip connection: falls linearly until the architecture learns, then exponentially."""
        if epoch < self.arch_start:
            return self.skip_dropout * (self.epochs - epoch - 1) / self.epochs
        return self.skip_dropout * math.exp(-0.2 * (epoch - self.arch_start))
