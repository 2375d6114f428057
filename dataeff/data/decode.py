"""Encoded image bytes to uint8 tensors.

PNG and JPEG go through torchvision's decoder, which is 2 to 3 times as fast as Pillow on small images and gives the
same pixels; everything else, and whatever that decoder refuses, goes through Pillow, so that training sees exactly what
a server sees that opens the same file with Pillow.
"""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

MAX_PIXELS = 89_478_485  # Pillow's own warning threshold against decompression bombs: 256 MiB of RGB


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names the file and row once a record set has added them."""


def decode(blob: Tensor, channels: int) -> Tensor:
    """Decode one image.

    Args:
        blob: the encoded file, uint8 [n].
        channels: 1 (luma, as Pillow's mode L) or 3 (RGB; an alpha channel is dropped).

    Returns:
        uint8 [channels, H, W].

    Raises:
        BadImageError: corrupt, truncated, not an image, or more than `MAX_PIXELS` pixels.
    """
    from torchvision.io import ImageReadMode, decode_image  # seconds to import

    pixels = _declared_pixels(blob)
    if pixels is not None:
        _refuse_bomb(pixels)
        image: Tensor | None = None
        with suppress(RuntimeError):  # damaged, or a variant that only Pillow reads: Pillow decides
            image = decode_image(
                blob, ImageReadMode.RGB if channels == 3 or _is_palette(blob) else ImageReadMode.UNCHANGED
            )
        if image is not None and image.dtype == torch.uint8:
            if image.shape[0] == channels:
                return image
            if channels == 1 and image.shape[0] == 3:
                return _luma(image)
    return pil_to_tensor(open_pil(blob), channels)


def open_pil(blob: Tensor) -> Image.Image:
    """Open encoded bytes with Pillow; only the header is read here.

    Raises:
        BadImageError: not an image, or more than `MAX_PIXELS` pixels.
    """
    if not len(blob):
        raise BadImageError("is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(blob.numpy().tobytes()))
    except Image.DecompressionBombError:
        raise BadImageError(f"has more than {MAX_PIXELS:,} pixels (decompression bomb)") from None
    except Exception as error:  # Pillow's plugins raise whatever they meet in a damaged header
        raise BadImageError(f"is not a readable image ({_first_line(error)})") from None
    _refuse_bomb(image.width * image.height)
    return image


def pil_to_tensor(image: Image.Image, channels: int) -> Tensor:
    """Convert a Pillow image of any mode to uint8 [channels, H, W]; 16-bit greys keep their upper 8 bits.

    Raises:
        BadImageError: its pixels cannot be decoded.
    """
    try:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        array = np.array(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # as above, for damaged pixel data
        raise BadImageError(f"is corrupt or truncated ({_first_line(error)})") from None
    return torch.from_numpy(array)[None] if channels == 1 else torch.from_numpy(array).permute(2, 0, 1)


def natural_channels(image: Image.Image) -> int:
    """1 for a grey image, 3 for any other."""
    return 1 if image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I") else 3


def fit_to_size(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale so that the image just covers `size`, keeping its aspect ratio, then cut the centre out.

    Args:
        images: uint8 [..., C, H, W].
        size: (height, width) wanted.
    """
    height, width = images.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    if scaled != (height, width):
        batch = images.reshape(-1, *images.shape[-3:])
        resized = functional.interpolate(batch, size=scaled, mode="bilinear", antialias=True, align_corners=False)
        images = resized.reshape(*images.shape[:-2], *scaled)
    return centre_crop(images, size)


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The central `size` = (height, width) of [..., H, W]."""
    top, left = (images.shape[-2] - size[0]) // 2, (images.shape[-1] - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]


def _luma(rgb: Tensor) -> Tensor:
    # Pillow's integer ITU-R 601 weights; libjpeg's own grey output rounds differently.
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)
    return (((rgb.to(torch.int32) * weights).sum(0, keepdim=True) + 0x8000) >> 16).to(torch.uint8)


def _is_palette(blob: Tensor) -> bool:
    # The colour type of a PNG header; undecoded, the pixels of such a file are palette indices that look like greys.
    return len(blob) > 25 and bytes(blob[1:4].tolist()) == b"PNG" and int(blob[25]) == 3


def _refuse_bomb(pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise BadImageError(f"has {pixels:,} pixels, more than the {MAX_PIXELS:,} allowed (decompression bomb)")


def _declared_pixels(blob: Tensor) -> int | None:
    """Height times width from a PNG or JPEG header, read without decoding; None for anything else."""
    data = memoryview(blob.numpy())  # type: ignore[arg-type]
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return int.from_bytes(data[16:20]) * int.from_bytes(data[20:24])
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 9 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[position + 5 : position + 7]) * int.from_bytes(data[position + 7 : position + 9])
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return None


def _first_line(error: Exception) -> str:
    # Pillow's message for unknown data names a BytesIO object, which tells a user nothing.
    return "unknown format" if "BytesIO" in str(error) else (str(error).splitlines() or [type(error).__name__])[0]
