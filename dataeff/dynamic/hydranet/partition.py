"""Which classes belong to which branch (spec hydranet section 2.2)."""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

RESTARTS = 10
Order = Literal["index", "distance"]


class BalancedClusterPartition:
    """Groups of equal size of similar classes: k-means centres pick classes in rounds, one each per round.

    Args:
        order: within a round, centres choose by number ("index"), or the pair of centre and class that is closest
            chooses first ("distance").
        strict: refuse a number of classes that the branches do not divide.

    Attributes:
        centres_: float32 (n, D), after `fit`.

    Example:
        part = BalancedClusterPartition().fit(class_features, n_branches=20, seed=0)
    """

    def __init__(self, order: Order = "index", strict: bool = False):
        self.order, self.strict = order, strict
        self.centres_: Tensor

    def fit(self, class_features: Tensor, n_branches: int, seed: int) -> Tensor:
        """Mean features of the classes (K, D) -> the branch of each class, int64 (K,).

        Where the branches do not divide K, the sizes of groups differ by one (with a warning). Classes whose features
        are all the same are dealt out in turn (with a warning).

        Raises:
            ValueError: fewer classes than branches, features that are not finite, or `strict` and sizes that differ.
        """
        count = len(class_features)
        check_counts(count, n_branches, self.strict)
        features = class_features.detach().double().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        if len(bad):
            raise ValueError(
                f"the mean features of classes {bad.tolist()[:10]} are not finite; train the classifier anew"
            )
        if len(np.unique(features, axis=0)) < n_branches:
            warnings.warn(
                f"fewer than {n_branches} different class features: k-means has no use, classes are dealt out in turn",
                stacklevel=2,
            )
            self.centres_ = class_features[:n_branches].detach().float().cpu().clone()
            return torch.arange(count) % n_branches
        # scikit-learn re-seeds clusters that run empty.
        means = KMeans(n_branches, n_init=RESTARTS, random_state=seed).fit(features)
        self.centres_ = torch.from_numpy(means.cluster_centers_).float()
        distances = np.linalg.norm(features[:, None] - means.cluster_centers_[None], axis=2)
        return torch.from_numpy(assign_in_rounds(distances, self.order))


def assign_in_rounds(distances: NDArray[np.float64], order: Order = "index") -> NDArray[np.int64]:
    """Distances (K, n) of classes to centres -> the centre that picked each class, int64 (K,).

    In every round each centre picks the closest class that is left.
    """
    count, n = distances.shape
    left = distances.copy()
    part = np.full(count, -1, dtype=np.int64)
    while (part < 0).any():
        waiting = list(range(n))
        while waiting and (part < 0).any():
            centre = waiting[0] if order == "index" else waiting[int(left[:, waiting].min(0).argmin())]
            chosen = int(left[:, centre].argmin())
            part[chosen] = centre
            left[chosen] = np.inf
            waiting.remove(centre)
    return part


def random_partition(num_classes: int, n_branches: int, seed: int) -> Tensor:
    """Random groups whose sizes differ by at most one, int64 (K,)."""
    check_counts(num_classes, n_branches)
    permutation = torch.from_numpy(np.random.default_rng(seed).permutation(num_classes))
    part = torch.empty(num_classes, dtype=torch.int64)
    part[permutation] = torch.arange(num_classes) % n_branches
    return part


def check_counts(num_classes: int, n_branches: int, strict: bool = False) -> None:
    """Refuse more branches than classes; warn about, or with `strict` refuse, groups of different sizes."""
    if not 1 <= n_branches <= num_classes:
        raise ValueError(f"n_branches = {n_branches} must be from 1 to the number of classes, {num_classes}")
    if num_classes % n_branches:
        message = f"{num_classes} classes on {n_branches} branches: sizes of groups differ by one"
        if strict:
            raise ValueError(f"{message}; choose n_branches that divides the number of classes")
        warnings.warn(message, stacklevel=3)


@torch.no_grad()
def class_mean_features(
    extract: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    per_class: int = 50,
) -> Tensor:
    """Mean features of the first `per_class` images of every class, float64 (K, D).

    Args:
        extract: images (B, C, H, W) -> features (B, D); a trained classifier in evaluation mode without its last layer
            ("penultimate", the default of the spec) or with it ("logits").
        batches: pairs of images and labels.

    Raises:
        ValueError: classes without images, naming them.
    """
    sums: Tensor | None = None
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for images, labels in batches:
        labels_ = labels.cpu()
        # Place of each image among those of its class so far, this one included.
        places = torch.nn.functional.one_hot(labels_, num_classes).cumsum(0).gather(1, labels_[:, None])[:, 0]
        used = places + counts[labels_] <= per_class
        if not bool(used.any()):
            continue
        features = extract(images[used.to(images.device)]).double().cpu()
        if sums is None:
            sums = features.new_zeros(num_classes, features.shape[1])
        sums.index_add_(0, labels_[used], features)
        counts += torch.bincount(labels_[used], minlength=num_classes)
    empty = (counts == 0).nonzero().view(-1).tolist()
    if sums is None or empty:
        raise ValueError(f"classes without training images have no mean features: {empty[:10]} ({len(empty)} classes)")
    return sums / counts[:, None]


def fingerprint(features: Tensor) -> str:
    """Digest of class features."""
    return hashlib.sha256(features.double().contiguous().numpy().tobytes()).hexdigest()
