"""HydraNet: a shared stem, branches of which a gate picks the top k for each image, and one classifier for their sum.

Source: spec hydranet sections 2.1 to 2.5, 2.7, 2.8 and 2.10. In training all branches run on all images, as grouped
convolutions, and outputs outside the top k are masked; in evaluation a branch runs on its own images only.
`inference.HydraInference` is the faster form of the latter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dataeff.core.config import Config
from dataeff.dynamic.hydranet.bases import (
    Base,
    BaseName,
    Init,
    StridePlacement,
    check_images,
    init_weights,
    make_base,
    make_stem,
    make_tail,
)
from dataeff.dynamic.hydranet.blocks import Block, Folded, Pool, SepConv, Stack
from dataeff.metrics.cost import count_macs
from dataeff.nn.branches import BranchConv2d, BranchLinear, BranchNorm2d, Fold, Pairs, run_branches

Strategy = Literal["cluster", "random", "learn", "learn_balance", "no_gating"]
PARTITIONED = ("cluster", "random")
LEARNED = ("learn", "learn_balance")


class HydraConfig(Config):
    """Architecture and strategy of a HydraNet (spec section 9). Widths scale the filters of the base network."""

    base: BaseName = "resnet"
    depth: int = Field(2, ge=1, le=64, description="how often each block is stacked")
    n_branches: int = Field(20, ge=1, le=1000, description="branches; 50 on ImageNet, 20 on CIFAR-100")
    k: int = Field(4, ge=1, description="branches executed for an image; 5 on ImageNet, 4 on CIFAR-100")
    w_stem: float = Field(1.0, gt=0, le=64)
    w_branch: float = Field(1.0, gt=0, le=64, description="0.125 on ImageNet")
    w_gate: float = Field(1.0, gt=0, le=64, description="0.125 to 0.75 on ImageNet")
    branch_point: Literal["last_block", "block1", "block2", "block3"] = Field(
        "last_block", description="last block inside the stem; last_block: all but the last"
    )
    gate_head: Literal["branches", "classes"] = Field(
        "branches", description="classes: scores of classes, summed over a branch's classes (fits the published counts)"
    )
    combine: Literal["sum", "concat"] = "sum"
    strategy: Strategy = Field("cluster", description="how classes belong to branches, and what trains the gate")
    stride_placement: StridePlacement = Field("last", description="ressep only; last fits the published counts")
    init: Init = Field("he", description="first weights; he: as published; uniform: PyTorch's own, for short trainings")

    @model_validator(mode="after")
    def _consistent(self) -> "HydraConfig":
        if self.k > self.n_branches:
            raise ValueError(f"k = {self.k} must be from 1 to n_branches = {self.n_branches}")
        if self.strategy in LEARNED and self.gate_head == "classes":
            raise ValueError(f"gate_head 'classes' needs a partition, which strategy {self.strategy!r} has not")
        base = make_base(self.base, self.depth, self.stride_placement)
        if not 1 <= self.stem_stages < base.stages:
            raise ValueError(
                f"branch_point {self.branch_point!r}: the stem of base {self.base!r} may end after block 1 to "
                f"{base.stages - 1}"
            )
        return self

    def make_base(self) -> Base:
        return make_base(self.base, self.depth, self.stride_placement)

    @property
    def stem_stages(self) -> int:
        """Blocks of the base network inside the stem."""
        if self.branch_point == "last_block":
            return self.make_base().stages - 1
        return int(self.branch_point.removeprefix("block"))


class HydraOutput(NamedTuple):
    """One forward pass.

    Attributes:
        logits: float32 (B, K).
        gate_logits: log score of each branch before (head "branches") or after (head "classes") normalisation,
            float32 (B, n); zeros without a gate.
        gate_probs: softmax of them, float32 (B, n).
        selected: the executed branches, best first, int64 (B, k); -1 where an image executes fewer.
        macs: multiply-adds of convolutions and linear layers that an image needs if only its branches are executed,
            float64 (B,).
    """

    logits: Tensor
    gate_logits: Tensor
    gate_probs: Tensor
    selected: Tensor
    macs: Tensor


@dataclass(frozen=True)
class HydraCosts:
    """Multiply-adds of one image by part; `branch`: one branch with its projection, `combiner`: with the classifier."""

    stem: float
    gate: float
    branch: float
    combiner: float
    n_branches: int

    @property
    def fixed(self) -> float:
        """What every image pays."""
        return self.stem + self.gate + self.combiner

    @property
    def total(self) -> float:
        """All branches executed."""
        return self.conditional(self.n_branches)

    def conditional(self, k: int) -> float:
        """`k` branches executed."""
        return self.fixed + k * self.branch


class Gate(nn.Module):
    """A branch of its own width, pooled, with one linear layer: to the branches, or to the classes.

    With head "classes" a branch's score is the sum of the probabilities of its classes, by logsumexp.
    """

    def __init__(self, base: Base, in_channels: int, stages: int, width: float, outputs: int):
        super().__init__()
        self.tail = make_tail(base, in_channels, stages, width)
        if base.pools_last:
            self.tail = Stack([self.tail, Pool(self.tail.out_channels)])
        self.output = nn.Linear(self.tail.out_channels, outputs)

    def forward(self, h: Tensor) -> Tensor:
        """Stem features -> scores float32 (B, outputs); float32 also under autocast."""
        features = self.tail(h)
        with torch.autocast(h.device.type, enabled=False):
            return self.output(features.float())  # type: ignore[no-any-return]


def branch_scores(class_logits: Tensor, part: Tensor, n_branches: int) -> Tensor:
    """log of the summed class probabilities of each branch, (B, K) -> (B, n), without underflow."""
    shape = (len(class_logits), n_branches)
    largest = class_logits.new_full(shape, -torch.inf)
    largest = largest.scatter_reduce(1, part.expand(len(class_logits), -1), class_logits.detach(), "amax")
    sums = class_logits.new_zeros(shape).index_add(1, part, (class_logits - largest[:, part]).exp())
    return largest + sums.log() - class_logits.logsumexp(1, keepdim=True)


class Projection(Block):
    """A branch's own map to the features that are summed: linear on vectors, 1x1 convolution and BatchNorm on maps."""

    def __init__(self, in_channels: int, features: int, branches: int, maps: bool):
        super().__init__()
        self.out_channels = features
        self.linear = None if maps else BranchLinear(in_channels, features, branches)
        if maps:
            self.conv = BranchConv2d(in_channels, features, 1, 1, branches)
            self.norm = BranchNorm2d(features, branches)

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        if self.linear is not None:
            return self.linear(x, branch)  # type: ignore[no-any-return]
        return self.norm(self.conv(x, branch), branch)  # type: ignore[no-any-return]

    def fold(self, fold: Fold) -> Folded:
        if self.linear is None:
            conv = fold.conv(self.conv, self.norm)
            return lambda x: conv(x, False)
        weight = fold.rows(self.linear.weight.detach(), self.out_channels).unflatten(0, (-1, self.out_channels))
        weight = weight.transpose(1, 2).contiguous()

        def run(x: Tensor) -> Tensor:
            rows = x.unflatten(1, (len(weight), -1)).transpose(0, 1)
            return torch.bmm(rows, weight).transpose(0, 1).flatten(1)

        return run


