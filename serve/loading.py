"""From folders to what is served: a version's cascade, whole or without its networks, or a network to attack."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import PIL.Image
import torch
from torch import Tensor, nn

from dataeff.core.artifact import Artifact, Card, Prediction, load, read_artifact
from dataeff.core.registry import get_method
from serve.cascade import Calibrated, Cascade, Point, Stage, StagedCascade, early_exit
from serve.versions import Version

FITTED = "idk"  # the method whose predictor is a cascade


class Attackable(Protocol):
    """A network that can be attacked, by one thread at a time. Images are float [B, C, H, W] in [0, 1]."""

    card: Card
    eps_grid: Sequence[float]
    """Default budgets of `fgsm_curve`."""

    @property
    def model(self) -> nn.Module:
        """Images to logits [B, K]."""

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Images of any size to those that the network takes."""

    def probabilities(self, x: Tensor) -> Tensor:
        """[B, K]."""

    def member_probabilities(self, x: Tensor) -> list[Tensor]:
        """[B, K] of each member of an ensemble; else empty."""

    def attack(
        self, x: Tensor, y: Tensor, name: str, eps: float, steps: int, alpha: float | None = None, **settings: Any
    ) -> Tensor:
        """Adversarial images for labels int64 [B]; ValueError for bad settings and for want of a gradient."""

    def fgsm_curve(self, x: Tensor, y: Tensor, eps_grid: Sequence[float]) -> Mapping[str, Tensor]:
        """p_true, pred and p_pred, each [budgets, B]; ValueError for want of a gradient."""

    def architectures(self) -> list[dict[str, Any]]:
        """Cells or blocks of each member; empty for a network of neither."""


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
    """

    def __init__(self, predictor: Any) -> None:
        stages, record = predictor.stages, predictor.spec.calibration
        self._add_ons = [stage.idk for stage in stages if stage.idk is not None]
        self.preprocess = predictor.preprocess
        self.card, self.input_shape = predictor.card, predictor.input_shape
        self.stages: Sequence[Stage] = stages
        self.names = self.path_names = list(predictor.path_names)
        self.costs = [stage.full_macs for stage in stages]
        self.thresholds = [add_on.threshold for add_on in self._add_ons]
        self.score_macs = [add_on.macs for add_on in self._add_ons]
        self.curve: Sequence[Point] = predictor.spec.curve
        self.calibrated = Calibrated(record.idk_rates, record.entropy_mean, record.entropy_sd)

    @torch.no_grad()
    def score(self, stage: int, probabilities: Tensor) -> Tensor:
        found: Tensor = self._add_ons[stage].score(probabilities)
        return found

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64).expand(len(inputs), -1)
        return early_exit(self, inputs, thresholds)


def load_cascade(version: Version, device: str = "cpu", networks: bool = True) -> Cascade:
    """The cascade of a version.

    Args:
        networks: False leaves the networks out: everything but `predict`, also of the stages.

    Raises:
        ValueError, OSError: no usable artifact, an artifact that is no cascade, or stages that do not fit together.
    """
    cascade: Cascade
    if version.artifact:
        cascade = FittedCascade(load_fitted(version.artifact, device, None if networks else ()))
        return cascade
    cards = [read_artifact(folder).card for folder in version.stages]
    cascade = StagedCascade(cards, version.thresholds, [load(f, device) for f in version.stages] if networks else [])
    return cascade


def load_fitted(folder: str, device: str, networks: Sequence[int] | None) -> Any:
    """The predictor of a fitted cascade with the networks of some stages, or of all.

    Raises:
        ValueError, OSError: no usable artifact, or of something else than a cascade.
    """
    artifact = read_artifact(folder)
    method = artifact.card.method
    if method != FITTED:
        raise ValueError(
            f"artifact {folder}: a {method} and no cascade; serve it with serve.app:model, or give stages=DIR,DIR and "
            "thresholds"
        )
    return get_method(method).load_predictor(artifact, device, networks)  # type: ignore[call-arg]  # this method's own


def load_stage(version: Version, number: int, device: str = "cpu") -> Stage:
    """Stage `number`, from 0, of a version's cascade."""
    if version.artifact:
        stage: Stage = load_fitted(version.artifact, device, [number]).stages[number]
        return stage
    return load(version.stages[number], device)


def read_attackable(folder: str) -> Artifact:
    """The artifact of a network that can be attacked.

    Raises:
        ValueError, OSError: no usable artifact, or one of another method.
    """
    artifact = read_artifact(folder)
    method = artifact.card.method
    if not hasattr(get_method(method), "load_attackable"):
        raise ValueError(
            f"artifact {folder}: a {method}, which cannot be attacked here; give one of robustness, nas_train or "
            "nas_search, or serve it with serve.app:model"
        )
    return artifact


def load_attackable(folder: str, device: str = "cpu") -> Attackable:
    """The network of `read_attackable`."""
    artifact = read_attackable(folder)
    network: Attackable = get_method(artifact.card.method).load_attackable(artifact, device)  # type: ignore[attr-defined]
    return network
