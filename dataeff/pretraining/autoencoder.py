"""Four convolutions down and four transposed ones up: the networks of the VAE and of inpainting.

Source: spec initial_pools_active_learning, section 2.2 b. Every layer halves the sides, rounding up, and the decoder
undoes that size by size, so that images of any size do (8x8 as well as 28x28, which the source pads to 32x32).
"""

import torch
from torch import Tensor, nn

SLOPE = 0.01


def _sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Sides before the first and after each of the four layers."""
    sizes = [(height, width)]
    for _ in range(4):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


class ConvEncoder(nn.Module):
    """Images (B, C, H, W) -> features (B, `features`): conv 3x3/2, BatchNorm, LeakyReLU, four times, then flat."""

    def __init__(self, image_shape: tuple[int, int, int], widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for outputs in widths:
            layers += [nn.Conv2d(channels, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(SLOPE)]
            channels = outputs
        self.layers = nn.Sequential(*layers, nn.Flatten())
        last = _sizes(height, width)[-1]
        self.features = channels * last[0] * last[1]

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class ConvDecoder(nn.Module):
    """Codes (B, `latent`) -> images (B, C, H, W), by a linear layer, four transposed convolutions and a convolution.

    Args:
        bounded: end in Tanh.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], widths: tuple[int, int, int, int], latent: int, bounded: bool
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        sizes = _sizes(height, width)
        self.start = (widths[3], *sizes[4])
        self.linear = nn.Linear(latent, widths[3] * sizes[4][0] * sizes[4][1])
        layers: list[nn.Module] = []
        inputs = (widths[3], widths[2], widths[1], widths[0])
        outputs = (widths[2], widths[1], widths[0], widths[0])
        for i, o, (tall, wide) in zip(inputs, outputs, sizes[3::-1], strict=True):
            extra = (1 - tall % 2, 1 - wide % 2)  # an odd side comes out of its rounded-up half without padding
            layers += [nn.ConvTranspose2d(i, o, 3, 2, 1, extra, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(SLOPE)]
        layers.append(nn.Conv2d(widths[0], channels, 3, padding=1))
        self.layers = nn.Sequential(*layers, *([nn.Tanh()] if bounded else []))

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(self.linear(z).view(-1, *self.start))
        return images


def standard_normal(draws: Tensor) -> Tensor:
    """Uniform draws as draws of the standard normal distribution."""
    normal: Tensor = torch.special.ndtri(draws.double().clamp(1e-12, 1 - 1e-12))
    return normal.to(draws.dtype)
