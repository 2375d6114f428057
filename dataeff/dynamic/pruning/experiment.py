"""Static pruning as an experiment: train, (SSS: sparsify,) prune, fine-tune.

Source: spec skipnet section 5 (PEFC, EP), spec deepmoe section 5 (Li et al. = PEFC, He et al., ThiNet, SSS).
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.data import Batch
from dataeff.dynamic.pruning.criteria import proximal_step
from dataeff.dynamic.pruning.model import PrunableResNet, shrink
from dataeff.dynamic.pruning.predictor import pruning_predictor
from dataeff.dynamic.pruning.prune import prune_channels
from dataeff.metrics.cost import parameters
from dataeff.nn.backbone import BackboneConfig, backbone_macs
from dataeff.supervised import Answers, StageConfig, SupervisedConfig, SupervisedExperiment


class FinetuneConfig(StageConfig):
    """Fine-tuning goes on at the last learning rate of training."""

    iterations: int = Field(16_000, ge=0, description="mini-batches")
    lr: float = Field(1e-3, gt=0, le=10, description="learning rate")
    milestones: tuple[float, ...] = ()


class PruningConfig(SupervisedConfig, BackboneConfig):
    """Settings of static pruning."""

    criterion: Literal["l1", "entropy", "lasso", "thinet", "sss"] = Field(
        "l1",
        description="l1: PEFC, smallest L1 norm; entropy: EP; lasso: He et al.; thinet: ThiNet; sss: factors that an "
        "L1 penalty drives to zero",
    )
    reduction: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="share of all multiply-adds to remove, by one share of channels in every layer (not sss)",
    )
    calibration_images: int = Field(512, ge=2, description="training images that entropy, lasso and thinet look at")
    calibration_positions: int = Field(10, ge=1, le=1000, description="positions in each of them (lasso, thinet)")
    structure: Literal["channels", "blocks"] = Field("channels", description="what sss removes; the others: channels")
    sparsity_weight: float = Field(5e-3, ge=0, le=100, description="weight of the L1 penalty on factors (sss)")
    train: StageConfig = StageConfig()
    sparsify: StageConfig = StageConfig(iterations=32_000, lr=0.01)
    finetune: FinetuneConfig = FinetuneConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "PruningConfig":
        if self.norm != "batch":
            raise ValueError(f"norm must be 'batch', got {self.norm!r}: a group's norm would mix other channels")
        if self.structure == "blocks" and self.criterion != "sss":
            raise ValueError(f"structure 'blocks' is for criterion 'sss', not {self.criterion!r}")
        before, name = (self.sparsify, "sparsify") if self.criterion == "sss" else (self.train, "train")
        if not before.iterations:
            raise ValueError(f"{name}.iterations must be at least 1: there is nothing trained to prune")
        return self


class PruningExperiment(SupervisedExperiment):
    """Trains a network, removes a part of it once, and trains what is left.

    Raises:
        ValueError: a reduction that removing inner channels cannot reach.
    """

    method: ClassVar[str] = "pruning"
    config_schema: ClassVar[type[ExperimentConfig]] = PruningConfig
    config: PruningConfig
    model: PrunableResNet

    def build_model(self) -> PrunableResNet:
        model = build_network(self.config, self.num_classes, self.in_channels)
        if self.config.criterion != "sss":
            model.counts_for(self.config.reduction, self.height, self.width)  # a mistake shows before training
        return model

    def stage_settings(self) -> Sequence[StageConfig]:
        config = self.config
        return [config.train, *([config.sparsify] if config.criterion == "sss" else []), config.finetune]

    def full_macs(self) -> float:
        return backbone_macs(self.model.backbone, self.height, self.width)

    def signature(self) -> str:
        parts = f"factors on {self.config.structure}" if self.config.criterion == "sss" else "no factors"
        return f"pruning, {parts}, {self.config.backbone_signature()}, {self.input_signature()}"

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(self.network(batch.images), batch.labels), {}

    def answer(self, batch: Batch) -> Answers:
        logits = self.model(batch.images)
        macs = self.model.macs(batch.images.shape[2], batch.images.shape[3])
        return Answers(logits, torch.full((len(logits),), macs, dtype=torch.float64, device=logits.device))

    def served_parameters(self) -> int:
        return parameters(shrink(self.model))

    def extra_metrics(self) -> dict[str, float]:
        return {"kept_share": self.model.kept_share}

    def _sparsifies(self, stage: int) -> bool:
        return self.stages[stage] is self.config.sparsify

    def prepare_stage(self, stage: int) -> None:
        for factor in self.model.factors.values():
            factor.requires_grad_(self._sparsifies(stage))

    def parameter_groups(self, stage: int) -> Iterable[Any]:
        factors = {id(factor) for factor in self.model.factors.values()}
        weights = [parameter for parameter in self.model.parameters() if id(parameter) not in factors]
        # Factors are in a group, so that their gradients are cleared, but move by `after_update` only.
        frozen = {"params": list(self.model.factors.values()), "lr_scale": 0.0, "weight_decay": 0.0}
        return [{"params": weights}, *([frozen] if factors else [])]

    @torch.no_grad()
    def after_update(self, stage: int, iteration: int) -> None:
        if not self._sparsifies(stage) or self.bad_steps:
            return
        settings, model = self.stages[stage], self.model
        for name, factor in model.factors.items():
            assert factor.grad is not None
            velocity, iterate = model.get_buffer(f"velocity_{name}"), model.get_buffer(f"iterate_{name}")
            lr, penalty = settings.lr_at(iteration), self.config.sparsity_weight
            found = proximal_step(factor, factor.grad, velocity, lr, penalty, settings.momentum)
            for old, new in zip((factor, velocity, iterate), found, strict=True):
                old.copy_(new)

    def end_stage(self, stage: int) -> None:
        if stage != len(self.stages) - 2:
            return
        self.runtime.sync_buffers(self.model)
        self.model.eval()
        if self.config.criterion == "sss":
            self._remove_zero_factors()
        else:
            counts = self.model.counts_for(self.config.reduction, self.height, self.width)
            options = {"positions": self.config.calibration_positions, "seed": self.seed}
            prune_channels(self.model, self.config.criterion, counts, self._calibration_images(), **options)

    def _calibration_images(self) -> Tensor:
        train = self.splits.train
        count = min(self.config.calibration_images, len(train))
        chosen = np.random.default_rng(self.seed).choice(len(train), count, replace=False)
        images: Tensor = self.runtime.to_device(self.preprocess(train.images(np.sort(chosen))))
        return images

    @torch.no_grad()
    def _remove_zero_factors(self) -> None:
        """Take the iterates, whose zeros are exact; a layer without any channel left keeps one, with factor 0."""
        model = self.model
        for name, factor in model.factors.items():
            factor.copy_(model.get_buffer(f"iterate_{name}"))
            kept = factor.nonzero()[:, 0]
            if not len(kept) and self.config.structure == "channels":
                kept = torch.zeros(1, dtype=torch.int64)
            model.keep(name, kept)
        share = model.kept_share
        if share == 1 or share < 0.02:
            change = "larger" if share == 1 else "smaller"
            warnings.warn(
                f"sss keeps {share:.0%} of the {self.config.structure}; use a {change} sparsity_weight than "
                f"{self.config.sparsity_weight:g}",
                stacklevel=2,
            )

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(PruningConfig, artifact.config, "artifact config.yaml")
        model = build_network(config, len(artifact.card.classes), artifact.card.input_shape[0])
        model.load_state_dict(artifact.state)
        return pruning_predictor(model, artifact.card, device)


def build_network(config: PruningConfig, num_classes: int, in_channels: int) -> PrunableResNet:
    """The network of a config, nothing removed."""
    backbone = config.build_backbone(num_classes, in_channels)
    return PrunableResNet(backbone, config.structure, scaled=config.criterion == "sss")
