"""What the experiments of DeepMoE share: settings of gates and stages, lambda, frozen routers, balance of the channels.

Source: spec deepmoe sections 2.4, 2.5, 3 and 10.
"""

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dataeff.core.config import ExperimentConfig
from dataeff.core.runtime import Runtime
from dataeff.data import Batch
from dataeff.dynamic.deepmoe import analysis
from dataeff.dynamic.deepmoe.losses import MuMode, adapted, deepmoe_loss, gate_warnings, ramped
from dataeff.dynamic.deepmoe.model import EMBEDDING_WIDTHS, DeepMoE, GateInit, LatentActivation, MoEOutput
from dataeff.dynamic.deepmoe.network import Block, GatedNetwork
from dataeff.nn.resnet import Init
from dataeff.supervised import StageConfig, SupervisedConfig, SupervisedExperiment

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


class GatedConfig(SupervisedConfig):
    """Settings of gated networks (spec deepmoe section 4)."""

    block: Block | None = Field(None, description="residual design; None: the architecture's own")
    widths: tuple[int, ...] | None = Field(None, description="channels before `width`; None: the architecture's")
    gated_convs: tuple[int, ...] | None = Field(None, description="gated convolutions of a block; None: the design's")
    embedding_widths: tuple[int, ...] = Field(EMBEDDING_WIDTHS[4], description="channels of M's stride-2 convolutions")
    latent: int | None = Field(None, ge=1, le=4096, description="d; None: the number of classes")
    latent_activation: LatentActivation = "softmax"
    temperature: float = Field(1.0, gt=0, le=100, description="of the softmax; high: static pruning")
    gate_init: GateInit = Field("ones", description="ones: all channels start on; kaiming: about half start off")
    init: Init = Field("he", description="first weights of the rest; uniform: PyTorch's own, for short trainings")
    keep_top: bool = Field(False, description="never close a whole layer")
    normalize_gates: bool = Field(False, description="apply gates relative to their mean")
    lam: float = Field(2.0, ge=0, le=100, description="lambda, weight of the gates' L1 norm; 0.001 to 8 in the source")
    gate_loss_reduction: Literal["mean", "sum"] = Field("mean", description="sum: Eq. 3.8 literally, lam 1e-4 to 1e-2")
    lam_ramp: float = Field(0.0, ge=0, le=1, description="share of the joint stage that raises lam from 0")
    target_share: float | None = Field(
        None, gt=0, le=1, description="active share that lam is adapted to after every epoch; None: lam is fixed"
    )
    joint: JointConfig = JointConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @property
    def base_options(self) -> dict[str, Any]:
        """Keyword arguments of `build_network` but for widths and gated layers."""
        return {"block": self.block, "gated_convs": self.gated_convs, "init": self.init}

    @property
    def gate_options(self) -> dict[str, Any]:
        """Further keyword arguments of `build_deepmoe`."""
        names = ("embedding_widths", "latent", "latent_activation", "temperature", "gate_init", "keep_top")
        return {name: getattr(self, name) for name in (*names, "normalize_gates")}


