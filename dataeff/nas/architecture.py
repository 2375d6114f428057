"""An architecture in plain values, and the network that it describes.

A `Genotype` is a pair of cells, a `Chain` a sequence of blocks (of ProxylessNAS- and DenseNAS-style searches).
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from dataeff.core.config import Config, nearest, parse_config
from dataeff.nas.blocks import BLOCKS, make_block
from dataeff.nas.genotype import Genotype


class ChainLayer(Config):
    """One block: its kind, output channels and stride."""

    block: str
    channels: int = Field(ge=1)
    stride: Literal[1, 2] = 1

    @model_validator(mode="after")
    def _known(self) -> "ChainLayer":
        if self.block not in BLOCKS:
            raise ValueError(f"unknown block {self.block!r} ({nearest(self.block, BLOCKS)})")
        return self


class Chain(Config):
    """Blocks one after another behind a 3x3 convolution with `stem` channels."""

    stem: int = Field(ge=1)
    layers: tuple[ChainLayer, ...] = Field(min_length=1)


Architecture = Genotype | Chain


def parse_architecture(values: Mapping[str, Any]) -> Architecture:
    """An architecture from a mapping, such as one of a YAML file.

    Raises:
        ValueError: one line that says what is wrong.
    """
    if "layers" in values:
        return parse_config(Chain, values, "genotype")
    return parse_config(Genotype, values, "genotype")


class ChainNetwork(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, num_classes)."""

    drop_sites: tuple[int, int] | None = None
    auxiliary: nn.Module | None = None

    def __init__(self, chain: Chain, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = chain_stem(in_channels, chain.stem)
        self.layers = nn.ModuleList()
        channels = chain.stem
        for layer in chain.layers:
            self.layers.append(make_block(layer.block, channels, layer.channels, layer.stride))
            channels = layer.channels
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor, keep: Tensor | None = None, both: bool = False) -> Any:
        """As `CellNetwork.forward`; a chain has neither tower nor drop-path."""
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(x.mean((2, 3)))
        return (logits, None) if both else logits


def chain_stem(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
    )


def architecture_parameters(network: nn.Module) -> int:
    """Parameters without the auxiliary tower."""
    return sum(value.numel() for name, value in network.named_parameters() if not name.startswith("auxiliary."))
