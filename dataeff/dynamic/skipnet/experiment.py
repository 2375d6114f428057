"""SkipNet as an Experiment: supervised pre-training of backbone and gates, then hybrid reinforcement learning.

Source: spec skipnet sections 2.6 to 2.8, 3 and 5. The baselines are arms of the same experiment: they differ in how a
gate's value is chosen in training, in the loss, and in how the network is evaluated.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dataeff.core.artifact import Artifact, Card, Predictor, read_artifact, save_artifact, versions
from dataeff.core.config import Config, ExperimentConfig, parse_config
from dataeff.core.experiment import Experiment
from dataeff.core.runtime import Runtime
from dataeff.data import Augment, Batch, Preprocess, TrainStream, eval_batches, open_splits
from dataeff.dynamic.skipnet import analysis
from dataeff.dynamic.skipnet.losses import gate_warnings, hybrid_rl_loss, pure_rl_loss, skip_all_warning
from dataeff.dynamic.skipnet.model import (
    Gate,
    SkipNet,
    SkipNetOutput,
    build_skipnet,
    survival_probabilities,
)
from dataeff.dynamic.skipnet.predictor import SkipNetPredictor
from dataeff.metrics.cost import parameters

MAX_BAD_STEPS = 10
EVAL_BATCH = 256


class StageConfig(Config):
    """One stage of training with SGD. Defaults: the CIFAR recipe of the ResNet paper (spec section 3)."""

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


class Stage2Config(StageConfig):
    """Stage 2 is a short refinement at a low learning rate (spec section 3)."""

    iterations: int = Field(10_000, ge=0, description="mini-batches")
    lr: float = Field(1e-4, gt=0, le=10, description="learning rate; 0.01 to 0.02 in small runs")
    milestones: tuple[float, ...] = ()


class SkipNetConfig(ExperimentConfig):
    """Settings of SkipNet and its baselines (spec skipnet section 4)."""

    arm: Literal["hrl_sp", "sp", "base", "hrl_scratch", "rl", "soft", "gumbel", "sdv", "stochastic_depth"] = Field(
        "hrl_sp",
        description="hrl_sp: the full method; sp: stage 1 only; base: the ResNet; hrl_scratch: stage-2 loss, stage-1 "
        "schedule; rl: REINFORCE only; soft, gumbel: relaxed gates; sdv, stochastic_depth: random dropping",
    )
    family: Literal["cifar", "imagenet"] = "cifar"
    depth: int = Field(38, ge=8, description="6n+2 (38, 74, 110, 152) or, for imagenet, 34, 50, 101")
    widths: tuple[int, ...] | None = Field(None, description="channels of the groups; None: 16, 32, 64 or 64 to 512")
    norm: Literal["batch", "group"] = Field("batch", description="group: no batch statistics")
    shortcut: Literal["projection", "pool_pad"] = "projection"
    gate: Gate = Field("rnn", description="rnn, ffgate1 (up to ~100 layers), ffgate2 (deeper), linear (control)")
    embed_dim: int = Field(10, ge=1, le=1024, description="input size of the RNN gate")
    hidden_dim: int = Field(10, ge=1, le=1024, description="state size of the RNN gate")
    gate_bias_init: float = Field(
        0.0, ge=-5, le=5, description="0.5 to 2 in small runs, else all blocks may be skipped"
    )
    gate_temperature: float = Field(
        1.0, gt=0, le=100, description="divides the gates' output before stage 2; above 1 explores"
    )
    gumbel_temperature: tuple[float, float] = Field((1.0, 0.1), description="first and last, annealed geometrically")
    alpha: float = Field(1.0, ge=0, le=100, description="weight of skipped blocks in the reward; 0 to 4 in the source")
    beta: Literal["alpha_over_n"] | Annotated[float, Field(ge=0, le=100)] = Field(
        "alpha_over_n", description="weight of the loss in the reward; 1: Eq. 2.5"
    )
    rl_weight: float = Field(0.01, ge=0, le=100, description="weight of the policy gradient")
    gamma: float = Field(1.0, gt=0, le=1, description="discount of later skips")
    reward_baseline: Literal["none", "batch_mean"] = "none"
    rl_reward: Literal["loss", "correct"] = Field("loss", description="reward of the predicted class in the arm rl")
    block_costs: Literal["ones", "macs"] = Field("ones", description="C_i: 1, or multiply-adds relative to their mean")
    keep: float = Field(0.5, ge=0, le=1, description="share of blocks that the arm sdv executes")
    clip_norm: float | None = Field(None, gt=0, description="bound on the gradient's norm; 5 in small runs")
    augment: Literal["none", "shift", "shift_flip", "imagenet"] = Field(
        "shift_flip", description="shift: no mirroring, for digits"
    )
    report_every: int = Field(1000, ge=1, description="mini-batches in a step")
    start_from: str | None = Field(None, description="artifact of a stage-1 run (arm sp); stage 1 is then left out")
    stage1: StageConfig = StageConfig()
    stage2: Stage2Config = Stage2Config()

    @field_validator("start_from")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).absolute())

    @model_validator(mode="after")
    def _consistent(self) -> "SkipNetConfig":
        if self.arm in GATED_ARMS and self.gate == "none":
            raise ValueError(f"arm {self.arm!r} needs a gate: rnn, ffgate1, ffgate2 or linear")
        if self.start_from and self.arm != "hrl_sp":
            raise ValueError(f"start_from is for arm 'hrl_sp', not {self.arm!r}")
        if self.arm == "hrl_sp" and not self.start_from and not self.stage1.iterations:
            raise ValueError(
                "stage 2 has no stage-1 weights: give stage1.iterations, start_from, or choose arm 'hrl_scratch'"
            )
        if not all(0 < temperature <= 10 for temperature in self.gumbel_temperature):
            raise ValueError(f"gumbel_temperature must be two numbers in (0, 10], got {self.gumbel_temperature}")
        return self


@dataclass(frozen=True)
class Arm:
    """How one stage trains: the network's mode, and the loss."""

    mode: str
    loss: Literal["cross_entropy", "hybrid", "pure_rl"] = "cross_entropy"


