"""Which images to label, chosen by what a request says of them (spec initial_pools section 9).

The choice is that of `dataeff.active`; here are its requests, their bounds and their answers. Images are named by their
position in the request.
"""

import base64
import threading
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from dataeff.active.initial import POOL_DRAWS
from dataeff.active.mc_dropout import McPrediction
from dataeff.active.pools import random_pool, spread_over_clusters
from dataeff.active.queries import DBAL, QUERIES, ALContext
from dataeff.core.artifact import Predictor, Segmenter
from dataeff.metrics.kmeans import kmeans
from serve.human_http import Strict, Whole
from serve.limits import LabellingLimits, RequestError, check_pixels, check_rows, decode_image, refusing

MOST_CHOSEN = 10_000  # images in one answer
SUM_TOLERANCE = 1e-3  # of probabilities, which may have been rounded
LARGEST = 1e15  # feature, so that squares stay finite in float32
KMEANS_WORK = 10  # times max_values: bound on N * D * K
BATCH = 64  # images that the network runs at once

Floats = NDArray[np.float64]
Index = Annotated[Whole, Field(ge=0, lt=2**31)]
# `fail_fast`: a body of a million wrong entries is one error, not a million.
Row = Annotated[list[float], Field(fail_fast=True)]
Rows = Annotated[list[Row], Field(fail_fast=True)]
Passes = Annotated[list[Rows], Field(fail_fast=True)]
Indices = Annotated[list[Index], Field(fail_fast=True)]

# What each need of a query can be met with; a query without needs takes anything.
_SOURCES = {
    "model": ("probabilities", "images"),
    "dropout": ("probabilities",),
    "ensemble": ("probabilities",),
    "features": ("features",),
    None: ("count", "probabilities", "features", "images"),
}


class SelectRequest(Strict):
    """Exactly one of probabilities, features, images and count describes the N images."""

    strategy: Literal["random", "lc", "me", "mm", "dbal", "coreset", "ens_varr", "ens_lc", "ens_me", "ens_mm"]
    k: Whole = Field(ge=1, le=MOST_CHOSEN, description="how many to choose; all that are left where they are fewer")
    probabilities: Rows | Passes | None = Field(
        None, union_mode="left_to_right", description="[N][K]; for dbal and ens_* [T][N][K], of T passes or networks"
    )
    features: Rows | None = Field(None, description="[N][D], for coreset")
    images: list[str] | None = Field(None, description="base64 of PNG, JPEG or WebP, for lc, me and mm of artifact=")
    count: Index | None = Field(None, description="N, for random")
    labelled: Indices = Field([], description="that have labels: never selected")
    dbal_score: Literal["entropy", "bald"] = "entropy"
    seed: Index = Field(0, description="of ties and of what is random")


class Selected(BaseModel):
    indices: list[int] = Field(description="most wanted first")
    scores: list[float | None] = Field(description="of each when it was chosen; null: infinite")
    strategy: str


class PoolRequest(Strict):
    strategy: Literal["random", "kmeans"]
    budget: Whole = Field(ge=1, le=MOST_CHOSEN)
    count: Index | None = Field(None, description="number of images, for random")
    features: Rows | None = Field(None, description="[N][D], for kmeans")
    n_clusters: Whole | None = Field(None, ge=1, description="default: the classes of the labelling")
    allocation: Literal["equal", "proportional"] = "equal"
    seed: Index = 0


class Pool(BaseModel):
    indices: list[int]


def select(request: SelectRequest, limits: LabellingLimits, predictor: Predictor | None) -> dict[str, Any]:
    """The answer of `/select`."""
    query = DBAL(request.dbal_score) if request.strategy == "dbal" else QUERIES[request.strategy]()
    need = next(iter(query.needs), None)
    given = [name for name in _SOURCES[None] if getattr(request, name) is not None]
    if len(given) != 1 or given[0] not in _SOURCES[need]:
        wanted = " or ".join(_SOURCES[need])
        raise RequestError(400, f"strategy {request.strategy!r} needs {wanted}, not {' and '.join(given) or 'nothing'}")
    values: Floats | None = None
    total = request.count or 0
    if request.probabilities is not None:
        dimensions = {"model": (2,), "dropout": (3,), "ensemble": (3,)}.get(str(need), (2, 3))
        values = _probabilities(request.probabilities, dimensions, limits)
        total = values.shape[-2]
    elif request.features is not None:
        values = _features(request.features, limits)
        total = len(values)
    elif request.images is not None:
        values = _predictions(request.images, predictor, limits) if need else None
        total = len(request.images)
    labelled = np.unique(np.array(request.labelled, dtype=np.int64))
    if len(labelled) and labelled[-1] >= total:
        raise RequestError(400, f"labelled: index {labelled[-1]} with {total} images; send indices below {total}")
    left = np.setdiff1d(np.arange(total), labelled)
    fields: dict[str, Any] = {}
    if values is not None:
        if need == "features":
            fields = {"features": values[left], "labelled_features": values[labelled]}
        elif need == "dropout":
            fields = {"mc": McPrediction.from_passes(values[:, left])}
        elif need:
            fields = {"probabilities": values[left]} if need == "model" else {"ensemble_probabilities": values[:, left]}
    with refusing():
        chosen = query.select(ALContext(left, labelled, np.random.default_rng(request.seed), **fields), request.k)
    scores = [score if np.isfinite(score) else None for score in chosen.scores.tolist()]
    return {"indices": chosen.indices.tolist(), "scores": scores, "strategy": request.strategy}


