"""A tiny predictor with blocks that it skips, and a tiny cascade, for tests of serving; no training, no artifact."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import torch
from ray.serve import Application
from torch import Tensor

from dataeff.core.artifact import Card, Prediction
from serve.app import build_cascade, parse_cascade_options
from serve.cascade import Calibrated, Stage, early_exit
from serve.loading import Loader
from serve.versions import Version

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


STAGES, STAGE_MACS = 3, [100.0, 400.0, 2000.0]


@dataclass(frozen=True)
class FakePoint:
    thresholds: tuple[float, ...]
    accuracy: float
    relative_cost: float


@dataclass
class FakeStage:
    """Probabilities of fixed random weights; counts the images that it is asked about."""

    number: int
    seed: int = 0
    seconds: float = 0.0
    fails: bool = False
    asked: int = 0

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        time.sleep(self.seconds)
        if self.fails:
            raise RuntimeError("the stage fails")
        self.asked += len(inputs)
        generator = torch.Generator().manual_seed(10 * self.seed + self.number)
        logits = inputs.flatten(1) @ torch.randn(192, len(CLASSES), generator=generator)
        macs = torch.full((len(inputs),), STAGE_MACS[self.number], dtype=torch.float64)
        return Prediction(logits.softmax(1), macs, torch.empty(len(inputs), 0, dtype=torch.bool))


class FakeCascade:
    """Three stages; a person stands behind them if there are three thresholds."""

    def __init__(
        self, stages: Sequence[Stage], thresholds: Sequence[float] = (0.3, 0.3), calibrated: Calibrated | None = None
    ) -> None:
        self.stages, self.thresholds = stages, list(thresholds)
        self.names = self.path_names = ["small", "medium", "large"]
        self.costs, self.score_macs = STAGE_MACS, [1.0] * len(thresholds)
        self.input_shape = (3, 8, 8)
        self.curve = [FakePoint((1.0, 1.0), 0.8, 0.05), FakePoint((0.3, 0.3), 0.9, 0.5), FakePoint((0, 0), 0.95, 1.25)]
        self.calibrated = calibrated or Calibrated()
        cost = {"macs": 600.0, "full_macs": sum(STAGE_MACS)}
        self.card = FakePredictor().card.model_copy(update={"method": "idk", "cost": cost})

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        return FakePredictor().preprocess(images)

    def score(self, stage: int, probabilities: Tensor) -> Tensor:
        return 1 - probabilities.double().amax(-1)

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        return early_exit(self, inputs, torch.tensor(self.thresholds).double().expand(len(inputs), -1))


def fake_stage(version: Version, number: int) -> FakeStage:
    """Seed: the digits in the version's folder; "slow": 20 ms a batch; "broken" stages fail from the second on."""
    name = version.artifact.rsplit("/", 1)[-1]
    seed = int("".join(character for character in name if character.isdigit()) or 0)
    if "missing" in name:
        raise FileNotFoundError(f"artifact {name}: no such directory")
    return FakeStage(number, seed, 0.02 if "slow" in name else 0.0, "broken" in name and number > 0)


def fake_cascade(version: Version, networks: bool = True) -> FakeCascade:
    stages = [fake_stage(version, number) for number in range(STAGES)]
    return FakeCascade(stages if networks else [], (0.3, 0.3, 0.4) if "human" in version.artifact else (0.3, 0.3))


FAKE_LOADER = Loader(fake_cascade, fake_stage)


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> PIL.Image.Image:
    """A picture of random pixels, `size` = (width, height)."""
    generator = np.random.default_rng(seed)
    bright = generator.integers(20, 255)
    return PIL.Image.fromarray(generator.integers(0, bright, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def fake_app(args: dict[str, str]) -> Application:
    """Builder of an application over fake cascades, for `serve deploy`."""
    return build_cascade(parse_cascade_options(args), FAKE_LOADER)
