"""An IDK cascade as serving sees it: a `Predictor` whose stages can be asked one by one (see dataeff.nn.cascade)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import PIL.Image
import torch
from torch import Tensor

from dataeff.core.artifact import Card, Prediction, Predictor
from dataeff.data import Preprocess
from dataeff.nn.cascade import CascadePrediction, Walk


class Point(Protocol):
    """One setting of all thresholds with what it gave on the calibration set."""

    @property
    def thresholds(self) -> Sequence[float]: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def relative_cost(self) -> float: ...


@dataclass(frozen=True)
class Calibrated:
    """What every add-on did on the calibration set, A each; empty if the cascade was not fitted.

    idk_rates: share of all images passed on. entropy_mean, entropy_sd: nats, of the images that reach it.
    """

    idk_rates: Sequence[float] = ()
    entropy_mean: Sequence[float] = ()
    entropy_sd: Sequence[float] = ()


class Cascade(Predictor, Protocol):
    """N stages with A = N - 1 add-ons, or A = N if a person stands behind the last stage.

    names, costs (most multiply-adds an image) and stages: N each, cheapest first. thresholds and score_macs
    (multiply-adds of an add-on): A each. curve: accuracy against cost on the calibration set, empty if not fitted.
    """

    names: list[str]
    costs: list[float]
    stages: Sequence["Stage"]
    thresholds: list[float]
    score_macs: list[float]
    curve: Sequence[Point]
    calibrated: Calibrated

    def score(self, stage: int, probabilities: Tensor) -> Tensor:
        """Uncertainty of a stage's answers, [B, K] to [B]; above the threshold means "I don't know"."""


class Stage(Protocol):
    """A network that answers the cascade's inputs."""

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction: ...


def record(cascade: Cascade, walk: Walk, number: int, answer: Prediction) -> Tensor:
    """Take a stage's answers; the images that it answers, as rows of the batch."""
    if number == len(cascade.thresholds):
        return walk.record(number, answer)
    return walk.record(number, answer, cascade.score(number, answer.probabilities), cascade.score_macs[number])


def exits(cascade: Cascade, images: Tensor, walk: Walk) -> Iterator[Tensor]:
    """Run every stage on those images only that the stage before passed on; yields the rows that each answers.

    Args:
        images: float32 [B, C, H, W].
    """
    for number, stage in enumerate(cascade.stages):
        answer = stage.predict(images if len(walk.rows) == len(images) else images[walk.rows])
        yield record(cascade, walk, number, answer)
        if not len(walk.rows):
            return


def early_exit(cascade: Cascade, images: Tensor, thresholds: Tensor) -> CascadePrediction:
    """All of `exits` at once; thresholds float64 [B, A]."""
    walk = Walk(thresholds, len(cascade.costs))
    for _ in exits(cascade, images, walk):
        pass
    return walk.prediction


class StagedCascade:
    """A cascade of artifacts that was not fitted: one minus the largest probability, and thresholds from the caller.

    Raises:
        ValueError: stages of other classes or inputs, or another number of thresholds than fits.
    """

    def __init__(self, cards: Sequence[Card], thresholds: Sequence[float], stages: Sequence[Stage]) -> None:
        for number, card in enumerate(cards[1:], 2):
            for what in ("classes", "input_shape", "preprocess"):
                if getattr(card, what) != getattr(cards[0], what):
                    raise ValueError(f"stage {number}: its {what} differ from those of stage 1; stages must share them")
        if len(thresholds) not in (len(cards) - 1, len(cards)):
            raise ValueError(
                f"{len(cards)} stages need {len(cards) - 1} thresholds, or {len(cards)} with a person behind them; "
                f"got {len(thresholds)}"
            )
        self.names = [f"{number}-{card.method}" for number, card in enumerate(cards, 1)]
        self.costs = [card.cost["full_macs"] for card in cards]
        self.stages, self.thresholds = stages, list(thresholds)
        self.curve: Sequence[Point] = ()
        self.calibrated = Calibrated()
        self.score_macs = [0.0] * len(thresholds)
        self.input_shape, self.path_names = cards[0].input_shape, self.names
        cost = {"macs": sum(card.cost["macs"] for card in cards), "full_macs": sum(self.costs)}
        self.card = cards[-1].model_copy(update={"method": "cascade", "cost": cost, "metrics": {}})
        self._preprocess = Preprocess.from_dict(cards[0].preprocess)

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        return self._preprocess.from_pil(images)

    def score(self, stage: int, probabilities: Tensor) -> Tensor:
        return 1 - probabilities.double().amax(-1)

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> CascadePrediction:
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64).expand(len(inputs), -1)
        return early_exit(self, inputs, thresholds)
