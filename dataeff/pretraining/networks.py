"""The network of the active-learning classifier and of SimCLR, SCAN, rotation and DeepCluster: trunk and projection.

Source: spec initial_pools_active_learning, section 2.4 (ResNet-18 with a projection layer before the classifier) and
section 8 (the three convolution blocks of the CPU recipe).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dataeff.core.config import Config
from dataeff.nn.resnet import Init, ResidualBlock, conv2d, init_weights


class EncoderConfig(Config):
    """Which network turns an image into an embedding."""

    kind: Literal["conv3", "resnet18"] = Field(
        "conv3", description="conv3: three convolution blocks, for 8x8 digits; resnet18: 4 stages of 2 basic blocks"
    )
    width: int | None = Field(
        None, ge=2, le=1024, description="channels of the first layer; None: 32 (conv3: w, w, 2w) or 64 (w to 8w)"
    )
    proj_dim: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="d, of the embedding; None: 32 (conv3) or 128 (resnet18; 512 for Tiny ImageNet)",
    )
    stem_maxpool: bool = Field(False, description="resnet18: max-pool 3/2 after the first convolution")
    dropout_p: float = Field(0.0, ge=0, lt=1, description="after the flatten; 0.5 for DBAL and 0 for everything else")
    init: Init = Field("he", description="first weights of the convolutions; uniform: PyTorch's, for short trainings")

    def build(self, in_channels: int) -> "Encoder":
        """The network, freshly initialised from PyTorch's global generator."""
        width = self.width or {"conv3": 32, "resnet18": 64}[self.kind]
        trunk, features = _TRUNKS[self.kind](in_channels, width, self.stem_maxpool)
        if self.init == "he":
            init_weights(trunk)  # Kaiming, fan-out
        return Encoder(trunk, features, self.proj_dim or {"conv3": 32, "resnet18": 128}[self.kind], self.dropout_p)


class Encoder(nn.Module):
    """Images to embeddings: `trunk` (deterministic), then `project` (dropout on request, Linear, ReLU, Linear).

    Attributes:
        width: length of the trunk's output.
        proj_dim: length of the embedding.
    """

    def __init__(self, trunk: nn.Module, width: int, proj_dim: int, dropout_p: float) -> None:
        super().__init__()
        self.width, self.proj_dim, self.dropout_p = width, proj_dim, dropout_p
        self.trunk = trunk
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, proj_dim)]
        self.project = nn.Sequential(*([nn.Dropout(dropout_p)] if dropout_p else []), *layers)

    def forward(self, x: Tensor) -> Tensor:
        """Images float (B, C, H, W) -> embeddings (B, proj_dim), not normalised."""
        embedding: Tensor = self.project(self.trunk(x))
        return embedding


class EncoderClassifier(nn.Module):
    """An encoder and a linear layer on its embedding: ResNet18AL, or its small counterpart.

    MC dropout needs the trunk only once: `head` is everything that dropout makes random.

    Example::

        classifier = build_classifier(EncoderConfig(dropout_p=0.5), num_classes=10, in_channels=1)
        logits = classifier(images)
        logits, features = classifier(images, return_features=True)
        shared = classifier.encoder.trunk(images)                  # once
        passes = [classifier.head(shared) for _ in range(25)]
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.proj_dim, num_classes)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Images float (B, C, H, W) -> logits (B, K), and with `return_features` the penultimate features (B, d)."""
        features = self.encoder(x)
        logits: Tensor = self.linear(features)
        return (logits, features) if return_features else logits

    def head(self, shared: Tensor) -> Tensor:
        """The trunk's output (B, width) -> logits (B, K), with dropout where the module is in training mode."""
        logits: Tensor = self.linear(self.encoder.project(shared))
        return logits


def build_encoder(config: EncoderConfig, in_channels: int) -> Encoder:
    """The encoder, freshly initialised from PyTorch's global generator."""
    return config.build(in_channels)


def build_classifier(config: EncoderConfig, num_classes: int, in_channels: int) -> EncoderClassifier:
    """The classifier, freshly initialised from PyTorch's global generator."""
    return EncoderClassifier(config.build(in_channels), num_classes)


def _conv3(in_channels: int, width: int, stem_maxpool: bool) -> tuple[nn.Module, int]:
    if stem_maxpool:
        raise ValueError("stem_maxpool = True is an option of kind = 'resnet18'; leave it out for conv3")
    shapes = [(in_channels, width, 1), (width, width, 2), (width, 2 * width, 2)]
    layers: list[nn.Module] = []
    for inputs, outputs, stride in shapes:
        layers += [conv2d(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU()]
    return _trunk(layers), 2 * width


def _resnet18(in_channels: int, width: int, stem_maxpool: bool) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = [conv2d(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
    if stem_maxpool:
        layers.append(nn.MaxPool2d(3, 2, 1))
    channels = width
    for stage in range(4):
        for index in range(2):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(ResidualBlock(channels, width * 2**stage, stride))
            channels = width * 2**stage
    return _trunk(layers), channels


def _trunk(layers: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


_TRUNKS = {"conv3": _conv3, "resnet18": _resnet18}


class Normalise(nn.Module):
    """(x - mean) / std for each channel; the statistics are buffers, so that they travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Statistics (C,) of images in [0, 1]."""
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(std.view_as(self.std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
