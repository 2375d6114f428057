"""Full training of an architecture on its evaluation network, always supervised, as the method `nas_train`.

Source: spec ss_pcp_darts sections 2.1, 2.9 and 3; spec nas_adversarial_robustness section 3.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dataeff.core.artifact import Artifact, Predictor, read_artifact
from dataeff.core.config import Config, ExperimentConfig, parse_config
from dataeff.core.run import replace_text
from dataeff.core.runtime import Runtime
from dataeff.data import Batch, Splits
from dataeff.metrics.cost import count_macs
from dataeff.nas import analysis
from dataeff.nas.architecture import Architecture, Chain, ChainNetwork, parse_architecture
from dataeff.nas.attackable import AttackableNetwork
from dataeff.nas.fgsm_curve import compare_curves, mean_curve, write_curve
from dataeff.nas.genotype import GENOTYPES, Genotype, named_genotype, random_genotype
from dataeff.nas.inference import cell_predictor
from dataeff.nas.network import CellNetwork
from dataeff.nas.threat import GradientMaskingError, NormalizedModel
from dataeff.supervised import Answers, StageConfig, SupervisedConfig, SupervisedExperiment

RANDOM = "random"
CURVE_IMAGES = 500  # of the FGSM curve


class EvaluationStage(StageConfig):
    """DARTS' recipe: 600 epochs of 50,000 images in mini-batches of 96, cosine to 0."""

    iterations: int = Field(312_000, ge=0, description="mini-batches")
    batch: int = Field(96, ge=2, description="images in a mini-batch over all workers")
    lr: float = Field(0.025, gt=0, le=10, description="learning rate")
    weight_decay: float = Field(3e-4, ge=0, le=1)
    schedule: Literal["step", "cosine"] = "cosine"


class EvaluationSettings(Config):
    """An evaluation network and its training."""

    cells: int = Field(20, ge=1, le=200, description="L")
    channels: int = Field(36, ge=2, le=4096, description="C of the first cells")
    stem: Literal["cifar", "imagenet"] = "cifar"
    aux_weight: float = Field(0.4, ge=0, le=10, description="of the auxiliary tower's loss; 0: no tower")
    drop_path: float = Field(0.3, ge=0, lt=1, description="probability at the end of training, from 0")
    cutout: int = Field(16, ge=0, description="side of the square that is cut out of training images; 0: none")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="adam: the spec's literal reading, betas (0.5, 0.999)")
    clip_norm: float | None = Field(5.0, gt=0, description="bound on the gradient's norm")
    augment: Literal["none", "shift", "shift_flip", "imagenet"] = "shift_flip"
    report_every: int = Field(1000, ge=1, description="mini-batches in a step")
    stage: EvaluationStage = EvaluationStage()


class EvaluationConfig(EvaluationSettings, SupervisedConfig):
    """Settings of every method that trains such networks."""

    clip_norm: float | None = Field(5.0, gt=0, description="bound on the gradient's norm")


class NasTrainConfig(EvaluationConfig):
    """Settings of `nas_train`."""

    genotype: Genotype | Chain | str = Field(
        "darts_v2", description=f"one of {', '.join(GENOTYPES)}, random (drawn by the seed), or an architecture itself"
    )
    start_from: str | None = Field(
        None, description="artifact of a nas_search or nas_train run, whose architecture is trained anew"
    )

    @field_validator("genotype", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, str) and value != RANDOM:
            named_genotype(value)
        return parse_architecture(value) if isinstance(value, Mapping) else value

    @field_validator("start_from")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).absolute())

    @model_validator(mode="after")
    def _one_source(self) -> "NasTrainConfig":
        if self.start_from and "genotype" in self.model_fields_set and self.genotype != "darts_v2":
            raise ValueError("give either genotype or start_from, not both")
        if not self.stage.iterations:
            raise ValueError("stage.iterations must be at least 1: there is nothing to train")
        return self


