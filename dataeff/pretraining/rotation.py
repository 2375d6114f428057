"""Prediction of which of four quarter turns an image has had, scored by its cross-entropy.

Source: spec initial_pools_active_learning, section 2.2 f.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.pretraining.networks import build_classifier
from dataeff.pretraining.settings import RotationConfig
from dataeff.pretraining.training import Context, PoolBatch, PretextModule, Stage, Update
from dataeff.pretraining.views import WEAK_DRAWS, rotations, weak_view


class Rotation(PretextModule):
    """The classifier's network with four classes: 0, 90, 180, 270 degrees.

    Raises:
        ValueError: images that are not square.
    """

    def __init__(self, config: RotationConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        if image_shape[1] != image_shape[2]:
            raise ValueError(
                f"rotation needs square images, got {image_shape[1]}x{image_shape[2]}; add size=N to the data"
            )
        self.config = config
        self.classifier = build_classifier(config.encoder, 4, image_shape[0])

    def stages(self, context: Context) -> list[Stage]:
        return [RotationStage(self, context)]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> cross-entropy (4, B) of their four turns."""
        logits = self.classifier(self.normalise(rotations(x))).float()
        targets = torch.arange(4, device=x.device).repeat_interleave(len(x))
        return F.cross_entropy(logits, targets, reduction="none").view(4, -1)

    def sample_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.classifier.encoder(self.normalise(x))
        return features

    def sample_losses(self, x: Tensor) -> Tensor:
        losses: Tensor = self(x).mean(0)
        return losses


class RotationStage(Stage):
    """Every image of a mini-batch in all four turns."""

    draws = WEAK_DRAWS

    def __init__(self, task: Rotation, context: Context) -> None:
        super().__init__(task.config, {"rotation": task}, context)
        self.config = task.config

    def updates(self, batch: PoolBatch, networks: Mapping[str, nn.Module]) -> Iterator[Update]:
        loss = networks["rotation"](weak_view(batch.images, batch.draws, self.config.views)).mean()
        yield Update("rotation", loss, {"loss": loss})
