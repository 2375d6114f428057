"""DeepMoE as an Experiment: joint training of base, embedding and heads, then fine-tuning with fixed gates.

Source: spec deepmoe sections 2.4, 2.5, 3 and 5. The baselines are arms of the same experiment.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.core.runtime import Runtime
from dataeff.data import Batch
from dataeff.dynamic.deepmoe import analysis
from dataeff.dynamic.deepmoe.baselines import (
    HardMoE,
    NoisyTopKHeads,
    RuntimePruning,
    StaticNetwork,
    importance_loss,
    q_loss,
)
from dataeff.dynamic.deepmoe.losses import adapted, deepmoe_loss, gate_warnings, ramped
from dataeff.dynamic.deepmoe.model import (
    EMBEDDING_WIDTHS,
    DeepMoE,
    GateInit,
    LatentActivation,
    MoEOutput,
    ShallowEmbedding,
    build_deepmoe,
)
from dataeff.dynamic.deepmoe.network import Block, GatedNetwork, build_network, solve_widening
from dataeff.dynamic.deepmoe.predictor import make_predictor
from dataeff.supervised import Answers, StageConfig, SupervisedConfig, SupervisedExperiment

ROUTER_SHARE = 0.04


class JointConfig(StageConfig):
    """The CIFAR recipe: 270 epochs of 390 mini-batches (spec section 3)."""

    iterations: int = Field(105_300, ge=1, description="mini-batches")
    milestones: tuple[float, ...] = Field((150 / 270, 250 / 270), description="fractions where lr drops tenfold")


class FinetuneConfig(StageConfig):
    """Base network only, gates fixed, at the last learning rate of the joint stage (spec section 2.5)."""

    iterations: int = Field(31_200, ge=0, description="mini-batches; 0 leaves the stage out, as on ImageNet")
    lr: float = Field(1e-3, gt=0, le=10, description="learning rate; the last one of the joint stage")
    milestones: tuple[float, ...] = ()


class DeepMoEConfig(SupervisedConfig):
    """Settings of DeepMoE and its baselines (spec deepmoe section 4)."""

    arm: Literal["deepmoe", "static", "noisy_topk", "hard_moe", "rnp"] = Field(
        "deepmoe",
        description="deepmoe; static: the base, thin or widened; noisy_topk: k channels a layer; hard_moe: one tail "
        "for each cluster of images; rnp: an agent per layer keeps nested channel groups",
    )
    arch: str = Field("resnet56", description="vgg6, vgg16, resnet20 ... resnet110, resnet18 to 101, resnet18_cifar")
    block: Block | None = Field(None, description="residual design; None: the architecture's own")
    width: float = Field(2.0, gt=0, le=16, description="2: wide, 1: narrow; below 1 (thin) for arm static only")
    widths: tuple[int, ...] | None = Field(None, description="channels before `width`; None: the architecture's")
    widening: Literal["W1-High", "W1-Mid", "W4-Low", "W13-All"] | None = Field(
        None, description="vgg16: widen and gate these layers only, to target_params"
    )
    target_params: float = Field(24.15e6, gt=0, description="weights of the convolutions, for widening")
    gated_convs: tuple[int, ...] | None = Field(None, description="gated convolutions of a block; None: the design's")
    embedding_widths: tuple[int, ...] = Field(EMBEDDING_WIDTHS[4], description="channels of M's stride-2 convolutions")
    latent: int | None = Field(None, ge=1, le=4096, description="d; None: the number of classes")
    latent_activation: LatentActivation = "softmax"
    temperature: float = Field(1.0, gt=0, le=100, description="of the softmax; high: static pruning")
    class_head: Literal["linear", "identity"] | None = Field(None, description="for L_e; None: identity where d = K")
    gate_init: GateInit = Field("ones", description="ones: all channels start on; kaiming: about half start off")
    keep_top: bool = Field(False, description="never close a whole layer")
    normalize_gates: bool = Field(False, description="apply gates relative to their mean")
    lam: float = Field(2.0, ge=0, le=100, description="lambda, weight of the gates' L1 norm; 0.001 to 8 in the source")
    gate_loss_reduction: Literal["mean", "sum"] = Field("mean", description="sum: Eq. 3.8 literally, lam 1e-4 to 1e-2")
    lam_ramp: float = Field(0.0, ge=0, le=1, description="share of the joint stage that raises lam from 0")
    target_share: float | None = Field(
        None, gt=0, le=1, description="active share that lam is adapted to after every epoch; None: lam is fixed"
    )
    mu: float = Field(1.0, ge=0, le=100, description="weight of the embedding's loss; 1 on CIFAR, 0 on ImageNet")
    top_share: float = Field(0.5, gt=0, le=1, description="noisy_topk: share of the channels that stay on")
    importance_weight: float = Field(0.1, ge=0, le=100, description="noisy_topk: weight of the importance loss")
    experts: int = Field(4, ge=2, le=64, description="hard_moe: clusters and tails")
    rnp_groups: int = Field(4, ge=2, le=64, description="rnp: nested channel groups of a layer")
    rnp_hidden: int = Field(32, ge=1, le=1024, description="rnp: size of the agent")
    rnp_alpha: float = Field(1.0, ge=0, le=100, description="rnp: weight of the kept share in the reward")
    rnp_epsilon: tuple[float, float] = Field((1.0, 0.05), description="rnp: exploration, first and last, linear")
    joint: JointConfig = JointConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "DeepMoEConfig":
        if self.width < 1 and self.arm != "static":
            raise ValueError(f"width must be at least 1 for arm {self.arm!r}, got {self.width} (thin: arm 'static')")
        if self.widening and (self.arch != "vgg16" or self.width != 1 or self.widths):
            raise ValueError("widening sets the widths of arch vgg16: use it with arch vgg16, width 1 and no widths")
        if self.arm in ("rnp", "hard_moe") and not self.finetune.iterations:
            raise ValueError(f"arm {self.arm!r} trains its base in stage joint, itself in finetune: give iterations")
        if not all(0 <= epsilon <= 1 for epsilon in self.rnp_epsilon):
            raise ValueError(f"rnp_epsilon must be two numbers in [0, 1], got {self.rnp_epsilon}")
        return self


def build_model(config: DeepMoEConfig, num_classes: int, in_channels: int) -> nn.Module:
    """The network of a config."""
    widths, gated_layers = config.widths, None
    if config.widening:
        widths = solve_widening(config.widening, config.target_params, in_channels)
        plain = build_network("vgg16", num_classes, in_channels)
        wider = zip(widths, plain.gate_channels, strict=True)
        gated_layers = tuple(i for i, (wide, narrow) in enumerate(wider) if wide != narrow)
    base: dict[str, Any] = {"width": config.width, "block": config.block, "widths": widths}
    base |= {"gated_convs": config.gated_convs, "gated_layers": gated_layers}
    if config.arm == "deepmoe":
        names = ("embedding_widths", "latent", "latent_activation", "temperature", "class_head", "gate_init")
        settings = {name: getattr(config, name) for name in (*names, "keep_top", "normalize_gates")}
        return build_deepmoe(config.arch, num_classes, in_channels, **base, **settings)
    network = build_network(config.arch, num_classes, in_channels, **base)
    if config.arm == "static":
        return StaticNetwork(network)
    if config.arm == "hard_moe":
        return HardMoE(network, config.experts)
    if config.arm == "rnp":
        return RuntimePruning(network, config.rnp_groups, config.rnp_hidden)
    latent = config.latent or num_classes
    embedding = ShallowEmbedding(
        in_channels, config.embedding_widths, latent, config.latent_activation, config.temperature
    )
    heads = NoisyTopKHeads(network.gate_channels, latent, config.top_share)
    return DeepMoE(network, embedding, "identity" if latent == num_classes else "linear", heads=heads)


class DeepMoEExperiment(SupervisedExperiment):
    """Trains one arm. Stage 1 is "joint"; stage 2 fixes the gates and goes on with the base network (deepmoe), or
    trains tails (hard_moe) or agent (rnp) on the base of stage 1."""

    config_schema: ClassVar[type[ExperimentConfig]] = DeepMoEConfig
    method: ClassVar[str] = "deepmoe"
    config: DeepMoEConfig

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        self.lam = self.config.lam
        self.share_sum, self.share_count = 0.0, 0
        self.on_counts: list[Tensor] = []
        self.dead_layers = torch.zeros(())
        self.images_seen = 0
        if isinstance(self.model, DeepMoE):
            share = self.model.router_macs(self.height, self.width) / self.full_macs()
            if share > ROUTER_SHARE:
                warnings.warn(
                    f"embedding network and heads cost {share:.1%} of the base network (intended: about 2 %); "
                    "use smaller embedding_widths, or larger images",
                    stacklevel=2,
                )

    def build_model(self) -> nn.Module:
        return build_model(self.config, self.num_classes, self.in_channels)

    def stage_settings(self) -> Sequence[StageConfig]:
        return [self.config.joint] if self.config.arm == "static" else [self.config.joint, self.config.finetune]

    @property
    def base(self) -> GatedNetwork:
        network = self.model.network
        assert isinstance(network, GatedNetwork)
        return network

    def full_macs(self) -> float:
        return self.base.full_macs(self.height, self.width)

    def signature(self) -> str:
        config = self.config
        parts = [f"arm {config.arm}", config.arch, f"block {config.block}", f"width {config.width:g}"]
        parts += [f"gates {self.base.gate_channels}", f"latent {config.latent}", self.input_signature()]
        return ", ".join(parts)

    # --- training -------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: int) -> None:
        if stage == 1 and isinstance(self.model, HardMoE):
            self.runtime.sync_buffers(self.model)
            self.model.form_experts((batch.images for batch in self.eval_stream("train")), self.seed)

    def prepare_stage(self, stage: int) -> None:
        model = self.model
        model.requires_grad_(True)
        if isinstance(model, DeepMoE):
            model.class_head.requires_grad_(self.config.mu > 0)  # else it gets no gradient
            if stage == 1:
                model.freeze_router()
        elif isinstance(model, HardMoE):
            if stage == 0:
                model.others.requires_grad_(False)
            else:
                nn.ModuleList(model.trunk_parts()).requires_grad_(False)
        elif isinstance(model, RuntimePruning) and stage == 0:
            for part in (model.encoders, model.cell, model.output):
                part.requires_grad_(False)

    def train_mode(self, stage: int) -> None:
        self.network.train()
        if stage == 1 and isinstance(self.model, DeepMoE):
            self.model.freeze_router()
        elif stage == 1 and isinstance(self.model, HardMoE):
            for part in self.model.trunk_parts():
                part.eval()

    def parameter_groups(self, stage: int) -> Iterable[Any]:
        """No weight decay on the gate heads (open choice, spec section 3)."""
        heads = list(self.model.heads.parameters()) if isinstance(self.model, DeepMoE) else []
        known = {id(parameter) for parameter in heads}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        learning = [parameter for parameter in heads if parameter.requires_grad]
        return [{"params": others}, *([{"params": learning, "weight_decay": 0.0}] if learning else [])]

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        losses = {
            "deepmoe": self._deepmoe_loss,
            "static": self._plain_loss,
            "noisy_topk": self._noisy_topk_loss,
            "hard_moe": self._plain_loss,
            "rnp": self._rnp_loss,
        }
        return losses[self.config.arm](batch, stage, iteration)

    def _deepmoe_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        assert isinstance(self.model, DeepMoE)
        if stage == 1:
            self.model.check_router_frozen()
        output: MoEOutput = self.network(batch.images)
        lam = ramped(self.lam, iteration / config.joint.iterations, config.lam_ramp) if stage == 0 else 0.0
        mu = config.mu if stage == 0 else 0.0
        loss, parts = deepmoe_loss(output, batch.labels, lam, mu, config.gate_loss_reduction)
        self.share_sum += float(parts["active_share"]) if config.target_share is not None else 0.0
        self.share_count += 1
        return loss, parts

    def _plain_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        options = {"one_tail": stage == 0} if isinstance(self.model, HardMoE) else {}
        return F.cross_entropy(self.network(batch.images, **options).logits, batch.labels), {}

    def _noisy_topk_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        draws = self.draws(stage, iteration, len(batch.labels), sum(self.base.gate_channels)) if stage == 0 else None
        output: MoEOutput = self.network(batch.images, draws=draws)
        loss, parts = deepmoe_loss(output, batch.labels, 0.0, config.mu if stage == 0 else 0.0)
        if stage == 0:
            means = self.mean_over_workers(torch.cat([gate.detach().mean(0) for gate in output.gates]))
            importance = importance_loss(output.gates, list(means.split(self.base.gate_channels)))
            loss = loss + config.importance_weight * importance
            parts["importance"] = importance.detach()
        return loss, parts

    def _rnp_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        count = len(batch.labels)
        draws = self.draws(stage, iteration, count, 2 * len(self.base.gate_channels))
        if stage == 0:  # the base, all channels: exploration that always draws the last action
            output = self.network(batch.images, draws=draws.new_full(draws.shape, 1 - 1e-6), epsilon=1.0)
            return F.cross_entropy(output.logits, batch.labels), {}
        first, last = config.rnp_epsilon
        epsilon = first + (last - first) * iteration / config.finetune.iterations
        output = self.network(batch.images, draws=draws, epsilon=epsilon)
        each = F.cross_entropy(output.logits, batch.labels, reduction="none")
        agent = q_loss(output, each.detach(), config.rnp_alpha)
        return each.mean() + agent, {"q": agent.detach()}

    def after_update(self, stage: int, iteration: int) -> None:
        """Adapt lambda after every epoch of the joint stage (spec section 2.5)."""
        config = self.config
        epoch = max(1, len(self.splits.train) // config.joint.batch)
        if stage or config.target_share is None or config.arm != "deepmoe" or (iteration + 1) % epoch:
            return
        share = torch.tensor(self.share_sum / self.share_count, device=self.runtime.device)
        self.lam = adapted(self.lam, float(self.mean_over_workers(share)), config.target_share)
        self.share_sum, self.share_count = 0.0, 0

    def extra_metrics(self) -> dict[str, float]:
        return {"lam": self.lam} if self.config.target_share is not None else {}

    def extra_state(self) -> dict[str, Any]:
        return {"lam": self.lam, "share_sum": self.share_sum, "share_count": self.share_count}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.lam = float(state["lam"])
        self.share_sum, self.share_count = float(state["share_sum"]), int(state["share_count"])

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> dict[str, float]:
        """Accuracy, loss, multiply-adds and reduction; with gates also the active share, the accuracy of the embedding
        alone, multiply-adds of the base network alone, and shares of dead, always-on and input-dependent channels."""
        self._reset_balance()
        metrics = super().evaluate(split)
        if not isinstance(self.model, DeepMoE):
            return metrics
        on_share = self._on_share()
        if split == "val":
            learns = self.config.arm == "deepmoe" and self.lam > 0
            dead = int(self.runtime.all_reduce(self.dead_layers))
            for message in gate_warnings(on_share, dead, learns):
                warnings.warn(message, stacklevel=2)
        return {**metrics, **analysis.balance_totals(on_share)}

    def answer(self, batch: Batch) -> Answers:
        output = self.model(batch.images)
        if not isinstance(self.model, DeepMoE):
            return Answers(output.logits, output.macs)
        for total, gate in zip(self.on_counts, output.gates, strict=True):
            total += (gate > 0).sum(0)
        self.dead_layers += sum((gate > 0).sum(1).eq(0).sum() for gate in output.gates)
        self.images_seen += len(batch.labels)
        means = {
            "active_share": output.active_share,
            "embedding_accuracy": (output.embedding_logits.argmax(1) == batch.labels).double(),
            "base_macs": output.macs - self.model.router_macs(self.height, self.width),
        }
        return Answers(output.logits, output.macs, means)

    def _reset_balance(self) -> None:
        device = self.runtime.device
        self.on_counts = [torch.zeros(c, dtype=torch.float64, device=device) for c in self.base.gate_channels]
        self.dead_layers = torch.zeros((), dtype=torch.float64, device=device)
        self.images_seen = 0

    def _on_share(self) -> list[Tensor]:
        """Share of the images evaluated last, over all workers, that each channel was active for."""
        counts = torch.cat([*self.on_counts, self.on_counts[0].new_tensor([self.images_seen])])
        counts = self.runtime.all_reduce(counts).cpu()
        return list((counts[:-1] / counts[-1]).split(self.base.gate_channels))

    def plots(self, directory: str | Path) -> None:
        if not isinstance(self.model, DeepMoE):
            return
        self.evaluate("test")
        swaps = analysis.shuffle_embeddings(self.model.eval(), self.splits.test, self.preprocess, repeats=2)
        analysis.write_figures(Path(directory), self._on_share(), swaps, self.splits.classes)

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(DeepMoEConfig, artifact.config, "artifact config.yaml")
        model = build_model(config, len(artifact.card.classes), artifact.card.input_shape[0])
        model.load_state_dict(artifact.state)
        return make_predictor(model.to(device).eval(), artifact.card, device)
