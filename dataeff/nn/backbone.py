"""The settings of a residual base network, for the methods that are built on one."""

from typing import Literal

from pydantic import Field

from dataeff.core.config import Config
from dataeff.nn.resnet import ResidualBlock, ResNet


class BackboneConfig(Config):
    """Which `ResNet` a method starts from (spec skipnet section 2.1)."""

    family: Literal["cifar", "imagenet"] = "cifar"
    depth: int = Field(38, ge=8, description="6n+2 (38, 74, 110, 152) or, for imagenet, 34, 50, 101")
    widths: tuple[int, ...] | None = Field(None, description="channels of the groups; None: 16, 32, 64 or 64 to 512")
    norm: Literal["batch", "group"] = Field("batch", description="group: no batch statistics")
    shortcut: Literal["projection", "pool_pad"] = "projection"

    def build_backbone(self, num_classes: int, in_channels: int) -> ResNet:
        """The network, freshly initialised.

        Raises:
            ValueError: for a depth or widths that `ResNet` refuses.
        """
        return ResNet(self.depth, num_classes, in_channels, self.widths, self.norm, self.shortcut, self.family)

    def backbone_signature(self) -> str:
        """What a checkpoint must agree with."""
        widths = list(self.widths) if self.widths else "default"
        return f"{self.family} depth {self.depth}, widths {widths}, {self.norm} norm, {self.shortcut} shortcut"


def residual_blocks(network: ResNet) -> list[ResidualBlock]:
    """Blocks 1..M of a network."""
    return [block for block in network.blocks if isinstance(block, ResidualBlock)]


def backbone_macs(network: ResNet, height: int, width: int) -> float:
    """Convolution multiply-adds of one image in the dense network."""
    total, height, width = network.stem_macs(height, width)
    for block in residual_blocks(network):
        residual, shortcut, height, width = block.macs(height, width)
        total += residual + shortcut
    return total
