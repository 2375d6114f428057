"""Barlow Twins as a search loss, its mixture with cross-entropy, and the two distorted views.

Source: spec ss_pcp_darts section 2.8.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.core.runtime import Runtime
from dataeff.data.distortions import fill_boxes, greyscale, jitter_colour, jitter_grey
from dataeff.nn.workers import mean_over_workers

EPSILON = 1e-5
VIEW_DRAWS = 24
JITTER = (0.4, 0.4, 0.2, 0.1)


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
        means = mean_over_workers(torch.stack([z1.mean(0), z2.mean(0)]), self.runtime)
        z1, z2 = z1 - means[0], z2 - means[1]
        squares = torch.stack([z1.square().mean(0), z2.square().mean(0)])
        moments = mean_over_workers(torch.cat([squares, z1.T @ z2 / len(z1)]), self.runtime)
        self.constant_features = (moments[:2].detach() < EPSILON**2).sum()
        deviation = (moments[:2] + EPSILON**2).sqrt()
        correlation = moments[2:] / torch.outer(deviation[0], deviation[1])
        diagonal = correlation.diagonal()
        off_diagonal = correlation.square().sum() - diagonal.square().sum()
        loss = (1 - diagonal).square().sum() + self.lambda_ * off_diagonal
        return loss / features if self.normalize else loss


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
        images = jitter_colour(images, u[12:17], JITTER)
        grey = greyscale(images).expand(-1, 3, -1, -1)
        images = torch.where((u[18] < 0.2)[:, None, None, None], grey, images)
    else:
        images = jitter_grey(images, u[12:15], JITTER)
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


def _erase(images: Tensor, u: tuple[Tensor, ...]) -> Tensor:
    height, width = images.shape[2:]
    area = (0.02 + 0.18 * u[1]) * height * width
    ratio = (math.log(3.3) * (2 * u[2] - 1)).exp()
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (u[3] * (height - tall + 1)).floor(), (u[4] * (width - wide + 1)).floor()
    return fill_boxes(images, top, left, torch.where(u[0] < 0.5, tall, 0), wide)
