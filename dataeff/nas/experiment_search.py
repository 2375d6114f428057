"""Architecture search as the method `nas_search`: search, then full training of what was found, then its artifact.

Source: spec ss_pcp_darts sections 2.1 and 9.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig
from dataeff.core.experiment import Experiment
from dataeff.core.runtime import Runtime
from dataeff.data import Preprocess, open_splits
from dataeff.nas import analysis
from dataeff.nas.architecture import architecture_parameters, parse_architecture
from dataeff.nas.differentiable import DifferentiableSearch
from dataeff.nas.evolution import EvolutionarySearch, RandomSearch
from dataeff.nas.experiment_train import EvaluationSettings, NasTrainConfig, NasTrainExperiment
from dataeff.nas.gated import GatedSearch
from dataeff.nas.routing import RoutingSearch
from dataeff.nas.search import Searcher, SearchTask
from dataeff.nas.settings import DIFFERENTIABLE, SearchSettings

SEARCHERS: dict[str, type[Searcher]] = {
    **dict.fromkeys(DIFFERENTIABLE, DifferentiableSearch),
    "random": RandomSearch,
    "nsga2": EvolutionarySearch,
    "proxyless": GatedSearch,
    "densenas": RoutingSearch,
}


class NasSearchConfig(SearchSettings):
    """Settings of `nas_search`: those of the search, and of the training that follows."""

    train: EvaluationSettings = EvaluationSettings()


class NasSearchExperiment(Experiment):
    """Searches, trains what was found from scratch, and exports it as an artifact of `nas_train`.

    A step is an epoch of the search (or a candidate network), then `train.report_every` mini-batches of training.

    Raises:
        ValueError: no validation images, or images that cannot be searched on.
    """

    method: ClassVar[str] = "nas_search"
    config_schema: ClassVar[type[ExperimentConfig]] = NasSearchConfig

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        assert isinstance(config, NasSearchConfig)
        self.config = config
        splits = open_splits(data)
        if not len(splits.val):
            raise ValueError(f"{data}: no validation images; leave val=0 out, or give more images")
        self.task = SearchTask(splits, Preprocess.fit(splits.train), runtime, config.seed)
        self.searcher = SEARCHERS[config.arm](self.task, config)
        self.training: NasTrainExperiment | None = None
        self.search_seconds = 0.0

    @property
    def total_steps(self) -> int:
        train = self.config.train
        return self.searcher.total_steps - (-train.stage.iterations // train.report_every)

    def train_step(self, step: int) -> Mapping[str, float]:
        if step < self.searcher.total_steps:
            started = time.perf_counter()
            metrics = dict(self.searcher.step(step))
            self.search_seconds += time.perf_counter() - started
            return {**metrics, "search_seconds": self.search_seconds}
        if self.training is None:
            self._start_training(self.searcher.architecture().model_dump(mode="json"))
        assert self.training is not None
        return {
            **self.training.step(),
            "params": float(architecture_parameters(self.training.model)),
            "search_seconds": self.search_seconds,
        }

    def _start_training(self, architecture: Mapping[str, Any]) -> None:
        settings = {name: getattr(self.config.train, name) for name in EvaluationSettings.model_fields}
        config = NasTrainConfig(seed=self.seed, genotype=parse_architecture(architecture), **settings)
        self.training = NasTrainExperiment(config, self.data, self.runtime, self.task.splits)

    def evaluate(self, split: str) -> dict[str, float]:
        """Of the trained network; of the super-network while the search goes on."""
        return self.searcher.evaluate(split) if self.training is None else self.training.evaluate(split)

    def state_dict(self) -> dict[str, Any]:
        training = self.training
        return {
            **super().state_dict(),
            "searcher": self.searcher.state_dict(),
            "search_seconds": self.search_seconds,
            "architecture": None if training is None else training.architecture.model_dump(mode="json"),
            "training": None if training is None else training.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.searcher.load_state_dict(state["searcher"])
        super().load_state_dict(state)
        self.search_seconds = float(state["search_seconds"])
        if state["training"] is not None:
            self._start_training(state["architecture"])
            assert self.training is not None
            self.training.load_state_dict(state["training"])

    def export(self, directory: str | Path) -> None:
        """The trained network, as an artifact of `nas_train` that holds its architecture."""
        if self.training is None:
            raise ValueError("the search has not ended: there is no trained network to export")
        self.training.export(directory)

    def plots(self, directory: str | Path) -> None:
        """The found cells, how they came about, and what `nas_train` draws."""
        analysis.write_evolution(self.searcher.history, Path(directory))
        if self.training is not None:
            self.training.plots(directory)

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        return NasTrainExperiment.load_predictor(artifact, device)