def resolve(config: NasTrainConfig) -> NasTrainConfig:
    """The config with the architecture itself in `genotype`.

    Raises:
        FileNotFoundError, ValueError: `start_from` is no artifact with an architecture.
    """
    found: Architecture
    if config.start_from:
        values = read_artifact(config.start_from).config.get("genotype")
        if not isinstance(values, Mapping):
            raise ValueError(f"start_from {config.start_from}: no architecture in it; give a nas_search artifact")
        found = parse_architecture(values)
    elif config.genotype == RANDOM:
        found = random_genotype(np.random.default_rng([config.seed, 23]))
    elif isinstance(config.genotype, str):
        found = named_genotype(config.genotype)
    else:
        found = config.genotype
    return config.model_copy(update={"genotype": found, "start_from": None})


def build_network(
    config: NasTrainConfig, num_classes: int, in_channels: int, side: int, auxiliary: bool
) -> CellNetwork | ChainNetwork:
    """The network of a resolved config."""
    if isinstance(config.genotype, Chain):
        return ChainNetwork(config.genotype, num_classes, in_channels)
    assert isinstance(config.genotype, Genotype)
    return CellNetwork(
        config.genotype, config.channels, num_classes, config.cells, in_channels, config.stem, auxiliary, side
    )


class EvaluationExperiment(SupervisedExperiment):
    """Trains networks that are not searched any more: cutout, drop-path, auxiliary towers; exports them without towers.

    A subclass builds the network and measures `macs`, its multiply-adds for one image.
    """

    config: EvaluationConfig
    macs: float

    def stage_settings(self) -> Sequence[StageConfig]:
        return [self.config.stage]

    def full_macs(self) -> float:
        return self.macs

    def build_optimizer(self, stage: int) -> torch.optim.Optimizer:
        if self.config.optimizer == "sgd":
            return super().build_optimizer(stage)
        settings = self.stages[stage]
        return torch.optim.Adam(
            self.parameter_groups(stage), lr=settings.lr, betas=(0.5, 0.999), weight_decay=settings.weight_decay
        )

    def drop_sites(self, stage: int) -> tuple[int, int] | None:
        """Places of drop-path in the network that a stage trains, as `CellNetwork.drop_sites`; None: it has none."""
        sites: tuple[int, int] | None = self.model.drop_sites  # type: ignore[assignment]
        return sites

    def both_logits(self, images: Tensor, keep: Tensor | None, stage: int) -> tuple[Tensor, Tensor | None]:
        """Logits in training, and the auxiliary tower's where there is one."""
        logits, auxiliary = self.network(images, keep, both=True)
        return logits, auxiliary

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        sites = self.drop_sites(stage)
        count, cells = len(batch.images), 0 if sites is None else sites[0] * sites[1]
        draws = self.draws(stage, iteration, count, 2 + cells)
        images = cutout(batch.images, draws[:, :2], self.config.cutout)
        probability = self.config.drop_path * iteration / self.stages[stage].iterations
        keep = None
        if sites is not None and probability:
            keep = (draws[:, 2:] >= probability).float().view(count, *sites) / (1 - probability)
        logits, auxiliary = self.both_logits(images, keep, stage)
        loss = F.cross_entropy(logits, batch.labels)
        if auxiliary is not None:
            loss = loss + self.config.aux_weight * F.cross_entropy(auxiliary, batch.labels)
        return loss, {"accuracy": (logits.detach().argmax(1) == batch.labels).float().mean()}

    def answer(self, batch: Batch) -> Answers:
        return self.answers(self.model(batch.images))

    def answers(self, logits: Tensor) -> Answers:
        """Logits (B, K) of a network that spends the same on every image."""
        return Answers(logits, torch.full((len(logits),), self.macs, dtype=torch.float64, device=logits.device))

    def export(self, directory: str | Path) -> None:
        """The artifact; auxiliary towers, which no inference needs, stay behind."""
        towers = {net: net.auxiliary for net in self.model.modules() if isinstance(net, CellNetwork)}
        for net in towers:
            net.auxiliary = None
        try:
            super().export(directory)
        finally:
            for net, tower in towers.items():
                net.auxiliary = tower


