"""A trained task behind the `Predictor` protocol: clusters as classes, and its embeddings and losses."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataeff.core.artifact import Card
from dataeff.nn.predictor import Answer, NetworkPredictor
from dataeff.pretraining.clusters import KMeansOnFeatures
from dataeff.pretraining.task import Clusterer
from dataeff.pretraining.training import PretextModule

CENTRES, SPREAD = "kmeans.centres", "kmeans.spread"


class PretextPredictor(NetworkPredictor):
    """Sorts images into clusters; see `dataeff.core.artifact.Predictor`. Also a `Clusterer`.

    Args:
        card: of the artifact.
        device: "cpu", "cuda", ...
        task: trained; moved to `device`.
        on_features: k-means of a task that has no clusters of its own.
    """

    def __init__(self, card: Card, device: str, task: PretextModule, on_features: KMeansOnFeatures | None) -> None:
        super().__init__(card, device, [], self._clusters)
        self.task = task.to(device).eval()
        self.on_features = on_features
        self.n_clusters = len(card.classes)

    def _clusters(self, x: Tensor, budget: Tensor | None) -> Answer:
        if self.on_features is None:
            logits: Tensor = self.task.cluster_logits(x)  # type: ignore[operator]
        else:
            # Responsibilities of equal round Gaussians with the variance that k-means has left.
            features = self.task.sample_features(x).float()
            centres = torch.from_numpy(self.on_features.centres).to(features)
            variance = max(self.on_features.spread / features.shape[1], 1e-12)
            logits = -torch.cdist(features, centres).square() / (2 * variance)
        macs = torch.full((len(x),), self.card.cost["macs"], dtype=torch.float64)
        return logits, macs, torch.empty(len(x), 0, dtype=torch.bool)

    def loss_per_sample(self, inputs: Tensor) -> NDArray[np.float64]:
        """Inputs float32 (N, C, H, W) in [0, 1], as `preprocess` makes them -> the task's loss (N,) of each."""
        return self.task.loss_per_sample(inputs)

    def features(self, inputs: Tensor) -> NDArray[np.float32]:
        """(N, D) embeddings."""
        return self.task.features(inputs)

    def assign(self, inputs: Tensor) -> NDArray[np.int64]:
        """(N,) clusters."""
        clusterer = self.task if self.on_features is None else self.on_features
        assert isinstance(clusterer, Clusterer)
        return clusterer.assign(inputs)
