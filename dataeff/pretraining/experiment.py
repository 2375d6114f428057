"""Self-supervised pretraining as the method `pretrain`: any task on the training split, its labels unread.

Source: spec initial_pools_active_learning, sections 2.2 and 9.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dataeff.core.artifact import Artifact, Card, Predictor, save_artifact, versions
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.core.experiment import Experiment
from dataeff.core.runtime import Runtime
from dataeff.data import Preprocess, open_splits
from dataeff.metrics.clustering import cluster_metrics
from dataeff.metrics.cost import count_macs, parameters
from dataeff.pretraining.clusters import KMeansOnFeatures
from dataeff.pretraining.fit import build_trainer, restore_task
from dataeff.pretraining.predictor import CENTRES, SPREAD, PretextPredictor
from dataeff.pretraining.settings import PretextSettings
from dataeff.pretraining.task import Clusterer
from dataeff.pretraining.training import Context, PretextModule


class PretrainConfig(PretextSettings, ExperimentConfig):
    """Settings of `pretrain`: which task, and those of every task."""


class PretrainExperiment(Experiment):
    """Trains a task on the training images; a step is an epoch of one of its stages.

    Tasks that do not cluster get k-means on their features at the end, with as many clusters as the data has classes,
    so that every artifact sorts images. Labels are read only to say how well clusters and classes agree.
    """

    method: ClassVar[str] = "pretrain"
    config_schema: ClassVar[type[ExperimentConfig]] = PretrainConfig
    config: PretrainConfig

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        assert isinstance(config, PretrainConfig)
        self.config = config
        self.splits = open_splits(data)
        settings = config.chosen(len(self.splits.classes))
        self.trainer = build_trainer(settings, self.splits.train, config.seed, runtime)
        self.task: PretextModule = self.trainer.task
        self.on_features: KMeansOnFeatures | None = None

    @property
    def total_steps(self) -> int:
        return self.trainer.total_steps

    def train_step(self, step: int) -> Mapping[str, float]:
        metrics = self.trainer.step()
        if not self.trainer.finished:
            return metrics
        if not isinstance(self.task, Clusterer):
            context = Context(self.trainer.pool, self.runtime, self.seed)
            features = self.task.pool_features(context)
            self.on_features = KMeansOnFeatures.fit_features(
                self.task, features, min(len(self.splits.classes), len(features)), self.seed
            )
        if not len(self.splits.val):
            return metrics
        return {**metrics, **{f"val_{name}": value for name, value in self.evaluate("val").items()}}

    @property
    def clusterer(self) -> Clusterer:
        """What sorts images, once training is over."""
        clusterer = self.task if isinstance(self.task, Clusterer) else self.on_features
        if clusterer is None or not self.trainer.finished:
            raise ValueError("the pretraining is not finished: there are no clusters yet")
        return clusterer

    def evaluate(self, split: str) -> dict[str, float]:
        """Mean loss of the images of a split, and how well their clusters agree with their classes."""
        source = getattr(self.splits, split)
        context = Context(self.trainer.pool, self.runtime, self.seed)
        share = source.subset(context.own_share(len(source)))
        losses = context.gather_shares(torch.from_numpy(self.clusterer.loss_per_sample(share)), len(source))
        clusters = context.gather_shares(torch.from_numpy(self.clusterer.assign(share)), len(source))
        return {"loss": float(losses.mean()), **cluster_metrics(clusters.cpu().numpy(), source.labels)}

    def state_dict(self) -> dict[str, Any]:
        found = self.on_features
        return {
            **super().state_dict(),
            "trainer": self.trainer.state_dict(),
            "centres": None if found is None else torch.from_numpy(found.centres),
            "spread": None if found is None else found.spread,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        super().load_state_dict(state)
        if state["centres"] is not None:
            self.on_features = KMeansOnFeatures(self.task, state["centres"].numpy(), float(state["spread"]))

    def export(self, directory: str | Path) -> None:
        """Evaluate on the test split (on all workers) and write the artifact (on the main one)."""
        metrics = self.evaluate("test")
        if not self.runtime.is_main:
            return
        channels, height, width = self.splits.image_shape
        macs = count_macs(_Embedding(self.task), (channels, height, width)).total
        pixels = Preprocess(channels=channels, size=(height, width), mean=(0.0,) * channels, std=(1.0,) * channels)
        card = Card(
            method=self.method,
            classes=[f"cluster {number}" for number in range(self.clusterer.n_clusters)],
            input_shape=self.splits.image_shape,
            preprocess=pixels.to_dict(),
            metrics={f"test_{name}": value for name, value in metrics.items()},
            cost={"macs": macs, "full_macs": macs, "params": parameters(self.task)},
            data={"name": self.splits.name, "fingerprint": self.splits.fingerprint},
            versions=versions(),
        )
        state: dict[str, Tensor] = self.task.state_dict()
        if self.on_features is not None:
            state[CENTRES] = torch.from_numpy(self.on_features.centres)
            state[SPREAD] = torch.tensor(self.on_features.spread, dtype=torch.float64)
        save_artifact(directory, card, self.config, state)

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(PretrainConfig, artifact.config, "artifact")
        state = dict(artifact.state)
        centres, spread = state.pop(CENTRES, None), state.pop(SPREAD, None)
        settings = config.chosen(len(artifact.card.classes))
        task = restore_task(settings, artifact.card.input_shape, state)
        found = None
        if centres is not None and spread is not None:
            found = KMeansOnFeatures(task, np.asarray(centres), float(spread))
        return PretextPredictor(artifact.card, device, task, found)


class _Embedding(nn.Module):
    """The part of a task that embeds, for counting its cost."""

    def __init__(self, task: PretextModule) -> None:
        super().__init__()
        self.task = task

    def forward(self, x: Tensor) -> Tensor:
        return self.task.sample_features(x)
