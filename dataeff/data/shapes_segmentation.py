"""Rendered shapes with a class for every pixel: the smallest data that a segmentation network can be tried on."""

import numpy as np
import torch
from torch import Tensor

from dataeff.data.transforms import uniform_draws

SHAPES = ("background", "disc", "square", "triangle", "ring")
IGNORE = 255
SHAPES_PER_IMAGE = 3
NOISE = 0.1


class ShapesSegmentation:
    """Up to three overlapping shapes of random place, size and colour on a noisy background (spec deepmoe section 8.2).

    An image is a pure function of (seed, index); pixels on the border of a shape are `IGNORE`.

    Args:
        count: images.
        size: of a side, at least 16 pixels.
        seed: of all of them.

    Example:
        images, labels = ShapesSegmentation(100).batch([0, 1, 2])
    """

    classes = SHAPES

    def __init__(self, count: int, size: int = 64, seed: int = 0):
        if count < 1 or size < 16:
            raise ValueError(f"needs at least 1 image of at least 16 pixels, got {count} of {size}")
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Images float32 (n, 3, size, size) around 0, and labels int64 (n, size, size)."""
        if indices and not 0 <= min(indices) <= max(indices) < self.count:
            raise IndexError(f"images are numbered 0 to {self.count - 1}, got {min(indices)} to {max(indices)}")
        pairs = [self._render(index) for index in indices]
        return torch.stack([image for image, _ in pairs]), torch.stack([labels for _, labels in pairs])

    def _render(self, index: int) -> tuple[Tensor, Tensor]:
        size = self.size
        draws = uniform_draws(self.seed, 0, [index], 7 * SHAPES_PER_IMAGE + 1)[0]
        noise = uniform_draws(self.seed, 1, [index], 3 * size * size)[0].reshape(3, size, size)
        image = NOISE * (2 * noise - 1)
        labels = np.zeros((size, size), dtype=np.int64)
        y, x = np.mgrid[:size, :size] + 0.5
        for shape in draws[1:].reshape(SHAPES_PER_IMAGE, 7)[: 1 + int(SHAPES_PER_IMAGE * draws[0])]:
            kind = 1 + int(shape[0] * (len(SHAPES) - 1))
            radius = size * (0.12 + 0.13 * shape[1])
            centre = radius + shape[2:4] * (size - 2 * radius)
            distance = _signed_distance(kind, y - centre[0], x - centre[1], radius)
            image = np.where(distance <= 0, shape[4:7].reshape(3, 1, 1) * 2 - 1 + image, image)
            labels = np.where(distance <= 0, kind, labels)
            labels = np.where(np.abs(distance) <= 0.5, IGNORE, labels)
        return torch.from_numpy(image).float(), torch.from_numpy(labels)


def _signed_distance(kind: int, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """About how many pixels a place is outside the shape; negative inside."""
    from_centre = np.hypot(y, x)
    distances: dict[str, np.ndarray] = {
        "disc": from_centre - radius,
        "square": np.maximum(np.abs(y), np.abs(x)) - 0.8 * radius,
        "triangle": np.maximum(y - 0.7 * radius, 0.866 * np.abs(x) - 0.5 * y - 0.6 * radius),
        "ring": np.abs(from_centre - 0.75 * radius) - 0.25 * radius,
    }
    return distances[SHAPES[kind]]