class GatedExperiment(SupervisedExperiment):
    """Joint training, then fine-tuning with fixed gates, of a network whose `network` is a `GatedNetwork`."""

    config: GatedConfig

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

    @abstractmethod
    def adapts(self) -> bool:
        """Whether the network's gates are penalised, and lambda adapted to a target share."""

    def stage_settings(self) -> Sequence[StageConfig]:
        return [self.config.joint, self.config.finetune]

    @property
    def base(self) -> GatedNetwork:
        network = self.model.network
        assert isinstance(network, GatedNetwork)
        return network

    @property
    def gate_modules(self) -> list[nn.Module]:
        """The gating heads; none in a network without gates."""
        heads = getattr(self.model, "heads", None)
        return [heads] if isinstance(heads, nn.Module) else []

    def full_macs(self) -> float:
        return self.base.full_macs(self.height, self.width)

    # --- training -------------------------------------------------------------------------------------------------

    def prepare_stage(self, stage: int) -> None:
        self.model.requires_grad_(True)
        if stage == 1 and isinstance(self.model, DeepMoE):
            self.model.freeze_router()

    def train_mode(self, stage: int) -> None:
        self.network.train()
        if stage == 1 and isinstance(self.model, DeepMoE):
            self.model.freeze_router()

    def parameter_groups(self, stage: int) -> Iterable[Any]:
        """No weight decay on the gate heads (open choice, spec section 3)."""
        known = {id(parameter) for heads in self.gate_modules for parameter in heads.parameters()}
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gates = [parameter for parameter in learning if id(parameter) in known]
        others = [parameter for parameter in learning if id(parameter) not in known]
        return [{"params": others}, *([{"params": gates, "weight_decay": 0.0}] if gates else [])]

    def lam_at(self, stage: int, iteration: int) -> float:
        """lambda of a mini-batch: ramped in the joint stage, 0 while gates are fixed."""
        return ramped(self.lam, iteration / self.config.joint.iterations, self.config.lam_ramp) if stage == 0 else 0.0

    def gated_loss(
        self,
        output: MoEOutput,
        targets: Tensor,
        stage: int,
        iteration: int,
        mu: float,
        mu_mode: MuMode = "labels",
        pixels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The three-term loss of the joint stage, the base network's while gates are fixed."""
        assert isinstance(self.model, DeepMoE)
        if stage == 1:
            self.model.check_router_frozen()
        lam, mu = self.lam_at(stage, iteration), mu if stage == 0 else 0.0
        loss, parts = deepmoe_loss(output, targets, lam, mu, self.config.gate_loss_reduction, mu_mode, pixels)
        self.count_share(parts["active_share"])
        return loss, parts

    def count_share(self, active_share: Tensor) -> None:
        """Remember a mini-batch's active share for the next adaptation of lambda."""
        self.share_sum += float(active_share) if self.config.target_share is not None else 0.0
        self.share_count += 1

    def after_update(self, stage: int, iteration: int) -> None:
        """Adapt lambda after every epoch of the joint stage (spec section 2.5).

        Not while lambda is still ramped: all channels are on then whatever lambda will be, and raised for that it would
        close far more of them than asked for, which never open again.
        """
        config = self.config
        epoch = max(1, len(self.splits.train) // config.joint.batch)
        if stage or config.target_share is None or not self.adapts() or (iteration + 1) % epoch:
            return
        if iteration >= config.lam_ramp * config.joint.iterations:
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
        """The metrics of `measure`; with gates also the active share, multiply-adds of the base network alone, and
        shares of dead, always-on and input-dependent channels."""
        self._reset_balance()
        metrics = self.measure(split)
        if not self.gate_modules:
            return metrics
        on_share = self.on_share()
        if split == "val":
            dead = int(self.runtime.all_reduce(self.dead_layers))
            for message in gate_warnings(on_share, dead, self.adapts() and self.lam > 0):
                warnings.warn(message, stacklevel=2)
        return {**metrics, **analysis.balance_totals(on_share)}

    def count_gates(self, gates: list[Tensor], batch: Batch) -> None:
        """Add the active channels of a batch to the balance."""
        for total, gate in zip(self.on_counts, gates, strict=True):
            total += (gate > 0).sum(0)
        self.dead_layers += sum((gate > 0).sum(1).eq(0).sum() for gate in gates)
        self.images_seen += len(batch.images)

    def _reset_balance(self) -> None:
        device = self.runtime.device
        self.on_counts = [torch.zeros(c, dtype=torch.float64, device=device) for c in self.base.gate_channels]
        self.dead_layers = torch.zeros((), dtype=torch.float64, device=device)
        self.images_seen = 0

    def on_share(self) -> list[Tensor]:
        """Share of the images evaluated last, over all workers, that each channel was active for."""
        counts = torch.cat([*self.on_counts, self.on_counts[0].new_tensor([self.images_seen])])
        counts = self.runtime.all_reduce(counts).cpu()
        return list((counts[:-1] / counts[-1]).split(self.base.gate_channels))
