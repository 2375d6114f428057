"""SCAN: neighbours in SimCLR's features get the same cluster, then confident images label themselves.

Source: spec initial_pools_active_learning, section 2.2 e.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.core.runtime import Runtime
from dataeff.data.subsets import IntArray
from dataeff.metrics.neighbours import nearest_neighbours
from dataeff.nn.workers import gather_over_workers, mean_over_workers
from dataeff.pretraining.deepcluster import number_of_clusters
from dataeff.pretraining.settings import ScanConfig
from dataeff.pretraining.simclr import SimCLR, SimCLRStage
from dataeff.pretraining.task import Images
from dataeff.pretraining.training import Context, PoolBatch, PretextModule, Stage, Update
from dataeff.pretraining.views import STRONG_DRAWS, WEAK_DRAWS, strong_view, weak_view

EPSILON = 1e-8
COLLAPSE = 0.5  # of log K; less entropy of the mean prediction is a collapse


def scan_loss(
    anchors: Tensor, neighbours: Tensor, entropy_weight: float, runtime: Runtime | None = None
) -> tuple[Tensor, Tensor]:
    """-mean log <p(x), p(k)> - lambda_H * H(mean p(x)), H in nats over the batch of all workers.

    Args:
        anchors, neighbours: logits (B, K).
        entropy_weight: lambda_H.

    Returns:
        The loss, and the first term alone.
    """
    first, second = anchors.float().softmax(1), neighbours.float().softmax(1)
    consistency = -(first * second).sum(1).clamp(min=EPSILON).log().mean()
    mean = mean_over_workers(first.mean(0), runtime)
    return consistency - entropy_weight * entropy(mean), consistency


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of a distribution (K,)."""
    clamped = probabilities.clamp(min=EPSILON)
    return -(clamped * clamped.log()).sum()


def balanced_weights(labels: Tensor, n_clusters: int) -> Tensor:
    """(B,) weights by inverse frequency within `labels` (B,), of mean 1; clusters without images are legal."""
    counts = torch.bincount(labels, minlength=n_clusters).clamp(min=1)
    weights = len(labels) / counts[labels].float()
    return weights / weights.mean()


