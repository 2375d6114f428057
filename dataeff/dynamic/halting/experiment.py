"""ACT and SACT as experiments: one stage of cross-entropy and ponder cost (spec skipnet section 5)."""

import warnings
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.data import Batch
from dataeff.dynamic.halting.model import HaltingResNet, ponder_loss
from dataeff.dynamic.halting.predictor import halting_predictor
from dataeff.nn.backbone import BackboneConfig, backbone_macs
from dataeff.supervised import Answers, StageConfig, SupervisedConfig, SupervisedExperiment

COLLAPSED = 0.02


class HaltingConfig(SupervisedConfig, BackboneConfig):
    """Settings of ACT and SACT."""

    tau: float = Field(0.005, ge=0, le=10, description="price of an executed unit in nats; larger stops earlier")
    train: StageConfig = StageConfig()


class SactConfig(HaltingConfig):
    """Settings of SACT."""

    @model_validator(mode="after")
    def _norm_by_position(self) -> "SactConfig":
        if self.norm != "batch":
            raise ValueError(f"norm must be 'batch', got {self.norm!r}: a group's norm needs every position")
        return self


class ActExperiment(SupervisedExperiment):
    """ACT: each image stops as a whole."""

    method: ClassVar[str] = "act"
    config_schema: ClassVar[type[ExperimentConfig]] = HaltingConfig
    spatial: ClassVar[bool] = False
    config: HaltingConfig
    model: HaltingResNet

    def build_model(self) -> HaltingResNet:
        return HaltingResNet(self.config.build_backbone(self.num_classes, self.in_channels), self.spatial)

    def stage_settings(self) -> Sequence[StageConfig]:
        return [self.config.train]

    def full_macs(self) -> float:
        return backbone_macs(self.model.backbone, self.height, self.width)

    def signature(self) -> str:
        return f"{self.method}, {self.config.backbone_signature()}, {self.input_signature()}"

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        return ponder_loss(self.network(batch.images), batch.labels, self.config.tau)

    def answer(self, batch: Batch) -> Answers:
        output = self.model(batch.images)
        return Answers(output.logits, output.macs, {"ponder": output.ponder, "executed_share": output.executed.mean(1)})

    def evaluate(self, split: str) -> dict[str, float]:
        """As in `SupervisedExperiment`, with `ponder` (units and remainders) and `executed_share` of all units."""
        metrics = super().evaluate(split)
        units, first = len(self.model.backbone.blocks), len(self.model.first_units)
        optional = (metrics["executed_share"] * units - first) / max(1, units - first)
        if split == "val" and self.steps_done + 1 >= self.total_steps and optional < COLLAPSED:
            warnings.warn(
                f"halting collapsed: {optional:.1%} of the units after each group's first run; use a smaller tau than "
                f"{self.config.tau:g}",
                stacklevel=2,
            )
        return metrics

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(HaltingConfig, artifact.config, "artifact config.yaml")
        backbone = config.build_backbone(len(artifact.card.classes), artifact.card.input_shape[0])
        model = HaltingResNet(backbone, cls.spatial)
        model.load_state_dict(artifact.state)
        return halting_predictor(model, artifact.card, device)


class SactExperiment(ActExperiment):
    """SACT: each position of the feature maps stops by itself."""

    method: ClassVar[str] = "sact"
    config_schema: ClassVar[type[ExperimentConfig]] = SactConfig
    spatial: ClassVar[bool] = True
