"""Barlow Twins as a search loss, its mixture with cross-entropy, and the two distorted views.

Source: spec ss_pcp_darts section 2.8.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.core.runtime import Runtime

EPSILON = 1e-5
VIEW_DRAWS = 24


class _MeanOverWorkers(torch.autograd.Function):
    """Mean over workers, forwards and backwards: with gradients averaged over workers afterwards, the loss of all
    workers' images has the gradient that one process would give it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runtime: Runtime) -> Tensor:  # type: ignore[override]
        ctx.runtime = runtime
        return runtime.all_reduce(x.detach().clone()) / runtime.world_size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.runtime.all_reduce(gradient.clone()) / ctx.runtime.world_size, None


class BarlowTwinsLoss:
    """sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2, C the correlation of the two embeddings' features.

    Statistics and C are those of all workers' images.

    Args:
        lambda_: weight of the off-diagonal terms.
        normalize: divide by the number of features.
        runtime: whose workers share the batch; None: this process alone.

    Attributes:
        constant_features: how many features of the last call did not vary over the batch.

    Example::

        loss = BarlowTwinsLoss()(network.embed(first_view), network.embed(second_view))
    """

    def __init__(self, lambda_: float = 5e-3, normalize: bool = False, runtime: Runtime | None = None) -> None:
        self.lambda_, self.normalize = lambda_, normalize
        self.runtime = runtime
        self.constant_features = torch.zeros((), dtype=torch.int64)

    def __call__(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Embeddings (N, D) of the two views -> scalar.

        Raises:
            ValueError: fewer than two images, over which nothing can be standardised.
        """
        if len(z1) < 2:
            raise ValueError(f"the Barlow Twins loss needs at least 2 images on a worker, got {len(z1)}")
        z1, z2 = z1.float(), z2.float()
        features = z1.shape[1]
        means = self._mean(torch.stack([z1.mean(0), z2.mean(0)]))
        z1, z2 = z1 - means[0], z2 - means[1]
        squares = torch.stack([z1.square().mean(0), z2.square().mean(0)])
        moments = self._mean(torch.cat([squares, z1.T @ z2 / len(z1)]))
        self.constant_features = (moments[:2].detach() < EPSILON**2).sum()
        deviation = (moments[:2] + EPSILON**2).sqrt()
        correlation = moments[2:] / torch.outer(deviation[0], deviation[1])
        diagonal = correlation.diagonal()
        off_diagonal = correlation.square().sum() - diagonal.square().sum()
        loss = (1 - diagonal).square().sum() + self.lambda_ * off_diagonal
        return loss / features if self.normalize else loss

    def _mean(self, x: Tensor) -> Tensor:
        if self.runtime is None or self.runtime.world_size == 1:
            return x
        mean: Tensor = _MeanOverWorkers.apply(x, self.runtime)
        return mean


class MixedSelfSupervisedLoss:
    """ss_factor * L_BT + (1 - ss_factor) * L_CE, the cross-entropy averaged over the two views.

    Raises:
        ValueError: ss_factor outside [0, 1]; below 1 without labels, when called.
    """

    def __init__(self, ss_factor: float, barlow: BarlowTwinsLoss) -> None:
        if not 0 <= ss_factor <= 1:
            raise ValueError(f"ss_factor = {ss_factor} must be from 0 (labels only) to 1 (no labels)")
        self.ss_factor, self.barlow = ss_factor, barlow

    def __call__(self, outputs: list[tuple[Tensor, Tensor]], labels: Tensor | None) -> Tensor:
        """
        Args:
            outputs: logits and embeddings of the views: two, or one where ss_factor is 0.
            labels: int64 (N,); None for images without labels.
        """
        loss: Tensor | float = 0.0
        if self.ss_factor > 0:
            loss = self.ss_factor * self.barlow(outputs[0][1], outputs[1][1])
        if self.ss_factor < 1:
            if labels is None:
                raise ValueError(f"ss_factor = {self.ss_factor} needs labels; only ss_factor = 1 does without")
            entropy = torch.stack([F.cross_entropy(logits.float(), labels) for logits, _ in outputs]).mean()
            loss = loss + (1 - self.ss_factor) * entropy
        assert isinstance(loss, Tensor)
        return loss


def distort(images: Tensor, draws: Tensor) -> Tensor:
    """One distorted view of a batch: crop (padding of an eighth), flip 0.5, perspective 0.3 p 0.5, colour jitter
    (0.4, 0.4, 0.2, 0.1) p 0.8, greyscale p 0.2, erasing 2 to 20 % of the area p 0.5.

    Args:
        images: float (B, C, H, W) in [0, 1]; C is 1 or 3.
        draws: float (B, VIEW_DRAWS) uniform in [0, 1); an image's view is a function of its own row.
    """
    u = draws.to(images.dtype).unbind(1)
    images = _warp(images, u[:12])
    if images.shape[1] == 3:
        images = _jitter(images, u[12:18])
        grey = _grey(images).expand(-1, 3, -1, -1)
        images = torch.where((u[18] < 0.2)[:, None, None, None], grey, images)
    else:
        images = _jitter_grey(images, u[12:15])
    return _erase(images, u[19:24])


def _warp(images: Tensor, u: tuple[Tensor, ...]) -> Tensor:
    """Crop, flip and perspective in one bilinear sampling."""
    height, width = images.shape[2:]
    padding = max(1, height // 8)
    corner_draws = torch.stack(u[4:12], 1).view(-1, 4, 2)
    chosen = (u[3] < 0.5)[:, None, None]
    base = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]], device=images.device, dtype=images.dtype)
    # Every corner moves inwards by up to 0.3 of half a side, as in torchvision's RandomPerspective.
    corners = base * (1 - 0.3 * torch.where(chosen, corner_draws, torch.zeros_like(corner_draws)))
    ys = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype) * (1 - 1 / height)
    xs = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype) * (1 - 1 / width)
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)  # (H, W, 2)
    matrix = _homography(corners, base)
    points = torch.cat([grid, torch.ones_like(grid[..., :1])], -1).view(1, -1, 3) @ matrix.transpose(1, 2)
    points = points[..., :2] / points[..., 2:].clamp(min=1e-3)
    sign = torch.where(u[0] < 0.5, -1.0, 1.0)
    # Whole pixels, so that a crop alone does not blur.
    across = ((u[1] * (2 * padding + 1)).floor() - padding) * (2 / width)
    down = ((u[2] * (2 * padding + 1)).floor() - padding) * (2 / height)
    points = torch.stack([points[..., 0] * sign[:, None] + across[:, None], points[..., 1] + down[:, None]], -1)
    return F.grid_sample(images, points.view(-1, height, width, 2), align_corners=False)


def _homography(source: Tensor, target: Tensor) -> Tensor:
    """(B, 3, 3) projective maps that take the corners `source` (B, 4, 2) to `target` (4, 2)."""
    x, y = source.unbind(-1)
    tx, ty = target.unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    tx, ty = tx.expand_as(x), ty.expand_as(y)
    rows_x = torch.stack([x, y, one, zero, zero, zero, -tx * x, -tx * y], -1)
    rows_y = torch.stack([zero, zero, zero, x, y, one, -ty * x, -ty * y], -1)
    solved = torch.linalg.solve(torch.cat([rows_x, rows_y], 1), torch.cat([tx, ty], 1))
    return torch.cat([solved, torch.ones_like(solved[:, :1])], 1).view(-1, 3, 3)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _factor(u: Tensor, chosen: Tensor, strength: float) -> Tensor:
    return torch.where(chosen, 1 + strength * (2 * u - 1), torch.ones_like(u))[:, None, None, None]


def _jitter(images: Tensor, u: tuple[Tensor, ...]) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order."""
    chosen = u[0] < 0.8
    images = (images * _factor(u[1], chosen, 0.4)).clamp(0, 1)
    mean = _grey(images).mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * _factor(u[2], chosen, 0.4)).clamp(0, 1)
    grey = _grey(images)
    images = (grey + (images - grey) * _factor(u[3], chosen, 0.2)).clamp(0, 1)
    # Hue turns the chroma plane of YIQ.
    angle = torch.where(chosen, 0.1 * (2 * u[4] - 1), torch.zeros_like(u[4])) * (2 * math.pi)
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


def _jitter_grey(images: Tensor, u: tuple[Tensor, ...]) -> Tensor:
    chosen = u[0] < 0.8
    images = (images * _factor(u[1], chosen, 0.4)).clamp(0, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    return (mean + (images - mean) * _factor(u[2], chosen, 0.4)).clamp(0, 1)


def _erase(images: Tensor, u: tuple[Tensor, ...]) -> Tensor:
    height, width = images.shape[2:]
    area = (0.02 + 0.18 * u[1]) * height * width
    ratio = (math.log(3.3) * (2 * u[2] - 1)).exp()
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (u[3] * (height - tall + 1)).floor(), (u[4] * (width - wide + 1)).floor()
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    inside = inside_rows[:, :, None] & inside_columns[:, None, :] & (u[0] < 0.5)[:, None, None]
    return images.masked_fill(inside[:, None], 0.0)