class Scan(PretextModule):
    """SimCLR and a linear head on its trunk."""

    def __init__(self, config: ScanConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        self.config = config
        self.n_clusters = number_of_clusters(config.n_clusters, "scan")
        self.simclr = SimCLR(config.simclr, image_shape)
        self.head = nn.Linear(self.simclr.encoder.width, self.n_clusters)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        super().set_statistics(mean, std)
        self.simclr.set_statistics(mean, std)

    def stages(self, context: Context) -> list[Stage]:
        pretraining, clustering, labelling = (context._replace(stage=number) for number in range(3))
        return [
            SimCLRStage(self.simclr, pretraining),
            NeighbourStage(self, clustering),
            SelfLabelStage(self, labelling),
        ]

    def sample_features(self, x: Tensor) -> Tensor:
        """The trunk's output, which the head sees."""
        features: Tensor = self.simclr.encoder.trunk(self.normalise(x))
        return features

    def cluster_logits(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: Tensor = self.head(self.sample_features(x))
        return logits

    def sample_losses(self, x: Tensor) -> Tensor:
        """-log of the largest probability: how little the image belongs to one cluster."""
        return -self.cluster_logits(x).float().log_softmax(1).max(1).values

    def assign(self, images: Images) -> IntArray:
        """(N,) cluster of each image."""
        return self.answer(images, lambda x: self.cluster_logits(x).argmax(1)).astype(np.int64)


class ClusterNetwork(nn.Module):
    """What the second and third stage train: the trunk and the head, without SimCLR's projection."""

    def __init__(self, task: Scan) -> None:
        super().__init__()
        self.normalise, self.trunk, self.head = task.normalise, task.simclr.encoder.trunk, task.head

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: Tensor = self.head(self.trunk(self.normalise(x)))
        return logits


class _HeadStage(Stage):
    """What the second and third stage share: the network, and a watch over collapse."""

    def __init__(self, task: Scan, settings: Any, context: Context) -> None:
        super().__init__(settings, {"clusters": ClusterNetwork(task)}, context)
        self.task = task
        self.predicted: list[Tensor] = []

    def begin_epoch(self, epoch: int) -> Sequence[nn.Parameter]:
        self.predicted = []
        return ()

    def watch(self, logits: Tensor) -> None:
        """Keep the mean prediction of a mini-batch."""
        self.predicted.append(logits.detach().float().softmax(1).mean(0))

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Entropy of the epoch's mean prediction as a share of log K; a warning where it has collapsed."""
        mean = mean_over_workers(torch.stack(self.predicted).mean(0), self.context.runtime)
        share = float(entropy(mean)) / math.log(self.task.n_clusters)
        if share < COLLAPSE:
            warnings.warn(
                f"SCAN has collapsed: the mean prediction has {share:.2f} of the entropy of {self.task.n_clusters} "
                f"equal clusters (below {COLLAPSE}); raise entropy_weight, or lower the learning rate",
                stacklevel=2,
            )
        return {"entropy": share}


class NeighbourStage(_HeadStage):
    """Clustering: an image and one of its nearest neighbours should have the same cluster."""

    draws = 2 * WEAK_DRAWS + 1

    def __init__(self, task: Scan, context: Context) -> None:
        super().__init__(task, task.config.cluster, context)
        self.config = task.config.cluster
        count, others = self.config.neighbours, len(context.pool) - 1
        if count > others:
            raise ValueError(f"scan: neighbours = {count} must be from 1 to {others}, the number of other images")
        self.neighbours: Tensor = torch.empty(0, count, dtype=torch.int32)

    def begin(self) -> None:
        features = self.task.simclr.pool_features(self.context)
        self.neighbours = torch.from_numpy(nearest_neighbours(features, self.config.neighbours).astype(np.int32))

    def updates(self, batch: PoolBatch, networks: Mapping[str, nn.Module]) -> Iterator[Update]:
        column = (batch.draws[:, -1].cpu().double() * self.config.neighbours).long()
        chosen = self.neighbours[torch.from_numpy(batch.indices), column].long().numpy()
        near = self.context.runtime.to_device(self.context.pool.read(chosen))
        recipe = self.task.config.simclr.views
        first = weak_view(batch.images, batch.draws[:, :WEAK_DRAWS], recipe)
        second = weak_view(near, batch.draws[:, WEAK_DRAWS : 2 * WEAK_DRAWS], recipe)
        anchors, neighbours = networks["clusters"](torch.cat([first, second])).chunk(2)
        loss, consistency = scan_loss(anchors, neighbours, self.config.entropy_weight, self.context.runtime)
        self.watch(anchors)
        yield Update("clusters", loss, {"loss": loss, "consistency": consistency})

    def state(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.neighbours = state["neighbours"]


class SelfLabelStage(_HeadStage):
    """Self-labelling: the clusters of confident images, seen weakly augmented, teach strongly augmented copies."""

    draws = WEAK_DRAWS + STRONG_DRAWS

    def __init__(self, task: Scan, context: Context) -> None:
        super().__init__(task, task.config.selflabel, context)
        self.config = task.config.selflabel
        self.skipped = 0

    def begin_epoch(self, epoch: int) -> Sequence[nn.Parameter]:
        self.skipped = 0
        return super().begin_epoch(epoch)

    def updates(self, batch: PoolBatch, networks: Mapping[str, nn.Module]) -> Iterator[Update]:
        recipe, runtime = self.task.config.simclr.views, self.context.runtime
        self.task.eval()
        with torch.no_grad():
            weak = self.task.cluster_logits(weak_view(batch.images, batch.draws[:, :WEAK_DRAWS], recipe)).float()
        networks["clusters"].train()
        self.watch(weak)
        confidence, labels = weak.softmax(1).max(1)
        everyone = gather_over_workers(torch.where(confidence > self.config.threshold, labels, -1), runtime)
        confident = everyone >= 0
        if not bool(confident.any()):
            self.skipped += 1
            return
        weights = torch.zeros(len(everyone), device=weak.device)
        weights[confident] = balanced_weights(everyone[confident], self.task.n_clusters)
        own = slice(runtime.rank * len(labels), (runtime.rank + 1) * len(labels))
        strong = strong_view(batch.images, batch.draws[:, WEAK_DRAWS:], recipe)
        losses = F.cross_entropy(networks["clusters"](strong).float(), labels, reduction="none")
        # The mean over the confident images of all workers, when gradients are averaged over workers.
        loss = (losses * weights[own]).sum() * (runtime.world_size / float(confident.sum()))
        yield Update("clusters", loss, {"loss": loss, "confident": confident.float().mean()})

    def end_epoch(self, epoch: int) -> dict[str, float]:
        if self.skipped == self.iterations:
            raise ValueError(
                f"scan: no image was more certain than selflabel.threshold = {self.config.threshold:g} in a whole "
                "epoch; lower the threshold, or cluster for more epochs"
            )
        return {**super().end_epoch(epoch), "skipped_batches": float(self.skipped)}
