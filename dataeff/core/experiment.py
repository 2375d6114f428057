"""The protocol that every method implements: one run, advanced one reportable step at a time."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig
from dataeff.core.runtime import Runtime


class LabelsNeeded(ValueError):
    """A step cannot be taken before people have labelled some images of the training split.

    Attributes:
        indices: which ones.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = list(indices)
        super().__init__(f"{len(self.indices)} images wait for their labels; give them with python -m ray_jobs.label")


class Experiment(ABC):
    """One run of one method on one data set.

    The same object is driven by `dataeff.train`, by a Ray Train worker, by a Tune trial and by a test. Before every
    step all global random generators are seeded from (seed, step, rank), so a run that is resumed at a step boundary
    draws what the undisturbed run draws, on any number of workers, without a generator state in the checkpoint.

    Args:
        config: the method's settings.
        data: the data set's name, such as "digits" or "parquet:DIR?labels=500".
        runtime: device and processes.
    """

    config_schema: ClassVar[type[ExperimentConfig]]

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        self.seed = config.seed
        self.data = data
        self.runtime = runtime
        self.steps_done = 0
        seed_everything(self.seed)

    @property
    def data_fingerprint(self) -> str:
        """Of what the data holds, so that a run is not continued on other data; empty: it may change meanwhile."""
        return ""

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """How many calls of `step` complete the run."""

    def step(self) -> dict[str, float]:
        """Train for one reportable step and return its metrics, equal on every rank."""
        seed_everything(self.seed, self.steps_done + 1, self.runtime.rank)
        metrics = self.train_step(self.steps_done)
        self.steps_done += 1
        return dict(metrics)

    @abstractmethod
    def train_step(self, step: int) -> Mapping[str, float]:
        """The work of step number `step` (from 0)."""

    @abstractmethod
    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics on the "train", "val" or "test" split, equal on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: tensors and plain Python values only."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: the state belongs to another network or configuration.
        """
        self.steps_done = int(state["steps_done"])

    @abstractmethod
    def export(self, directory: str | Path) -> None:
        """Write the servable artifact into `directory`."""

    def plots(self, directory: str | Path) -> None:  # noqa: B027 - optional
        """Write the method's own figures of the finished run as PNG files."""

    @staticmethod
    def data_opener() -> Callable[[str], object] | None:
        """What opens the data's name where `dataeff.data.open_splits` does not; commands look at data before they
        start."""
        return None

    @classmethod  # noqa: B027 - optional
    def compare(cls, runs: Sequence[Path], directory: Path) -> None:
        """Write the method's figures over several finished runs (their folders), such as a sweep's trials, as PNG files
        and their data."""

    @classmethod
    @abstractmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        """A predictor from an artifact of this method."""


def seed_everything(*numbers: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch from a tuple of whole numbers."""
    state = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))
