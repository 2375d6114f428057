"""Data sets drawn from the fonts that come with matplotlib: letters and digits, the same on every machine."""

from __future__ import annotations

import string
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dataeff.data.embedded import array_store, content_of, to_uint8
from dataeff.data.sources import RawData, RawSplit
from dataeff.data.spec import DataSpec

SIZE = 16
PER_CLASS = {"train": 60, "test": 30}
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic",
)  # fmt: skip


def open_letters(spec: DataSpec) -> RawData:
    """`letters`: the 26 capital letters, 16x16 grey, in eight DejaVu fonts (spec adaskips section 8).

    Each image is drawn on its own: font, rotation within 15 degrees, shift within 1.5 pixels, Gaussian noise of
    standard deviation 0.1 (of the 0..1 range). 60 training and 30 test images a class; `seed` draws them.
    """
    return _draw_all(spec.seed, "letters", tuple(string.ascii_uppercase))


def open_rendered_digits(spec: DataSpec) -> RawData:
    """`rendered-digits`: the ten digits, drawn like `letters`; a domain beside the handwritten ones of `digits`."""
    return _draw_all(spec.seed, "rendered-digits", tuple(string.digits))


@lru_cache(4)  # drawing takes a second, and a sweep opens its data for every trial
def _draw_all(seed: int, name: str, characters: tuple[str, ...]) -> RawData:
    splits = {}
    for number, (split, per_class) in enumerate(PER_CLASS.items()):
        labels = np.repeat(np.arange(len(characters), dtype=np.int64), per_class)
        rng = np.random.default_rng((seed, number))
        images = np.stack([_draw(characters[label], rng) for label in labels])
        splits[split] = RawSplit(array_store(to_uint8(images), f"{name} {split}"), labels)
    train, test = splits["train"], splits["test"]
    return RawData(characters, train, None, test, content_of(train, test))


def _draw(character: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """One image, float64 (16, 16) in 0..1: drawn at four times the size, turned, shifted and scaled down."""
    canvas = Image.new("L", (4 * SIZE, 4 * SIZE))
    offset = rng.uniform(-6, 6, 2)
    font = _font(FONTS[rng.integers(len(FONTS))])
    place = (2 * SIZE + offset[0], 2 * SIZE + offset[1])
    ImageDraw.Draw(canvas).text(place, character, 255, font, anchor="mm")
    turned = canvas.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
    pixels = np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.BOX), np.float64) / 255
    return pixels + rng.normal(0, 0.1, pixels.shape)


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), 3 * SIZE)
