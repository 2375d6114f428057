"""Preprocessing (fixed, stored with the model) and augmentation (random, a pure function of seed, epoch and image)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from dataeff.core.config import Config, parse_config
from dataeff.data.decode import centre_crop, fit_to_size, pil_to_tensor
from dataeff.data.sources import ImageSource
from dataeff.data.subsets import IntArray

_FIT_IMAGES = 5000


class Preprocess(Config):
    """uint8 images to a network's input: centre crop, then (x / 255 - mean) / std for each channel.

    Example::

        preprocess = Preprocess.fit(splits.train)
        inputs = preprocess(splits.train.images([0, 1]))      # float32 [2, C, H, W]
        same = preprocess.from_pil([image, image])            # from a client's images
    """

    channels: Literal[1, 3] = Field(description="1 (grey) or 3 (RGB)")
    size: tuple[int, int] = Field(description="height and width of the network's input, pixels")
    resize: tuple[int, int] | None = Field(
        None, description="height and width that foreign images are brought to before the centre crop; none: `size`"
    )
    mean: tuple[float, ...] = Field(description="of each channel, on the scale 0..1")
    std: tuple[float, ...] = Field(description="of each channel, on the scale 0..1; above 0")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values, got {len(self.mean)} and {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std = {self.std} must be above 0")
        if min(self.size) < 1 or (self.resize is not None and min(np.subtract(self.resize, self.size)) < 0):
            raise ValueError(f"size = {self.size} must be at least 1x1 and at most resize = {self.resize}")
        return self

    @classmethod
    def fit(cls, source: ImageSource, size: tuple[int, int] | None = None) -> Preprocess:
        """Mean and standard deviation of up to 5,000 evenly spaced images of the training split.

        Args:
            size: (height, width) of the network's input, at most the images' own (the default); a smaller one is cut
                from the centre, as ImageNet networks do (images of 256, input of 224).

        Raises:
            ValueError: an empty split, or a size above the images'.
        """
        if not len(source):
            raise ValueError("cannot fit the preprocessing: the split has no images")
        channels, height, width = source.image_shape
        rows = np.unique(np.linspace(0, len(source) - 1, min(len(source), _FIT_IMAGES)).astype(np.int64))
        sums = torch.zeros(2, channels, dtype=torch.float64)
        for part in np.array_split(rows, -(-len(rows) // 250)):
            pixels = source.images(part).to(torch.float64) / 255
            sums += torch.stack([pixels.mean((0, 2, 3)), pixels.square().mean((0, 2, 3))]) * len(part)
        mean, square = sums / len(rows)
        std = (square - mean.square()).clamp(min=0).sqrt()
        return parse_config(
            cls,
            {
                "channels": channels,
                "size": size or (height, width),
                "resize": (height, width) if size and tuple(size) != (height, width) else None,
                "mean": mean.tolist(),
                "std": torch.where(std > 1e-6, std, 1.0).tolist(),  # a constant channel carries nothing to scale
            },
            "preprocess",
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch, on its own device.

        Args:
            images: uint8 [B, C, H, W] with H, W at least `size`.

        Returns:
            float32 [B, C, *size].

        Raises:
            ValueError: another shape or dtype.
        """
        if images.ndim != 4 or images.shape[1] != self.channels or images.dtype != torch.uint8:
            raise ValueError(
                f"expected uint8 images [B, {self.channels}, H, W], got {images.dtype} {list(images.shape)}"
            )
        if images.shape[2] < self.size[0] or images.shape[3] < self.size[1]:
            raise ValueError(f"images are {list(images.shape[2:])}, smaller than the input size {list(self.size)}")
        shape = (1, self.channels, 1, 1)
        mean = torch.tensor(self.mean, dtype=torch.float32, device=images.device).view(shape) * 255
        scale = 1 / (torch.tensor(self.std, dtype=torch.float32, device=images.device).view(shape) * 255)
        return centre_crop(images, self.size).sub(mean).mul_(scale)

    def from_pil(self, images: Sequence[Image.Image]) -> Tensor:
        """Prepare Pillow images of any mode and size: the training path for images of the training size.

        Other sizes are scaled to cover `resize` (or `size`) and cut to it at the centre.

        Returns:
            float32 [B, C, *size].

        Raises:
            BadImageError: an image whose pixels cannot be decoded.
        """
        target = self.resize or self.size
        tensors = [fit_to_size(pil_to_tensor(image, self.channels), target) for image in images]
        empty = torch.empty(0, self.channels, *target, dtype=torch.uint8)
        return self(torch.stack(tensors) if tensors else empty)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a card or a YAML file."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`.

        Raises:
            ValueError: one line naming each wrong or unknown key.
        """
        return parse_config(cls, values, "preprocess")


AugmentKind = Literal["none", "shift", "shift_flip", "imagenet"]


class Augment(Config):
    """Random changes of training images, before `Preprocess`.

    - `none`
    - `shift`: pad with zeros, cut a random window of the original size.
    - `shift_flip`: the same, then mirror with probability 1/2 (the CIFAR recipe).
    - `imagenet`: a random window of 8 to 100 % of the area and aspect ratio 3/4 to 4/3, scaled to the network's input,
      then mirrored with probability 1/2. A window that leaves the image is cut to it.

    Every kind takes a fixed number of uniform draws an image (`draws`), so that an image's draws never depend on its
    neighbours.
    """

    kind: AugmentKind = Field("none", description="which recipe")
    padding: int | None = Field(
        None, ge=1, le=64, description="pixels a side, for the shifts; none: an eighth of the height (4 at 32 pixels)"
    )

    def __init__(self, kind: AugmentKind = "none", padding: int | None = None) -> None:
        super().__init__(kind=kind, padding=padding)  # type: ignore[call-arg]

    @property
    def draws(self) -> int:
        """Uniform draws an image."""
        return {"none": 0, "shift": 2, "shift_flip": 3, "imagenet": 5}[self.kind]

    def __call__(self, images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
        """Augment a batch.

        Args:
            images: uint8 [B, C, H, W].
            draws: float64 [B, `draws`] in [0, 1).
            size: (height, width) of the network's input, which `imagenet` scales to.

        Returns:
            uint8 [B, C, H, W]; for `imagenet` [B, C, *size].
        """
        if self.kind == "none":
            return images
        if self.kind == "imagenet":
            return torch.stack(
                [_random_resized(image, d, size) for image, d in zip(images, draws.tolist(), strict=True)]
            )
        padding = self.padding or max(1, images.shape[2] // 8)
        flip = draws[:, 2] < 0.5 if self.kind == "shift_flip" else torch.zeros(len(images), dtype=torch.bool)
        top, left = (draws[:, :2] * (2 * padding + 1)).long().unbind(1)
        return _shift(images, padding, top, left, flip)


def uniform_draws(
    seed: int, epochs: int | IntArray, indices: Sequence[int] | IntArray, count: int, stream: int = 0
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) that depend on nothing but (seed, stream, epoch, index, position).

    A counter-based generator: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014) over a hash of the key, with 53
    random bits a number.

    Args:
        epochs: one for all, or int64 [B].
        indices: which images, int64 [B].
        count: numbers an image.
        stream: keeps different uses of one (seed, epoch, index) apart; augmentation uses 0.

    Returns:
        float64 [B, count].
    """
    key = np.zeros(len(indices), dtype=np.uint64)
    for part in (seed, stream, epochs, indices):
        key = _mix(key ^ np.asarray(part).astype(np.uint64))
    bits = _mix(key[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shift(images: Tensor, padding: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    count, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    rows = top[:, None] + torch.arange(height)
    columns = torch.arange(width)
    columns = left[:, None] + torch.where(flip[:, None], columns.flip(0), columns)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    pixels = pixels.view(count, 1, -1).expand(-1, channels, -1)
    return padded.view(count, channels, -1).gather(2, pixels).view_as(images)


def _random_resized(image: Tensor, draws: Sequence[float], size: tuple[int, int]) -> Tensor:
    _, height, width = image.shape
    area = height * width * (0.08 + 0.92 * draws[0])
    ratio = (4 / 3) ** (2 * draws[1] - 1)
    window_height = min(height, max(1, round((area / ratio) ** 0.5)))
    window_width = min(width, max(1, round((area * ratio) ** 0.5)))
    top = int(draws[2] * (height - window_height + 1))
    left = int(draws[3] * (width - window_width + 1))
    window = image[None, :, top : top + window_height, left : left + window_width]
    scaled = functional.interpolate(window, size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    return scaled.flip(-1) if draws[4] < 0.5 else scaled
