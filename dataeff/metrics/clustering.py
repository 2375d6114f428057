"""How well clusters agree with classes: accuracy under the best matching, NMI, ARI, purity.

Source: spec initial_pools_active_learning, section 5.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

IntArray = NDArray[np.int64]


def cluster_accuracy(predicted: IntArray, true: IntArray) -> float:
    """ACC: share of images whose cluster is matched to their class, under the best one-to-one matching (Hungarian).

    Args:
        predicted: int (N,) cluster of each image.
        true: int (N,) class of each image; the number of clusters and of classes may differ.

    Raises:
        ValueError: no images, or arrays of different lengths.

    Example:
        >>> cluster_accuracy(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1]))
        1.0
    """
    table = _counts(predicted, true)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / len(true))


def purity(predicted: IntArray, true: IntArray) -> float:
    """Share of images that are of the commonest class of their cluster; arguments as for `cluster_accuracy`."""
    return float(_counts(predicted, true).max(0).sum() / len(true))


def cluster_metrics(predicted: IntArray, true: IntArray) -> dict[str, float]:
    """`cluster_accuracy`, `nmi` (arithmetic mean of the entropies), `ari` and `purity`."""
    return {
        "cluster_accuracy": cluster_accuracy(predicted, true),
        "nmi": float(normalized_mutual_info_score(true, predicted)),
        "ari": float(adjusted_rand_score(true, predicted)),
        "purity": purity(predicted, true),
    }


def _counts(predicted: IntArray, true: IntArray) -> NDArray[np.int64]:
    """(classes, clusters) images of each pair."""
    if len(predicted) != len(true) or not len(true):
        raise ValueError(f"clusters and classes need one entry an image, got {len(predicted)} and {len(true)}")
    table: NDArray[np.int64] = contingency_matrix(true, predicted)
    return table
