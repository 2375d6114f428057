"""A fitted cascade behind the `Predictor` protocol."""

from collections.abc import Sequence

import PIL.Image
import torch
from torch import Tensor

from dataeff.cascades.idk.artifact import CascadeSpec, add_ons, read_spec, stage_artifact
from dataeff.cascades.idk.cascade import CascadeOutput, IDKCascade
from dataeff.cascades.idk.fit import CurvePoint
from dataeff.cascades.idk.stages import load_stage_artifact
from dataeff.cascades.idk.uncertainty import IDKClassifier
from dataeff.core.artifact import Artifact, Card, Prediction, Predictor
from dataeff.data import Preprocess
from dataeff.metrics.curve import pick_point


class CascadeStage:
    """One model of a cascade with its add-on; takes inputs as the cascade's `preprocess` makes them.

    Attributes:
        name: of the stage. full_macs: the most that it spends on an image. predictor: the model itself, None where it
        was not loaded. idk: its add-on, None at a last stage that has none.
    """

    def __init__(
        self,
        name: str,
        predictor: Predictor | None,
        idk: IDKClassifier | None,
        full_macs: float,
        cascade_preprocess: Preprocess,
        own_preprocess: Preprocess,
    ) -> None:
        self.name, self.predictor, self.idk, self.full_macs = name, predictor, idk, full_macs
        self._rescale = _rescaling(cascade_preprocess, own_preprocess, name)

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        """The model's own answers to inputs of the cascade."""
        assert self.predictor is not None
        if self._rescale is not None:
            scale, shift = (part.to(inputs.device) for part in self._rescale)
            inputs = inputs * scale + shift
        return self.predictor.predict(inputs, budget)


class CascadePredictor:
    """A cascade in one process: images that leave early leave the batch; see `dataeff.core.artifact.Predictor`.

    Attributes:
        stages: the models with their add-ons, cheapest first. spec: costs, calibration record and curve.
        path_names: names of the stages; `Prediction.path` says which of them ran.
        human: whether images that the last model passes on are meant for a person.
    """

    def __init__(self, card: Card, spec: CascadeSpec, stages: Sequence[CascadeStage]) -> None:
        self.card, self.spec, self.stages = card, spec, list(stages)
        self.input_shape = card.input_shape
        self.path_names = [stage.name for stage in stages]
        self.human = spec.human_cost is not None
        self._preprocess = Preprocess.from_dict(card.preprocess)
        idk = [stage.idk for stage in stages if stage.idk is not None]
        self.cascade = IDKCascade([stage.predict for stage in stages], idk, [stage.full_macs for stage in stages])

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Images of any size to float32 (B, C, H, W), as in training."""
        inputs: Tensor = self._preprocess.from_pil(images)
        return inputs

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> CascadeOutput:
        """Answer float32 (B, C, H, W); `budget` float64 (B,), multiply-adds allowed per image, stops an image before
        the stage that could exceed it. `cascade.predict` takes thresholds and a last stage too."""
        return self.cascade.predict(inputs, budget)

    def point(self, accuracy: float | None = None, relative_cost: float | None = None) -> CurvePoint:
        """The point of the calibration curve for a request's wish: see `pick_point`."""
        return pick_point(self.spec.curve, accuracy, relative_cost)


def load_cascade(artifact: Artifact, device: str, networks: Sequence[int] | None = None) -> CascadePredictor:
    """A cascade from its artifact.

    Args:
        networks: numbers of the stages whose networks are built, from 0; default: all.

    Raises:
        ValueError: no cascade's artifact, one of those stages has no network, or there is no such stage.
    """
    spec = read_spec(artifact)
    chosen = range(len(spec.stages)) if networks is None else networks
    missing = [number for number in chosen if not 0 <= number < len(spec.stages)]
    if missing:
        raise ValueError(f"stage {missing[0]} must be 0 to {len(spec.stages) - 1}")
    stages = [_build_stage(artifact, spec, number, device, number in chosen) for number in range(len(spec.stages))]
    return CascadePredictor(artifact.card, spec, stages)


def _build_stage(artifact: Artifact, spec: CascadeSpec, number: int, device: str, network: bool) -> CascadeStage:
    own, idk, stage = stage_artifact(artifact, spec, number), add_ons(artifact, spec), spec.stages[number]
    assert stage.full_macs is not None  # a stage with a network has a card
    return CascadeStage(
        stage.name,
        load_stage_artifact(own, device) if network else None,
        idk[number] if number < len(idk) else None,
        stage.full_macs,
        Preprocess.from_dict(artifact.card.preprocess),
        Preprocess.from_dict(own.card.preprocess),
    )


def _rescaling(cascade: Preprocess, stage: Preprocess, name: str) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (1, C, 1, 1) from the cascade's normalisation to a stage's; None where they are the same.

    Raises:
        ValueError: other sizes or channels, which no arithmetic brings together.
    """
    if (cascade.channels, cascade.size, cascade.resize) != (stage.channels, stage.size, stage.resize):
        raise ValueError(
            f"stage {name} takes images of {stage.channels} channels, {stage.size} pixels, resize {stage.resize}, the "
            f"first stage {cascade.channels}, {cascade.size}, {cascade.resize}; train the stages on one image size"
        )
    if (cascade.mean, cascade.std) == (stage.mean, stage.std):
        return None
    mean, std, own_mean, own_std = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
        for values in (cascade.mean, cascade.std, stage.mean, stage.std)
    )
    return (std / own_std).float(), ((mean - own_mean) / own_std).float()
