"""The candidate operations of a cell as ordinary modules, (B, C, H, W) -> (B, C, H/stride, W/stride).

Source: spec ss_pcp_darts section 2.2. BatchNorms are affine in evaluation networks and not during search.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nas.capsules import CapsuleOp
from dataeff.nas.genotype import ALLOWED, CAPSULES
from dataeff.nn.pointwise import PointwiseConv2d


def relu_conv_norm(channels: int, width: int, affine: bool = True) -> nn.Sequential:
    """ReLU - 1x1 convolution - BatchNorm, `channels` to `width`."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width, affine=affine))


class FactorizedReduce(nn.Module):
    """Halves the resolution: ReLU, two 1x1 convolutions of stride 2, the second shifted by one pixel, concatenated.

    Raises:
        ValueError: an odd number of output channels.
    """

    def __init__(self, channels: int, width: int, affine: bool = True) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"a factorised reduction has an even number of channels, got {width}")
        self.first = PointwiseConv2d(channels, width // 2, stride=2)
        self.second = PointwiseConv2d(channels, width // 2, stride=2)
        self.norm = nn.BatchNorm2d(width, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out: Tensor = self.norm(torch.cat([self.first(x), self.second(shifted(x))], 1))
        return out


def shifted(x: Tensor) -> Tensor:
    """`x` without its first row and column; an odd side gets one row or column of zeros at its end."""
    height, width = x.shape[2:]
    return F.pad(x[:, :, 1:, 1:], (0, width % 2, 0, height % 2))


def _depthwise(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def make_operation(name: str, channels: int, stride: int, affine: bool = True) -> nn.Module:
    """The module of an operation other than `none`.

    Raises:
        ValueError: unknown operation, or channels that it cannot divide.
    """
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, 1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)
    if name in CAPSULES:
        return CapsuleOp(name.removeprefix("caps_"), channels, stride, affine)
    if name not in ALLOWED:
        raise ValueError(f"unknown operation {name!r}; known: {', '.join(ALLOWED)}")
    kernel = int(name[-1])
    if name.startswith("dil"):
        return nn.Sequential(*_depthwise(channels, kernel, stride, 2, affine))
    return nn.Sequential(*_depthwise(channels, kernel, stride, 1, affine), *_depthwise(channels, kernel, 1, 1, affine))
