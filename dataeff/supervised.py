"""Supervised image classification in stages of SGD: what the experiments of several methods share.

A method says how its network is built, what a mini-batch costs, and how the network answers; streams, optimiser,
learning rates, gradients that are not finite, evaluation on all workers, checkpoints and artifacts are here, once.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from dataeff.core.artifact import Card, save_artifact, versions
from dataeff.core.config import Config, ExperimentConfig
from dataeff.core.experiment import Experiment
from dataeff.core.runtime import Runtime
from dataeff.data import Augment, Batch, ImageSource, Preprocess, Splits, TrainStream, eval_batches, open_splits
from dataeff.metrics.cost import parameters

MAX_BAD_STEPS = 10
EVAL_BATCH = 256


class StageConfig(Config):
    """One stage of training with SGD. Defaults: the CIFAR recipe of the ResNet paper."""

    iterations: int = Field(64_000, ge=0, description="mini-batches; 0 leaves the stage out")
    batch: int = Field(128, ge=2, description="images in a mini-batch over all workers")
    lr: float = Field(0.1, gt=0, le=10, description="learning rate")
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0, le=1)
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = Field(
        (0.5, 0.75), description="fractions of the stage where lr drops tenfold (step)"
    )
    warmup_iterations: int = Field(0, ge=0, description="mini-batches at warmup_lr; 400 for depth 110")
    warmup_lr: float = Field(0.01, gt=0, le=10)

    @field_validator("milestones")
    @classmethod
    def _ordered_fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(value) or any(not 0 < fraction < 1 for fraction in value):
            raise ValueError(f"milestones must be ascending fractions between 0 and 1, got {list(value)}")
        return value

    def lr_at(self, iteration: int) -> float:
        """Learning rate of mini-batch number `iteration`, from 0."""
        if iteration < self.warmup_iterations:
            return self.warmup_lr
        progress = iteration / self.iterations
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * 0.1 ** sum(progress >= milestone for milestone in self.milestones)


class SupervisedConfig(ExperimentConfig):
    """Settings that every supervised experiment has."""

    clip_norm: float | None = Field(None, gt=0, description="bound on the gradient's norm; 5 in small runs")
    augment: Literal["none", "shift", "shift_flip", "imagenet"] = Field(
        "shift_flip", description="shift: no mirroring, for digits"
    )
    report_every: int = Field(1000, ge=1, description="mini-batches in a step")


@dataclass
class Answers:
    """A network's answers to B images: logits (B, K), multiply-adds (B,) float64, and numbers per image (B,) whose
    means are metrics."""

    logits: Tensor
    macs: Tensor
    means: dict[str, Tensor] = field(default_factory=dict)


class SupervisedExperiment(Experiment):
    """Trains a classifier stage by stage. A step is `report_every` mini-batches of a stage; the network is reported at
    the fixed end of training, never at its best validation step.

    Raises:
        ValueError: the data has no validation images.
    """

    method: ClassVar[str]
    config: SupervisedConfig

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        assert isinstance(config, SupervisedConfig)
        self.config = config
        self.splits = self.open_data(data)
        if not len(self.splits.val):
            raise ValueError(f"{data}: no validation images; leave val=0 out, or give more images")
        self.preprocess = self.fit_preprocess()
        self.num_classes = len(self.splits.classes)
        self.in_channels = self.splits.image_shape[0]
        self.height, self.width = self.preprocess.size
        self.model = self.build_model()
        runtime.place(self.model)
        self.stages = list(self.stage_settings())
        self.network: nn.Module = self.model
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_stage = -1
        self.stream: TrainStream | None = None
        self.bad_steps = 0

    # --- what a method says ---------------------------------------------------------------------------------------

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The network, from `config`, `num_classes`, `in_channels`, `height` and `width`."""

    @abstractmethod
    def stage_settings(self) -> Sequence[StageConfig]:
        """The stages in order; one without iterations is left out."""

    @abstractmethod
    def full_macs(self) -> float:
        """Multiply-adds of the dense network for one image, which `reduction` is measured against."""

    @abstractmethod
    def signature(self) -> str:
        """What a checkpoint must agree with: architecture, classes, input."""

    @abstractmethod
    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a mini-batch, by `self.network`, and detached numbers that are reported as train_*."""

    @abstractmethod
    def answer(self, batch: Batch) -> Answers:
        """Answers in evaluation mode, without gradient."""

    def open_data(self, data: str) -> Splits:
        """The splits that are trained and evaluated on."""
        return open_splits(data)

    def fit_preprocess(self) -> Preprocess:
        """How images become the network's input."""
        return Preprocess.fit(self.splits.train)

    def build_optimizer(self, stage: int) -> torch.optim.Optimizer:
        """The optimiser of a stage; its learning rate is set anew for every mini-batch."""
        settings = self.stages[stage]
        return torch.optim.SGD(
            self.parameter_groups(stage),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )

    def begin_stage(self, stage: int) -> None:
        """A stage starts; not called when a run goes on within it."""

    def prepare_stage(self, stage: int) -> None:
        """Before a stage is trained, also after a resume: which parameters learn."""

    def parameter_groups(self, stage: int) -> Iterable[Any]:
        """Parameters, or dicts of them that may hold `lr_scale` (times the stage's rate) and `weight_decay`."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def train_mode(self, stage: int) -> None:
        """Training mode before the mini-batches of a step."""
        self.network.train()

    def after_backward(self, stage: int) -> None:
        """Gradients are there, equal on all workers, and not yet applied."""

    def after_update(self, stage: int, iteration: int) -> None:
        """A mini-batch is done."""

    def end_stage(self, stage: int) -> None:
        """A stage is done."""

    def train_source(self, stage: int) -> ImageSource:
        """The images that a stage trains on."""
        return self.splits.train

    def served_parameters(self) -> int:
        """Trainable scalars of the network that the artifact serves."""
        return parameters(self.model)

    def extra_metrics(self) -> dict[str, float]:
        """Further numbers of a step, equal on every worker."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """What a method must keep besides weights and optimiser."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `extra_state()`; called before weights and optimiser are loaded."""

    # --- training -------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return sum(self._steps(stage) for stage in range(len(self.stages)))

    def _steps(self, stage: int) -> int:
        return -(-self.stages[stage].iterations // self.config.report_every)

    def _place(self, step: int) -> tuple[int, int]:
        """Stage of a step, and the step's number within it."""
        stage = 0
        while step >= self._steps(stage):
            step -= self._steps(stage)
            stage += 1
        return stage, step

    def train_step(self, step: int) -> Mapping[str, float]:
        stage, within = self._place(step)
        settings = self.stages[stage]
        first = within * self.config.report_every
        last = min(first + self.config.report_every, settings.iterations)
        if self.optimizer_stage != stage:
            self.begin_stage(stage)
            self._make_optimizer(stage)
        self.train_mode(stage)
        batches = self._batches(stage, first)
        sums: dict[str, Tensor] = {}
        for iteration in range(first, last):
            for name, value in self._train_batch(next(batches), stage, iteration).items():
                sums[name] = sums.get(name, 0) + value.double()
        totals = self.runtime.all_reduce(torch.stack(list(sums.values()))).tolist()
        count = (last - first) * self.runtime.world_size
        metrics = {
            "stage": float(stage + 1),
            "lr": settings.lr_at(last - 1),
            **{f"train_{name}": total / count for name, total in zip(sums, totals, strict=True)},
            **{f"val_{name}": value for name, value in self.evaluate("val").items()},
            **self.extra_metrics(),
        }
        if last == settings.iterations:
            self._close_stream()
            self.end_stage(stage)
        return metrics

    def _batches(self, stage: int, first: int) -> Iterator[Batch]:
        """The stage's stream of training batches at mini-batch `first`."""
        if self.stream is None or self.stream.iteration != first:
            self._close_stream()
            preprocess, augment = self.training_input()
            self.stream = TrainStream(
                self.train_source(stage),
                preprocess,
                augment,
                batch_size=self.stages[stage].batch,
                seed=self.seed + stage,
                rank=self.runtime.rank,
                world_size=self.runtime.world_size,
                start_iteration=first,
                workers=self.runtime.options.loader_workers,
            )
        return self.runtime.wrap_loader(self.stream)

    def training_input(self) -> tuple[Preprocess, Augment]:
        """What makes the input of a training batch of the images that are read."""
        return self.preprocess, Augment(self.config.augment)

    def _close_stream(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def _make_optimizer(self, stage: int) -> None:
        self._close_stream()
        # What an earlier stage has left on parts that no longer learn would enter the norm that is clipped.
        self.model.zero_grad(set_to_none=True)
        self.prepare_stage(stage)
        self.network = self.runtime.wrap_model(self.model)
        self.optimizer_stage = stage
        self.optimizer = self.build_optimizer(stage)

    def _train_batch(self, batch: Batch, stage: int, iteration: int) -> dict[str, Tensor]:
        """One mini-batch; its loss and what else the method reports, without gradient."""
        loss, reported = self.batch_loss(batch, stage, iteration)
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.after_backward(stage)
        # Averaged gradients are the same on every rank, so every rank takes the same decision.
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf)
        if bool(torch.isfinite(norm)):
            self.bad_steps = 0
            for group in self.optimizer.param_groups:
                group["lr"] = self.stages[stage].lr_at(iteration) * group.get("lr_scale", 1.0)
            self.optimizer.step()
        else:
            self._count_bad_step(stage, iteration)
        self.after_update(stage, iteration)
        return {"loss": loss.detach(), **reported}

    def _count_bad_step(self, stage: int, iteration: int) -> None:
        self.bad_steps += 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise ValueError(
                f"stage {stage + 1}, mini-batch {iteration}: the loss or its gradient was not finite "
                f"{MAX_BAD_STEPS} times in a row; use a smaller lr or loss weight, or set clip_norm"
            )
        warnings.warn(
            f"stage {stage + 1}, mini-batch {iteration}: gradient not finite, mini-batch skipped", stacklevel=2
        )

    def draws(self, stage: int, iteration: int, count: int, width: int) -> Tensor:
        """Uniform numbers (count, width) for this worker's part of a mini-batch.

        They belong to the place in the global batch: each rank has its own, whatever the number of ranks.
        """
        generator = torch.Generator().manual_seed(mix(self.seed, stage, iteration))
        first = self.runtime.rank * count
        numbers = torch.rand(self.stages[stage].batch, width, generator=generator)[first : first + count]
        return numbers.to(self.runtime.device)

    def mean_over_workers(self, values: Tensor) -> Tensor:
        """Mean of `values` over the workers; `values` is overwritten."""
        return self.runtime.all_reduce(values) / self.runtime.world_size

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy, loss (nats), mean multiply-adds, their reduction against the dense network, and the method's
        means."""
        return self.measure(split)

    @torch.no_grad()
    def measure(self, split: str, **options: Any) -> dict[str, float]:
        """`evaluate`, with options that are passed to `answer`."""
        self.runtime.sync_buffers(self.model)
        self.model.eval()
        sums: dict[str, Tensor] = {}
        for batch in self.eval_stream(split, self.runtime.rank, self.runtime.world_size):
            for name, part in self._parts(batch, options).items():
                sums[name] = sums.get(name, 0) + part
        if not sums:  # fewer images than workers; the names are still needed for the sum over workers
            sums = {name: part * 0 for name, part in self._parts(next(self.eval_stream(split)), options).items()}
        names = list(sums)
        values = self.runtime.all_reduce(torch.stack(list(sums.values()))).tolist()
        totals = dict(zip(names, values, strict=True))
        count = totals.pop("count")
        metrics = {name: total / count for name, total in totals.items()}
        return {**metrics, "reduction": 1 - metrics["macs"] / self.full_macs()}

    def _parts(self, batch: Batch, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Sums over the images of a batch, and their count."""
        answers = self.answer(batch, **options)
        parts = {
            "accuracy": (answers.logits.argmax(1) == batch.labels).sum(),
            "loss": F.cross_entropy(answers.logits.float(), batch.labels, reduction="sum"),
            "macs": answers.macs.sum(),
            "count": torch.tensor(len(batch.labels)),
            **{name: values.sum() for name, values in answers.means.items()},
        }
        return {name: part.double().to(self.runtime.device) for name, part in parts.items()}

    def eval_stream(self, split: str, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Batches of a split, this rank's part of them."""
        source = getattr(self.splits, split)
        return self.runtime.wrap_loader(
            eval_batches(source, self.preprocess, EVAL_BATCH, rank, world_size, self.runtime.options.loader_workers)
        )

    # --- state and results ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "network": self.signature(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "optimizer_stage": self.optimizer_stage,
            "bad_steps": self.bad_steps,
            "extra": self.extra_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["network"] != self.signature():
            raise ValueError(
                f"the checkpoint is of another network: {state['network']}, this run's is {self.signature()}"
            )
        super().load_state_dict(state)
        self.load_extra_state(state["extra"])
        self.model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            self._make_optimizer(int(state["optimizer_stage"]))
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])
        self.bad_steps = int(state["bad_steps"])

    @property
    def data_fingerprint(self) -> str:
        return self.splits.fingerprint

    def input_signature(self) -> str:
        """The part of `signature` that comes from the data."""
        return f"{self.num_classes} classes, input {'x'.join(map(str, self.splits.image_shape))}"

    def export(self, directory: str | Path) -> None:
        """Evaluate on the test split (on all ranks) and write the artifact (on the main rank).

        Raises:
            ValueError: a metric is not finite.
        """
        metrics = self.evaluate("test")
        broken = [f"test_{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise ValueError(f"{', '.join(broken)}: the network's answers have overflowed; lower lr, or train longer")
        if not self.runtime.is_main:
            return
        card = Card(
            method=self.method,
            classes=list(self.splits.classes),
            input_shape=(self.in_channels, self.height, self.width),
            preprocess=self.preprocess.to_dict(),
            metrics={f"test_{name}": value for name, value in metrics.items()},
            cost={"macs": metrics["macs"], "full_macs": self.full_macs(), "params": self.served_parameters()},
            data={"name": self.splits.name, "fingerprint": self.splits.fingerprint},
            versions=versions(),
        )
        save_artifact(directory, card, self.config, self.model.state_dict())


def mix(*numbers: int) -> int:
    """One seed out of several numbers, so that neighbouring ones share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
