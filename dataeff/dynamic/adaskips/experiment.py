"""AdaSkips as an Experiment: pretraining on a source data set, or given weights, then transfer to the data at hand.

Source: spec adaskips sections 2.5, 3 (protocols A, B, C, E) and 5. The baselines and the arms of the ablation are
settings of the same experiment.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.core.runtime import Runtime
from dataeff.data import (
    Augment,
    Batch,
    ImageSource,
    Preprocess,
    Splits,
    absolute_spec,
    eval_batches,
    open_splits,
    uniform_draws,
)
from dataeff.dynamic.adaskips import finetune
from dataeff.dynamic.adaskips.analysis import variance_growth, warn_of_explosion
from dataeff.dynamic.adaskips.base import HostConfig, SkipExperiment
from dataeff.dynamic.adaskips.finetune import FineTuneMethod, Step
from dataeff.dynamic.adaskips.hosts import download_weights, load_pretrained, read_weights
from dataeff.dynamic.adaskips.network import TransferNetwork, TransferOutput, frozen_copy
from dataeff.dynamic.adaskips.predictor import AdaSkipsPredictor, load_student
from dataeff.supervised import EVAL_BATCH, Answers, StageConfig, mix

PRETRAINING, TRANSFER = 0, 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORM_DRAWS = 98


class PretrainingConfig(StageConfig):
    """Small-scale pretraining on the source classes."""

    iterations: int = Field(11_000, ge=0, description="mini-batches")
    schedule: Literal["step", "cosine"] = "cosine"


class TransferConfig(StageConfig):
    """Protocol B of spec section 3; its epochs are not known before the data is, so iterations are set."""

    iterations: int = Field(5000, ge=0, description="mini-batches")
    batch: int = Field(64, ge=2, description="images in a mini-batch over all workers")
    lr: float = Field(0.01, gt=0, le=10, description="learning rate of new parts")
    schedule: Literal["step", "cosine"] = "cosine"


class AdaSkipsConfig(HostConfig):
    """Settings of AdaSkips, its ablation and the fine-tuning baselines (spec section 4)."""

    mode: Literal["frozen", "finetune", "scratch"] = Field(
        "frozen", description="frozen: only new parts learn; finetune: all; scratch: all, without pretraining"
    )
    finetune_method: Literal["vanilla", "lwf", "bss", "delta", "co_tuning", "stoch_norm", "bi_tuning"] = "vanilla"
    source: str | None = Field(None, description="data to pretrain on, such as letters")
    weights: str | None = Field(None, description="pretrained weights: .safetensors, .pth, or an artifact folder")
    download: bool = Field(False, description="take torchvision's ImageNet weights, from the network if need be")
    backbone_lr: float | None = Field(
        None, ge=0, le=10, description="times lr, for the pretrained part in mode finetune; none: 0.1, bi_tuning 1"
    )
    lwf_weight: float = Field(4.0, ge=0)
    lwf_temperature: float = Field(3.0, gt=0)
    bss_weight: float = Field(0.001, ge=0)
    bss_k: int = Field(1, ge=1, description="smallest singular values that are penalised")
    delta_weight: float = Field(0.01, ge=0)
    co_tuning_weight: float = Field(2.3, ge=0)
    stoch_norm_p: float = Field(0.5, ge=0, le=1, description="share of channels normalised by the batch")
    bi_tuning_queue: int = Field(40, ge=1, description="keys of each class")
    bi_tuning_momentum: float = Field(0.999, ge=0, le=1)
    bi_tuning_temperature: float = Field(0.07, gt=0)
    normalize: Literal["data", "imagenet"] = Field("data", description="mean and deviation; imagenet for its weights")
    crop: int | None = Field(None, ge=8, description="side of the network's input, cut from the centre; 224 of 256")
    sync_bn: bool = Field(False, description="norms take statistics over all workers (GPUs)")
    pretraining: PretrainingConfig = PretrainingConfig()
    transfer: TransferConfig = TransferConfig()

    @field_validator("weights")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).absolute())

    @field_validator("source")
    @classmethod
    def _absolute_data(cls, value: str | None) -> str | None:
        return None if value is None else absolute_spec(value)

    @model_validator(mode="after")
    def _consistent(self) -> "AdaSkipsConfig":
        given = [name for name in ("source", "weights", "download") if getattr(self, name)]
        if self.mode == "scratch" and given:
            raise ValueError(f"mode 'scratch' takes no pretrained weights: leave {' and '.join(given)} out")
        if self.mode != "scratch" and len(given) != 1:
            raise ValueError(
                f"mode {self.mode!r} needs one of source, weights or download=true, got {' and '.join(given) or 'none'}"
            )
        if self.finetune_method in ("lwf", "delta", "co_tuning") and self.mode == "scratch":
            raise ValueError(f"finetune_method {self.finetune_method!r} needs a pretrained network, not mode 'scratch'")
        if self.finetune_method == "stoch_norm" and self.mode == "frozen":
            raise ValueError("finetune_method 'stoch_norm' needs norms that learn: mode 'finetune'")
        if self.finetune_method == "stoch_norm" and self.sync_bn:
            raise ValueError("finetune_method 'stoch_norm' has norms of its own: leave sync_bn out")
        return self


class AdaSkipsExperiment(SkipExperiment):
    """Stage 1 pretrains the plain network on `source`, stage 2 transfers it; metrics of stage 1 are named *_source_*.

    The network is reported at the fixed end of training.
    """

    method: ClassVar[str] = "adaskips"
    config_schema: ClassVar[type[ExperimentConfig]] = AdaSkipsConfig
    config: AdaSkipsConfig
    model: TransferNetwork

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        self.fine_tune = self._build_method()
        runtime.place(self.fine_tune)

    def open_data(self, data: str) -> Splits:
        splits = open_splits(data)
        source = self.config.source
        self.source_splits = open_like(source, splits.image_shape) if source else None
        return splits

    def fit_preprocess(self) -> Preprocess:
        size = (self.config.crop, self.config.crop) if self.config.crop else None
        fitted = Preprocess.fit(self.splits.train, size)
        if self.config.normalize == "imagenet":
            if fitted.channels != 3:
                raise ValueError("normalize 'imagenet' needs RGB images: add channels=3 to the data string")
            return fitted.model_copy(update={"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
        return fitted

    def build_model(self) -> TransferNetwork:
        config = self.config
        student = config.build_student(self.num_classes, self.in_channels)
        head: nn.Linear | None = None
        if self.source_splits is not None:
            head = nn.Linear(student.embedding_dim, len(self.source_splits.classes))
        elif config.weights or config.download:
            state = read_weights(config.weights) if config.weights else download_weights(config.network)
            head = load_pretrained(student, state, f"weights {config.weights or 'of torchvision'}")
        if config.finetune_method in ("lwf", "co_tuning") and head is None:
            raise ValueError(f"finetune_method {config.finetune_method!r} needs the source classifier: fc in weights")
        if config.finetune_method == "stoch_norm":
            finetune.use_stochastic_norms(student)
        projector = None
        if config.finetune_method == "bi_tuning":
            projector = nn.Linear(student.embedding_dim, finetune.PROJECTION)
        model = TransferNetwork(student, head, projector)
        return self._with_shared_norms(model) if config.sync_bn else model

    def _with_shared_norms(self, model: TransferNetwork) -> TransferNetwork:
        if self.runtime.device.type != "cuda":
            raise ValueError("sync_bn needs GPUs: PyTorch's SyncBatchNorm has no CPU form; leave it out")
        shared: TransferNetwork = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return shared

    def _build_method(self) -> FineTuneMethod:
        config, model = self.config, self.model
        sources = model.source_head.out_features if model.source_head is not None else 0
        images = len(self.splits.train)
        table: dict[str, Callable[[], FineTuneMethod]] = {
            "vanilla": finetune.VanillaFineTune,
            "lwf": partial(
                finetune.LearningWithoutForgetting, images, sources, config.lwf_weight, config.lwf_temperature
            ),
            "bss": partial(finetune.BatchSpectralShrinkage, config.bss_weight, config.bss_k),
            "delta": partial(finetune.DELTA, model, self.num_classes, config.delta_weight),
            "co_tuning": partial(finetune.CoTuning, self.num_classes, sources, config.co_tuning_weight),
            "stoch_norm": partial(finetune.StochasticNormalization, config.stoch_norm_p),
            "bi_tuning": partial(
                finetune.BiTuning,
                model,
                self.num_classes,
                config.bi_tuning_queue,
                config.bi_tuning_momentum,
                config.bi_tuning_temperature,
            ),
        }
        return table[config.finetune_method]()

    def stage_settings(self) -> list[StageConfig]:
        first = self.config.pretraining
        if self.source_splits is None:
            first = first.model_copy(update={"iterations": 0})
        return [first, self.config.transfer]

    def signature(self) -> str:
        return f"{super().signature()}, {self.config.finetune_method}"

    # --- training ---------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: int) -> None:
        if stage == PRETRAINING:
            return
        self.model.eval()
        batches = [self._on_device(batch) for batch in self._training_images()]
        warn_of_explosion(variance_growth(self.model.student, batches[0].images))
        self.fine_tune.setup(self.model, frozen_copy(self.model), batches)

    def _training_images(self) -> Iterator[Batch]:
        return eval_batches(self.splits.train, self.preprocess, EVAL_BATCH)

    def _on_device(self, batch: Batch) -> Batch:
        moved: Batch = self.runtime.to_device(batch)
        return moved

    def prepare_stage(self, stage: int) -> None:
        model, config = self.model, self.config
        pretraining = stage == PRETRAINING
        model.requires_grad_(False)
        model.student.freeze_backbone(config.mode == "frozen" and not pretraining)
        for parameter in model.student.new_parameters():
            parameter.requires_grad_(not pretraining)
        if model.source_head is not None:
            model.source_head.requires_grad_(pretraining or self.fine_tune.needs_source_head)
        if model.projector is not None:
            model.projector.requires_grad_(not pretraining)

    def parameter_groups(self, stage: int) -> Iterable[Any]:
        backbone = [parameter for parameter in self.model.student.backbone_parameters() if parameter.requires_grad]
        known = {id(parameter) for parameter in backbone}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": backbone}]
        if stage == TRANSFER:
            if self.config.mode == "finetune":
                groups[1]["lr_scale"] = self._backbone_lr()
            if self.config.finetune_method == "delta":  # its own term holds the weights (spec section 5)
                groups = [{**group, "weight_decay": 0.0} for group in groups]
        return [group for group in groups if group["params"]]

    def _backbone_lr(self) -> float:
        if self.config.backbone_lr is not None:
            return self.config.backbone_lr
        return 1.0 if self.config.finetune_method == "bi_tuning" else 0.1

    def train_source(self, stage: int) -> ImageSource:
        if stage == PRETRAINING:
            assert self.source_splits is not None
            return self.source_splits.train
        return self.splits.train

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        if stage == PRETRAINING:
            output: TransferOutput = self.network(batch.images, plain=True)
            return F.cross_entropy(output.logits, batch.labels), {}
        count, draws = self.model.student.num_draws, None
        if count:
            draws = self.draws(stage, iteration, len(batch.labels), count)
        return self.fine_tune.loss(
            Step(
                self.network,
                self.model,
                batch,
                draws,
                uniform=partial(self._uniform, iteration),
                second_view=partial(self._second_view, batch, iteration),
                gather=self._gather,
            )
        )

    def _uniform(self, iteration: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(self.seed, NORM_DRAWS, iteration))
        return torch.rand(count, generator=generator).to(self.runtime.device)

    def _second_view(self, batch: Batch, iteration: int) -> Tensor:
        """The images of a batch, augmented anew."""
        indices = batch.indices.cpu().numpy()
        augment = Augment(self.config.augment)
        draws = uniform_draws(self.seed, iteration, indices, augment.draws, stream=1)
        images = augment(self.splits.train.images(indices), torch.from_numpy(draws), self.preprocess.size)
        view: Tensor = self.runtime.to_device(self.preprocess(images))
        return view

    def _gather(self, tensor: Tensor) -> Tensor:
        """Tensors of all workers one after the other, without gradient."""
        if self.runtime.world_size == 1:
            return tensor
        everyone = tensor.new_zeros(self.runtime.world_size, *tensor.shape)
        everyone[self.runtime.rank] = tensor
        return self.runtime.all_reduce(everyone).flatten(0, 1)

    def after_update(self, stage: int, iteration: int) -> None:
        if stage == TRANSFER:
            self.fine_tune.on_step_end(self.model)

    def end_stage(self, stage: int) -> None:
        if stage == TRANSFER:
            self.remember_mean_weights()

    # --- evaluation -------------------------------------------------------------------------------------------------

    @property
    def pretraining(self) -> bool:
        return self.optimizer_stage == PRETRAINING and self.steps_done < self._steps(PRETRAINING)

    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy, loss (nats), multiply-adds and the share of skips that are taken; in the pretraining stage those of
        the source data, named source_*."""
        if self.pretraining:
            return {f"source_{name}": value for name, value in self.measure(split).items() if name != "reduction"}
        return super().evaluate(split)

    def eval_stream(self, split: str, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        if not self.pretraining:
            return super().eval_stream(split, rank, world_size)
        source = getattr(self.source_splits, split)
        batches = eval_batches(source, self.preprocess, EVAL_BATCH, rank, world_size)
        return self.runtime.wrap_loader(batches)

    def answer(self, batch: Batch, skip_means: bool = False) -> Answers:
        if self.pretraining:
            logits = self.model(batch.images, plain=True).logits
            return Answers(logits, torch.full((len(logits),), self.costs.base, dtype=torch.float64))
        return super().answer(batch, skip_means)

    # --- state and results ------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {"fine_tune": self.fine_tune.state_dict()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.fine_tune.load_state_dict(state["fine_tune"])

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(AdaSkipsConfig, artifact.config, "artifact config.yaml")
        student = config.build_student(len(artifact.card.classes), artifact.card.input_shape[0])
        return AdaSkipsPredictor(load_student(student, artifact), artifact.card, device)


def open_like(data: str, shape: tuple[int, int, int]) -> Splits:
    """A data set with images of this (C, H, W), brought to them where the data string leaves that open.

    Raises:
        ValueError: the images have another shape, and the data string sets it or it is not square.
    """
    splits = open_splits(data)
    if splits.image_shape == shape:
        return splits
    sets_it = "size=" in data or "channels=" in data
    if sets_it or shape[1] != shape[2]:
        raise ValueError(
            f"source {data} has images of {splits.image_shape}, the data of {shape} (channels, height, width); make "
            "them equal with size= and channels= in the data strings"
        )
    return open_splits(f"{data}{'&' if '?' in data else '?'}size={shape[1]}&channels={shape[0]}")
