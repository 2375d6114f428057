"""Which images to label next, given what the current models say (spec initial_pools section 2.3).

A query reads an `ALContext` and trains nothing: the loop fills in what the query `needs`.

    ctx = ALContext(unlabelled=u, labelled=l, rng=np.random.default_rng(7), probabilities=p)
    picked = QUERIES["me"]().query(ctx, 60)

| need       | fields the loop fills                                                              |
|------------|------------------------------------------------------------------------------------|
| "model"    | `probabilities`                                                                    |
| "dropout"  | `mc`, from `active.mc_dropout.mc_dropout` on a model with dropout                  |
| "features" | `features` and `labelled_features`                                                 |
| "ensemble" | `ensemble_probabilities` of independently seeded models                            |
| "vaal"     | `labelledness`, from an `active.vaal.VaalTraining` that has finished               |
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from dataeff.active.coreset import DEFAULT_MEMORY_MB, greedy_k_centre
from dataeff.active.mc_dropout import McPrediction
from dataeff.active.pools import CONSTANT, IntArray
from dataeff.active.scores import FloatArray, entropy, least_confidence, margin, variation_ratio

Need = Literal["model", "dropout", "features", "ensemble", "vaal"]


@dataclass(frozen=True)
class ALContext:
    """What a query may read. Rows are aligned: row i of every field of U rows is image `unlabelled[i]`.

    Args:
        unlabelled: indices into the original training set, int64 [U].
        labelled: the same, int64 [L].
        rng: of random choices and of ties; make a fresh one for every cycle from (seed, cycle).
        probabilities: class probabilities in eval mode, float [U, C].
        mc: what passes with dropout say of the U images.
        ensemble_probabilities: of each member in eval mode, float [M, U, C].
        features: penultimate features (projection output), float [U, D].
        labelled_features: the same of the labelled images, float [L, D].
        labelledness: VAAL's D(mu(x)), how labelled an image looks, float [U] in [0, 1].
    """

    unlabelled: IntArray
    labelled: IntArray
    rng: np.random.Generator
    probabilities: np.ndarray | None = None
    mc: McPrediction | None = None
    ensemble_probabilities: np.ndarray | None = None
    features: np.ndarray | None = None
    labelled_features: np.ndarray | None = None
    labelledness: np.ndarray | None = None


class Selection(NamedTuple):
    """Chosen images, most wanted first: indices into the original training set, int64 [k], and the score of each at the
    moment it was chosen, float64 [k]."""

    indices: IntArray
    scores: FloatArray


class QueryStrategy(ABC):
    """Chooses the next images to label.

    The choice does not depend on the order of `ctx.unlabelled`: ties, and what is random, follow a permutation drawn
    from `ctx.rng` over the sorted indices.
    """

    needs: ClassVar[frozenset[Need]]

    def query(self, ctx: ALContext, k: int) -> IntArray:
        """The k images to label next, int64 [min(k, U)], most wanted first.

        Warns:
            UserWarning: fewer than k are left (all are returned), or the scores rank nothing (the choice is random).

        Raises:
            ValueError: k is not a whole number of at least 1, or a field that the query needs is missing or has the
                wrong number of rows.
        """
        return self.select(ctx, k).indices

    @abstractmethod
    def select(self, ctx: ALContext, k: int) -> Selection:
        """As `query`, with scores."""


class RandomQuery(QueryStrategy):
    """Uniform without replacement: passive learning. Every score is 0."""

    needs = frozenset()

    def select(self, ctx: ALContext, k: int) -> Selection:
        k = batch_size(k, len(ctx.unlabelled))
        return Selection(ctx.unlabelled[np.argsort(priorities(ctx))[:k]], np.zeros(k))


class ScoreQuery(QueryStrategy):
    """Takes the k images of largest score."""

    def select(self, ctx: ALContext, k: int) -> Selection:
        k = batch_size(k, len(ctx.unlabelled))
        if not k:
            return _NOTHING
        scores = self.score(ctx)
        if not ranks(scores):
            _warn_random(self, "its scores are constant or not finite")
            scores = np.zeros(len(scores))
        chosen = np.lexsort((priorities(ctx), -scores))[:k]
        return Selection(ctx.unlabelled[chosen], scores[chosen])

    @abstractmethod
    def score(self, ctx: ALContext) -> FloatArray:
        """How much each image is wanted, float64 [U]."""


class LeastConfidence(ScoreQuery):
    """Lowest probability of the most likely class."""

    needs = frozenset({"model"})

    def score(self, ctx: ALContext) -> FloatArray:
        return least_confidence(_field(self, ctx, "probabilities"))


class MaxEntropy(ScoreQuery):
    """Highest entropy of the prediction."""

    needs = frozenset({"model"})

    def score(self, ctx: ALContext) -> FloatArray:
        return entropy(_field(self, ctx, "probabilities"))


class MinMargin(ScoreQuery):
    """Smallest margin between the two most likely classes."""

    needs = frozenset({"model"})

    def score(self, ctx: ALContext) -> FloatArray:
        return margin(_field(self, ctx, "probabilities"))


class DBAL(ScoreQuery):
    """Deep Bayesian active learning over passes with dropout.

    Args:
        dbal_score: "entropy" of the mean prediction (the source's toolkit), or "bald", the mutual information between
            prediction and weights: entropy of the mean less mean entropy.
    """

    needs = frozenset({"dropout"})

    def __init__(self, dbal_score: Literal["entropy", "bald"] = "entropy") -> None:
        if dbal_score not in ("entropy", "bald"):
            raise ValueError(f"dbal_score = {dbal_score!r}: must be 'entropy' or 'bald'")
        self.dbal_score = dbal_score

    def score(self, ctx: ALContext) -> FloatArray:
        mc: McPrediction = _field(self, ctx, "mc")
        if mc.identical:
            warnings.warn(
                "DBAL: all passes gave the same predictions, so its scores say what max-entropy says; is dropout on?",
                stacklevel=4,
            )
        return mc.mutual_information if self.dbal_score == "bald" else entropy(mc.mean)


class CoreSetGreedy(QueryStrategy):
    """Greedy k-centre on the penultimate features, starting from all labelled images (see `coreset.greedy_k_centre`).

    The score of an image is its distance to the nearest centre when it was chosen.

    Args:
        memory_mb: bound on what it allocates beyond one float32 copy of the features.
    """

    needs = frozenset({"features"})

    def __init__(self, memory_mb: float = DEFAULT_MEMORY_MB) -> None:
        self.memory_mb = memory_mb

    def select(self, ctx: ALContext, k: int) -> Selection:
        k = batch_size(k, len(ctx.unlabelled))
        if not k:
            return _NOTHING
        features = _field(self, ctx, "features")
        centres = _field(self, ctx, "labelled_features", rows=len(ctx.labelled)) if len(ctx.labelled) else None
        if not np.isfinite(features).all() or (centres is not None and not np.isfinite(centres).all()):
            _warn_random(self, "some features are not finite")
            return RandomQuery().select(ctx, k)
        chosen, distances = greedy_k_centre(features, k, priorities(ctx), centres, self.memory_mb)
        return Selection(ctx.unlabelled[chosen], distances)


class VAAL(ScoreQuery):
    """What the discriminator of `vaal.VaalTraining` finds least like a labelled image."""

    needs = frozenset({"vaal"})

    def score(self, ctx: ALContext) -> FloatArray:
        return 1 - np.asarray(_field(self, ctx, "labelledness"), dtype=np.float64)


class EnsembleVarR(ScoreQuery):
    """Largest share of members outvoted. T members give only T different scores: ties are the rule."""

    needs = frozenset({"ensemble"})

    def score(self, ctx: ALContext) -> FloatArray:
        return variation_ratio(_field(self, ctx, "ensemble_probabilities", axis=1))


class EnsembleLC(ScoreQuery):
    """Least confidence of the members' mean prediction."""

    needs = frozenset({"ensemble"})

    def score(self, ctx: ALContext) -> FloatArray:
        return least_confidence(_mean_of_members(self, ctx))


class EnsembleME(ScoreQuery):
    """Highest entropy of the members' mean prediction."""

    needs = frozenset({"ensemble"})

    def score(self, ctx: ALContext) -> FloatArray:
        return entropy(_mean_of_members(self, ctx))


class EnsembleMM(ScoreQuery):
    """Smallest margin of the members' mean prediction."""

    needs = frozenset({"ensemble"})

    def score(self, ctx: ALContext) -> FloatArray:
        return margin(_mean_of_members(self, ctx))


QUERIES: dict[str, type[QueryStrategy]] = {
    "random": RandomQuery,
    "lc": LeastConfidence,
    "me": MaxEntropy,
    "mm": MinMargin,
    "dbal": DBAL,
    "coreset": CoreSetGreedy,
    "vaal": VAAL,
    "ens_varr": EnsembleVarR,
    "ens_lc": EnsembleLC,
    "ens_me": EnsembleME,
    "ens_mm": EnsembleMM,
}

_NOTHING = Selection(np.empty(0, np.int64), np.empty(0))


def batch_size(k: int, available: int) -> int:
    """min(k, `available`), with a warning where k is larger.

    Raises:
        ValueError: k is not a whole number of at least 1.
    """
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k = {k!r} with {available} unlabelled images: must be a whole number of at least 1")
    if k > available:
        warnings.warn(f"k = {k} with {available} unlabelled images: all of them are taken", stacklevel=3)
    return min(int(k), available)


def priorities(ctx: ALContext) -> IntArray:
    """Who comes first among equals, int64 [U]: the smallest number does. Belongs to the image, not to its row."""
    drawn = ctx.rng.permutation(len(ctx.unlabelled))
    mine = np.empty_like(drawn)
    mine[np.argsort(ctx.unlabelled)] = drawn
    return mine


def ranks(scores: FloatArray) -> bool:
    """Whether scores tell any image from another: all finite, and not constant."""
    return bool(np.isfinite(scores).all()) and (len(scores) < 2 or float(np.std(scores)) >= CONSTANT)


def _field(query: QueryStrategy, ctx: ALContext, name: str, rows: int | None = None, axis: int = 0) -> Any:
    """A field that the query needs, checked for one row an unlabelled image (or `rows`) along `axis`."""
    value = getattr(ctx, name)
    if value is None:
        raise ValueError(f"{type(query).__name__} needs {name}: fill that field of the context")
    expected = len(ctx.unlabelled) if rows is None else rows
    found = len(value) if axis == 0 else value.shape[axis]
    if found != expected:
        raise ValueError(f"{type(query).__name__}: {name} has {found} rows for {expected} images")
    return value


def _mean_of_members(query: QueryStrategy, ctx: ALContext) -> FloatArray:
    probabilities = _field(query, ctx, "ensemble_probabilities", axis=1)
    return np.asarray(np.mean(probabilities, axis=0, dtype=np.float64))


def _warn_random(query: QueryStrategy, why: str) -> None:
    warnings.warn(f"{type(query).__name__}: {why}, so this batch is chosen at random", stacklevel=4)
