"""LCCL as an experiment: one stage of cross-entropy, base network and companions together (spec skipnet section 5)."""

import warnings
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.data import Batch
from dataeff.dynamic.lccl.model import LcclResNet
from dataeff.dynamic.lccl.predictor import lccl_predictor
from dataeff.nn.backbone import BackboneConfig, backbone_macs
from dataeff.supervised import Answers, StageConfig, SupervisedConfig, SupervisedExperiment

COLLAPSED = 0.02


class LcclConfig(SupervisedConfig, BackboneConfig):
    """Settings of LCCL."""

    depth: int = Field(20, ge=8, description="6n+2; 20, 32 and 44 in the source, or 34 for imagenet")
    companion: Literal["channels", "shared"] = Field(
        "channels",
        description="channels: one for each output channel, as published; shared: one for all channels of a position, "
        "which leaves out whole positions",
    )
    train: StageConfig = StageConfig()

    @model_validator(mode="after")
    def _norm_by_position(self) -> "LcclConfig":
        if self.norm != "batch":
            raise ValueError(f"norm must be 'batch', got {self.norm!r}: a group's norm needs every position")
        return self


class LcclExperiment(SupervisedExperiment):
    """Trains a network with companions."""

    method: ClassVar[str] = "lccl"
    config_schema: ClassVar[type[ExperimentConfig]] = LcclConfig
    config: LcclConfig
    model: LcclResNet

    def build_model(self) -> LcclResNet:
        return LcclResNet(self.config.build_backbone(self.num_classes, self.in_channels), self.config.companion)

    def stage_settings(self) -> Sequence[StageConfig]:
        return [self.config.train]

    def full_macs(self) -> float:
        return backbone_macs(self.model.backbone, self.height, self.width)

    def signature(self) -> str:
        config = self.config
        return f"lccl, companion {config.companion}, {config.backbone_signature()}, {self.input_signature()}"

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.network(batch.images)
        return F.cross_entropy(output.logits, batch.labels), {"executed_share": output.executed.detach().mean()}

    def answer(self, batch: Batch) -> Answers:
        output = self.model(batch.images)
        means = {"executed_share": output.executed.mean(1), "elementwise_macs": output.elementwise_macs}
        return Answers(output.logits, output.macs, means)

    def evaluate(self, split: str) -> dict[str, float]:
        """As in `SupervisedExperiment`, with `executed_share` of positions, and `elementwise_macs` and
        `elementwise_reduction`: what would be saved if every single number could be left out, the published count."""
        metrics = super().evaluate(split)
        if split == "val" and metrics["executed_share"] < COLLAPSED:
            warnings.warn(
                f"companions collapsed: {metrics['executed_share']:.1%} of the positions computed; use a smaller lr",
                stacklevel=2,
            )
        return {**metrics, "elementwise_reduction": 1 - metrics["elementwise_macs"] / self.full_macs()}

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(LcclConfig, artifact.config, "artifact config.yaml")
        backbone = config.build_backbone(len(artifact.card.classes), artifact.card.input_shape[0])
        model = LcclResNet(backbone, config.companion)
        model.load_state_dict(artifact.state)
        return lccl_predictor(model, artifact.card, device)