SP, HRL = Arm("straight_through"), Arm("sample", "hybrid")
ARMS: dict[str, tuple[Arm, ...]] = {
    "hrl_sp": (SP, HRL),
    "sp": (SP,),
    "base": (Arm("full"),),
    "hrl_scratch": (HRL,),
    "rl": (Arm("sample", "pure_rl"),),
    "soft": (Arm("soft"),),
    "gumbel": (Arm("gumbel"),),
    "sdv": (Arm("random"),),
    "stochastic_depth": (Arm("random"),),
}
UNGATED_EVAL = {"base": "full", "sdv": "random", "stochastic_depth": "expected"}
GATED_ARMS = ARMS.keys() - UNGATED_EVAL.keys()


def build_network(config: SkipNetConfig, num_classes: int, in_channels: int) -> SkipNet:
    """The network of a config; arms that never ask a gate have none."""
    return build_skipnet(
        depth=config.depth,
        num_classes=num_classes,
        gate=config.gate if config.arm in GATED_ARMS else "none",
        in_channels=in_channels,
        widths=config.widths,
        norm=config.norm,
        shortcut=config.shortcut,
        family=config.family,
        embed_dim=config.embed_dim,
        hidden_dim=config.hidden_dim,
        gate_bias_init=config.gate_bias_init,
    )


