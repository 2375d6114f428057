"""What a finished run leaves for serving: `model.safetensors`, `config.yaml` and `card.json` in one directory.

Nothing in an artifact is executable and nothing is unpickled. The card carries a checksum of the other two files, so
that a truncated or edited artifact is refused by name rather than served.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import PIL.Image
import torch
import yaml
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dataeff.core.config import Config, parse_config, read_yaml

SCHEMA_VERSION = 1
WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.yaml", "card.json"


class Card(Config):
    """What an artifact is: enough to describe, check and serve it without its training code."""

    format: Literal["dataeff.artifact"] = "dataeff.artifact"
    schema_version: int = Field(SCHEMA_VERSION, ge=1)
    method: str
    classes: list[str] = Field(min_length=1)
    input_shape: tuple[int, int, int] = Field(description="(channels, height, width)")
    preprocess: dict[str, Any]
    metrics: dict[str, float] = Field(description="on the test split")
    cost: dict[str, float] = Field(
        description="macs: mean multiply-adds an image; full_macs: with nothing skipped; params"
    )
    data: dict[str, str] = Field(description="name and fingerprint of the training data")
    versions: dict[str, str]
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of the other files")


@dataclass(frozen=True)
class Artifact:
    """A checked artifact in memory."""

    card: Card
    config: dict[str, Any]
    state: dict[str, Tensor]


@dataclass
class Prediction:
    """Answers for B images.

    probabilities: float32 [B, K]; macs: float64 [B], multiply-adds spent on each image; path: bool [B, P], which of the
    network's optional parts ran (P is 0 for a static network).
    """

    probabilities: Tensor
    macs: Tensor
    path: Tensor


@dataclass
class SegmentedPrediction(Prediction):
    """Answers of a segmentation network; `probabilities` are means over an image's pixels: the share of each class.

    class_map: uint8 [B, H, W], the class of every pixel.
    """

    class_map: Tensor


class Predictor(Protocol):
    """A trained network ready to answer; what serving, scoring and reports see of a method."""

    card: Card
    input_shape: tuple[int, int, int]
    path_names: list[str]

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Images of any size to float32 [B, C, H, W], as in training."""

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        """Answer float32 [B, C, H, W]; `budget` float64 [B] bounds an image's multiply-adds where the network can."""


@runtime_checkable
class Segmenter(Protocol):
    """A predictor whose predictions are `SegmentedPrediction`."""

    map_shape: tuple[int, int]
    """(H, W) of a class map."""


@runtime_checkable
class Embedder(Protocol):
    """A predictor whose network has an embedding of each image."""

    def embed(self, inputs: Tensor) -> Tensor:
        """float32 [B, C, H, W] -> float32 [B, D], on the CPU."""


def save_artifact(directory: str | Path, card: Card, config: Config, state: Mapping[str, Tensor]) -> None:
    """Write an artifact; the directory appears complete or not at all, replacing an older artifact there."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary / WEIGHTS)
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (temporary / SETTINGS).write_text(settings, encoding="utf-8")
        sums = {name: _sha256(temporary / name) for name in (WEIGHTS, SETTINGS)}
        filled = card.model_copy(update={"files": sums})
        (temporary / CARD).write_text(filled.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.chmod(temporary, 0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_artifact(directory: str | Path) -> Artifact:
    """Read and check an artifact.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: the directory is no artifact, comes from a newer schema, or was truncated or edited.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"artifact {directory}: no such directory; give the artifact/ folder of a finished run")
    missing = [name for name in (CARD, SETTINGS, WEIGHTS) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"artifact {directory}: {', '.join(missing)} missing; give the artifact/ folder of a finished run"
        )
    card = _read_card(directory)
    for name in (WEIGHTS, SETTINGS):
        if card.files.get(name) != _sha256(directory / name):
            raise ValueError(
                f"artifact {directory}: {name} is not the file that was exported (truncated or edited); export it again"
            )
    try:
        state = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"artifact {directory}: {WEIGHTS} cannot be read ({error}); export it again") from None
    return Artifact(card, read_yaml(directory / SETTINGS), state)


def _read_card(directory: Path) -> Card:
    try:
        values = json.loads((directory / CARD).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(
            f"artifact {directory}: {CARD} is not valid JSON (truncated or edited); export it again"
        ) from None
    if not isinstance(values, dict) or values.get("format") != "dataeff.artifact":
        raise ValueError(f"artifact {directory}: {CARD} was not written by dataeff")
    version = values.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"artifact {directory}: schema version {version!r}, this dataeff reads up to {SCHEMA_VERSION}; "
            "upgrade dataeff"
        )
    return parse_config(Card, values, f"artifact {directory}: {CARD}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(directory: str | Path, device: str = "cpu") -> Predictor:
    """The predictor of an artifact. Needs no training code, no pickle, no network and no Ray.

    Raises:
        FileNotFoundError, ValueError: see `read_artifact`; also for an artifact of a method that this version lacks.

    Example:
        >>> predictor = dataeff.load("runs/digits/artifact")
        >>> predictor.predict(predictor.preprocess([image])).probabilities.argmax(1)
    """
    from dataeff.core.registry import get_method  # the registry imports Experiment, which imports this module

    artifact = read_artifact(directory)
    return get_method(artifact.card.method).load_predictor(artifact, device)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"torch": str(torch.__version__)}
    for name in ("dataeff", "torchvision", "ray", "optuna"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
