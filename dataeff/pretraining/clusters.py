"""k-means on a trained task's features: clusters for tasks that have none of their own.

Source: spec initial_pools_active_learning, section 2.2 d.
"""

import numpy as np
from numpy.typing import NDArray

from dataeff.data.subsets import IntArray
from dataeff.metrics.kmeans import assign_to_centres, kmeans
from dataeff.metrics.neighbours import MEMORY_MIB
from dataeff.pretraining.task import Images, PretextTask


class KMeansOnFeatures:
    """A `Clusterer` by the nearest of K centres in the feature space of `task`.

    Attributes:
        centres: float32 (K, D).
        spread: mean squared distance of the pool's images to their centres.
    """

    def __init__(self, task: PretextTask, centres: NDArray[np.float32], spread: float) -> None:
        self.task, self.centres, self.spread = task, centres, spread
        self.n_clusters = len(centres)

    @classmethod
    def fit(
        cls,
        task: PretextTask,
        images: Images,
        n_clusters: int,
        seed: int,
        restarts: int = 4,
        memory_mib: float = MEMORY_MIB,
    ) -> "KMeansOnFeatures":
        """Cluster the features of a pool; arguments and errors as for `dataeff.metrics.kmeans.kmeans`."""
        return cls.fit_features(task, task.features(images), n_clusters, seed, restarts, memory_mib)

    @classmethod
    def fit_features(
        cls,
        task: PretextTask,
        features: NDArray[np.float32],
        n_clusters: int,
        seed: int,
        restarts: int = 4,
        memory_mib: float = MEMORY_MIB,
    ) -> "KMeansOnFeatures":
        """The same from features (N, D) that are already there."""
        found = kmeans(features, n_clusters, seed, restarts, memory_mib=memory_mib)
        return cls(task, np.asarray(found.centres, np.float32), found.inertia / len(features))

    def loss_per_sample(self, images: Images) -> NDArray[np.float64]:
        """(N,) the task's own loss."""
        return self.task.loss_per_sample(images)

    def features(self, images: Images) -> NDArray[np.float32]:
        """(N, D) of the task."""
        return self.task.features(images)

    def assign(self, images: Images) -> IntArray:
        """(N,) the nearest centre of each image."""
        return assign_to_centres(self.task.features(images), self.centres)