class SkipNetExperiment(Experiment):
    """Trains one arm. A step is `report_every` mini-batches of a stage; the network is reported at the fixed end of
    training, never at its best validation step (spec section 2.8)."""

    config_schema: ClassVar[type[ExperimentConfig]] = SkipNetConfig

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        assert isinstance(config, SkipNetConfig)
        self.config = config
        self.splits = open_splits(data)
        if not len(self.splits.val):
            raise ValueError(f"{data}: no validation images; leave val=0 out, or give more images")
        self.preprocess = Preprocess.fit(self.splits.train)
        channels, self.height, self.width = self.splits.image_shape
        self.model = build_network(config, len(self.splits.classes), channels)
        self.stages: list[StageConfig] = [config.stage1, config.stage2][: len(ARMS[config.arm])]
        self.first_stage = 0
        if config.start_from:
            self.model.load_state_dict(_stage1_weights(config, self.splits.classes))
            self.first_stage = 1
        self.network = runtime.wrap_model(self.model)
        self.keep = (
            survival_probabilities(self.model.num_gates)
            if config.arm == "stochastic_depth"
            else torch.full((self.model.num_gates,), config.keep)
        )
        self.costs = self.model.costs(self.height, self.width)
        self.full_macs = self.costs.full
        self.optimizer: torch.optim.SGD | None = None
        self.optimizer_stage = -1
        self.stream: TrainStream | None = None
        self.bad_steps = 0
        self.class_medians_before: list[float] = []

    @property
    def total_steps(self) -> int:
        return sum(self._steps(stage) for stage in range(self.first_stage, len(self.stages)))

    def _steps(self, stage: int) -> int:
        return -(-self.stages[stage].iterations // self.config.report_every)

    def _place(self, step: int) -> tuple[int, int]:
        """Stage of a step, and the step's number within it."""
        stage = self.first_stage
        while step >= self._steps(stage):
            step -= self._steps(stage)
            stage += 1
        return stage, step

    # --- training ---------------------------------------------------------------------------------------------------

    def train_step(self, step: int) -> Mapping[str, float]:
        stage, within = self._place(step)
        settings = self.stages[stage]
        first = within * self.config.report_every
        last = min(first + self.config.report_every, settings.iterations)
        if self.optimizer_stage != stage:
            self._begin_stage(stage)
        sums = torch.zeros(3, dtype=torch.float64, device=self.runtime.device)
        self.network.train()
        batches = self._batches(stage, first)
        for iteration in range(first, last):
            loss, executed = self._train_batch(next(batches), stage, iteration)
            sums += torch.stack([loss.double(), executed.double(), torch.ones_like(loss).double()])
        loss_sum, executed_sum, count = self.runtime.all_reduce(sums).tolist()
        metrics = {
            "stage": float(stage + 1),
            "lr": settings.lr_at(last - 1),
            "train_loss": loss_sum / count,
            "train_executed_share": executed_sum / count,
            **{f"val_{name}": value for name, value in self.evaluate("val").items()},
        }
        if last == settings.iterations:
            self._end_stage(stage)
        return metrics

    def _batches(self, stage: int, first: int) -> Any:
        """The stage's stream of training batches at mini-batch `first`."""
        if self.stream is None or self.stream.iteration != first:
            self._close_stream()
            self.stream = TrainStream(
                self.splits.train,
                self.preprocess,
                Augment(self.config.augment),
                batch_size=self.stages[stage].batch,
                seed=self.seed + stage,
                rank=self.runtime.rank,
                world_size=self.runtime.world_size,
                start_iteration=first,
                workers=self.runtime.options.loader_workers,
            )
        return self.runtime.wrap_loader(self.stream)

    def _close_stream(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def _begin_stage(self, stage: int) -> None:
        """A new optimiser for a stage that starts; before stage 2 the gates are sharpened or softened once."""
        self._make_optimizer(stage)
        if ARMS[self.config.arm][stage].loss != "hybrid":
            return
        full_loss = self._full_loss()
        config = self.config
        message = skip_all_warning(config.alpha, config.beta, len(self.splits.classes), full_loss)
        if message:
            warnings.warn(message, stacklevel=2)
        if stage == 1:
            self.model.scale_gates(config.gate_temperature)

    def _make_optimizer(self, stage: int) -> None:
        settings = self.stages[stage]
        self._close_stream()
        self.optimizer_stage = stage
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )

    def _end_stage(self, stage: int) -> None:
        self._close_stream()
        if stage + 1 < len(self.stages):
            medians = analysis.class_medians(self._profile("val"), len(self.splits.classes))
            self.class_medians_before = medians.tolist()

    def _train_batch(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, Tensor]:
        """One mini-batch: its loss and executed share, both without gradient."""
        arm, settings = ARMS[self.config.arm][stage], self.stages[stage]
        draws, class_draws = self._draws(arm, stage, iteration, len(batch.labels))
        output = self.network(
            batch.images,
            mode=arm.mode,
            draws=draws,
            keep=self.keep if arm.mode == "random" else None,
            temperature=self._gumbel_temperature(iteration / settings.iterations),
        )
        loss = self._loss(arm, output, batch.labels, class_draws)
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Averaged gradients are the same on every rank, so every rank takes the same decision.
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf)
        if bool(torch.isfinite(norm)):
            self.bad_steps = 0
            for group in self.optimizer.param_groups:
                group["lr"] = settings.lr_at(iteration)
            self.optimizer.step()
        else:
            self._count_bad_step(stage, iteration)
        return loss.detach(), output.gates.detach().mean()

    def _count_bad_step(self, stage: int, iteration: int) -> None:
        self.bad_steps += 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise ValueError(
                f"stage {stage + 1}, mini-batch {iteration}: the loss or its gradient was not finite "
                f"{MAX_BAD_STEPS} times in a row; use a smaller lr or rl_weight, or set clip_norm"
            )
        warnings.warn(
            f"stage {stage + 1}, mini-batch {iteration}: gradient not finite, mini-batch skipped", stacklevel=2
        )

    def _draws(self, arm: Arm, stage: int, iteration: int, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Uniform numbers for the gates, and for the class in pure RL.

        They belong to the place in the global batch: each rank has its own, whatever the number of ranks.
        """
        if arm.mode not in ("sample", "gumbel", "random"):
            return None, None
        generator = torch.Generator().manual_seed(_mix(self.seed, stage, iteration))
        gates = self.model.num_gates
        if arm.mode == "random":  # one decision for the whole mini-batch, as in stochastic depth
            return torch.rand(1, gates, generator=generator).expand(count, gates).to(self.runtime.device), None
        first = self.runtime.rank * count
        draws = torch.rand(self.stages[stage].batch, gates + 1, generator=generator)[first : first + count]
        draws = draws.to(self.runtime.device)
        return draws[:, :gates], draws[:, gates]

    def _loss(self, arm: Arm, output: SkipNetOutput, labels: Tensor, class_draws: Tensor | None) -> Tensor:
        if arm.loss == "cross_entropy":
            return F.cross_entropy(output.logits, labels)
        config = self.config
        costs = self.costs.blocks / self.costs.blocks.mean() if config.block_costs == "macs" else None
        options: dict[str, Any] = {
            "alpha": config.alpha,
            "beta": config.beta,
            "reward_baseline": config.reward_baseline,
            "block_costs": costs,
            "gamma": config.gamma,
            "batch_mean": self._mean_over_workers,
        }
        if arm.loss == "hybrid":
            return hybrid_rl_loss(output, labels, rl_weight=config.rl_weight, **options)[0]
        assert class_draws is not None
        return pure_rl_loss(output, labels, class_draws, reward=config.rl_reward, **options)[0]

    def _mean_over_workers(self, rewards: Tensor) -> Tensor:
        return self.runtime.all_reduce(rewards.mean(0)) / self.runtime.world_size

    def _gumbel_temperature(self, progress: float) -> float:
        first, last = self.config.gumbel_temperature
        return float(first * (last / first) ** progress)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy, loss (nats), executed share of the N gated blocks, mean multiply-adds and their reduction against
        the full network without gates. The arm "soft" also gives `accuracy_soft`, with the gates left soft."""
        mode = UNGATED_EVAL.get(self.config.arm, "hard")
        accuracy, loss, executed, macs = self._evaluate(split, mode)
        metrics = {
            "accuracy": accuracy,
            "loss": loss,
            "executed_share": executed,
            "macs": macs,
            "reduction": 1 - macs / self.full_macs,
        }
        if self.config.arm == "soft":
            metrics["accuracy_soft"] = self._evaluate(split, "soft")[0]
        return metrics

    @torch.no_grad()
    def _evaluate(self, split: str, mode: str) -> tuple[float, float, float, float]:
        sums = torch.zeros(5, dtype=torch.float64, device=self.runtime.device)
        self.runtime.sync_buffers(self.model)
        self.model.eval()
        gates, gate_logits = [], []
        for batch in self._eval_batches(split, self.runtime.rank, self.runtime.world_size):
            output = self._forward(batch, mode)
            correct = (output.logits.argmax(1) == batch.labels).sum()
            loss = F.cross_entropy(output.logits, batch.labels, reduction="sum")
            parts = [correct, loss, output.gates.mean(1).sum(), output.macs.sum(), torch.tensor(len(batch.labels))]
            sums += torch.stack([part.double().to(sums.device) for part in parts])
            gates.append(output.gates)
            gate_logits.append(output.gate_logits)
        if mode == "hard" and split == "val" and gates and self._learns_to_skip():
            for message in gate_warnings(torch.cat(gates), torch.cat(gate_logits)):
                warnings.warn(message, stacklevel=2)
        correct, loss, executed, macs, count = self.runtime.all_reduce(sums).tolist()
        return correct / count, loss / count, executed / count, macs / count

    def _learns_to_skip(self) -> bool:
        """Whether the stage rewards skipping; without a reward, executing everything is no failure."""
        return self.optimizer_stage >= 0 and ARMS[self.config.arm][self.optimizer_stage].loss != "cross_entropy"

    def _full_loss(self) -> float:
        """Validation cross-entropy with every block executed, in nats."""
        return self._evaluate("val", "full")[1]

    def _forward(self, batch: Batch, mode: str) -> SkipNetOutput:
        draws = None
        if mode == "random":  # per image at inference, a pure function of the image's number
            generator = torch.Generator().manual_seed(_mix(self.seed, 99, 0))
            size = int(batch.indices.max()) + 1
            draws = torch.rand(size, self.model.num_gates, generator=generator).to(self.runtime.device)[batch.indices]
        keep = self.keep if mode in ("random", "expected") else None
        output: SkipNetOutput = self.model(batch.images, mode=mode, draws=draws, keep=keep)
        return output

    def _eval_batches(self, split: str, rank: int = 0, world_size: int = 1) -> Any:
        source = getattr(self.splits, split)
        return self.runtime.wrap_loader(
            eval_batches(source, self.preprocess, EVAL_BATCH, rank, world_size, self.runtime.options.loader_workers)
        )

    def _profile(self, split: str) -> analysis.Profile:
        self.model.eval()
        mode = UNGATED_EVAL.get(self.config.arm, "hard")
        with torch.no_grad():
            return analysis.collect((self._forward(batch, mode), batch) for batch in self._eval_batches(split))

    # --- state and results ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "network": self._signature(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "optimizer_stage": self.optimizer_stage,
            "bad_steps": self.bad_steps,
            "class_medians_before": self.class_medians_before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["network"] != self._signature():
            raise ValueError(
                f"the checkpoint is of another network: {state['network']}, this run's is {self._signature()}"
            )
        super().load_state_dict(state)
        self.model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            self._make_optimizer(int(state["optimizer_stage"]))
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])
        self.bad_steps = int(state["bad_steps"])
        self.class_medians_before = list(state["class_medians_before"])

    def _signature(self) -> str:
        config = self.config
        shape = "x".join(map(str, self.splits.image_shape))
        gate = config.gate if config.arm in GATED_ARMS else "none"
        widths = list(config.widths) if config.widths else "default"
        return (
            f"{config.family} depth {config.depth}, gate {gate}, widths {widths}, {config.norm} norm, "
            f"{len(self.splits.classes)} classes, input {shape}"
        )

    def export(self, directory: str | Path) -> None:
        """Evaluate on the test split (on all ranks) and write the artifact (on the main rank)."""
        metrics = self.evaluate("test")
        if not self.runtime.is_main:
            return
        card = Card(
            method="skipnet",
            classes=list(self.splits.classes),
            input_shape=self.splits.image_shape,
            preprocess=self.preprocess.to_dict(),
            metrics={f"test_{name}": value for name, value in metrics.items()},
            cost={"macs": metrics["macs"], "full_macs": self.full_macs, "params": parameters(self.model)},
            data={"name": self.splits.name, "fingerprint": self.splits.fingerprint},
            versions=versions(),
        )
        save_artifact(directory, card, self.config, self.model.state_dict())

    def plots(self, directory: str | Path) -> None:
        if self.config.arm in UNGATED_EVAL:
            return
        self.model.eval()
        analysis.write_figures(
            Path(directory),
            model=self.model,
            preprocess=self.preprocess,
            profile=self._profile("test"),
            source=self.splits.test,
            classes=self.splits.classes,
            before=self.class_medians_before,
            after=analysis.class_medians(self._profile("val"), len(self.splits.classes)).tolist(),
        )

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(SkipNetConfig, artifact.config, "artifact config.yaml")
        model = build_network(config, len(artifact.card.classes), artifact.card.input_shape[0])
        model.load_state_dict(artifact.state)
        return SkipNetPredictor(model, config.arm, config.keep, artifact.card, device)


def _stage1_weights(config: SkipNetConfig, classes: tuple[str, ...]) -> dict[str, Tensor]:
    assert config.start_from is not None
    artifact = read_artifact(config.start_from)
    theirs = parse_config(SkipNetConfig, artifact.config, f"start_from {config.start_from}")
    for name in ("family", "depth", "widths", "norm", "shortcut", "gate", "embed_dim", "hidden_dim"):
        if getattr(theirs, name) != getattr(config, name):
            raise ValueError(
                f"start_from {config.start_from}: its {name} is {getattr(theirs, name)!r}, this run's is "
                f"{getattr(config, name)!r}; make them equal"
            )
    if tuple(artifact.card.classes) != classes:
        raise ValueError(
            f"start_from {config.start_from}: its classes are {artifact.card.classes}, this data's {list(classes)}"
        )
    if theirs.arm not in GATED_ARMS:
        raise ValueError(f"start_from {config.start_from}: arm {theirs.arm!r} has no gates; give a run of arm 'sp'")
    return artifact.state


def _mix(*numbers: int) -> int:
    """One seed out of several numbers, so that neighbouring ones share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
