"""A cascade on disk: one artifact that holds its stages' networks, add-ons, costs and calibration curve.

The stages' weights lie in the cascade's own `model.safetensors` under `stages.J.`, their settings and cards in its
`config.yaml`, so that the artifact needs no other folder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from dataeff.cascades.idk.fit import CurvePoint
from dataeff.cascades.idk.uncertainty import IDKClassifier
from dataeff.core.artifact import Artifact, Card
from dataeff.core.config import Config, parse_config


class AddOn(Config):
    """An IDK classifier; its numbers are in the weights."""

    kind: str
    feature: str
    hidden: tuple[int, ...]


class EmbeddedStage(Config):
    """A model of the cascade; `card` and `config` are those of its own artifact, None for one that was only a table."""

    name: str
    cost: float = Field(ge=0, description="average, in the cascade's unit")
    full_macs: float | None = Field(description="the most multiply-adds that it spends on an image")
    weights: str = Field("", description="SHA-256 of its own artifact's weights")
    card: dict[str, Any] | None = None
    config: dict[str, Any] | None = None


class CalibrationRecord(Config):
    """On what, and how well, the cascade was calibrated."""

    split: str
    images: int
    indices: str = Field(description="SHA-256 of the positions in the split")
    goal: float
    feasible: bool
    accuracy: float
    idk_rates: tuple[float, ...] = Field(description="of all images, at each add-on")
    idk_level: tuple[float, ...] = Field(description="of the images that reach each add-on; -1 where none does")
    entropy_mean: tuple[float, ...] = Field(description="nats, of each add-on's model on the images that reach it")
    entropy_sd: tuple[float, ...]


class CascadeSpec(Config):
    """`config.yaml` of a cascade's artifact."""

    settings: dict[str, Any] = Field(description="of the run that fitted it")
    stages: tuple[EmbeddedStage, ...]
    add_ons: tuple[AddOn, ...]
    human_cost: float | None = Field(description="of an intervention; None: no human stage")
    costs_are: str = Field(description="multiply-adds, or given")
    cost_weight: float | None = Field(description="lambda that was taken; None: not learned with a cost")
    calibration: CalibrationRecord
    curve: tuple[CurvePoint, ...]


def stage_state(artifacts: Sequence[Artifact | None], add_ons: Sequence[IDKClassifier]) -> dict[str, Tensor]:
    """All tensors of a cascade under one set of names."""
    state = {
        f"stages.{number}.{name}": tensor
        for number, artifact in enumerate(artifacts)
        if artifact is not None
        for name, tensor in artifact.state.items()
    }
    for number, h in enumerate(add_ons):
        state |= {f"idk.{number}.{name}": tensor for name, tensor in h.state_dict().items()}
    return state


def read_spec(artifact: Artifact) -> CascadeSpec:
    return parse_config(CascadeSpec, artifact.config, "artifact config.yaml")


def stage_artifact(artifact: Artifact, spec: CascadeSpec, number: int) -> Artifact:
    """The artifact of one stage, out of the cascade's.

    Raises:
        ValueError: the stage has no model, as it was fitted from a table of scores.
    """
    stage = spec.stages[number]
    if stage.card is None or stage.config is None:
        raise ValueError(
            f"stage {number + 1} ({stage.name}) has no network: the cascade was fitted from its table of scores; "
            "fit it from an artifact, or from a table of ray_jobs.score whose artifact still exists"
        )
    card = parse_config(Card, stage.card, f"stage {number + 1} of the artifact")
    return Artifact(card, stage.config, _below(artifact.state, f"stages.{number}."))


def add_ons(artifact: Artifact, spec: CascadeSpec) -> list[IDKClassifier]:
    """The IDK classifiers with their numbers; they need no network."""
    found = []
    for number, add_on in enumerate(spec.add_ons):
        h = IDKClassifier(add_on.kind, len(artifact.card.classes), add_on.feature, add_on.hidden)  # type: ignore[arg-type]
        h.load_state_dict(_below(artifact.state, f"idk.{number}."))
        found.append(h.eval())
    return found


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
