"""The walk of a batch through a cascade: images that a stage answers leave the batch, the others go on to the next.

A cascade has N stages, cheapest first, and A add-ons: one behind every stage but the last (A = N - 1), or behind that
one too (A = N), which then passes images on to a person. An add-on scores a stage's probabilities; above a threshold
the answer is "I don't know" (spec idk_cascades 2.3, 2.8).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dataeff.core.artifact import Prediction


@dataclass
class CascadePrediction(Prediction):
    """Answers for B images, each of the last stage that ran on it; `path` [B, N] says which ran.

    score, entropy: float64 [B, A], what each add-on said and the entropy (nats) of what it saw, NaN where it was not
    asked. idk: bool [B], passed on by the last add-on as well: a person should answer. stopped: bool [B], passed on,
    but no further stage ran: a budget or a limit was in the way, or the stage failed.
    """

    score: Tensor
    entropy: Tensor
    idk: Tensor
    stopped: Tensor

    @property
    def stage(self) -> Tensor:
        """int64 [B], which stage answered, from 0."""
        return (self.path.sum(1) - 1).clamp(min=0)

    @property
    def labels(self) -> Tensor:
        """int64 [B]."""
        return self.probabilities.argmax(1)


class Walk:
    """A batch on its way: `rows` int64 are the images that the next stage is asked about.

    Args:
        thresholds: float64 [B, A], of each image's own choice; infinite: answer here.
        stages: N.

    Example:
        >>> walk = Walk(thresholds, len(networks))
        >>> for number, network in enumerate(networks):
        ...     answer = network.predict(images[walk.rows])
        ...     answered = walk.record(number, answer, score(number, answer.probabilities))
        ...     if not len(walk.rows):
        ...         break
        >>> walk.prediction
    """

    prediction: CascadePrediction  # from the first record on

    def __init__(self, thresholds: Tensor, stages: int) -> None:
        self._thresholds, self._stages = thresholds, stages
        self.rows = torch.arange(len(thresholds))

    def record(self, stage: int, answer: Prediction, score: Tensor | None = None, score_macs: float = 0.0) -> Tensor:
        """Take a stage's answers for `rows`, and keep in `rows` those that its add-on passes on.

        Args:
            score: float64 [b] of the stage's add-on, None behind a stage that has none. score_macs: its multiply-adds.

        Returns:
            The images that it answers, int64 rows of the batch.
        """
        if not stage:
            self.prediction = self._empty(answer.probabilities.shape[1])
        found, rows = self.prediction, self.rows
        probabilities = answer.probabilities.float().cpu()
        found.probabilities[rows] = probabilities
        found.path[rows, stage] = True
        found.macs[rows] += answer.macs.cpu() + score_macs
        if score is None:
            self.rows = rows[:0]
            return rows
        found.score[rows, stage] = score.double().cpu()
        found.entropy[rows, stage] = torch.special.entr(probabilities.double()).sum(-1)
        passed = found.score[rows, stage] > self._thresholds[rows, stage]
        self.rows = rows[passed]
        if stage < self._stages - 1:
            return rows[~passed]
        found.idk[self.rows] = True
        return rows

    def stop(self, which: Tensor | None = None) -> None:
        """No further stage runs on those of `rows` that the mask `which` names, by default all: they keep their
        answer."""
        stopped = self.rows if which is None else self.rows[which]
        self.prediction.stopped[stopped] = True
        self.rows = self.rows[:0] if which is None else self.rows[~which]

    def _empty(self, classes: int) -> CascadePrediction:
        count, add_ons = self._thresholds.shape
        unknown = torch.full((count, add_ons), math.nan, dtype=torch.float64)
        return CascadePrediction(
            probabilities=torch.zeros(count, classes),
            macs=torch.zeros(count, dtype=torch.float64),
            path=torch.zeros(count, self._stages, dtype=torch.bool),
            score=unknown,
            entropy=unknown.clone(),
            idk=torch.zeros(count, dtype=torch.bool),
            stopped=torch.zeros(count, dtype=torch.bool),
        )
