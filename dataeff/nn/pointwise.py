"""1x1 convolutions with a stride, such as the shortcuts of residual networks."""

import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution without bias that takes every `stride`-th pixel first.

    The same as `nn.Conv2d` with that stride, whose gradient in channels-last memory writes outside its memory (PyTorch
    2.14 on CPUs, with fewer than 8 input channels and for some sizes with 8) and mostly ends the process.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(thinned(x, self.stride), self.weight)


def thinned(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Every stride-th row and column of features (B, C, H, W)."""
    height, width = stride
    return x if height == width == 1 else x[:, :, ::height, ::width]
