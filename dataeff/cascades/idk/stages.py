"""Where a cascade's probabilities come from: artifacts that answer images, or stored tables of answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dataeff.cascades.idk.search import Ints
from dataeff.core.artifact import Artifact, Predictor, read_artifact
from dataeff.core.registry import get_method
from dataeff.core.runtime import Runtime
from dataeff.data import ImageSource, Preprocess, Splits
from dataeff.data.scores import Scores, ScoreTable, concatenate

CHUNK = 256


class Source(Protocol):
    """One stage of a cascade. `artifact` is None for a stage whose model is not at hand; `full_macs`, the most that it
    spends on an image, and `macs`, its average, are then NaN unless the table knows them."""

    name: str
    artifact: Artifact | None
    macs: float
    full_macs: float

    def chunks(self, images: ImageSource, split: str, indices: Ints) -> Iterator["Answer"]:
        """Answers to `CHUNK` images at a time; each is computed when called."""


class Answer(Protocol):
    def __call__(self) -> Scores: ...


@dataclass
class ArtifactSource:
    """A stage that an artifact answers for."""

    path: Path
    artifact: Artifact | None
    predictor: Predictor

    def __post_init__(self) -> None:
        assert self.artifact is not None
        self.name = stage_name(self.path)
        self.macs = self.artifact.card.cost["macs"]
        self.full_macs = self.artifact.card.cost["full_macs"]
        self.preprocess = Preprocess.from_dict(self.artifact.card.preprocess)

    def chunks(self, images: ImageSource, split: str, indices: Ints) -> Iterator[Answer]:
        for start in range(0, len(indices), CHUNK):
            rows = indices[start : start + CHUNK]
            yield lambda rows=rows: self._answer(images, rows)  # type: ignore[misc]

    def _answer(self, images: ImageSource, rows: Ints) -> Scores:
        prediction = self.predictor.predict(self.preprocess(images.images(rows)))
        return Scores(prediction.probabilities.numpy(), images.labels[rows], rows, prediction.macs.numpy())


@dataclass
class TableSource:
    """A stage that is known by its stored answers; its artifact is used too where the table names one that exists."""

    table: ScoreTable

    def __post_init__(self) -> None:
        about = self.table.about
        path = Path(about["artifact"]) if "artifact" in about else None
        self.artifact = read_artifact(path) if path is not None and path.is_dir() else None
        self.name = stage_name(path) if path is not None else self.table.path.stem
        self.macs = float(about.get("macs", np.nan))
        self.full_macs = float(about.get("full_macs", np.nan))

    def chunks(self, images: ImageSource, split: str, indices: Ints) -> Iterator[Answer]:
        for number, scores in enumerate(self.table.chunks(split, CHUNK, indices)):
            rows = indices[number * CHUNK : (number + 1) * CHUNK]
            self._check(scores, images, split, rows)
            yield lambda scores=scores: scores  # type: ignore[misc]

    def _check(self, scores: Scores, images: ImageSource, split: str, rows: Ints) -> None:
        if not np.array_equal(scores.indices, rows):
            raise ValueError(
                f"{self.table.path}: its rows of split {split!r} are not images {rows[0]} to {rows[-1]} in order; "
                "score the same data again"
            )
        wrong = np.flatnonzero(scores.labels != images.labels[rows])
        if len(wrong):
            raise ValueError(
                f"{self.table.path}: image {rows[wrong[0]]} of split {split!r} has label "
                f"{scores.labels[wrong[0]]}, the data says {images.labels[rows[wrong[0]]]}; it was scored on other data"
            )


def stage_name(path: Path) -> str:
    """`runs/small/artifact` is "small"."""
    return path.parent.name if path.name == "artifact" else path.stem


def open_source(path: str, splits: Splits, device: str) -> Source:
    """A stage from an artifact's folder, or from a Parquet file of scores.

    Raises:
        FileNotFoundError, ValueError: nothing usable there, or it knows other classes than the data.
    """
    found: Source
    if Path(path).is_file() or path.endswith(".parquet"):
        found = TableSource(ScoreTable(path))
        classes = found.table.about.get("classes")
    else:
        artifact = read_artifact(path)
        found = ArtifactSource(Path(path), artifact, load_stage_artifact(artifact, device))
        classes = artifact.card.classes
    if classes is not None and list(classes) != list(splits.classes):
        raise ValueError(f"stage {path}: its classes are {list(classes)}, the data's are {list(splits.classes)}")
    return found


def load_stage_artifact(artifact: Artifact, device: str) -> Predictor:
    return get_method(artifact.card.method).load_predictor(artifact, device)


def score_chunks(
    sources: Sequence[Source], images: ImageSource, split: str, indices: Ints, runtime: Runtime
) -> Iterator[list[Scores]]:
    """The answers of all stages to a chunk of images; this rank's chunks only.

    Raises:
        ValueError: a table does not cover the images.
    """
    expected = -(-len(indices) // CHUNK)
    number = 0
    for number, answers in enumerate(_together(sources, images, split, indices), 1):
        if (number - 1) % runtime.world_size == runtime.rank:
            yield [answer() for answer in answers]
    if number < expected:
        raise ValueError(
            f"a score table holds fewer than the {len(indices)} images of split {split!r} that are needed; score the "
            "split again with python -m ray_jobs.score"
        )


def _together(
    sources: Sequence[Source], images: ImageSource, split: str, indices: Ints
) -> Iterator[tuple[Answer, ...]]:
    return zip(*(source.chunks(images, split, indices) for source in sources), strict=False)


def collect(
    sources: Sequence[Source], images: ImageSource, split: str, indices: Ints, runtime: Runtime
) -> list[Scores]:
    """The answers of all stages to `indices`, on every rank."""
    mine = list(score_chunks(sources, images, split, indices, runtime))
    gathered = []
    for stage in range(len(sources)):
        parts = [chunk[stage] for chunk in mine]
        gathered.append(_gather(concatenate(parts) if parts else None, images, indices, runtime))
    return gathered


def _gather(part: Scores | None, images: ImageSource, indices: Ints, runtime: Runtime) -> Scores:
    if runtime.world_size == 1:
        assert part is not None
        return part
    own = [part.probabilities.shape[1], 1] if part else [0, 0]  # a rank may have had no chunk
    classes, ranks = runtime.all_reduce(torch.tensor(own)).tolist()
    width = classes // ranks
    whole = torch.zeros(len(indices), width + 1, dtype=torch.float64)
    if part is not None:
        rows = torch.from_numpy(np.searchsorted(indices, part.indices))
        whole[rows, :width] = torch.from_numpy(part.probabilities).double()
        whole[rows, width] = torch.from_numpy(part.macs)
    values = runtime.all_reduce(whole).numpy()
    return Scores(values[:, :width].astype(np.float32), images.labels[indices], indices, values[:, width])


def describe(source: Source) -> dict[str, Any]:
    """What a cascade's artifact says about a stage's own."""
    artifact = source.artifact
    if artifact is None:
        return {"name": source.name}
    return {"name": source.name, "method": artifact.card.method, "weights": artifact.card.files["model.safetensors"]}