def initial_pool(request: PoolRequest, limits: LabellingLimits, classes: int) -> dict[str, Any]:
    """The answer of `/initial_pool`: for a seed what `active.initial.choose_pool` chooses."""
    rng = np.random.default_rng([request.seed, POOL_DRAWS])
    wanted, other = ("count", "features") if request.strategy == "random" else ("features", "count")
    if getattr(request, wanted) is None or getattr(request, other) is not None:
        raise RequestError(400, f"strategy {request.strategy!r} needs {wanted}, and no {other}")
    with refusing():
        if request.count is not None:
            if request.count > limits.max_values:
                raise RequestError(413, f"count = {request.count}; send at most {limits.max_values}")
            return {"indices": random_pool(request.count, request.budget, rng).tolist()}
        features, clusters = _features(request.features, limits), request.n_clusters or classes
        if clusters > limits.max_classes or features.size * clusters > KMEANS_WORK * limits.max_values:
            raise RequestError(413, f"{features.size} numbers for {clusters} clusters; send fewer, or fewer clusters")
        found = kmeans(features.astype(np.float32), clusters, request.seed).labels
        return {"indices": spread_over_clusters(found, request.budget, clusters, rng, request.allocation).tolist()}


def _numbers(name: str, rows: list[Any] | None, limits: LabellingLimits) -> Floats:
    try:
        values = np.array(rows, dtype=np.float64)
    except ValueError:
        raise RequestError(400, f"{name}: rows of different lengths") from None
    if not values.size:
        raise RequestError(400, f"{name}: no numbers; send at least one row of at least one number")
    if values.size > limits.max_values:
        raise RequestError(413, f"{name}: {values.size} numbers; send at most {limits.max_values}")
    return values


def _features(rows: list[Any] | None, limits: LabellingLimits) -> Floats:
    values = _numbers("features", rows, limits)
    wrong = ~(np.abs(values) <= LARGEST).all(axis=1)  # NaN is not
    if wrong.any():
        raise RequestError(400, f"features: row {wrong.argmax()} is not of finite numbers up to {LARGEST:g} in size")
    return values


def _probabilities(rows: list[Any], dimensions: tuple[int, ...], limits: LabellingLimits) -> Floats:
    values = _numbers("probabilities", rows, limits)
    if values.ndim not in dimensions:
        shape = "[N][K]" if 2 in dimensions else "[T][N][K], of T passes with dropout or T networks"
        raise RequestError(400, f"probabilities: {values.ndim} dimensions; this strategy takes {shape}")
    if not 2 <= values.shape[-1] <= limits.max_classes:
        raise RequestError(400, f"probabilities of {values.shape[-1]} classes; send 2 to {limits.max_classes}")
    wrong = ~((values >= 0).all(-1) & (np.abs(values.sum(-1) - 1) <= SUM_TOLERANCE))  # NaN and infinity too
    if wrong.any():
        row = np.argwhere(wrong)[0, -1]
        raise RequestError(400, f"probabilities: those of image {row} are not finite, not negative and 1 in sum")
    return values


_running = threading.Lock()


def _predictions(images: list[str], predictor: Predictor | None, limits: LabellingLimits) -> Floats:
    """Class probabilities [N, K] of encoded images."""
    if predictor is None or isinstance(predictor, Segmenter):
        raise RequestError(400, "images: this server has no network that classifies; start it with artifact=DIR")
    check_rows(len(images), limits)
    pictures, pixels = [], 0
    for number, text in enumerate(images):
        try:
            pictures.append(decode_image(base64.b64decode(text, validate=True), limits))
        except ValueError:
            raise RequestError(400, f"image {number}: not base64") from None
        except RequestError as error:
            raise RequestError(error.status, f"image {number}: {error.message}") from None
        pixels += pictures[-1].width * pictures[-1].height
        check_pixels(pixels, limits)
    with _running:  # one at a time, as networks keep what they work on
        parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
        found = [predictor.predict(predictor.preprocess(part)).probabilities for part in parts]
    return np.asarray(torch.cat(found).double().numpy())
