"""A tiny predictor with blocks that it skips, for tests of serving; no training, no artifact."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from dataeff.core.artifact import Card, Prediction

CLASSES = ["circle", "square", "star", "tree", "zebra", "other"]
POISON = 1e6  # a preprocessed image that starts with this value makes the predictor fail
BASE_MACS, BLOCK_MACS, BLOCKS = 1000.0, 100.0, 3
FULL_MACS = BASE_MACS + BLOCKS * BLOCK_MACS


@dataclass
class FakePredictor:
    """Fixed random weights; block i runs if the image is bright enough for it and the budget has room."""

    seconds: float = 0.0  # time that each batch takes
    input_shape: tuple[int, int, int] = (3, 8, 8)
    path_names: list[str] = field(default_factory=lambda: [f"block {i + 1}" for i in range(BLOCKS)])
    card: Card = field(init=False)

    def __post_init__(self) -> None:
        self.card = Card(
            method="fake",
            classes=CLASSES,
            input_shape=self.input_shape,
            preprocess={},
            metrics={"accuracy": 0.9},
            cost={"macs": 1100.0, "full_macs": FULL_MACS, "params": 10.0},
            data={"name": "<none>", "fingerprint": "0"},
            versions={},
        )
        generator = torch.Generator().manual_seed(0)
        self.head = torch.randn(192, len(CLASSES), generator=generator)
        self.blocks = torch.randn(BLOCKS, 192, 192, generator=generator) / 14

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        rows = [np.asarray(image.convert("RGB").resize((8, 8)), np.float32) / 255 - 0.5 for image in images]
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        time.sleep(self.seconds)
        if (inputs[:, 0, 0, 0] == POISON).any():
            raise RuntimeError("poisoned image")
        features = inputs.flatten(1)
        left = torch.full((len(inputs),), torch.inf).double() if budget is None else budget.clone()
        left -= BASE_MACS
        path = torch.zeros(len(inputs), BLOCKS, dtype=torch.bool)
        for index, weights in enumerate(self.blocks):
            runs = (features.mean(1) > -0.2 * (BLOCKS - index)) & (left >= BLOCK_MACS)
            features = torch.where(runs[:, None], features + (features @ weights).tanh(), features)
            left -= BLOCK_MACS * runs
            path[:, index] = runs
        return Prediction((features @ self.head).softmax(1), BASE_MACS + BLOCK_MACS * path.double().sum(1), path)


def load_fake(artifact: str) -> FakePredictor:
    """A loader for `serve.app.build`; "slow" in the folder's name makes each batch take 50 ms."""
    return FakePredictor(seconds=0.05 if "slow" in artifact else 0.0)


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> PIL.Image.Image:
    """A picture of random pixels, `size` = (width, height)."""
    generator = np.random.default_rng(seed)
    bright = generator.integers(20, 255)
    return PIL.Image.fromarray(generator.integers(0, bright, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
