"""SkipNet as an Experiment: supervised pre-training of backbone and gates, then hybrid reinforcement learning.

Source: spec skipnet sections 2.6 to 2.8, 3 and 5. The baselines are arms of the same experiment: they differ in how a
gate's value is chosen in training, in the loss, and in how the network is evaluated.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dataeff.core.artifact import Artifact, Predictor, read_artifact
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.core.runtime import Runtime
from dataeff.data import Batch
from dataeff.dynamic.skipnet import analysis
from dataeff.dynamic.skipnet.losses import gate_warnings, hybrid_rl_loss, pure_rl_loss, skip_all_warning
from dataeff.dynamic.skipnet.model import (
    Gate,
    SkipNet,
    SkipNetOutput,
    build_skipnet,
    survival_probabilities,
)
from dataeff.dynamic.skipnet.predictor import skipnet_predictor
from dataeff.nn.backbone import BackboneConfig
from dataeff.supervised import Answers, StageConfig, SupervisedConfig, SupervisedExperiment, mix


class Stage2Config(StageConfig):
    """Stage 2 is a short refinement at a low learning rate (spec section 3)."""

    iterations: int = Field(10_000, ge=0, description="mini-batches")
    lr: float = Field(1e-4, gt=0, le=10, description="learning rate; 0.01 to 0.02 in small runs")
    milestones: tuple[float, ...] = ()


class SkipNetConfig(SupervisedConfig, BackboneConfig):
    """Settings of SkipNet and its baselines (spec skipnet section 4)."""

    arm: Literal["hrl_sp", "sp", "base", "hrl_scratch", "rl", "soft", "gumbel", "sdv", "stochastic_depth"] = Field(
        "hrl_sp",
        description="hrl_sp: the full method; sp: stage 1 only; base: the ResNet; hrl_scratch: stage-2 loss, stage-1 "
        "schedule; rl: REINFORCE only; soft, gumbel: relaxed gates; sdv, stochastic_depth: random dropping",
    )
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


class SkipNetExperiment(SupervisedExperiment):
    """Trains one arm; the network is reported at the fixed end of training (spec section 2.8)."""

    method: ClassVar[str] = "skipnet"
    config_schema: ClassVar[type[ExperimentConfig]] = SkipNetConfig
    config: SkipNetConfig
    model: SkipNet

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        self.keep = (
            survival_probabilities(self.model.num_gates)
            if self.config.arm == "stochastic_depth"
            else torch.full((self.model.num_gates,), self.config.keep)
        )
        self.costs = self.model.costs(self.height, self.width)
        self.class_medians_before: list[float] = []
        self.seen: list[SkipNetOutput] = []

    def build_model(self) -> SkipNet:
        model = build_network(self.config, self.num_classes, self.in_channels)
        if self.config.start_from:
            model.load_state_dict(_stage1_weights(self.config, self.splits.classes))
        return model

    def stage_settings(self) -> list[StageConfig]:
        stages: list[StageConfig] = [self.config.stage1, self.config.stage2][: len(ARMS[self.config.arm])]
        if self.config.start_from:
            stages[0] = stages[0].model_copy(update={"iterations": 0})
        return stages

    def full_macs(self) -> float:
        return self.costs.full

    def signature(self) -> str:
        config = self.config
        gate = config.gate if config.arm in GATED_ARMS else "none"
        widths = list(config.widths) if config.widths else "default"
        return (
            f"{config.family} depth {config.depth}, gate {gate}, widths {widths}, {config.norm} norm, "
            f"{self.input_signature()}"
        )

    # --- training ---------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: int) -> None:
        """Before the hybrid loss, the gates are sharpened or softened once."""
        if ARMS[self.config.arm][stage].loss != "hybrid":
            return
        config = self.config
        full_loss = self.measure("val", mode="full")["loss"]
        message = skip_all_warning(config.alpha, config.beta, self.num_classes, full_loss)
        if message:
            warnings.warn(message, stacklevel=2)
        if stage == 1:
            self.model.scale_gates(config.gate_temperature)

    def end_stage(self, stage: int) -> None:
        if stage + 1 < len(self.stages):
            medians = analysis.class_medians(self._profile("val"), self.num_classes)
            self.class_medians_before = medians.tolist()

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
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
        return loss, {"executed_share": output.gates.detach().mean()}

    def _draws(self, arm: Arm, stage: int, iteration: int, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Uniform numbers for the gates, and for the class in pure RL."""
        if arm.mode not in ("sample", "gumbel", "random"):
            return None, None
        gates = self.model.num_gates
        if arm.mode == "random":  # one decision for the whole mini-batch, as in stochastic depth
            generator = torch.Generator().manual_seed(mix(self.seed, stage, iteration))
            return torch.rand(1, gates, generator=generator).expand(count, gates).to(self.runtime.device), None
        draws = self.draws(stage, iteration, count, gates + 1)
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
            "batch_mean": lambda rewards: self.mean_over_workers(rewards.mean(0)),
        }
        if arm.loss == "hybrid":
            return hybrid_rl_loss(output, labels, rl_weight=config.rl_weight, **options)[0]
        assert class_draws is not None
        return pure_rl_loss(output, labels, class_draws, reward=config.rl_reward, **options)[0]

    def _gumbel_temperature(self, progress: float) -> float:
        first, last = self.config.gumbel_temperature
        return float(first * (last / first) ** progress)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy, loss (nats), executed share of the N gated blocks, mean multiply-adds and their reduction against
        the full network without gates. The arm "soft" also gives `accuracy_soft`, with the gates left soft."""
        self.seen = []
        metrics = self.measure(split, mode=self._eval_mode)
        if split == "val" and self._learns_to_skip():
            gates = torch.cat([output.gates for output in self.seen])
            for message in gate_warnings(gates, torch.cat([output.gate_logits for output in self.seen])):
                warnings.warn(message, stacklevel=2)
        self.seen = []
        if self.config.arm == "soft":
            metrics["accuracy_soft"] = self.measure(split, mode="soft")["accuracy"]
        return metrics

    @property
    def _eval_mode(self) -> str:
        return UNGATED_EVAL.get(self.config.arm, "hard")

    def _learns_to_skip(self) -> bool:
        """Whether the stage rewards skipping; without a reward, executing everything is no failure."""
        return self.optimizer_stage >= 0 and ARMS[self.config.arm][self.optimizer_stage].loss != "cross_entropy"

    def answer(self, batch: Batch, mode: str = "hard") -> Answers:
        output = self._forward(batch, mode)
        self.seen.append(output)
        return Answers(output.logits, output.macs, {"executed_share": output.gates.mean(1)})

    def _forward(self, batch: Batch, mode: str) -> SkipNetOutput:
        draws = None
        if mode == "random":  # per image at inference, a pure function of the image's number
            generator = torch.Generator().manual_seed(mix(self.seed, 99, 0))
            size = int(batch.indices.max()) + 1
            draws = torch.rand(size, self.model.num_gates, generator=generator).to(self.runtime.device)[batch.indices]
        keep = self.keep if mode in ("random", "expected") else None
        output: SkipNetOutput = self.model(batch.images, mode=mode, draws=draws, keep=keep)
        return output

    def _profile(self, split: str) -> analysis.Profile:
        self.model.eval()
        with torch.no_grad():
            return analysis.collect((self._forward(batch, self._eval_mode), batch) for batch in self.eval_stream(split))

    # --- state and results ------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        return {"class_medians_before": self.class_medians_before}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.class_medians_before = list(state["class_medians_before"])

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
        return skipnet_predictor(model, config.arm, config.keep, artifact.card, device)


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
