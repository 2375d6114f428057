"""HydraNet as an Experiment: feature classifier, partition of the classes, joint training (spec hydranet section 3).

The partition is made when joint training begins. Baselines are arms of the same experiment; the other ways to group and
gate (Table 3.8) are the config's `strategy`.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.data import Batch, eval_batches
from dataeff.dynamic.hydranet import analysis
from dataeff.dynamic.hydranet.bases import StaticNet
from dataeff.dynamic.hydranet.losses import (
    BALANCE_WEIGHT,
    HydraLoss,
    collapse_warning,
    gate_metrics,
    idle_warning,
    utilisation_entropy,
)
from dataeff.dynamic.hydranet.model import PARTITIONED, HydraConfig, HydraNet, HydraOutput, selection_mask
from dataeff.dynamic.hydranet.partition import (
    BalancedClusterPartition,
    Order,
    class_mean_features,
    fingerprint,
    random_partition,
)
from dataeff.dynamic.hydranet.predictor import hydra_predictor
from dataeff.metrics.cost import count_macs
from dataeff.supervised import EVAL_BATCH, Answers, StageConfig, SupervisedConfig, SupervisedExperiment

FEATURES, JOINT = 0, 1
SHARE = "share_of_branch_"


class FeatureStageConfig(StageConfig):
    """The classifier whose features group the classes; any good one will do."""

    iterations: int = Field(10_000, ge=0, description="mini-batches")


class HydraNetConfig(SupervisedConfig, HydraConfig):
    """Settings of HydraNet and its baselines (spec hydranet sections 3 and 4)."""

    arm: Literal["hydra", "static", "base"] = Field(
        "hydra",
        description="static: one branch as wide as the conditional cost allows, no gate; base: the base network",
    )
    lambda_gate: float = Field(1.0, ge=0, le=100, description="weight of the gate's cross entropy")
    lambda_bal: float = Field(
        BALANCE_WEIGHT, ge=0, le=100, description="weight of the balance term, times branches / images^2"
    )
    freeze_unselected: bool = Field(
        True, description="weight decay and momentum do not move branches that no image of a mini-batch selects"
    )
    partition_order: Order = Field("index", description="who picks first within a round: centre 0, or the closest pair")
    strict_partition: bool = Field(False, description="refuse groups of different sizes")
    feature: Literal["penultimate", "logits"] = Field("penultimate", description="what the partition compares")
    feature_width: float = Field(1.0, gt=0, le=64, description="width of the feature classifier's last stage")
    per_class: int = Field(50, ge=1, description="images of a class that its mean feature is taken over")
    rescale: bool = Field(False, description="when a budget cuts k, bring the sum of features to its trained scale")
    features: FeatureStageConfig = FeatureStageConfig()
    joint: StageConfig = StageConfig()

    @model_validator(mode="after")
    def _trains(self) -> "HydraNetConfig":
        if not self.joint.iterations:
            raise ValueError("joint.iterations must be at least 1")
        if self.needs_features and not self.features.iterations:
            raise ValueError("strategy 'cluster' needs class features: give features.iterations, or strategy 'random'")
        return self

    @property
    def needs_features(self) -> bool:
        return self.arm == "hydra" and self.strategy == "cluster"


class HydraSystem(nn.Module):
    """The network, and the classifier whose features group the classes (None where no groups are needed)."""

    def __init__(self, net: HydraNet | StaticNet, classifier: StaticNet | None):
        super().__init__()
        self.net, self.classifier = net, classifier

    def forward(self, x: Tensor, features: bool = False) -> Any:
        """`features`: logits of the classifier; else the network's output, all branches run and masked."""
        if features:
            assert self.classifier is not None
            return self.classifier(x)
        return self.net(x, conditional=False) if isinstance(self.net, HydraNet) else self.net(x)


def build_network(config: HydraNetConfig, num_classes: int, shape: tuple[int, int, int]) -> HydraNet | StaticNet:
    """The network of an arm for images of `shape` (C, H, W)."""
    architecture = HydraConfig(**{name: getattr(config, name) for name in HydraConfig.model_fields})
    if config.arm == "base":
        return StaticNet(architecture.make_base(), num_classes, shape[0], config.w_stem, init=config.init)
    net = HydraNet(architecture, num_classes, shape[0])
    if config.arm == "hydra":
        return net
    return equal_cost_static(architecture, num_classes, shape, net.costs(shape[1], shape[2]).conditional(config.k))


