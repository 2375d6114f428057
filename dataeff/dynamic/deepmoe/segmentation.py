"""DeepMoE for semantic segmentation: one gate vector an image over a dilated backbone.

Source: spec deepmoe sections 2.9, 3 and 8.2. The embedding network sees the (cropped) image; pixels are classified on
the last feature map, whose scores are scaled up.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dataeff.core.artifact import Artifact, Predictor, SegmentedPrediction
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.core.plots import new_figure
from dataeff.data import Batch, Splits, eval_batches
from dataeff.data.segmentation import PairPreprocess, RandomCrop, open_segmentation, unpack
from dataeff.dynamic.deepmoe.base import FinetuneConfig, GatedConfig, GatedExperiment, JointConfig
from dataeff.dynamic.deepmoe.baselines import StaticNetwork
from dataeff.dynamic.deepmoe.losses import IGNORE, pixel_cross_entropy
from dataeff.dynamic.deepmoe.model import EMBEDDING_WIDTHS, DeepMoE, build_deepmoe
from dataeff.dynamic.deepmoe.network import build_network
from dataeff.dynamic.deepmoe.predictor import answer_of
from dataeff.metrics.iou import class_iou, confusion_matrix, mean_iou
from dataeff.nn.predictor import NetworkPredictor, check_budget
from dataeff.supervised import Answers, StageConfig

EVAL_BATCH = 16
PIXELS = "pixels_"


class SegmentationJointConfig(JointConfig):
    """The CityScapes recipe: 250 epochs of 185 mini-batches (spec section 3)."""

    iterations: int = Field(46_250, ge=1, description="mini-batches")
    batch: int = Field(16, ge=2, description="images in a mini-batch over all workers")
    lr: float = Field(5e-4, gt=0, le=10, description="learning rate")
    milestones: tuple[float, ...] = Field((200 / 250,), description="fractions where lr drops tenfold")


class SegmentationFinetuneConfig(FinetuneConfig):
    """Optional in segmentation (spec section 2.5)."""

    iterations: int = Field(0, ge=0, description="mini-batches; 0 leaves the stage out")
    batch: int = Field(16, ge=2, description="images in a mini-batch over all workers")
    lr: float = Field(5e-5, gt=0, le=10, description="learning rate; the last one of the joint stage")


class SegmentationConfig(GatedConfig):
    """Settings of DeepMoE on a dilated backbone (spec deepmoe sections 2.9 and 4)."""

    arm: Literal["deepmoe", "static"] = Field("deepmoe", description="static: the base, plain or widened")
    arch: Literal["drn10", "drn_a_50"] = "drn_a_50"
    width: float = Field(2.0, gt=0, le=16, description="2: wide, 1: narrow; below 1 (thin) for arm static only")
    embedding_widths: tuple[int, ...] = Field(EMBEDDING_WIDTHS[5], description="channels of M's stride-2 convolutions")
    mu: float = Field(0.0, ge=0, le=100, description="weight of the embedding's loss; above 0 needs mu_mode presence")
    mu_mode: Literal["labels", "presence"] = Field(
        "labels", description="presence: the embedding tells which classes an image holds; labels: images have none"
    )
    augment: Literal["none", "shift", "shift_flip"] = Field("shift_flip", description="shift: no mirroring")
    crop: int | None = Field(None, ge=16, le=4096, description="side of training crops; 832 on CityScapes; None: whole")
    joint: SegmentationJointConfig = SegmentationJointConfig()
    finetune: SegmentationFinetuneConfig = SegmentationFinetuneConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "SegmentationConfig":
        if self.width < 1 and self.arm != "static":
            raise ValueError(f"width must be at least 1 for arm {self.arm!r}, got {self.width} (thin: arm 'static')")
        if self.mu > 0 and self.mu_mode != "presence":
            raise ValueError(
                f"mu = {self.mu:g} needs class labels of images, which segmentation lacks: set mu_mode=presence or mu=0"
            )
        return self


def build_model(config: SegmentationConfig, num_classes: int, in_channels: int) -> DeepMoE | StaticNetwork:
    """The network of a config."""
    base = {"width": config.width, "widths": config.widths, **config.base_options}
    if config.arm == "static":
        return StaticNetwork(build_network(config.arch, num_classes, in_channels, **base))
    return build_deepmoe(config.arch, num_classes, in_channels, **base, **config.gate_options)


class SegmentationExperiment(GatedExperiment):
    """Trains one arm; stage 1 is "joint", stage 2 ("finetune", optional) fixes the gates."""

    config_schema: ClassVar[type[ExperimentConfig]] = SegmentationConfig
    method: ClassVar[str] = "deepmoe_segmentation"
    config: SegmentationConfig
    preprocess: PairPreprocess

    @staticmethod
    def data_opener() -> Callable[[str], object]:
        return open_segmentation

    def open_data(self, data: str) -> Splits:
        splits = open_segmentation(data)
        crop = self.config.crop
        if crop is not None and crop > min(splits.image_shape[1:]):
            raise ValueError(f"crop = {crop} must be at most the images' side, {min(splits.image_shape[1:])}")
        return splits

    def fit_preprocess(self) -> PairPreprocess:
        return PairPreprocess.fit(self.splits.train)

    def build_model(self) -> nn.Module:
        return build_model(self.config, self.num_classes, self.in_channels)

    def stage_settings(self) -> Sequence[StageConfig]:
        return [self.config.joint] if self.config.arm == "static" else super().stage_settings()

    def adapts(self) -> bool:
        return self.config.arm == "deepmoe"

    def signature(self) -> str:
        config = self.config
        parts = [f"arm {config.arm}", config.arch, f"block {config.block}", f"width {config.width:g}"]
        parts += [f"gates {self.base.gate_channels}", f"latent {config.latent}", self.input_signature()]
        return ", ".join(parts)

    # --- training -------------------------------------------------------------------------------------------------

    def prepare_stage(self, stage: int) -> None:
        super().prepare_stage(stage)
        if isinstance(self.model, DeepMoE) and stage == 0:
            self.model.class_head.requires_grad_(self.config.mu > 0)  # else it gets no gradient

    def training_input(self) -> tuple[PairPreprocess, RandomCrop]:
        size = (self.height, self.width) if self.config.crop is None else (self.config.crop, self.config.crop)
        return self.preprocess.cropped(size), RandomCrop(kind=self.config.augment)

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = unpack(batch.images)
        output = self.network(images)
        pixels = self.mean_over_workers((targets != IGNORE).sum().float())
        if self.config.arm == "static":
            return pixel_cross_entropy(output.logits, targets, pixels), {}
        return self.gated_loss(output, targets, stage, iteration, self.config.mu, self.config.mu_mode, pixels)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def measure(self, split: str, **options: Any) -> dict[str, float]:
        """`accuracy` (share of the pixels that count), `miou` over the classes that occur, `iou_CLASS` of each, loss
        (nats, mean over images), multiply-adds and their reduction against the dense network."""
        metrics = super().measure(split, **options)
        k = self.num_classes
        cells = [metrics.pop(f"{PIXELS}{cell}") for cell in range(k * k)]
        confusion = torch.tensor(cells, dtype=torch.float64).view(k, k)
        by_class = dict(zip(self.splits.classes, class_iou(confusion).tolist(), strict=True))
        return {
            **metrics,
            "accuracy": float(confusion.diagonal().sum() / confusion.sum()),
            "miou": mean_iou(confusion),
            **{f"iou_{name}": value for name, value in by_class.items() if not math.isnan(value)},
        }

    def _parts(self, batch: Batch, options: Any) -> dict[str, Tensor]:
        """Sums over the images of a batch: those of `Answers`, and pixels of each class by predicted class."""
        images, targets = unpack(batch.images)
        answers = self.answer(Batch(images, batch.labels, batch.indices))
        confusion = confusion_matrix(answers.logits.argmax(1), targets, self.num_classes, IGNORE).flatten()
        each = [
            pixel_cross_entropy(logits[None], target[None])
            for logits, target in zip(answers.logits, targets, strict=True)
        ]
        parts = {
            "loss": torch.stack(each).sum(),
            "macs": answers.macs.sum(),
            "count": torch.tensor(len(images)),
            **{name: values.sum() for name, values in answers.means.items()},
            **{f"{PIXELS}{cell}": pixels for cell, pixels in enumerate(confusion)},
        }
        return {name: part.double().to(self.runtime.device) for name, part in parts.items()}

    def answer(self, batch: Batch) -> Answers:
        output = self.model(batch.images)
        if not isinstance(self.model, DeepMoE):
            return Answers(output.logits, output.macs)
        self.count_gates(output.gates, batch)
        router_macs = self.model.router_macs(self.height, self.width)
        means = {"active_share": output.active_share, "base_macs": output.macs - router_macs}
        return Answers(output.logits, output.macs, means)

    def eval_stream(self, split: str, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        source = getattr(self.splits, split)
        workers = self.runtime.options.loader_workers
        return self.runtime.wrap_loader(eval_batches(source, self.preprocess, EVAL_BATCH, rank, world_size, workers))

    # --- results --------------------------------------------------------------------------------------------------

    def plots(self, directory: str | Path) -> None:
        """IoU of each class on the test split, and images beside their true and predicted classes."""
        directory = Path(directory)
        metrics = self.evaluate("test")
        by_class = {name: metrics.get(f"iou_{name}", math.nan) for name in self.splits.classes}
        figure = new_figure()
        axes = figure.add_subplot()
        axes.barh(list(by_class), list(by_class.values()))
        axes.invert_yaxis()
        axes.set_xlabel(f"IoU (mean {metrics['miou']:.3f})")
        figure.savefig(directory / "iou.png", dpi=120, bbox_inches="tight")
        count = min(4, len(self.splits.test))
        rows = np.linspace(0, len(self.splits.test) - 1, count).round().astype(np.int64)
        pairs = self.splits.test.images(rows)
        images, targets = unpack(self.preprocess(pairs).to(self.runtime.device))
        with torch.no_grad():
            predicted = self.model.eval()(images).logits.argmax(1)
        figure = new_figure()
        grid = figure.subplots(count, 3, squeeze=False)
        for line, (pair, target, found) in enumerate(zip(pairs, targets.cpu(), predicted.cpu(), strict=True)):
            grid[line][0].imshow(pair[:-1].permute(1, 2, 0).numpy())
            for axes, classes in ((grid[line][1], target), (grid[line][2], found)):
                shown = np.ma.masked_equal(classes.numpy(), IGNORE)
                axes.imshow(shown, vmin=0, vmax=self.num_classes - 1, cmap="tab20", interpolation="nearest")
        for axes, title in zip(grid[0], ("image", "true", "predicted"), strict=True):
            axes.set_title(title, fontsize=8)
        for axes in grid.ravel():
            axes.set_axis_off()
        figure.savefig(directory / "examples.png", dpi=120)
        numbers = {"iou": {name: None if math.isnan(value) else value for name, value in by_class.items()}}
        (directory / "analysis.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(SegmentationConfig, artifact.config, "artifact config.yaml")
        model = build_model(config, len(artifact.card.classes), artifact.card.input_shape[0])
        model.load_state_dict(artifact.state)
        names, answer = answer_of(model.to(device).eval())
        return SegmentationPredictor(artifact.card, device, names, answer)


class SegmentationPredictor(NetworkPredictor):
    """A trained segmentation network."""

    @property
    def map_shape(self) -> tuple[int, int]:
        return self.input_shape[1:]

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> SegmentedPrediction:
        """As the protocol asks, with the class of every pixel; errors as for any predictor."""
        check_budget(budget, len(inputs))
        with torch.inference_mode():
            logits, macs, path = self._answer(inputs.to(self._device), budget)
            shares, class_map = logits.float().softmax(1).mean((2, 3)), logits.argmax(1).to(torch.uint8)
        return SegmentedPrediction(shares.cpu(), macs.cpu(), path.cpu(), class_map.cpu())
