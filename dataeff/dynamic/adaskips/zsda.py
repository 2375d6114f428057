"""Zero-shot domain adaptation as an Experiment: train on a labelled source domain, answer on another.

Source: spec adaskips sections 2.6, 2.7 and 3 (protocol D). Labels of target images are read for measuring only, but by
the upper bound `target_only`.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.core.runtime import Runtime
from dataeff.data import Augment, Batch, ImageSource, Preprocess, Splits, TrainStream, absolute_spec, open_splits
from dataeff.data.fingerprint import text_fingerprint
from dataeff.dynamic.adaskips.adaptation import ADDATrainer, UniformPriorRegularizer
from dataeff.dynamic.adaskips.base import HostConfig, SkipExperiment
from dataeff.dynamic.adaskips.network import TransferNetwork, TransferOutput, frozen_copy
from dataeff.dynamic.adaskips.predictor import AdaSkipsPredictor, load_student
from dataeff.supervised import StageConfig

TRAINING, ADAPTATION = 0, 1


class SourceStage(StageConfig):
    """Training on the labelled domain."""

    iterations: int = Field(5000, ge=1, description="mini-batches")
    lr: float = Field(0.05, gt=0, le=10)
    schedule: Literal["step", "cosine"] = "cosine"


class AdversarialStage(StageConfig):
    """ADDA's second step, with Adam (betas 0.5 and 0.999) on the target encoder."""

    iterations: int = Field(2000, ge=1, description="mini-batches")
    lr: float = Field(2e-4, gt=0, le=1)
    weight_decay: float = Field(0.0, ge=0, le=1)
    milestones: tuple[float, ...] = ()


class ZsdaConfig(HostConfig):
    """Settings of zero-shot domain adaptation. Without AdaSkips: skips standard, skip_weights ones, module_bn false."""

    target: str = Field("digits", description="data of the target domain, with the classes of the source")
    uniform_prior: bool = Field(False, description="features are pushed towards a uniform distribution")
    adda: bool = Field(False, description="a target encoder is adapted to unlabelled target images")
    target_only: bool = Field(False, description="upper bound: train on the labelled target")
    size: int = Field(32, ge=8, le=512, description="side of all images, grey")
    prior_range: float = Field(1.0, gt=0, description="a: the prior is uniform on (-a, a)")
    prior_weight: float = Field(0.1, ge=0, description="gamma; 0.01 to 1")
    prior_lr: float = Field(1e-4, gt=0, le=1)
    discriminator_lr: float = Field(2e-4, gt=0, le=1, description="of ADDA's discriminator")
    adda_patience: int = Field(500, ge=1, description="mini-batches without a lesson after which ADDA stops")
    training: SourceStage = SourceStage()
    adaptation: AdversarialStage = AdversarialStage()

    @field_validator("target")
    @classmethod
    def _absolute_data(cls, value: str) -> str:
        return absolute_spec(value)

    @model_validator(mode="after")
    def _consistent(self) -> "ZsdaConfig":
        if self.target_only and (self.adda or self.uniform_prior):
            raise ValueError("target_only is the upper bound: leave adda and uniform_prior out")
        return self


