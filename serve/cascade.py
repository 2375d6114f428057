"""An IDK cascade as serving sees it, and the walk of a batch through its stages (spec idk_cascades 2.3, 2.8).

A cascade is a `Predictor` whose stages can be asked one by one. Each stage but the last has an add-on: a score of the
stage's probabilities, and a threshold above which the answer is "I don't know" and the next stage is asked. With an
add-on behind the last stage too, what that one passes on goes to a person.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import PIL.Image
import torch
from torch import Tensor

from dataeff.core.artifact import Card, Prediction, Predictor
from dataeff.data import Preprocess


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


@dataclass
class CascadePrediction(Prediction):
    """Answers for B images; `path` [B, N] says which stages ran.

    score, entropy: float64 [B, A], what each add-on said and the entropy (nats) of what it saw, NaN where it was not
    asked. idk: bool [B], passed on by the last add-on as well: a person should answer. degraded: bool [B], a later
    stage was asked and failed.
    """

    score: Tensor
    entropy: Tensor
    idk: Tensor
    degraded: Tensor

    @property
    def stage(self) -> Tensor:
        """int64 [B], which stage answered, from 0."""
        return (self.path * torch.arange(1, self.path.shape[1] + 1)).argmax(1)


class Walk:
    """A batch on its way: `rows` are the images that the next stage is asked about.

    Example:
        >>> walk = Walk(cascade, thresholds)
        >>> for number, stage in enumerate(cascade.stages):
        ...     walk.record(number, stage.predict(images[walk.rows]))
        ...     if not len(walk.rows):
        ...         break
        >>> walk.prediction
    """

    def __init__(self, cascade: Cascade, thresholds: Tensor) -> None:
        count, stages, asked = len(thresholds), len(cascade.costs), len(cascade.thresholds)
        self._cascade, self._thresholds = cascade, thresholds
        self.rows = torch.arange(count)
        self.prediction = CascadePrediction(
            probabilities=torch.zeros(count, len(cascade.card.classes)),
            macs=torch.zeros(count, dtype=torch.float64),
            path=torch.zeros(count, stages, dtype=torch.bool),
            score=torch.full((count, asked), math.nan, dtype=torch.float64),
            entropy=torch.full((count, asked), math.nan, dtype=torch.float64),
            idk=torch.zeros(count, dtype=torch.bool),
            degraded=torch.zeros(count, dtype=torch.bool),
        )

    def record(self, stage: int, answer: Prediction) -> None:
        """Take a stage's answers for `rows`, and keep in `rows` those that its add-on passes on."""
        found, rows = self.prediction, self.rows
        found.probabilities[rows] = answer.probabilities
        found.macs[rows] += answer.macs
        found.path[rows, stage] = True
        if stage == found.score.shape[1]:
            self.rows = rows[:0]
            return
        score = self._cascade.score(stage, answer.probabilities).double()
        found.macs[rows] += self._cascade.score_macs[stage]
        found.score[rows, stage] = score
        found.entropy[rows, stage] = torch.special.entr(answer.probabilities.double()).sum(-1)
        self.rows = rows[score > self._thresholds[rows, stage]]
        if stage == found.path.shape[1] - 1:
            found.idk[self.rows] = True

    def give_up(self) -> None:
        """The next stage failed: `rows` keep the answer of the one before."""
        self.prediction.degraded[self.rows] = True
        self.rows = self.rows[:0]


def early_exit(cascade: Cascade, images: Tensor, thresholds: Tensor) -> CascadePrediction:
    """Run every stage on those images only that the stage before passed on.

    Args:
        images: float32 [B, C, H, W]. thresholds: float64 [B, A], of each image's own choice; infinite: answer here.
    """
    walk = Walk(cascade, thresholds)
    for number, stage in enumerate(cascade.stages):
        walk.record(number, stage.predict(images if len(walk.rows) == len(images) else images[walk.rows]))
        if not len(walk.rows):
            break
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
