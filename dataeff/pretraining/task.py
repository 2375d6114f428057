"""What pretraining leaves: a `PretextTask`, which scores, embeds and, for a clusterer, assigns images.

Source: spec initial_pools_active_learning, section 9.
"""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dataeff.data import ImageSource

Images = Tensor | ImageSource
"""A pool: float32 (N, C, H, W) in [0, 1], uint8 (N, C, H, W), or a split that is decoded a block at a time."""


@runtime_checkable
class PretextTask(Protocol):
    """A trained task. Answers depend on the image alone, neither on its neighbours nor on its place in the pool."""

    def loss_per_sample(self, images: Images) -> NDArray[np.float64]:
        """(N,): the task's loss for each image; the highest are the hardest."""

    def features(self, images: Images) -> NDArray[np.float32]:
        """(N, D) embeddings."""


@runtime_checkable
class Clusterer(PretextTask, Protocol):
    """A task that also sorts images into clusters."""

    n_clusters: int

    def assign(self, images: Images) -> NDArray[np.int64]:
        """(N,) cluster numbers in [0, n_clusters)."""
