"""Views of images for self-supervised tasks; each view is a function of the image and its own uniform draws.

Two recipes: "digits" (spec initial_pools_active_learning section 8; nothing that changes which digit it is) and
"photos" (sections 2.2 c, e and 3). Images are float (B, C, H, W) in [0, 1], C 1 or 3;
what needs colour is left out for C = 1.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from dataeff.data.distortions import (
    JitterStrength,
    affine,
    blur,
    fill_boxes,
    greyscale,
    jitter_colour,
    jitter_grey,
)

Recipe = Literal["digits", "photos"]

CONTRAST_DRAWS = 16
WEAK_DRAWS = 3
RAND_OPERATIONS = 4
STRONG_DRAWS = WEAK_DRAWS + 2 * RAND_OPERATIONS + 2
SCORE_DRAWS = 8

DIGITS_JITTER: JitterStrength = (0.4, 0.4, 0.0, 0.0)
PHOTOS_JITTER: JitterStrength = (0.8, 0.8, 0.8, 0.2)


def contrast_view(images: Tensor, draws: Tensor, recipe: Recipe) -> Tensor:
    """One of the two views that SimCLR compares.

    digits: shift by up to a pixel, turn by up to 20 degrees, scale by up to 25 %, jitter, blur of at most 0.8 pixels
    with p 0.5 (2 pixels, as for photos, wipe a digit of 8x8 out: k-means is then right for fewer images).
    photos: a crop of 20 to 100 % of the area, scaled back; mirror 0.5; colour jitter (0.8, 0.8, 0.8, 0.2) p 0.8; grey
    p 0.2; blur of at most 2 pixels p 0.5.

    Args:
        draws: (B, CONTRAST_DRAWS).
    """
    u = draws.to(images.dtype).unbind(1)
    if recipe == "digits":
        images = affine(images, _turn_and_scale(u[:5], images.shape[2], images.shape[3]))
        images = _jitter(images, u[5:10], DIGITS_JITTER, 0.8)
    else:
        images = affine(images, _resized_crop(u[:5]))
        images = _jitter(images, u[5:10], PHOTOS_JITTER, 0.8)
        if images.shape[1] == 3:
            images = _where(u[10] < 0.2, greyscale(images).expand_as(images), images)
    reach = 0.7 if recipe == "digits" else 1.9
    return _where(u[11] < 0.5, blur(images, 0.1 + reach * u[12]), images)


def weak_view(images: Tensor, draws: Tensor, recipe: Recipe) -> Tensor:
    """A shift by whole pixels (digits: 1; photos: an eighth of the side), and for photos a mirror with p 0.5.

    Args:
        draws: (B, WEAK_DRAWS).
    """
    u = draws.to(images.dtype).unbind(1)
    height, width = images.shape[2:]
    reach = 1 if recipe == "digits" else max(1, height // 8)
    mirrored = u[2] < 0.5 if recipe == "photos" else torch.zeros_like(u[2], dtype=torch.bool)
    sign = torch.where(mirrored, -1.0, 1.0).to(images.dtype)
    across = ((u[0] * (2 * reach + 1)).floor() - reach) * (2 / width)
    down = ((u[1] * (2 * reach + 1)).floor() - reach) * (2 / height)
    zero, one = torch.zeros_like(sign), torch.ones_like(sign)
    return affine(images, _rows((sign, zero, across), (zero, one, down)))


def strong_view(images: Tensor, draws: Tensor, recipe: Recipe) -> Tensor:
    """SCAN's strong augmentation: the weak view, four random operations of RandAugment, cutout of half the side.

    Args:
        draws: (B, STRONG_DRAWS).
    """
    images = weak_view(images, draws[:, :WEAK_DRAWS], recipe)
    u = draws[:, WEAK_DRAWS:].to(images.dtype)
    for k in range(RAND_OPERATIONS):
        which = (u[:, 2 * k] * len(_OPERATIONS)).long()
        done = images.clone()
        for number, operation in enumerate(_OPERATIONS):
            members = which == number
            if bool(members.any()):
                done[members] = operation(images[members], u[members, 2 * k + 1])
        images = done
    height, width = images.shape[2:]
    side = torch.full_like(u[:, 0], min(height, width) // 2)  # 16 for 32 pixels
    top = (u[:, -2] * height).floor() - (side / 2).floor()
    left = (u[:, -1] * width).floor() - (side / 2).floor()
    return fill_boxes(images, top, left, side, side)


def score_copies(images: Tensor, draws: Tensor, recipe: Recipe) -> list[Tensor]:
    """The augmented copies that SimCLR's score compares an image with, one an augmentation, each applied for certain.

    digits: blur, jitter, shift. photos: mirror, blur, jitter and, for C = 3, grey. Blur has a deviation from 0.1 to 2
    pixels, jitter the strength (0.8, 0.8, 0.8, 0.2).

    Args:
        draws: (B, SCORE_DRAWS).
    """
    u = draws.to(images.dtype).unbind(1)
    blurred = blur(images, 0.1 + 1.9 * u[0])
    jittered = _jitter(images, u[1:6], PHOTOS_JITTER, 1.0)
    if recipe == "digits":
        return [blurred, jittered, weak_view(images, torch.stack([u[6], u[7], u[0]], 1), recipe)]
    grey = [greyscale(images).expand_as(images)] if images.shape[1] == 3 else []
    return [images.flip(-1), blurred, jittered, *grey]


def rotations(images: Tensor) -> Tensor:
    """The four quarter turns of square images, (4 B, C, H, W): first all of 0 degrees, then all of 90, 180, 270."""
    return torch.cat([images, *(torch.rot90(images, k, (2, 3)) for k in (1, 2, 3))])


def _jitter(images: Tensor, u: tuple[Tensor, ...], strength: JitterStrength, probability: float) -> Tensor:
    if images.shape[1] == 3:
        return jitter_colour(images, u, strength, probability)
    return jitter_grey(images, u, strength, probability)


def _where(chosen: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], changed, images)


def _rows(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([torch.stack(first, 1), torch.stack(second, 1)], 1)


def _turn_and_scale(u: tuple[Tensor, ...], height: int, width: int) -> Tensor:
    angle = (2 * u[0] - 1) * math.radians(20)
    scale = 1 / (1 + 0.25 * (2 * u[1] - 1))
    cos, sin = scale * angle.cos(), scale * angle.sin()
    across, down = (2 * u[2] - 1) * (2 / width), (2 * u[3] - 1) * (2 / height)
    return _rows((cos, -sin * height / width, across), (sin * width / height, cos, down))


def _resized_crop(u: tuple[Tensor, ...]) -> Tensor:
    area, ratio = 0.2 + 0.8 * u[0], ((2 * u[1] - 1) * math.log(4 / 3) / 2).exp()
    wide, tall = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
    across, down = (1 - wide) * (2 * u[2] - 1), (1 - tall) * (2 * u[3] - 1)
    sign = torch.where(u[4] < 0.5, -1.0, 1.0).to(wide.dtype)
    zero = torch.zeros_like(wide)
    return _rows((wide * sign, zero, across), (zero, tall, down))


def _geometric(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Rotation by up to 30 degrees; shear and translation by up to a tenth."""

    def apply(images: Tensor, u: Tensor) -> Tensor:
        zero, one, amount = torch.zeros_like(u), torch.ones_like(u), 2 * u - 1
        height, width = images.shape[2:]
        if kind == "rotate":
            cos, sin = (amount * math.radians(30)).cos(), (amount * math.radians(30)).sin()
            return affine(images, _rows((cos, -sin * height / width, zero), (sin * width / height, cos, zero)))
        x_shear, y_shear = (0.1 * amount * (kind == name) for name in ("shear_x", "shear_y"))
        across, down = (0.2 * amount * (kind == name) for name in ("translate_x", "translate_y"))
        return affine(images, _rows((one, x_shear, across), (y_shear, one, down)))

    return apply


