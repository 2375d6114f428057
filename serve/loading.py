"""From a version's folders to a cascade, whole or without its networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from dataeff.core.artifact import Card, Prediction, load, read_artifact
from dataeff.data import Preprocess
from serve.cascade import Calibrated, Cascade, Point, Stage, StagedCascade, early_exit
from serve.versions import Version

FITTED = "idk"  # the method whose predictor is a cascade


@dataclass(frozen=True)
class Loader:
    """How replicas load: a whole cascade (`cascade(version)`), what routes its images
    (`cascade(version, networks=False)`), or one network (`stage(version, number)`)."""

    cascade: Callable[..., Cascade]
    stage: Callable[[Version, int], Stage]


class FittedCascade:
    """A fitted cascade's predictor (method `idk`) as serving sees one.

    Args:
        predictor: with `stages`, each with its add-on `idk`, and `spec`: curve and calibration record.
        networks: False forgets the stages' networks.
    """

    def __init__(self, predictor: Any, networks: bool) -> None:
        stages, record = predictor.stages, predictor.spec.calibration
        self._add_ons = [stage.idk for stage in stages if stage.idk is not None]
        self._preprocess = predictor.preprocess if networks else load_preprocess(predictor.card)
        self.card, self.input_shape = predictor.card, predictor.input_shape
        self.stages: Sequence[Stage] = stages if networks else []
        self.names = self.path_names = list(predictor.path_names)
        self.costs = [stage.full_macs for stage in stages]
        self.thresholds = [add_on.threshold for add_on in self._add_ons]
        self.score_macs = [add_on.macs for add_on in self._add_ons]
        self.curve: Sequence[Point] = predictor.spec.curve
        self.calibrated = Calibrated(record.idk_rates, record.entropy_mean, record.entropy_sd)

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        found: Tensor = self._preprocess(images)
        return found

    @torch.no_grad()
    def score(self, stage: int, probabilities: Tensor) -> Tensor:
        found: Tensor = self._add_ons[stage].score(probabilities)
        return found

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64).expand(len(inputs), -1)
        return early_exit(self, inputs, thresholds)


def load_preprocess(card: Card) -> Callable[[Sequence[PIL.Image.Image]], Tensor]:
    return Preprocess.from_dict(card.preprocess).from_pil


def load_cascade(version: Version, device: str = "cpu", networks: bool = True) -> Cascade:
    """The cascade of a version.

    Args:
        networks: False leaves `stages` empty: everything but the networks.

    Raises:
        ValueError, OSError: no usable artifact, an artifact that is no cascade, or stages that do not fit together.
    """
    cascade: Cascade
    if version.artifact:
        check_fitted(version.artifact)
        cascade = FittedCascade(load(version.artifact, device if networks else "cpu"), networks)
        return cascade
    cards = [read_artifact(folder).card for folder in version.stages]
    cascade = StagedCascade(cards, version.thresholds, [load(f, device) for f in version.stages] if networks else [])
    return cascade


def check_fitted(folder: str) -> None:
    """Refuse an artifact that is no fitted cascade."""
    method = read_artifact(folder).card.method
    if method != FITTED:
        raise ValueError(
            f"artifact {folder}: a {method} and no cascade; serve it with serve.app:model, or give stages=DIR,DIR and "
            "thresholds"
        )


def load_stage(version: Version, number: int, device: str = "cpu") -> Stage:
    """Stage `number`, from 0, of a version's cascade."""
    if version.artifact:
        stage: Stage = load(version.artifact, device).stages[number]  # type: ignore[attr-defined]
        return stage
    return load(version.stages[number], device)
