"""Low-cost collaborative layers: a cheap companion of each convolution says where its output is zero.

Source: spec skipnet section 5, baseline LCCL; "More is Less: A More Complicated Network with Less Inference Complexity"
(Dong et al., 2017). In training every output is computed and multiplied by its companion.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.backbone import residual_blocks
from dataeff.nn.pointwise import PointwiseConv2d
from dataeff.nn.positions import count_positions
from dataeff.nn.resnet import ResidualBlock, ResNet, conv2d_macs, init_weights

CompanionKind = Literal["channels", "shared"]


@dataclass
class LcclOutput:
    """One forward pass.

    Attributes:
        logits: class logits, float32 (B, K).
        executed: share of the output positions of each collaborative convolution that are computed, float32 (B, L).
        macs: convolution multiply-adds of each image, float64 (B,): a position is computed with all its channels
            wherever one of its companions is above 0; companions and all other convolutions run densely.
        elementwise_macs: the published way of counting, float64 (B,): each output number by itself.
    """

    logits: Tensor
    executed: Tensor
    macs: Tensor
    elementwise_macs: Tensor


class Companion(nn.Module):
    """ReLU(BN(conv1x1(x))), which the output of a convolution is multiplied by.

    Args:
        conv: the expensive convolution.
        channels: "channels", one companion for each output channel; "shared", one for all channels of a position.
    """

    def __init__(self, conv: nn.Conv2d, channels: CompanionKind):
        super().__init__()
        width = conv.out_channels if channels == "channels" else 1
        self.conv = PointwiseConv2d(conv.in_channels, width, conv.stride[0])
        self.norm = nn.BatchNorm2d(width)
        init_weights(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) -> companion (B, C' or 1, H', W')."""
        return F.relu(self.norm(self.conv(x)))


class LcclResNet(nn.Module):
    """A `ResNet` whose 3x3 convolutions in the blocks have companions; a 1x1 convolution costs what its own would.

    Args:
        backbone: the base network.
        companion: see `Companion`.
    """

    def __init__(self, backbone: ResNet, companion: CompanionKind):
        super().__init__()
        self.backbone = backbone
        self.companions = nn.ModuleDict(
            {
                f"{b}_{c}": Companion(conv, companion)
                for b, block in enumerate(residual_blocks(backbone))
                for c, conv in enumerate(block.convs)
                if isinstance(conv, nn.Conv2d) and conv.kernel_size[0] > 1
            }
        )

    def companion_of(self, block: int, conv: int) -> Companion | None:
        """The companion of a convolution, both numbers from 0."""
        companion = dict(self.companions.items()).get(f"{block}_{conv}")
        assert companion is None or isinstance(companion, Companion)
        return companion

    @property
    def names(self) -> list[str]:
        """Of the convolutions with a companion, L of them."""
        numbers = [key.split("_") for key in self.companions]
        return [f"block {int(block) + 1} conv {int(conv) + 1}" for block, conv in numbers]

    def forward(self, x: Tensor) -> LcclOutput:
        """Images float (B, C, H, W) -> answers.

        Raises:
            ValueError: for images that `ResNet.check_images` refuses.
        """
        self.backbone.check_images(x)
        counter = Counter(self, len(x), x.shape[2], x.shape[3], x.device)
        x = self.backbone.stem(x)
        for number, block in enumerate(residual_blocks(self.backbone)):
            x = F.relu(self._residual(number, block, x, counter) + block.shortcut(x))
        return counter.output(self.backbone.classify(x))

    def _residual(self, number: int, block: ResidualBlock, x: Tensor, counter: "Counter") -> Tensor:
        for position, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
            layer = self.companion_of(number, position)
            if layer is None:
                x = norm(conv(x))
            else:
                companion = layer(x)
                counter.add(conv, companion)
                x = norm(conv(x) * companion)
            if position + 1 < len(block.convs):
                x = F.relu(x)
        return x

    def always_macs(self, height: int, width: int) -> float:
        """Convolution multiply-adds of one image that do not depend on it: companions, and all without one."""
        total, height, width = self.backbone.stem_macs(height, width)
        for number, block in enumerate(residual_blocks(self.backbone)):
            total += block.macs(height, width)[1]
            for position, conv in enumerate(block.convs):
                assert isinstance(conv, nn.Conv2d)
                companion = self.companion_of(number, position)
                if companion is not None:
                    total += conv2d_macs(companion.conv, height, width)[0]
                macs, height, width = conv2d_macs(conv, height, width)
                total += macs if companion is None else 0.0
        return total


class Counter:
    """Multiply-adds of a batch, from the companions of its convolutions."""

    def __init__(self, model: LcclResNet, count: int, height: int, width: int, device: torch.device):
        always = model.always_macs(height, width)
        self.executed: list[Tensor] = []
        self.spent = torch.full((count,), always, dtype=torch.float64, device=device)
        self.elementwise = self.spent.clone()

    def add(self, conv: nn.Module, companion: Tensor) -> None:
        """Count one convolution."""
        assert isinstance(conv, nn.Conv2d)
        on = companion > 0
        active = on.any(1, keepdim=True)
        weights = float(conv.weight.numel())
        self.executed.append(active.flatten(1).float().mean(1))
        self.spent += weights * count_positions(active)
        self.elementwise += weights / on.shape[1] * on.flatten(1).sum(1).double()

    def output(self, logits: Tensor) -> LcclOutput:
        """The answer of the batch."""
        return LcclOutput(logits, torch.stack(self.executed, 1), self.spent, self.elementwise)