def equal_cost_static(config: HydraConfig, num_classes: int, shape: tuple[int, int, int], macs: float) -> HydraNet:
    """The network with one branch and no gate whose multiply-adds are closest to `macs`, by the branch's width."""
    channels = config.make_base().last_channels

    def build(width: int) -> HydraNet:
        changes = {"n_branches": 1, "k": 1, "strategy": "no_gating", "w_branch": width / channels}
        return HydraNet(config.model_copy(update=changes), num_classes, shape[0])

    def cost(width: int) -> float:
        return build(width).costs(shape[1], shape[2]).total

    low, high = 1, 2
    while cost(high) < macs:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < macs else (low, middle)
    return build(min((low, high), key=lambda width: abs(cost(width) - macs)))


class HydraNetExperiment(SupervisedExperiment):
    """Trains one arm: feature classifier (strategy "cluster" only), then everything else together."""

    method = "hydranet"
    config_schema: ClassVar[type[ExperimentConfig]] = HydraNetConfig
    config: HydraNetConfig
    model: HydraSystem

    def build_model(self) -> nn.Module:
        shape = (self.in_channels, self.height, self.width)
        net = build_network(self.config, self.num_classes, shape)
        classifier = None
        if self.config.needs_features:
            base = self.config.make_base()
            width = self.config.w_stem
            last_width = width * self.config.feature_width
            classifier = StaticNet(base, self.num_classes, shape[0], width, last_width, self.config.init)
        self.centres: Tensor | None = None
        self.class_fingerprint = ""
        branches = net.config.n_branches if isinstance(net, HydraNet) else 0
        self.epoch_counts = torch.zeros(branches, dtype=torch.int64)
        self.unselected: Tensor | None = None
        self.frozen: list[tuple[Tensor, Tensor, Tensor]] = []
        return HydraSystem(net, classifier)

    def stage_settings(self) -> list[StageConfig]:
        features = self.config.features
        if not self.config.needs_features:
            features = features.model_copy(update={"iterations": 0})
        return [features, self.config.joint]

    @property
    def hydra(self) -> HydraNet | None:
        """The network, if it is one with a stem and branches."""
        return self.model.net if isinstance(self.model.net, HydraNet) else None

    @property
    def gated(self) -> HydraNet | None:
        """The network, if it has a gate."""
        return self.hydra if self.hydra is not None and self.hydra.gate is not None else None

    def full_macs(self) -> float:
        if self.hydra is not None:
            return self.hydra.costs(self.height, self.width).total
        return self._static_macs(self.model.net)

    def _static_macs(self, net: nn.Module) -> float:
        return count_macs(net, (self.in_channels, self.height, self.width)).total

    def signature(self) -> str:
        config = self.config
        widths = f"{config.w_stem:g}/{config.w_branch:g}/{config.w_gate:g}"
        return (
            f"{config.arm} {config.base} depth {config.depth}, {config.n_branches} branches, k {config.k}, "
            f"widths {widths}, branch point {config.branch_point}, {config.strategy}, gate head {config.gate_head}, "
            f"{config.combine}, {self.input_signature()}"
        )

    # --- stages -----------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: int) -> None:
        if stage == JOINT and self.config.arm == "hydra" and self.config.strategy in PARTITIONED:
            assert self.hydra is not None
            if self.config.strategy == "random":
                part = random_partition(self.num_classes, self.config.n_branches, self.seed)
            else:
                part = self._cluster()
            self.hydra.set_partition(part.to(self.hydra.part.device))

    def _cluster(self) -> Tensor:
        """Every worker computes the same partition, from the main worker's BatchNorm statistics."""
        classifier = self.model.classifier
        assert classifier is not None
        self.runtime.sync_buffers(self.model)
        classifier.eval()
        extract = classifier.features if self.config.feature == "penultimate" else classifier.forward
        means = class_mean_features(extract, self._train_images(), self.num_classes, self.config.per_class)
        partition = BalancedClusterPartition(self.config.partition_order, self.config.strict_partition)
        part = partition.fit(means, self.config.n_branches, self.seed)
        self.centres, self.class_fingerprint = partition.centres_, fingerprint(means)
        return part

    def _train_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        workers = self.runtime.options.loader_workers
        batches = eval_batches(self.splits.train, self.preprocess, EVAL_BATCH, workers=workers)
        return ((batch.images, batch.labels) for batch in self.runtime.wrap_loader(batches))

    def prepare_stage(self, stage: int) -> None:
        self.model.net.requires_grad_(stage == JOINT)
        if self.model.classifier is not None:
            self.model.classifier.requires_grad_(stage == FEATURES)

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        if stage == FEATURES:
            return nn.functional.cross_entropy(self.network(batch.images, features=True).float(), batch.labels), {}
        output = self.network(batch.images)
        if not isinstance(output, HydraOutput):
            return nn.functional.cross_entropy(output.float(), batch.labels), {}
        assert self.hydra is not None
        loss = HydraLoss(
            self.hydra.config,
            self.hydra.part,
            self.config.lambda_gate,
            self.config.lambda_bal,
            self.runtime.all_reduce,
            self.runtime.world_size,
        )
        terms = loss(output, batch.labels)
        if self.gated is None:
            return terms["total"], {}
        counts = selection_mask(output.selected, self.hydra.config.n_branches).sum(0)
        counts = self.runtime.all_reduce(counts).cpu()
        self.epoch_counts += counts
        self.unselected = (counts == 0).nonzero().view(-1)
        return terms["total"], {name: terms[name].detach() for name in ("cls", "gate", "balance")}

    # --- branches that nobody selected ------------------------------------------------------------------------------

    def after_backward(self, stage: int) -> None:
        """Remember the weights and momentum of branches that no image of the mini-batch selected, on any worker."""
        self.frozen = []
        if stage == FEATURES or self.gated is None or not self.config.freeze_unselected:
            return
        assert self.unselected is not None and self.optimizer is not None
        if not len(self.unselected):
            return
        for parameter in self.gated.branch_parameters():
            rows = self._rows(parameter.data)
            index = self.unselected.to(rows.device)
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            kept = rows[index].zero_() if momentum is None else self._rows(momentum)[index]
            self.frozen.append((parameter, rows[index], kept))

    def after_update(self, stage: int, iteration: int) -> None:
        """Undo what weight decay and momentum did to them, as if their gradient had been None."""
        assert self.optimizer is not None
        for parameter, rows, kept in self.frozen:
            assert self.unselected is not None
            index = self.unselected.to(rows.device)
            self._rows(parameter.data)[index] = rows
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                self._rows(momentum)[index] = kept
        self.frozen = []
        assert self.stream is not None
        if stage == JOINT and self.gated is not None and (iteration + 1) % self.stream.iterations_per_epoch == 0:
            message = idle_warning(self.epoch_counts, self.config.strategy)
            if message:
                warnings.warn(message, stacklevel=2)
            self.epoch_counts.zero_()

    def _rows(self, tensor: Tensor) -> Tensor:
        rows: Tensor = tensor.unflatten(0, (self.config.n_branches, -1))
        return rows

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> dict[str, float]:
        """As `SupervisedExperiment.evaluate`; with a gate also `utilisation_entropy` (0 collapsed, 1 balanced), and
        with a partition `gate_top1` and `gate_recall`, the share of images whose class's branch is best or selected."""
        metrics = super().evaluate(split)
        names = [name for name in metrics if name.startswith(SHARE)]
        if names:
            shares = torch.tensor([metrics.pop(name) for name in names], dtype=torch.float64)
            metrics["utilisation_entropy"] = utilisation_entropy(shares)
            message = collapse_warning(shares, self.config.strategy)
            if message and split == "val":
                warnings.warn(message, stacklevel=2)
        return metrics

    def answer(self, batch: Batch) -> Answers:
        count = len(batch.labels)
        in_features = self.optimizer_stage == FEATURES and self.model.classifier is not None
        static = self.model.classifier if in_features else self.model.net
        if not isinstance(static, HydraNet):
            assert static is not None
            macs = torch.full((count,), self._static_macs(static), dtype=torch.float64)
            return Answers(static(batch.images), macs)
        output = static(batch.images)
        means: dict[str, Tensor] = {}
        if static.gate is not None:
            executed = selection_mask(output.selected, static.config.n_branches)
            means = {f"{SHARE}{branch}": column for branch, column in enumerate(executed.T)}
            if static.config.strategy in PARTITIONED:
                means |= gate_metrics(output.gate_probs, batch.labels, static.part, output.selected)
        return Answers(output.logits, output.macs, means)

    # --- state and results ------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {
            "centres": self.centres,
            "class_fingerprint": self.class_fingerprint,
            "epoch_counts": self.epoch_counts.clone(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.centres = state["centres"]
        self.class_fingerprint = state["class_fingerprint"]
        self.epoch_counts = state["epoch_counts"].clone()

    def plots(self, directory: str | Path) -> None:
        if self.gated is None:
            return
        self.model.eval()
        batches = [*self.eval_stream("test")]
        analysis.write_figures(Path(directory), self.gated, batches, self.splits.classes)

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(HydraNetConfig, artifact.config, "artifact config.yaml")
        card = artifact.card
        net = build_network(config, len(card.classes), card.input_shape)
        prefix = "net."
        net.load_state_dict(
            {name.removeprefix(prefix): value for name, value in artifact.state.items() if name.startswith(prefix)}
        )
        return hydra_predictor(net.to(device).eval(), card, device, config.rescale)
