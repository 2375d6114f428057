"""Which images to label first, before any classifier exists (spec initial_pools section 2.2).

Three kinds: at random, the images on which a self-supervised model does worst (eq. 3.1), and images spread over
clusters. None sees a label. Each comes as a function of what is known of the images (scores, cluster ids) and as a
class that asks a trained pretext task for it; indices are positions in the images given, and ties go by the generator.
"""

import warnings
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dataeff.active.scores import FloatArray
from dataeff.pretraining.task import Clusterer, Images, PretextTask

IntArray = NDArray[np.int64]
Allocation = Literal["equal", "proportional"]

LOSS_POOLS = ("vae", "simclr", "rotation", "inpainting")
CLUSTER_POOLS = ("kmeans", "scan", "deepcluster")
POOLS = ("random", *LOSS_POOLS, *CLUSTER_POOLS)
BINS = (1, 2, 5, 10)
CONSTANT = 1e-12  # scores with a smaller standard deviation rank nothing
DOMINANT = 0.9  # a cluster with a larger share of the images makes cluster sampling nearly random


class DegenerateScoreError(ValueError):
    """The scores of a self-supervised model cannot rank the images: constant, or not finite."""


class InitialPoolStrategy(Protocol):
    """Chooses the first images to label."""

    def select(self, images: Images, budget: int, n_clusters: int, rng: np.random.Generator) -> IntArray:
        """Positions of `budget` different images, int64 [budget].

        Args:
            images: the pool, [N, C, H, W].
            budget: how many to choose, from 1 to N.
            n_clusters: K, the assumed number of classes; read by cluster pools only.
            rng: of every random choice and of ties.

        Raises:
            ValueError: the budget is out of range.
        """
        ...


class RandomPool:
    """Uniformly, without replacement: the control."""

    def select(self, images: Images, budget: int, n_clusters: int, rng: np.random.Generator) -> IntArray:
        return random_pool(len(images), budget, rng)


@dataclass(frozen=True)
class SelfSupervisedLossPool:
    """The images of highest loss (see `hardest`).

    Args:
        source: a trained task, or its losses of these very images, float64 [N].
        n_bins: 1 for the highest losses overall; 2, 5 or 10 for binned sampling.
    """

    source: PretextTask | FloatArray
    n_bins: int = 1

    def select(self, images: Images, budget: int, n_clusters: int, rng: np.random.Generator) -> IntArray:
        known = isinstance(self.source, np.ndarray)
        scores = self.source if isinstance(self.source, np.ndarray) else self.source.loss_per_sample(images)
        _check_length("scores", len(scores), len(images), known)
        return hardest(scores, budget, rng, self.n_bins)


@dataclass(frozen=True)
class ClusterPool:
    """Random images of every cluster (see `spread_over_clusters`).

    Args:
        source: a trained clustering, or its cluster ids of these very images, int64 [N].
        allocation: the same number from each cluster, or in proportion to its size.
    """

    source: Clusterer | IntArray
    allocation: Allocation = "equal"

    def select(self, images: Images, budget: int, n_clusters: int, rng: np.random.Generator) -> IntArray:
        known = isinstance(self.source, np.ndarray)
        clusters = self.source if isinstance(self.source, np.ndarray) else self.source.assign(images)
        _check_length("cluster ids", len(clusters), len(images), known)
        return spread_over_clusters(clusters, budget, n_clusters, rng, self.allocation)


def check_budget(budget: int, available: int) -> None:
    """Raise ValueError unless `budget` is a whole number from 1 to `available`, the number of unlabelled images."""
    whole = isinstance(budget, (int, np.integer)) and not isinstance(budget, bool)
    if not whole or not 1 <= budget <= available:
        raise ValueError(
            f"budget = {budget!r} with {available} unlabelled images: must be a whole number from 1 to {available}"
        )


def random_pool(available: int, budget: int, rng: np.random.Generator) -> IntArray:
    """`budget` of `available` positions, uniformly without replacement."""
    check_budget(budget, available)
    return rng.permutation(available)[:budget]