class NasTrainExperiment(EvaluationExperiment):
    """Trains one architecture from scratch."""

    method: ClassVar[str] = "nas_train"
    config_schema: ClassVar[type[ExperimentConfig]] = NasTrainConfig
    config: NasTrainConfig
    model: CellNetwork | ChainNetwork

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime, splits: Splits | None = None) -> None:
        self._opened = splits  # by a search on the same data
        super().__init__(config, data, runtime)

    def open_data(self, data: str) -> Splits:
        return self._opened or super().open_data(data)

    def build_model(self) -> CellNetwork | ChainNetwork:
        self.config = resolve(self.config)
        side, tower = min(self.height, self.width), self.config.aux_weight > 0
        model = build_network(self.config, self.num_classes, self.in_channels, side, tower)
        self.macs = count_macs(model.eval(), (self.in_channels, self.height, self.width)).total
        return model

    @property
    def architecture(self) -> Architecture:
        assert not isinstance(self.config.genotype, str)
        return self.config.genotype

    def signature(self) -> str:
        config = self.config
        return (
            f"{self.architecture.model_dump_json()}, {config.cells} cells, C {config.channels}, {config.stem} stem, "
            f"{'with' if config.aux_weight else 'without'} tower, {self.input_signature()}"
        )

    def plots(self, directory: str | Path) -> None:
        """Class-wise metrics and structure in `analysis.json`, the cells as graphs, the FGSM curve."""
        confusion = self.confusion("test")
        analysis.write_architecture(self.architecture, Path(directory))
        found = {
            "classes": analysis.classwise_metrics(confusion, self.splits.classes),
            "confusion": confusion.tolist(),
            "structure": analysis.structure(self.architecture),
        }
        replace_text(Path(directory) / "analysis.json", json.dumps(found, indent=2) + "\n")
        self.plot_fgsm(Path(directory))

    def plot_fgsm(self, directory: Path) -> None:
        """How the probability of the true class falls under FGSM, on test images."""
        preprocess, images = self.preprocess, self.splits.test.spread(CURVE_IMAGES)
        model = NormalizedModel(self.model, preprocess.mean, preprocess.std).to(self.runtime.device).eval()
        try:
            write_curve(mean_curve(model, images, preprocess.size, self.runtime.device), directory)
        except GradientMaskingError as error:
            warnings.warn(f"no FGSM curve: {error}", stacklevel=2)

    @classmethod
    def compare(cls, runs: Sequence[Path], directory: Path) -> None:
        """The FGSM curves of all."""
        compare_curves(runs, directory)

    @torch.no_grad()
    def confusion(self, split: str) -> np.ndarray:
        """Counts (classes, classes): rows are true, columns predicted."""
        self.model.eval()
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        for batch in self.eval_stream(split):
            predicted = self.model(batch.images).argmax(1)
            np.add.at(counts, (batch.labels.cpu().numpy(), predicted.cpu().numpy()), 1)
        return counts

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        return cell_predictor(trained_network(artifact)[0], artifact.card, device)

    @classmethod
    def load_attackable(cls, artifact: Artifact, device: str) -> AttackableNetwork:
        """The network of an artifact of this method, as serving attacks it."""
        model, config = trained_network(artifact)
        assert not isinstance(config.genotype, str)
        return AttackableNetwork(artifact.card, model, [config.genotype], device)


def trained_network(artifact: Artifact) -> tuple[CellNetwork | ChainNetwork, NasTrainConfig]:
    """The network of an artifact of `nas_train` in evaluation mode, and its resolved config."""
    config = resolve(parse_config(NasTrainConfig, artifact.config, "artifact config.yaml"))
    card = artifact.card
    model = build_network(config, len(card.classes), card.input_shape[0], min(card.input_shape[1:]), False)
    model.load_state_dict(artifact.state)
    return model.eval(), config


def cutout(images: Tensor, draws: Tensor, side: int) -> Tensor:
    """`images` (B, C, H, W) with a square around a random pixel set to 0, the mean; it may leave the image.

    Args:
        draws: (B, 2) uniform numbers.
    """
    if not side:
        return images
    height, width = images.shape[2:]
    low_y = (draws[:, :1] * height).floor() - side // 2
    low_x = (draws[:, 1:] * width).floor() - side // 2
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside = ((rows >= low_y) & (rows < low_y + side))[:, :, None] & ((columns >= low_x) & (columns < low_x + side))[
        :, None
    ]
    return images.masked_fill(inside[:, None], 0.0)
