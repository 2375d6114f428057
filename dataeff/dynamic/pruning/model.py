"""Residual networks whose inner channels, or whole blocks, are removed for all images alike.

In training removed parts stay where they are behind a mask, so that checkpoints, optimiser and workers see one shape;
`shrink` gives the physically smaller dense network of the same function.
"""

import copy
import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.backbone import residual_blocks
from dataeff.nn.channels import take_conv, take_norm
from dataeff.nn.resnet import ResidualBlock, ResNet, conv2d_macs

Structure = Literal["channels", "blocks"]


class PrunableResNet(nn.Module):
    """A `ResNet` with a mask, and for SSS a factor, on each part that may be removed.

    A part is one inner channel of a residual branch (every convolution but a branch's last: the sums over branches need
    all channels), or one residual branch that keeps the shape. Parts come in vectors named "block_conv" (channels) or
    "block" (blocks).

    Args:
        backbone: the base network, with BatchNorm.
        structure: which parts.
        scaled: whether parts have trainable factors, 1 at the start.

    Attributes:
        sizes: number of parts of each vector.
    """

    def __init__(self, backbone: ResNet, structure: Structure = "channels", scaled: bool = False):
        super().__init__()
        self.backbone, self.structure = backbone, structure
        self.sizes: dict[str, int] = {}
        for number, block in enumerate(residual_blocks(backbone)):
            if structure == "channels":
                for position, conv in enumerate(list(block.convs)[:-1]):
                    assert isinstance(conv, nn.Conv2d)
                    self.sizes[f"{number}_{position}"] = conv.out_channels
            elif not block.changes_shape:
                self.sizes[str(number)] = 1
        for name, size in self.sizes.items():
            self.register_buffer(f"mask_{name}", torch.ones(size))
            if scaled:
                self.register_buffer(f"velocity_{name}", torch.zeros(size))
                self.register_buffer(f"iterate_{name}", torch.ones(size))
        factors = {name: nn.Parameter(torch.ones(size)) for name, size in self.sizes.items() if scaled}
        self.factors = nn.ParameterDict(factors)

    def forward(self, x: Tensor) -> Tensor:
        """Images float (B, C, H, W) -> logits float32 (B, K).

        Raises:
            ValueError: for images that `ResNet.check_images` refuses.
        """
        self.backbone.check_images(x)
        x = self.backbone.stem(x)
        for number in range(len(self.backbone.blocks)):
            x = self.run_block(number, x)
        return self.backbone.classify(x)

    def run_block(self, number: int, x: Tensor) -> Tensor:
        """Features of block `number`, from 0, with what is removed left out."""
        block = residual_blocks(self.backbone)[number]
        inner = x
        for position, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
            inner = norm(conv(inner))
            if position + 1 < len(block.convs):
                inner = self._scaled(f"{number}_{position}", F.relu(inner))
        return F.relu(self._scaled(str(number), inner) + block.shortcut(x))

    def _scaled(self, name: str, x: Tensor) -> Tensor:
        if name not in self.sizes:
            return x
        scale = self.mask(name)
        if name in self.factors:
            scale = scale * self.factors[name]
        return x * scale.to(x.dtype).view(1, -1, 1, 1)

    def mask(self, name: str) -> Tensor:
        """1 for parts that stay, float32 (size,)."""
        mask = self.get_buffer(f"mask_{name}")
        return mask

    def kept(self, name: str) -> Tensor:
        """Ascending numbers of the parts that stay, int64."""
        return self.mask(name).nonzero()[:, 0]

    @torch.no_grad()
    def keep(self, name: str, parts: Tensor) -> None:
        """Remove all parts of a vector but these."""
        mask = self.mask(name)
        mask.zero_()
        mask[parts.to(mask.device)] = 1

    @property
    def kept_share(self) -> float:
        """Parts that stay over all parts."""
        return sum(int(self.mask(name).sum()) for name in self.sizes) / max(1, sum(self.sizes.values()))

    def macs(self, height: int, width: int, counts: Mapping[str, int] | None = None) -> float:
        """Convolution multiply-adds of one image.

        Args:
            counts: parts that stay, by vector; None for those that the masks leave.
        """
        if counts is None:
            counts = {name: int(self.mask(name).sum()) for name in self.sizes}
        total, height, width = self.backbone.stem_macs(height, width)
        for number, block in enumerate(residual_blocks(self.backbone)):
            residual, shortcut, *size = block.macs(height, width)
            if self.structure == "channels":
                residual = self._branch_macs(number, block, counts, height, width)
            total += residual * counts.get(str(number), 1) + shortcut
            height, width = size
        return total

    def _branch_macs(
        self, number: int, block: ResidualBlock, counts: Mapping[str, int], height: int, width: int
    ) -> float:
        total, share = 0.0, 1.0
        for position, conv in enumerate(block.convs):
            assert isinstance(conv, nn.Conv2d)
            macs, height, width = conv2d_macs(conv, height, width)
            left = counts.get(f"{number}_{position}", conv.out_channels) / conv.out_channels
            total, share = total + macs * share * left, left
        return total

    def counts_for(self, reduction: float, height: int, width: int) -> dict[str, int]:
        """Channels to keep in each layer, one share for all layers, so that `reduction` of the multiply-adds go.

        Raises:
            ValueError: even one channel a layer costs more.
        """
        full = self.macs(height, width, self.sizes)
        counts: dict[str, int] = {}
        for step in range(1000, -1, -1):
            counts = {name: max(1, math.ceil(size * step / 1000)) for name, size in self.sizes.items()}
            if self.macs(height, width, counts) <= (1 - reduction) * full * (1 + 1e-12):
                return counts
        most = 1 - self.macs(height, width, counts) / full
        raise ValueError(f"reduction = {reduction:g} is not reachable: inner channels make up at most {most:.3f} here")


@torch.no_grad()
def shrink(model: PrunableResNet) -> ResNet:
    """The smaller dense network, in evaluation mode: weights gathered, factors multiplied into them."""
    network = copy.deepcopy(model.backbone)
    blocks: list[nn.Module] = []
    groups = []
    for number, block in enumerate(residual_blocks(network)):
        if not len(model.kept(str(number)) if str(number) in model.sizes else [0]):
            continue
        _shrink_block(model, number, block)
        blocks.append(block)
        groups.append(network.group_of_block[number])
    network.blocks, network.group_of_block = nn.ModuleList(blocks), groups
    return network.eval()


def _shrink_block(model: PrunableResNet, number: int, block: ResidualBlock) -> None:
    for position in range(len(block.convs) - 1):
        name = f"{number}_{position}"
        if name not in model.sizes:
            continue
        kept = model.kept(name)
        conv, norm, after = block.convs[position], block.norms[position], block.convs[position + 1]
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and isinstance(after, nn.Conv2d)
        block.convs[position], block.norms[position] = take_conv(conv, outputs=kept), take_norm(norm, kept)
        following = take_conv(after, inputs=kept)
        if name in model.factors:
            following.weight.mul_(model.factors[name][kept].view(1, -1, 1, 1))
        block.convs[position + 1] = following
    if str(number) in model.factors:
        norm = block.norms[-1]
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.mul_(model.factors[str(number)])
        norm.bias.mul_(model.factors[str(number)])
