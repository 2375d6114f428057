"""Strided 1x1 convolutions: as PyTorch's, and safe where PyTorch's gradient is not."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from dataeff.nn.pointwise import PointwiseConv2d


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_it_gives_what_pytorch_gives_and_so_do_its_gradients(stride: int) -> None:
    torch.manual_seed(0)
    ours, theirs = PointwiseConv2d(5, 7, stride), nn.Conv2d(5, 7, 1, stride, bias=False)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        x = torch.randn(3, 5, 9, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        assert x.grad is not None and layer.weight.grad is not None
        results.append((y.detach(), x.grad, layer.weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_its_gradient_in_channels_last_memory_does_not_end_the_process() -> None:
    code = (
        "import torch; from dataeff.nn.pointwise import PointwiseConv2d\n"
        "for channels, side in ((3, 8), (4, 8), (6, 56), (8, 48)):\n"
        "    x = torch.randn(16, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()\n"
        "    layer = PointwiseConv2d(channels, 8, 2).to(memory_format=torch.channels_last)\n"
        "    for _ in range(3): layer(x).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