class VectorCombiner(Block):
    """Linear layer and ReLU on pooled features; with `norm`, BatchNorm and ReLU before."""

    def __init__(self, in_features: int, features: int, norm: bool):
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features) if norm else None
        self.linear = nn.Linear(in_features, features)
        self.out_channels = features

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        if self.norm is not None:
            x = F.relu(self.norm(x))
        return F.relu(self.linear(x))

    def fold(self, fold: Fold) -> Folded:
        return self.forward


class HydraNet(nn.Module):
    """Stem, gate, branches, projections, combiner and classifier.

    Args:
        config: architecture and strategy.
        num_classes, in_channels: of labels and images.

    Raises:
        ValueError: more branches than classes (where classes are partitioned), or branches too narrow.

    Example:
        model = HydraNet(HydraConfig(base="resnet", depth=2), num_classes=100)
        model.set_partition(random_partition(100, 20, seed=0))
        output = model(images)
    """

    def __init__(self, config: HydraConfig, num_classes: int, in_channels: int = 3):
        super().__init__()
        self.config, self.num_classes, self.in_channels = config, num_classes, in_channels
        n, base, stages = config.n_branches, config.make_base(), config.stem_stages
        if config.strategy in PARTITIONED and n > num_classes:
            raise ValueError(f"n_branches = {n} must be at most the number of classes, {num_classes}")
        self.stride, self.maps = base.stride, base.pools_last
        self.features = features = base.feature_size(config.w_stem)
        self.stem = make_stem(base, in_channels, stages, config.w_stem)
        channels = self.stem.out_channels
        self.gate: Gate | None = None
        if config.strategy != "no_gating":
            outputs = num_classes if config.gate_head == "classes" else n
            self.gate = Gate(base, channels, stages, config.w_gate, outputs)
        self.branches = make_tail(base, channels, stages, config.w_branch, n)
        self.projection = Projection(self.branches.out_channels, features, n, self.maps)
        combined = features * n if config.combine == "concat" else features
        self.combiner: Block = (
            SepConv(combined, features) if self.maps else VectorCombiner(combined, features, config.base == "mini")
        )
        self.classifier = nn.Linear(features, num_classes)
        self.register_buffer("part", torch.full((num_classes,), -1, dtype=torch.int64))
        self.part: Tensor
        self._costs: dict[tuple[int, int], HydraCosts] = {}
        self.register_load_state_dict_pre_hook(_refuse_other_partition)
        init_weights(self, config.init)

    # --- partition --------------------------------------------------------------------------------------------------

    @property
    def has_partition(self) -> bool:
        return bool((self.part >= 0).all())

    def set_partition(self, part: Tensor) -> None:
        """Fix the branch of every class, int64 (K,).

        Raises:
            ValueError: another shape, a branch outside 0..n-1, or group sizes that differ by more than one.
        """
        n = self.config.n_branches
        if part.shape != (self.num_classes,) or int(part.min()) < 0 or int(part.max()) >= n:
            raise ValueError(
                f"a partition needs a branch from 0 to {n - 1} for each of {self.num_classes} classes, "
                f"got shape {tuple(part.shape)}"
            )
        sizes = torch.bincount(part, minlength=n)
        if int(sizes.max() - sizes.min()) > 1:
            raise ValueError(f"group sizes of a partition may differ by at most one, got {sizes.tolist()}")
        self.part.copy_(part)

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, conditional: bool | None = None, k: int | None = None, executed: Tensor | None = None
    ) -> HydraOutput:
        """Classify images.

        Args:
            x: images float (B, C, H, W), normalised.
            conditional: run a branch on its own images only; None: in evaluation mode. Otherwise all branches run on
                all images and are masked.
            k: branches of an image, in place of the trained number; the summed features then have another scale than
                in training.
            executed: which branches an image runs, bool (B, n), in place of the gate's choice; the gate is asked all
                the same.

        Raises:
            ValueError: images of a wrong shape or too small, an empty or single-image batch in training, k outside
                1..n, no partition where the strategy needs one, or gate scores that are NaN.
        """
        conditional = not self.training if conditional is None else conditional
        self.check_images(x)
        h = self.stem(x)
        gate_logits = self.gate_scores(h)
        probs = gate_logits.softmax(1)
        if executed is None:
            selected = self.select(gate_logits, k)
            executed = selection_mask(selected, self.config.n_branches)
        else:
            selected = top_k(executed.float(), int(executed.sum(1).max()))
            selected = torch.where(executed.gather(1, selected), selected, -1)
        weights = probs if self.config.strategy in LEARNED else None
        if conditional:
            combined = combine_pairs(
                run_branches(h, executed, lambda b, rows: self.projection(self.branches(rows, b), b)),
                executed,
                weights,
                self.feature_shape(h),
                self.config.combine,
            )
        else:
            outputs = self.projection(self.branches(h)).unflatten(1, (self.config.n_branches, self.features))
            combined = self.combine_masked(outputs, executed, weights)
        logits = self.classify(self.combiner(combined))
        macs = self.macs(executed, (x.shape[2], x.shape[3]))
        return HydraOutput(logits, gate_logits, probs, selected, macs)

    def combine_masked(self, outputs: Tensor, executed: Tensor, weights: Tensor | None) -> Tensor:
        """Outputs (B, n, D, ...) of all branches -> what the combiner reads. `where` and not a product with 0: what a
        branch that is not selected puts out may be NaN."""
        extra = (1,) * (outputs.dim() - 2)
        if weights is not None:
            outputs = outputs * weights.to(outputs.dtype).view(*weights.shape, *extra)
        masked = torch.where(executed.view(*executed.shape, *extra), outputs, 0.0)
        return masked.sum(1) if self.config.combine == "sum" else masked.flatten(1, 2)

    def check_images(self, x: Tensor) -> None:
        """Check images before a forward pass; errors as for `forward`."""
        check_images(x, self.in_channels, self.stride, values=not self.training)
        if not self.training:
            return
        if len(x) < 2:
            raise ValueError(
                f"training needs batches of at least 2 images (BatchNorm on pooled features), got {len(x)}"
            )
        if self.config.strategy in PARTITIONED and not self.has_partition:
            raise ValueError(f"strategy {self.config.strategy!r} needs a partition before training: call set_partition")

    def gate_scores(self, h: Tensor) -> Tensor:
        """Log scores of the branches float32 (B, n); zeros without a gate."""
        if self.gate is None:
            return h.new_zeros(len(h), self.config.n_branches, dtype=torch.float32)
        return self.to_branches(self.gate(h))

    def to_branches(self, scores: Tensor) -> Tensor:
        """What the gate's linear layer puts out -> log scores of the branches.

        Raises:
            ValueError: in evaluation, for scores that are NaN; in training they make the loss NaN.
        """
        if not self.training and not torch.compiler.is_compiling() and bool(torch.isnan(scores).any()):
            raise ValueError("the gate's scores are NaN: no branch can be selected")
        if self.config.gate_head == "branches":
            return scores
        # Without a partition yet, all classes count for branch 0: costs can be counted, training is refused.
        return branch_scores(scores, self.part.clamp(min=0), self.config.n_branches)

    def select(self, gate_logits: Tensor, k: int | None = None) -> Tensor:
        """The k best branches of each image, int64 (B, k), equal scores by lower index; all of them without a gate."""
        n = self.config.n_branches
        if self.gate is None:
            return torch.arange(n, device=gate_logits.device).expand(len(gate_logits), n)
        k = self.config.k if k is None else k
        if not 1 <= k <= n:
            raise ValueError(f"k = {k} must be from 1 to n_branches = {n}")
        return top_k(gate_logits.detach(), k)

    def feature_shape(self, h: Tensor) -> tuple[int, ...]:
        """(B, D, ...) of one branch's features, for stem features `h`."""
        if not self.maps:
            return (len(h), self.features)
        stages = self.config.make_base().stages
        size = [-(-extent // 2) if stages - self.config.stem_stages > 1 else extent for extent in h.shape[2:]]
        return (len(h), self.features, *size)

    def classify(self, features: Tensor) -> Tensor:
        """Combined features, pooled if they are maps -> logits float32 (B, K); float32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            logits: Tensor = self.classifier(features.mean((2, 3)) if self.maps else features)
        return logits

    # --- cost and parameters ----------------------------------------------------------------------------------------

    def macs(self, executed: Tensor, size: tuple[int, int]) -> Tensor:
        """Multiply-adds of images of `size` that execute these branches, float64 (B,)."""
        costs = self.costs(*size)
        return costs.fixed + executed.sum(1, dtype=torch.float64) * costs.branch

    def costs(self, height: int, width: int) -> HydraCosts:
        """Multiply-adds by part for images of `height` x `width`, counted on a forward pass."""
        if (height, width) not in self._costs:
            self._costs[height, width] = self._count_costs(height, width)
        return self._costs[height, width]

    def _count_costs(self, height: int, width: int) -> HydraCosts:
        shape = (self.in_channels, height, width)
        self._costs[height, width] = HydraCosts(0, 0, 0, 0, self.config.n_branches)  # while the count itself runs
        counted = count_macs(self, shape, conditional=False).by_module
        part = {name: 0.0 for name in ("stem", "gate", "branches", "projection", "combiner", "classifier")}
        for name, macs in counted.items():
            part[name.split(".")[0]] += macs
        n = self.config.n_branches
        return HydraCosts(
            stem=part["stem"],
            gate=part["gate"],
            branch=(part["branches"] + part["projection"]) / n,
            combiner=part["combiner"] + part["classifier"],
            n_branches=n,
        )

    def branch_parameters(self) -> list[nn.Parameter]:
        """Parameters whose first axis holds the rows of all branches, branch by branch."""
        return [*self.branches.parameters(), *self.projection.parameters()]


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, largest first, equal ones by lower index: int64 (B, k)."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def selection_mask(selected: Tensor, n: int) -> Tensor:
    """int64 (B, k), -1 for none -> bool (B, n)."""
    mask = torch.zeros(len(selected), n + 1, dtype=torch.bool, device=selected.device)
    return mask.scatter_(1, torch.where(selected < 0, n, selected), True)[:, :n]


def combine_pairs(
    pairs: Pairs | None,
    executed: Tensor,
    weights: Tensor | None,
    shape: tuple[int, ...],
    combine: str,
) -> Tensor:
    """Outputs of `run_branches` -> what the combiner reads: (B, D, ...), or (B, n * D, ...) for "concat"."""
    count, n = executed.shape
    slots = n if combine == "concat" else 1
    if pairs is None:
        return torch.zeros(count, slots * shape[1], *shape[2:], device=executed.device)
    outputs, images, branches = pairs
    if weights is not None:
        outputs = outputs * weights[images, branches].to(outputs.dtype).view(-1, *(1,) * (outputs.dim() - 1))
    combined = outputs.new_zeros(count * slots, *outputs.shape[1:])
    places = images * n + branches if combine == "concat" else images
    return combined.index_add(0, places, outputs).view(count, slots * outputs.shape[1], *outputs.shape[2:])


def _refuse_other_partition(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    assert isinstance(module, HydraNet)
    theirs = state.get(f"{prefix}part")
    if theirs is not None and module.has_partition and not torch.equal(theirs.cpu(), module.part.cpu()):
        raise ValueError("the weights belong to another partition of the classes than this network's")
