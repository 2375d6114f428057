"""Architecture search as the method `nas_search`: search, then full training of what was found, then its artifact.

Source: spec ss_pcp_darts sections 2.1 and 9.
"""

import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig
from dataeff.core.experiment import Experiment
from dataeff.core.run import replace_text
from dataeff.core.runtime import Runtime
from dataeff.data import ImageSource, Preprocess, Splits, absolute_spec, open_images, open_splits
from dataeff.data.fingerprint import text_fingerprint
from dataeff.nas import analysis
from dataeff.nas.architecture import architecture_parameters, parse_architecture
from dataeff.nas.differentiable import DifferentiableSearch
from dataeff.nas.evolution import EvolutionarySearch, RandomSearch
from dataeff.nas.experiment_train import EvaluationSettings, NasTrainConfig, NasTrainExperiment
from dataeff.nas.gated import GatedSearch
from dataeff.nas.routing import RoutingSearch
from dataeff.nas.search import Searcher, SearchTask
from dataeff.nas.settings import DIFFERENTIABLE, SearchSettings
from dataeff.pretraining.pool import Pool

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
    search_data: str | None = Field(
        None,
        description="data set whose training images the search sees without their labels (ss_factor 1), which it need "
        "not have, such as all of parquet:DIR beside --data 'parquet:DIR?labels=500'; none: those of --data",
    )

    @field_validator("search_data")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else absolute_spec(value)

    @model_validator(mode="after")
    def _label_free(self) -> "NasSearchConfig":
        if self.search_data is not None and self.ss_factor < 1:
            raise ValueError("search_data is for searches that read no label: set ss_factor to 1, or leave it out")
        return self


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
        pool = splits.train if config.search_data is None else self.open_pool(config.search_data, splits)
        self.task = SearchTask(pool, splits, Preprocess.fit(pool), runtime, config.seed)
        self.searcher = SEARCHERS[config.arm](self.task, config)
        self.training: NasTrainExperiment | None = None
        self.search_seconds = 0.0
        self.peak_memory = 0

    @cached_property
    def data_fingerprint(self) -> str:  # type: ignore[override]
        labelled = self.task.splits.fingerprint
        if self.config.search_data is None:
            return labelled
        return text_fingerprint(labelled, Pool(self.task.pool).fingerprint())

    def open_pool(self, text: str, splits: Splits) -> ImageSource:
        """The images of `search_data`."""
        pool = open_images(text)
        if pool.image_shape != splits.image_shape:
            raise ValueError(
                f"search_data {text}: its images are {pool.image_shape}, those of {self.data} are {splits.image_shape} "
                "(channels, height, width); add size= or channels= to one of them"
            )
        return pool

    @property
    def total_steps(self) -> int:
        train = self.config.train
        return self.searcher.total_steps - (-train.stage.iterations // train.report_every)

    def train_step(self, step: int) -> Mapping[str, float]:
        if step < self.searcher.total_steps:
            started = time.perf_counter()
            metrics = dict(self.searcher.step(step))
            self.search_seconds += time.perf_counter() - started
            self.peak_memory = max(self.peak_memory, self.runtime.peak_memory())
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
            "peak_memory": self.peak_memory,
            "architecture": None if training is None else training.architecture.model_dump(mode="json"),
            "training": None if training is None else training.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.searcher.load_state_dict(state["searcher"])
        super().load_state_dict(state)
        self.search_seconds = float(state["search_seconds"])
        self.peak_memory = int(state["peak_memory"])
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
        """The found cells, how they came about and what that cost (`search.json`), and what `nas_train` draws."""
        analysis.write_evolution(self.searcher.history, Path(directory))
        replace_text(Path(directory) / "search.json", json.dumps(self.search_cost(), indent=2) + "\n")
        if self.training is not None:
            self.training.plots(directory)

    def search_cost(self) -> dict[str, Any]:
        """Of the search alone, without the training: `device_days` are seconds / 86,400 times workers (GPU-days on a
        GPU), `peak_memory_mib` is `Runtime.peak_memory` of the main worker."""
        return {
            "device": self.runtime.device.type,
            "workers": self.runtime.world_size,
            "seconds": self.search_seconds,
            "device_days": self.search_seconds * self.runtime.world_size / 86_400,
            "peak_memory_mib": self.peak_memory / 2**20,
        }

    @classmethod
    def compare(cls, runs: Sequence[Path], directory: Path) -> None:
        """As `nas_train` does."""
        NasTrainExperiment.compare(runs, directory)

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        return NasTrainExperiment.load_predictor(artifact, device)
