"""DARTS, PC-, P- and PCP-DARTS, with labels and without: one search, by its settings.

Source: spec ss_pcp_darts sections 2.3 to 2.8.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dataeff.core.runtime import Runtime
from dataeff.data import Augment, Batch, Preprocess, uniform_draws
from dataeff.nas.discretise import derive_genotype, keep_operations
from dataeff.nas.genotype import Genotype, structure_stats
from dataeff.nas.search import GradientSearch, Moment, SearchTask
from dataeff.nas.self_supervised import VIEW_DRAWS, BarlowTwinsLoss, MixedSelfSupervisedLoss, distort
from dataeff.nas.settings import SearchSettings
from dataeff.nas.supernet import EDGES, OperationSets, SuperNetwork, SuperNetworkShape, build_supernet

KINDS = ("normal", "reduce")


class DifferentiableSearch(GradientSearch):
    """Gradient search of cells on a super-network, phase by phase.

    Attributes:
        sets: surviving operations of each edge, for the normal and the reduction cell.
    """

    model: SuperNetwork

    def __init__(self, task: SearchTask, settings: SearchSettings) -> None:
        self.sets: dict[str, OperationSets] = {kind: [list(settings.operations)] * len(EDGES) for kind in KINDS}
        barlow = BarlowTwinsLoss(settings.bt_lambda, settings.bt_normalize, task.runtime)
        self.criterion = MixedSelfSupervisedLoss(settings.ss_factor, barlow)
        self.labels_needed = settings.ss_factor < 1  # type: ignore[misc]
        super().__init__(task, settings)

    def build(self, phase: int) -> SuperNetwork:
        settings = self.settings
        shape = SuperNetworkShape(
            channels=settings.init_channels,
            cells=self.phases[phase].cells,
            num_classes=self.task.num_classes,
            in_channels=self.task.in_channels,
            partial_k=settings.channel_share,
            edge_norm=settings.normalises_edges,
            embedding=settings.bt_embedding if settings.ss_factor else "pooled",
        )
        return build_supernet(shape, self.sets["normal"], self.sets["reduce"], settings.operations, self.task.side)

    def loss(self, batch: Batch, moment: Moment) -> Tensor:
        drop = self._drop(moment, len(batch.images))
        selections = self._selections(moment)
        with self.autocast():
            outputs = [self.model.outputs(view, drop, selections) for view in self._views(batch, moment)]
        return self.criterion(outputs, batch.labels if self.labels_needed else None)

    def logits(self, images: Tensor) -> Tensor:
        with self.autocast():
            logits: Tensor = self.model(images, None, self._selections(Moment(self.phase, 0, 0)))
        return logits

    def _views(self, batch: Batch, moment: Moment) -> list[Tensor]:
        """The mini-batch itself, or two distorted views of its raw images, preprocessed."""
        if not self.settings.ss_factor:
            return [batch.images]
        views = []
        for number in (1, 2):
            stream = 4 * self.phase + 2 * moment.architecture + number
            numbers = uniform_draws(self.task.seed, moment.number, batch.indices.cpu().numpy(), VIEW_DRAWS, stream)
            draws = torch.from_numpy(numbers).float().to(batch.images.device)
            views.append(_normalise(distort(batch.images, draws), self.task.preprocess))
        return views

    def stream_preprocess(self) -> Preprocess:
        """Views are distorted in [0, 1]."""
        preprocess = self.task.preprocess
        if not self.settings.ss_factor:
            return preprocess
        channels = preprocess.channels
        return preprocess.model_copy(update={"mean": (0.0,) * channels, "std": (1.0,) * channels})

    def stream_augment(self) -> Augment:
        return Augment("none") if self.settings.ss_factor else super().stream_augment()

    def _drop(self, moment: Moment, count: int) -> Tensor | None:
        """Factors of the skip connections (count, cells, 14): 0, or 1 / (1 - p)."""
        probability = self.current.drop_probability(moment.epoch)
        if not probability:
            return None
        kept = self.draws(moment, count, self.current.cells, len(EDGES)) >= probability
        return kept.float() / (1 - probability)

    def _selections(self, moment: Moment) -> list[Tensor] | None:
        """For random sampling, a permutation of every cell's channels; outside training always the same."""
        if self.settings.sampling == "shuffle" or self.model.shape.partial_k == 1:
            return None
        place = (moment.number + 1) * 2 + moment.architecture if self.model.training else 0
        generator = torch.Generator().manual_seed(self.task.seed * 1_000_003 + self.phase * 100_000_007 + place)
        device = self.runtime.device
        return [torch.randperm(count, generator=generator).to(device) for count in self.model.cell_channels()]

    def arch_gradients(self, weight_batch: Batch, arch_batch: Batch, moment: Moment) -> list[Tensor]:
        if not self.settings.second_order:
            return super().arch_gradients(weight_batch, arch_batch, moment)
        weights = [parameter for parameter in self.weight_parameters]
        for parameter in weights:
            parameter.requires_grad_(True)
        weight_moment = Moment(moment.phase, moment.epoch, moment.number)
        return unrolled_gradients(
            weights,
            self.arch_parameters,
            lambda: self.loss(weight_batch, weight_moment),
            lambda: self.loss(arch_batch, moment),
            self.weight_optimizer,
            self.runtime,
        )

    def end_phase(self) -> None:
        """Between phases, every edge keeps its strongest operations."""
        if self.phase + 1 < len(self.phases):
            count = self.phases[self.phase + 1].count
            for kind in KINDS:
                alpha = self.model.cell_weights(kind).detached().alpha
                self.sets[kind] = keep_operations(alpha, self.sets[kind], self.settings.operations, count)

    def architecture(self) -> Genotype:
        normal, reduce = (self.model.cell_weights(kind).detached() for kind in KINDS)
        limit = self.settings.skip_limit
        return derive_genotype(normal, reduce, self.settings.operations, limit)

    def describe_epoch(self) -> dict[str, float]:
        genotype = self.architecture()
        metrics = {f"normal_{name}": value for name, value in structure_stats(genotype.normal).items()}
        metrics["alpha_entropy"] = float(
            torch.cat(
                [torch.special.entr(self.model.cell_weights(kind).detached().alpha).sum(1) for kind in KINDS]
            ).mean()
        )
        for name in self.settings.extra_ops:
            metrics[f"weight_{name}"] = self._mean_weight(name)
        if self.settings.ss_factor:
            metrics["constant_features"] = float(self.criterion.barlow.constant_features)
        return metrics

    def _mean_weight(self, name: str) -> float:
        """Mean softmax weight of an operation over all edges."""
        column = list(self.settings.operations).index(name)
        return float(torch.cat([self.model.cell_weights(kind).detached().alpha[:, column] for kind in KINDS]).mean())

    def signature(self) -> str:
        shape = self.model.shape
        return f"{super().signature()}, K {shape.partial_k}, operations {', '.join(self.settings.operations)}"

    def state_dict(self) -> dict[str, Any]:
        sets = {kind: [list(names) for names in self.sets[kind]] for kind in KINDS}
        return {**super().state_dict(), "sets": sets, "next_sets_made": self._sets_are_of_next_phase()}

    def _sets_are_of_next_phase(self) -> bool:
        return any(len(names) != self.current.count for names in self.sets["normal"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: the surviving operations are not those of the checkpoint's own network.
        """
        self.sets = {kind: _sets_of(state["model"][f"mask_{kind}"], self.settings.operations) for kind in KINDS}
        super().load_state_dict(state)
        kept = self.phases[self.phase + 1].count if state["next_sets_made"] else self.current.count
        for kind in KINDS:
            own = zip(state["sets"][kind], self.sets[kind], strict=True)
            if any(len(names) != kept or not set(names) <= set(before) for names, before in own):
                raise ValueError(
                    f"the checkpoint's {kind} cell has other operation sets than its phase allows ({kept} an edge); "
                    "it belongs to another search"
                )
            self.sets[kind] = state["sets"][kind]


def _sets_of(mask: Tensor, operations: tuple[str, ...]) -> list[list[str]]:
    return [[name for name, has in zip(operations, row, strict=True) if has] for row in mask.tolist()]


def _normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return ((images - mean) / std).to(memory_format=torch.channels_last)


def unrolled_gradients(
    weights: list[nn.Parameter],
    architecture: list[nn.Parameter],
    weight_loss: Callable[[], Tensor],
    arch_loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
) -> list[Tensor]:
    """Gradient of L_val(w - lr * grad L_train(w, alpha), alpha): the second-order form of DARTS, whose Hessian-vector
    product is a finite difference (Liu et al., ICLR 2019, equations 7 and 8)."""
    group = optimizer.param_groups[0]
    rate, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    before = [weight.detach().clone() for weight in weights]

    def mean(gradients: tuple[Tensor, ...]) -> list[Tensor]:
        return [runtime.all_reduce(gradient) / runtime.world_size for gradient in gradients]

    steps = mean(torch.autograd.grad(weight_loss(), weights, materialize_grads=True))
    with torch.no_grad():
        for weight, step in zip(weights, steps, strict=True):
            velocity = optimizer.state[weight].get("momentum_buffer")
            total = step + decay * weight + (0 if velocity is None else momentum * velocity)
            weight.sub_(rate * total)
    found = torch.autograd.grad(arch_loss(), [*architecture, *weights], materialize_grads=True)
    direct, vector = list(found[: len(architecture)]), mean(found[len(architecture) :])
    scale = 0.01 / float(torch.cat([v.reshape(-1) for v in vector]).norm())
    sides = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for weight, old, v in zip(weights, before, vector, strict=True):
                weight.copy_(old + sign * scale * v)
        sides.append(torch.autograd.grad(weight_loss(), architecture, materialize_grads=True))
    with torch.no_grad():
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
    return [d - rate * (up - down) / (2 * scale) for d, up, down in zip(direct, *sides, strict=True)]
