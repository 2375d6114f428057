"""DeepMoE as an Experiment: joint training of base, embedding and heads, then fine-tuning with fixed gates.

Source: spec deepmoe sections 2.4, 2.5, 3 and 5. The baselines are arms of the same experiment.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dataeff.core.artifact import Artifact, Predictor
from dataeff.core.config import ExperimentConfig, parse_config
from dataeff.data import Batch
from dataeff.dynamic.deepmoe import analysis
from dataeff.dynamic.deepmoe.base import GatedConfig, GatedExperiment
from dataeff.dynamic.deepmoe.baselines import (
    HardMoE,
    NoisyTopKHeads,
    RuntimePruning,
    StaticNetwork,
    importance_loss,
    q_loss,
)
from dataeff.dynamic.deepmoe.losses import deepmoe_loss, gate_loss
from dataeff.dynamic.deepmoe.model import DeepMoE, MoEOutput, ShallowEmbedding, build_deepmoe
from dataeff.dynamic.deepmoe.network import build_network, solve_widening
from dataeff.dynamic.deepmoe.perlayer import PerLayerMoE, PerLayerOutput
from dataeff.dynamic.deepmoe.predictor import make_predictor
from dataeff.supervised import Answers, StageConfig


class DeepMoEConfig(GatedConfig):
    """Settings of DeepMoE and its baselines (spec deepmoe section 4)."""

    arm: Literal["deepmoe", "static", "per_layer", "noisy_topk", "hard_moe", "rnp"] = Field(
        "deepmoe",
        description="deepmoe; static: the base, thin or widened; per_layer: gates read the layer before (softmax "
        "latents, no mu); noisy_topk: k channels a layer; hard_moe: one tail for each cluster of images; rnp: an agent "
        "per layer keeps nested channel groups",
    )
    arch: str = Field("resnet56", description="vgg6, vgg16, resnet20 ... resnet110, resnet18 to 101, resnet18_cifar")
    width: float = Field(2.0, gt=0, le=16, description="2: wide, 1: narrow; below 1 (thin) for arm static only")
    widening: Literal["W1-High", "W1-Mid", "W4-Low", "W13-All"] | None = Field(
        None, description="vgg16: widen and gate these layers only, to target_params"
    )
    target_params: float = Field(24.15e6, gt=0, description="weights of the convolutions, for widening")
    class_head: Literal["linear", "identity"] | None = Field(None, description="for L_e; None: identity where d = K")
    mu: float = Field(1.0, ge=0, le=100, description="weight of the embedding's loss; 1 on CIFAR, 0 on ImageNet")
    top_share: float = Field(0.5, gt=0, le=1, description="noisy_topk: share of the channels that stay on")
    importance_weight: float = Field(0.1, ge=0, le=100, description="noisy_topk: weight of the importance loss")
    experts: int = Field(4, ge=2, le=64, description="hard_moe: clusters and tails")
    rnp_groups: int = Field(4, ge=2, le=64, description="rnp: nested channel groups of a layer")
    rnp_hidden: int = Field(32, ge=1, le=1024, description="rnp: size of the agent")
    rnp_alpha: float = Field(1.0, ge=0, le=100, description="rnp: weight of the kept share in the reward")
    rnp_epsilon: tuple[float, float] = Field((1.0, 0.05), description="rnp: exploration, first and last, linear")

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
    base: dict[str, Any] = {"width": config.width, "widths": widths, "gated_layers": gated_layers}
    base |= config.base_options
    if config.arm == "deepmoe":
        gates = {**config.gate_options, "class_head": config.class_head}
        return build_deepmoe(config.arch, num_classes, in_channels, **base, **gates)
    network = build_network(config.arch, num_classes, in_channels, **base)
    if config.arm == "static":
        return StaticNetwork(network)
    if config.arm == "hard_moe":
        return HardMoE(network, config.experts)
    if config.arm == "rnp":
        return RuntimePruning(network, config.rnp_groups, config.rnp_hidden)
    latent = config.latent or num_classes
    if config.arm == "per_layer":
        return PerLayerMoE(network, latent, config.temperature, config.gate_init, config.keep_top)
    embedding = ShallowEmbedding(
        in_channels, config.embedding_widths, latent, config.latent_activation, config.temperature, config.init
    )
    heads = NoisyTopKHeads(network.gate_channels, latent, config.top_share)
    return DeepMoE(network, embedding, "identity" if latent == num_classes else "linear", heads=heads)


class DeepMoEExperiment(GatedExperiment):
    """Trains one arm. Stage 1 is "joint"; stage 2 fixes the gates and goes on with the base network (deepmoe), or
    trains tails (hard_moe) or agent (rnp) on the base of stage 1."""

    config_schema: ClassVar[type[ExperimentConfig]] = DeepMoEConfig
    method: ClassVar[str] = "deepmoe"
    config: DeepMoEConfig

    def build_model(self) -> nn.Module:
        return build_model(self.config, self.num_classes, self.in_channels)

    def stage_settings(self) -> Sequence[StageConfig]:
        return [self.config.joint] if self.config.arm == "static" else super().stage_settings()

    def adapts(self) -> bool:
        return self.config.arm in ("deepmoe", "per_layer")

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
        elif isinstance(model, PerLayerMoE):
            model.heads.requires_grad_(stage == 0)
        elif isinstance(model, HardMoE):
            if stage == 0:
                model.others.requires_grad_(False)
            else:
                nn.ModuleList(model.trunk_parts()).requires_grad_(False)
        elif isinstance(model, RuntimePruning) and stage == 0:
            for part in (model.encoders, model.cell, model.output):
                part.requires_grad_(False)

    def train_mode(self, stage: int) -> None:
        super().train_mode(stage)
        if stage == 1 and isinstance(self.model, HardMoE):
            for part in self.model.trunk_parts():
                part.eval()

    def batch_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        losses = {
            "deepmoe": self._deepmoe_loss,
            "static": self._plain_loss,
            "per_layer": self._per_layer_loss,
            "noisy_topk": self._noisy_topk_loss,
            "hard_moe": self._plain_loss,
            "rnp": self._rnp_loss,
        }
        return losses[self.config.arm](batch, stage, iteration)

    def _deepmoe_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        output: MoEOutput = self.network(batch.images)
        return self.gated_loss(output, batch.labels, stage, iteration, self.config.mu)

    def _per_layer_loss(self, batch: Batch, stage: int, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        output: PerLayerOutput = self.network(batch.images)
        base = F.cross_entropy(output.logits, batch.labels)
        gates = gate_loss(output.gates, self.config.gate_loss_reduction)
        share = output.active_share.mean()
        self.count_share(share)
        parts = {"base": base.detach(), "gates": gates.detach(), "active_share": share}
        return base + self.lam_at(stage, iteration) * gates, parts

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

    # --- evaluation -----------------------------------------------------------------------------------------------

    def answer(self, batch: Batch) -> Answers:
        output = self.model(batch.images)
        if isinstance(self.model, PerLayerMoE):
            router_macs = self.model.router_macs()
        elif isinstance(self.model, DeepMoE):
            router_macs = self.model.router_macs(self.height, self.width)
        else:
            return Answers(output.logits, output.macs)
        self.count_gates(output.gates, batch)
        means = {"active_share": output.active_share, "base_macs": output.macs - router_macs}
        if isinstance(output, MoEOutput):
            means["embedding_accuracy"] = (output.embedding_logits.argmax(1) == batch.labels).double()
        return Answers(output.logits, output.macs, means)

    def plots(self, directory: str | Path) -> None:
        if not isinstance(self.model, DeepMoE):
            return
        self.evaluate("test")
        swaps = analysis.shuffle_embeddings(self.model.eval(), self.splits.test, self.preprocess, repeats=2)
        analysis.write_figures(Path(directory), self.on_share(), swaps, self.splits.classes)

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        config = parse_config(DeepMoEConfig, artifact.config, "artifact config.yaml")
        model = build_model(config, len(artifact.card.classes), artifact.card.input_shape[0])
        model.load_state_dict(artifact.state)
        return make_predictor(model.to(device).eval(), artifact.card, device)