def hardest(scores: FloatArray, budget: int, rng: np.random.Generator, n_bins: int = 1) -> IntArray:
    """The images of highest score, optionally binned (spec sections 2.2 eq. 3.1 and 2.2 j).

    With n bins of equal size by falling score, the share of each of the first n - 1 bins are its highest scores and
    the share of the last bin its LOWEST: hard images of every level, and the easiest. Where `budget` or N does not
    divide, the first bins are larger by one.

    Args:
        scores: float64 [N], larger is harder.
        budget: how many, from 1 to N.
        rng: of the order among equal scores.
        n_bins: 1, 2, 5 or 10.

    Returns:
        Positions, int64 [budget], from the highest score of each bin downwards.

    Raises:
        DegenerateScoreError: the scores are constant, or some are not finite.
        ValueError: the budget or the number of bins is out of range.
    """
    check_budget(budget, len(scores))
    if n_bins not in BINS:
        raise ValueError(f"n_bins = {n_bins!r}: must be one of {', '.join(map(str, BINS))}")
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise DegenerateScoreError(
            f"{bad} of {len(scores)} scores are not finite: the self-supervised training diverged; lower its learning "
            "rate"
        )
    if float(np.std(scores)) < CONSTANT:
        raise DegenerateScoreError(
            f"all {len(scores)} scores equal {float(scores[0]):.6g}: the self-supervised model ranks nothing; train it "
            "longer, or check that its score has negatives (SimCLR)"
        )
    bins = np.array_split(descending(scores, rng), n_bins)
    shares = [budget // n_bins + (number < budget % n_bins) for number in range(n_bins)]
    chosen = [ranked[:share] for ranked, share in zip(bins[:-1], shares[:-1], strict=True)]
    last, share = bins[-1], shares[-1]
    chosen.append(last[:share] if n_bins == 1 else last[len(last) - share :])
    return np.concatenate(chosen)


def descending(scores: FloatArray, rng: np.random.Generator) -> IntArray:
    """Positions by falling score, int64 [N]; equal scores in an order drawn from `rng`, never by position."""
    shuffled = rng.permutation(len(scores))
    return shuffled[np.argsort(-scores[shuffled], kind="stable")]


def spread_over_clusters(
    clusters: IntArray, budget: int, n_clusters: int, rng: np.random.Generator, allocation: Allocation = "equal"
) -> IntArray:
    """Random images of every cluster (spec section 2.2, clustering family).

    Equal: floor(B / K) of each, the remainder one by one to clusters at random. Proportional: |C_j| * B / N, rounded by
    largest remainder. What a cluster is too small for goes to others at random, so that exactly `budget` are returned.

    Args:
        clusters: int64 [N] in [0, K); a cluster may be empty.
        budget: B, from 1 to N.
        n_clusters: K.

    Returns:
        Positions, int64 [budget], by cluster.

    Warns:
        UserWarning: B < K, so that not every cluster gets a label; or one cluster holds over 90 % of the images.

    Raises:
        ValueError: the budget, a cluster id or the allocation is out of range.
    """
    check_budget(budget, len(clusters))
    if clusters.min() < 0 or clusters.max() >= n_clusters:
        seen = f"{clusters.min()} to {clusters.max()}"
        raise ValueError(f"cluster ids from {seen} with n_clusters = {n_clusters}: must be from 0 to {n_clusters - 1}")
    sizes = np.bincount(clusters, minlength=n_clusters).astype(np.int64)
    if budget < n_clusters:
        warnings.warn(
            f"budget = {budget} is below the {n_clusters} clusters: not every cluster can be covered", stacklevel=2
        )
    if sizes.max() > DOMINANT * len(clusters):
        warnings.warn(
            f"cluster {sizes.argmax()} holds {sizes.max()} of {len(clusters)} images: the clustering is degenerate and "
            "the pool close to a random one",
            stacklevel=2,
        )
    quotas = _quotas(sizes, budget, allocation, rng)
    members = (np.flatnonzero(clusters == cluster) for cluster in range(n_clusters))
    return np.concatenate([rng.permutation(own)[:quota] for own, quota in zip(members, quotas, strict=True)])


def _quotas(sizes: IntArray, budget: int, allocation: Allocation, rng: np.random.Generator) -> IntArray:
    """Images to take of each cluster, int64 [K], at most its size, `budget` in sum."""
    if allocation == "proportional":
        # Whole-number arithmetic: shares that are equal on paper tie here too.
        quotas, remainders = np.divmod(sizes * budget, sizes.sum())
        missing = int(budget - quotas.sum())
        quotas[descending(remainders.astype(np.float64), rng)[:missing]] += 1
        return quotas
    if allocation != "equal":
        raise ValueError(f"allocation = {allocation!r}: must be 'equal' or 'proportional'")
    quotas = np.full(len(sizes), budget // len(sizes), dtype=np.int64)
    quotas[rng.permutation(len(sizes))[: budget % len(sizes)]] += 1
    quotas = np.asarray(np.minimum(quotas, sizes))
    while (deficit := int(budget - quotas.sum())) > 0:
        with_room = np.flatnonzero(quotas < sizes)
        quotas[rng.permutation(with_room)[:deficit]] += 1
    return quotas


def _check_length(what: str, length: int, images: int, known: bool) -> None:
    if length != images:
        origin = "given" if known else "returned by the task"
        raise ValueError(f"{length} {what} {origin} for {images} images: there must be one for each")
