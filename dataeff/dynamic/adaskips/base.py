"""What both experiments with AdaSkips share: the settings of the network, and how it is evaluated."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from dataeff.core.config import ExperimentConfig
from dataeff.core.runtime import Runtime
from dataeff.data import Batch
from dataeff.dynamic.adaskips import analysis
from dataeff.dynamic.adaskips.hosts import HostName, build_host
from dataeff.dynamic.adaskips.inference import AdaSkipInference
from dataeff.dynamic.adaskips.model import AdaSkipConfig, AdaSkipResNet, Skips, SkipWeights
from dataeff.dynamic.adaskips.network import TransferNetwork
from dataeff.supervised import Answers, SupervisedConfig, SupervisedExperiment, mix

EVAL_DRAWS = 99


class HostConfig(SupervisedConfig):
    """The network that skips are added to, and the skips (spec sections 2.1 to 2.5)."""

    network: HostName = "resnet18"
    stem: Literal["imagenet", "small"] = Field("imagenet", description="small: 3x3 without pooling, for small images")
    widths: tuple[int, int, int, int] = Field((8, 16, 32, 64), description="channels of the stages of network 'small'")
    blocks: tuple[int, int, int, int] = Field((2, 2, 2, 2), description="blocks of the stages of network 'small'")
    skips: Skips = Field("all", description="standard: only those that the network has anyway")
    module_bn: bool = Field(True, description="a BatchNorm at the end of every module")
    skip_weights: SkipWeights = Field("hyper", description="hyper: predicted for each image; random: drawn for each")
    hyper_input: Literal["module_input", "image"] = Field("module_input", description="what a hypernetwork reads")
    hyper_width_mult: float = Field(2.0, gt=0, le=8, description="hidden channels over input channels")
    modules: tuple[int, ...] = Field((1, 2, 3, 4), min_length=1, description="stages that get skips, of 1 to 4")
    bn_mode: Literal["eval", "train"] = Field("eval", description="statistics of frozen norms: running or the batch's")
    sparsity_tau: float = Field(0.0, ge=0, le=1, description="skips below it are left out in evaluation and serving")

    @field_validator("modules")
    @classmethod
    def _stages(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value) or not set(value) <= {1, 2, 3, 4}:
            raise ValueError(f"modules must be different numbers from 1 to 4, got {list(value)}")
        return value

    @field_validator("widths", "blocks")
    @classmethod
    def _positive(cls, value: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        if min(value) < 1:
            raise ValueError(f"every stage needs at least one channel and one block, got {list(value)}")
        return value

    def build_student(self, num_classes: int, in_channels: int) -> AdaSkipResNet:
        """The network with skips, freshly initialised."""
        host = build_host(self.network, num_classes, in_channels, self.stem, self.widths, self.blocks)
        skips = AdaSkipConfig(
            skips=self.skips,
            module_bn=self.module_bn,
            weights=self.skip_weights,
            hyper_input=self.hyper_input,
            hyper_width_mult=self.hyper_width_mult,
            modules=self.modules,
            bn_mode=self.bn_mode,
            sparsity_tau=self.sparsity_tau,
        )
        return AdaSkipResNet.from_pretrained(host, num_classes, cfg=skips)

    def host_signature(self) -> str:
        """What a checkpoint must agree with."""
        small = f" widths {list(self.widths)} blocks {list(self.blocks)}" if self.network == "small" else ""
        norm = "with" if self.module_bn else "without"
        return (
            f"{self.network}{small}, {self.stem} stem, {self.skips} skips {norm} module norm in modules "
            f"{list(self.modules)}, {self.skip_weights} weights of {self.hyper_input} x {self.hyper_width_mult:g}"
        )


class SkipExperiment(SupervisedExperiment):
    """Evaluates as a served network answers: folded norms, skips below the threshold left out."""

    config: HostConfig
    model: TransferNetwork

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        self.costs = self.model.student.costs(self.height, self.width)
        self.inference: AdaSkipInference | None = None

    def full_macs(self) -> float:
        return self.costs.full

    def signature(self) -> str:
        return f"{self.config.host_signature()}, {self.input_signature()}"

    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy, loss (nats), multiply-adds and the share of skips that are taken."""
        self.prepare_inference()
        return self.measure(split)

    def prepare_inference(self) -> None:
        """Build the form of the network that answers, from the weights of now."""
        self.runtime.sync_buffers(self.model)
        self.inference = AdaSkipInference(self.model.eval().student)

    def answer(self, batch: Batch, skip_means: bool = False) -> Answers:
        """`skip_means`: also the mean of every skip weight."""
        assert self.inference is not None
        found = self.inference(batch.images, self.config.sparsity_tau, None, self.eval_draws(batch))
        means = {"active_skips": torch.cat(found.active, 1).double().mean(1)}
        if skip_means:
            means |= {
                f"lambda_{number}_{column}": values[:, column]
                for number, values in enumerate(found.weights)
                for column in range(values.shape[1])
            }
        return Answers(found.logits, found.macs, means)

    def eval_draws(self, batch: Batch) -> Tensor | None:
        """Of random skip weights: a function of the image's number."""
        count = self.model.student.num_draws
        if not count:
            return None
        generator = torch.Generator().manual_seed(mix(self.seed, EVAL_DRAWS, 0))
        draws = torch.rand(int(batch.indices.max()) + 1, count, generator=generator)
        return draws.to(self.runtime.device)[batch.indices]

    def remember_mean_weights(self) -> None:
        """Store the mean skip weights of the training images, which stand in where a budget leaves a hypernetwork
        out."""
        self.prepare_inference()
        means = self.measure("train", skip_means=True)
        for number, module in enumerate(self.model.student.stages):
            if module.hyper is not None:
                values = [means[f"lambda_{number}_{column}"] for column in range(len(module.pairs))]
                module.hyper.mean_weights.copy_(torch.tensor(values))

    @torch.no_grad()
    def plots(self, directory: str | Path) -> None:
        if self.config.skip_weights == "ones":
            return
        self.runtime.sync_buffers(self.model)
        self.model.eval()
        weights = [self.model(batch.images, self.eval_draws(batch)).weights for batch in self.eval_stream("test")]
        growth = analysis.variance_growth(self.model.student, next(self.eval_stream("test")).images)
        analysis.write_figures(Path(directory), analysis.skip_statistics(self.model.student, weights), growth)