class ZsdaExperiment(SkipExperiment):
    """Stage 1 trains encoder and classifier on the data; stage 2, with `adda`, adapts a copy of the encoder to images
    of `target`. Validation and test metrics are the target's."""

    method: ClassVar[str] = "adaskips_zsda"
    config_schema: ClassVar[type[ExperimentConfig]] = ZsdaConfig
    config: ZsdaConfig
    model: TransferNetwork

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        dim = self.model.student.embedding_dim
        own = self.config
        self.prior = UniformPriorRegularizer(dim, own.prior_range, own.prior_weight, own.prior_lr)
        self.adversary = ADDATrainer(frozen_copy(self.model), own.discriminator_lr, own.adda_patience)
        runtime.place(self.prior)
        runtime.place(self.adversary)
        self.source_stream: TrainStream | None = None

    def open_data(self, data: str) -> Splits:
        config = self.config
        source = open_grey(data, config.size)
        target = open_grey(config.target, config.size)
        if source.classes != target.classes:
            raise ValueError(
                f"the domains differ in their classes: {data} has {list(source.classes)}, {config.target} has "
                f"{list(target.classes)}"
            )
        self.target_images = target.train
        trained_on = target.train if config.target_only else source.train
        both = text_fingerprint(source.fingerprint, target.fingerprint)
        return replace(target, name=f"{data} -> {config.target}", train=trained_on, fingerprint=both)

    def fit_preprocess(self) -> Preprocess:
        """To [-1, 1], the same for both domains."""
        size = (self.config.size, self.config.size)
        return Preprocess(channels=1, size=size, mean=(0.5,), std=(0.5,))

    def build_model(self) -> TransferNetwork:
        return TransferNetwork(self.config.build_student(self.num_classes, self.in_channels))

    def stage_settings(self) -> list[StageConfig]:
        second = (
            self.config.adaptation if self.config.adda else self.config.adaptation.model_copy(update={"iterations": 0})
        )
        return [self.config.training, second]

    # --- training ---------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: int) -> None:
        if stage == ADAPTATION:
            self.adversary.source.load_state_dict(self.model.state_dict())

    def prepare_stage(self, stage: int) -> None:
        self.model.requires_grad_(True)
        if stage == ADAPTATION:
            self.model.student.fc.requires_grad_(False)

    def build_optimizer(self, stage: int) -> torch.optim.Optimizer:
        if stage == TRAINING:
            return super().build_optimizer(stage)
        settings = self.stages[stage]
        parameters: Iterable[Any] = self.parameter_groups(stage)
        return torch.optim.Adam(parameters, settings.lr, (0.5, 0.999), weight_decay=settings.weight_decay)

    def train_source(self, stage: int) -> ImageSource:
        return self.splits.train if stage == TRAINING else self.target_images

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        skips = self.model.student.num_draws
        draws = self.draws(stage, iteration, len(batch.images), skips + self.model.student.embedding_dim)
        output: TransferOutput = self.network(batch.images, draws[:, :skips] if skips else None)
        reported: dict[str, Tensor] = {}
        if stage == TRAINING:
            loss = F.cross_entropy(output.logits, batch.labels)
        else:
            source = next(self._source_batches(iteration)).images
            domain_loss, right = self.adversary.step(source, output.embedding, self.mean_over_workers)
            self.adversary.watch(float(self.mean_over_workers(domain_loss.clone())))
            loss = self.adversary.encoder_loss(output.embedding)
            reported |= {"domain_loss": domain_loss, "domain_accuracy": right}
        if self.config.uniform_prior:
            reported["prior_accuracy"] = self.prior.step(output.embedding, draws[:, skips:], self.mean_over_workers)
            prior = self.prior.encoder_loss(output.embedding)
            loss = loss + self.prior.weight * prior
            reported["prior_loss"] = prior.detach()
        return loss, reported

    def _source_batches(self, iteration: int) -> Iterator[Batch]:
        """Source images beside the target's, as many a mini-batch."""
        if self.source_stream is None or self.source_stream.iteration != iteration:
            self.source_stream = TrainStream(
                self.splits.train,
                self.preprocess,
                Augment(self.config.augment),
                batch_size=self.stages[ADAPTATION].batch,
                seed=self.seed + 2,
                rank=self.runtime.rank,
                world_size=self.runtime.world_size,
                start_iteration=iteration,
            )
        return self.runtime.wrap_loader(self.source_stream)

    def after_backward(self, stage: int) -> None:
        if stage == ADAPTATION and self.adversary.stopped:
            for parameter in self.model.parameters():
                parameter.grad = None

    def end_stage(self, stage: int) -> None:
        if self.source_stream is not None:
            self.source_stream.close()
            self.source_stream = None
        self.remember_mean_weights()

    # --- state ------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {
            "prior": self.prior.state_dict(),
            "prior_optimizer": self.prior.optimizer.state_dict(),
            "adversary": self.adversary.state_dict(),
            "adversary_optimizer": self.adversary.optimizer.state_dict(),
            "adversary_idle": self.adversary.idle,
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.prior.load_state_dict(state["prior"])
        self.prior.optimizer.load_state_dict(state["prior_optimizer"])
        self.adversary.load_state_dict(state["adversary"])
        self.adversary.optimizer.load_state_dict(state["adversary_optimizer"])
        self.adversary.idle = int(state["adversary_idle"])

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(ZsdaConfig, artifact.config, "artifact config.yaml")
        student = config.build_student(len(artifact.card.classes), artifact.card.input_shape[0])
        return AdaSkipsPredictor(load_student(student, artifact), artifact.card, device)


def open_grey(data: str, size: int) -> Splits:
    """A data set as grey images of `size` x `size`; RGB is converted, which is said."""
    splits = open_splits(data)
    if splits.image_shape == (1, size, size):
        return splits
    if splits.image_shape[0] != 1:
        warnings.warn(f"{data}: RGB images are converted to grey", stacklevel=2)
    return open_splits(f"{data}{'&' if '?' in data else '?'}size={size}&channels=1")
