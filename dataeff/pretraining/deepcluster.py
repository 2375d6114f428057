"""DeepCluster: k-means on the network's own features gives the labels that it is then trained on.

Source: spec initial_pools_active_learning, section 2.2 h.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dataeff.data.subsets import IntArray
from dataeff.metrics.kmeans import assign_to_centres, kmeans
from dataeff.pretraining.networks import build_encoder
from dataeff.pretraining.settings import DeepClusterConfig
from dataeff.pretraining.simclr import unit
from dataeff.pretraining.task import Images
from dataeff.pretraining.training import Context, PoolBatch, PretextModule, Stage, Update, initial_weights
from dataeff.pretraining.views import WEAK_DRAWS, weak_view

VARIANCE_FLOOR = 1e-5


def whitening(features: NDArray[np.float32], dimensions: int) -> tuple[Tensor, Tensor]:
    """PCA-whitening of features (N, D).

    Returns:
        Mean (D,) and projection (D, d) with d = min(dimensions, D), such that (features - mean) @ projection has
        uncorrelated columns of variance 1; directions of no variance stay near 0.
    """
    values = torch.from_numpy(features).double()
    mean = values.mean(0)
    covariance = (values - mean).T @ (values - mean) / len(values)
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0), directions.flip(1)
    count = min(dimensions, len(variances))
    scale = (variances[:count].clamp(min=0) + VARIANCE_FLOOR * variances[0].clamp(min=VARIANCE_FLOOR)).rsqrt()
    return mean.float(), (directions[:, :count] * scale).float()


class DeepCluster(PretextModule):
    """Encoder, the head of the current pseudo-labels, and the whitening and centres of the final clusters.

    Raises:
        ValueError: the number of clusters is left open.
    """

    centre: Tensor
    projection: Tensor
    centres: Tensor

    def __init__(self, config: DeepClusterConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        self.config = config
        self.n_clusters = number_of_clusters(config.n_clusters, "deepcluster")
        self.pseudo_clusters = config.pseudo_clusters or self.n_clusters
        self.encoder = build_encoder(config.encoder, image_shape[0])
        self.head = nn.Linear(self.encoder.proj_dim, self.pseudo_clusters)
        self.register_buffer("centre", torch.empty(0))
        self.register_buffer("projection", torch.empty(0, 0))
        self.register_buffer("centres", torch.empty(0, 0))

    def stages(self, context: Context) -> list[Stage]:
        return [DeepClusterStage(self, context)]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, pseudo_clusters)."""
        logits: Tensor = self.head(F.relu(self.encoder(self.normalise(x))))
        return logits

    def sample_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.encoder(self.normalise(x))
        return features

    def whitened(self, x: Tensor) -> Tensor:
        """Images -> unit features (B, d), whitened as the final clusters are."""
        return unit((self.sample_features(x).float() - self.centre) @ self.projection)

    def squared_distances(self, x: Tensor) -> Tensor:
        """Images -> squared distances (B, K) to the clusters' centres."""
        return torch.cdist(self.whitened(x), self.centres, compute_mode="donot_use_mm_for_euclid_dist").square()

    def sample_losses(self, x: Tensor) -> Tensor:
        """Squared distance to the nearest centre."""
        return self.squared_distances(x).min(1).values

    def assign(self, images: Images) -> IntArray:
        """(N,) cluster of each image."""
        return self.answer(images, lambda x: self.squared_distances(x).argmin(1)).astype(np.int64)

    def cluster_logits(self, x: Tensor) -> Tensor:
        """Images -> (B, K), highest for the nearest centre."""
        return -self.squared_distances(x)

    def cluster(self, context: Context, n_clusters: int, *numbers: int) -> IntArray:
        """Whiten the pool's features, cluster them, and keep whitening and centres; the clusters of the pool."""
        features = self.pool_features(context)
        self.centre, self.projection = (part.to(self.device) for part in whitening(features, self.config.pca_dim))
        flat = unit((torch.from_numpy(features).to(self.device) - self.centre) @ self.projection).cpu().numpy()
        seed = int(context.generator(*numbers).integers(2**31))
        self.centres = torch.from_numpy(kmeans(flat, n_clusters, seed).centres).float().to(self.device)
        return assign_to_centres(flat, self.centres.cpu().numpy())


def number_of_clusters(count: int | None, task: str) -> int:
    """The number of clusters, which a caller who knows the classes has filled in.

    Raises:
        ValueError: nobody has.
    """
    if count is None:
        raise ValueError(f"{task}: n_clusters is not set; give the number of classes (see with_clusters)")
    return count


class DeepClusterStage(Stage):
    """Every `reassign` epochs: cluster the features and put a fresh head on the network; train it on the clusters."""

    draws = WEAK_DRAWS

    def __init__(self, task: DeepCluster, context: Context) -> None:
        if max(task.pseudo_clusters, task.n_clusters) > len(context.pool):
            raise ValueError(f"{max(task.pseudo_clusters, task.n_clusters)} clusters of {len(context.pool)} images")
        super().__init__(task.config, {"network": task}, context)
        self.task, self.config = task, task.config
        self.labels: IntArray = np.empty(0, np.int64)

    def begin_epoch(self, epoch: int) -> list[nn.Parameter]:
        if epoch % self.config.reassign:
            return []
        self.labels = self.task.cluster(self.context, self.task.pseudo_clusters, 1, epoch)
        head = self.task.head
        with initial_weights(self.context.seed, self.context.stage, epoch), torch.no_grad():
            head.reset_parameters()
        return list(head.parameters())

    def order(self, epoch: int) -> IntArray:
        """Places are filled uniformly over the clusters that have images, then uniformly over a cluster's images."""
        generator = self.context.generator(2, epoch)
        present = np.unique(self.labels)
        members = {cluster: np.flatnonzero(self.labels == cluster) for cluster in present.tolist()}
        chosen = generator.choice(present, self.iterations * self.batch_size)
        places = generator.random(len(chosen))
        return np.array([members[c][int(u * len(members[c]))] for c, u in zip(chosen.tolist(), places, strict=True)])

    def updates(self, batch: PoolBatch, networks: Mapping[str, nn.Module]) -> Iterator[Update]:
        logits = networks["network"](weak_view(batch.images, batch.draws, self.config.views)).float()
        targets = torch.from_numpy(self.labels[batch.indices]).to(logits.device)
        loss = F.cross_entropy(logits, targets)
        accuracy = (logits.detach().argmax(1) == targets).float().mean()
        yield Update("network", loss, {"loss": loss, "accuracy": accuracy})

    def end_epoch(self, epoch: int) -> dict[str, float]:
        sizes = np.bincount(self.labels, minlength=self.task.pseudo_clusters)
        return {"largest_cluster": float(sizes.max() / sizes.sum())}

    def finish(self) -> None:
        self.task.cluster(self.context, self.task.n_clusters, 3)

    def state(self) -> dict[str, Any]:
        return {"labels": torch.from_numpy(self.labels)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.labels = state["labels"].numpy()