def _blend(other: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Between `other` and the image, with a factor from 0.05 to 0.95."""

    def apply(images: Tensor, u: Tensor) -> Tensor:
        plain = other(images)
        return (plain + (images - plain) * (0.05 + 0.9 * u)[:, None, None, None]).clamp(0, 1)

    return apply


def _mean_grey(images: Tensor) -> Tensor:
    grey = greyscale(images) if images.shape[1] == 3 else images
    return grey.mean((1, 2, 3), keepdim=True).expand_as(images)


def _colourless(images: Tensor) -> Tensor:
    return greyscale(images).expand_as(images) if images.shape[1] == 3 else images


def _posterize(images: Tensor, u: Tensor) -> Tensor:
    step = 2.0 ** (4 - (u * 5).floor())[:, None, None, None]  # 4 to 8 bits are left
    return ((images * 255 / step).floor() * step) / 255


# The operations and ranges of the code base that the source names (spec section 2.2 e).
_OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda images, u: images,
    lambda images, u: TF.autocontrast(images),
    lambda images, u: TF.equalize(images),
    _geometric("rotate"),
    lambda images, u: torch.where(images < u[:, None, None, None], images, 1 - images),
    _blend(_colourless),
    _blend(_mean_grey),
    _blend(torch.zeros_like),
    _blend(lambda images: TF.adjust_sharpness(images, 0.0)),
    _geometric("shear_x"),
    _geometric("shear_y"),
    _geometric("translate_x"),
    _geometric("translate_y"),
    _posterize,
)
