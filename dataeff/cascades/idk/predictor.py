"""A fitted cascade behind the `Predictor` protocol, and its stages one by one for a server that spreads them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor

from dataeff.cascades.idk.artifact import CascadeSpec, add_ons, read_spec, stage_artifact
from dataeff.cascades.idk.cascade import CascadeOutput, IDKCascade, ask
from dataeff.cascades.idk.fit import CurvePoint
from dataeff.cascades.idk.stages import load_stage_artifact
from dataeff.cascades.idk.uncertainty import IDKClassifier, entropy
from dataeff.core.artifact import Artifact, Card, Prediction, Predictor, read_artifact
from dataeff.data import Preprocess
from dataeff.metrics.curve import pick_point
from dataeff.nn.predictor import check_budget


@dataclass(frozen=True)
class StageOutput:
    """One stage's answers to B images.

    probabilities float32 (B, k); macs float64 (B,), with the add-on's own; entropy float64 (B,), nats; uncertainty and
    score float64 (B,), NaN at a stage without add-on; idk bool (B,): pass the image on.
    """

    probabilities: Tensor
    macs: Tensor
    entropy: Tensor
    uncertainty: Tensor
    score: Tensor
    idk: Tensor


class CascadeStage:
    """One model of a cascade with its add-on, which runs alone; takes inputs as the cascade's `preprocess` makes them.

    Attributes:
        name: of the stage. cost: average, in the cascade's unit. full_macs: the most that it spends on an image.
        threshold: of its add-on's score, None at a last stage that has none. predictor: the model itself.
    """

    def __init__(
        self,
        name: str,
        predictor: Predictor,
        idk: IDKClassifier | None,
        cost: float,
        full_macs: float,
        cascade_preprocess: Preprocess,
    ) -> None:
        self.name, self.predictor, self.idk, self.cost, self.full_macs = name, predictor, idk, cost, full_macs
        self.threshold = None if idk is None else idk.threshold
        self._rescale = _rescaling(cascade_preprocess, Preprocess.from_dict(predictor.card.preprocess), name)

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        """The model's own answers to inputs of the cascade."""
        if self._rescale is not None:
            scale, shift = (part.to(inputs.device) for part in self._rescale)
            inputs = inputs * scale + shift
        return self.predictor.predict(inputs, budget)

    def run(self, inputs: Tensor, threshold: Tensor | None = None, budget: Tensor | None = None) -> StageOutput:
        """Answer, and say which images to pass on.

        Args:
            threshold: float64 (B,) or one number, in place of the stage's own.
        """
        answer = self.predict(inputs, budget)
        unknown = torch.full((len(inputs),), math.nan, dtype=torch.float64)
        uncertainty, score, idk = unknown, unknown, torch.zeros(len(inputs), dtype=torch.bool)
        macs = answer.macs
        if self.idk is not None:
            uncertainty, score = ask(self.idk, answer.probabilities)
            idk = score > (self.idk.threshold if threshold is None else threshold)
            macs = macs + self.idk.macs
        return StageOutput(answer.probabilities, macs, entropy(answer.probabilities.double()), uncertainty, score, idk)


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

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        """Answer float32 (B, C, H, W); `budget` float64 (B,), multiply-adds allowed per image, stops an image before
        the stage that could exceed it."""
        output = self.answer(inputs, budget)
        return Prediction(output.probabilities, output.macs, output.ran)

    def answer(
        self,
        inputs: Tensor,
        budget: Tensor | None = None,
        thresholds: Tensor | None = None,
        max_stage: int | None = None,
    ) -> CascadeOutput:
        """`predict` with all that the cascade knows: the stage that answered, uncertainties, IDK at the human stage.

        Args:
            thresholds: float64 (A,) or (B, A); those of a `point`, possibly another one for every image.
            max_stage: the last stage that may run, from 0.
        """
        check_budget(budget, len(inputs))
        with torch.inference_mode():
            return self.cascade.predict(inputs, budget, thresholds, max_stage)

    def point(self, accuracy: float | None = None, relative_cost: float | None = None) -> CurvePoint:
        """The point of the calibration curve for a request's wish: see `pick_point`."""
        return pick_point(self.spec.curve, accuracy, relative_cost)


def load_cascade(artifact: Artifact, device: str) -> CascadePredictor:
    """All stages in one process."""
    spec = read_spec(artifact)
    stages = [_build_stage(artifact, spec, number, device) for number in range(len(spec.stages))]
    return CascadePredictor(artifact.card, spec, stages)


def load_stage(directory: str, number: int, device: str = "cpu") -> CascadeStage:
    """Stage `number`, from 0, of the cascade in `directory`; the others' networks are not built.

    Raises:
        FileNotFoundError, ValueError: no artifact there, not a cascade's, or it has no such stage.
    """
    artifact = read_artifact(directory)
    spec = read_spec(artifact)
    if not 0 <= number < len(spec.stages):
        raise ValueError(f"stage {number} of {directory}: must be 0 to {len(spec.stages) - 1}")
    return _build_stage(artifact, spec, number, device)


def _build_stage(artifact: Artifact, spec: CascadeSpec, number: int, device: str) -> CascadeStage:
    predictor = load_stage_artifact(stage_artifact(artifact, spec, number), device)
    idk = add_ons(artifact, spec)
    stage = spec.stages[number]
    assert stage.full_macs is not None  # a stage with a network has a card
    return CascadeStage(
        stage.name,
        predictor,
        idk[number] if number < len(idk) else None,
        stage.cost,
        stage.full_macs,
        Preprocess.from_dict(artifact.card.preprocess),
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
