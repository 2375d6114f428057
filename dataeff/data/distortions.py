"""Distortions of batches in which every image has parameters of its own: the parts that self-supervised views share.

Images are float (B, C, H, W) in [0, 1] and draws uniform in [0, 1); what happens to an image is a function of its own
draws. torchvision's transforms give one draw to the whole batch.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

JitterStrength = tuple[float, float, float, float]
"""Of brightness, contrast, saturation and hue: factors from 1 - s to 1 + s; hue turns by up to s of a circle."""


def greyscale(images: Tensor) -> Tensor:
    """Luma of RGB images, (B, 1, H, W)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def jitter_colour(images: Tensor, u: Sequence[Tensor], strength: JitterStrength, probability: float = 0.8) -> Tensor:
    """Brightness, contrast, saturation and hue of RGB images, in this order.

    Args:
        u: five draws (B,): whether at all, and one for each.
    """
    chosen = u[0] < probability
    images = jitter_grey(images, u[:3], strength, probability)
    grey = greyscale(images)
    images = (grey + (images - grey) * _factor(u[3], chosen, strength[2])).clamp(0, 1)
    # Hue turns the chroma plane of YIQ.
    angle = torch.where(chosen, strength[3] * (2 * u[4] - 1), torch.zeros_like(u[4])) * (2 * math.pi)
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]],
        device=images.device,
        dtype=images.dtype,
    )
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    turned = torch.einsum("bij,bjhw->bihw", matrix, images)
    return torch.where(chosen[:, None, None, None], turned.clamp(0, 1), images)


def jitter_grey(images: Tensor, u: Sequence[Tensor], strength: JitterStrength, probability: float = 0.8) -> Tensor:
    """Brightness and contrast alone, which is all that an image of one channel has.

    Args:
        u: three draws (B,): whether at all, and one for each.
    """
    chosen = u[0] < probability
    images = (images * _factor(u[1], chosen, strength[0])).clamp(0, 1)
    mean = (greyscale(images) if images.shape[1] == 3 else images).mean((1, 2, 3), keepdim=True)
    return (mean + (images - mean) * _factor(u[2], chosen, strength[1])).clamp(0, 1)


def _factor(u: Tensor, chosen: Tensor, strength: float) -> Tensor:
    return torch.where(chosen, 1 + strength * (2 * u - 1), torch.ones_like(u))[:, None, None, None]


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a deviation for each image.

    Args:
        sigma: (B,) pixels, above 0; the kernel has about a tenth of the side (odd, at least 3), as in SimCLR.
    """
    radius = max(1, round(0.1 * min(images.shape[2:]) / 2))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True))[:, :, None, None, None]
    for axis in (2, 3):
        padding = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        padded = F.pad(images, padding, mode="reflect")
        size = images.shape[axis]
        images = sum((weights[:, k] * padded.narrow(axis, k, size) for k in range(2 * radius + 1)), images * 0)
    return images


def fill_boxes(images: Tensor, top: Tensor, left: Tensor, tall: Tensor, wide: Tensor, value: float = 0.0) -> Tensor:
    """A box of each image set to `value`; `top`, `left`, `tall`, `wide` (B,) in pixels, and it may leave the image."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    return images.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], value)


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Bilinear resampling at `matrix` (B, 2, 3) times the output's coordinates, both from -1 to 1; outside is 0."""
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
