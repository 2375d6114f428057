"""ProxylessNAS-style search: a chain of layers, each one of several blocks, by binary gates on sampled paths.

Source: spec nas_adversarial_robustness section 2.4 (in chain form; the published CIFAR network is a tree inside a
PyramidNet). Latency is looked up in a table of multiply-adds, so that a run can be repeated.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.data import Batch
from dataeff.metrics.cost import count_macs
from dataeff.nas.architecture import Chain, ChainLayer, chain_stem
from dataeff.nas.blocks import SPACES, make_block
from dataeff.nas.search import GradientSearch, Moment
from dataeff.nas.settings import ChainSettings


class GatedLayer(nn.Module):
    """The candidates of one layer; one of them runs, or two in an architecture step."""

    def __init__(self, names: Sequence[str], channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.names, self.width, self.stride = list(names), width, stride
        self.candidates = nn.ModuleList(make_block(name, channels, width, stride) for name in names)

    def forward(self, x: Tensor, path: Sequence[int], gates: Tensor | None) -> Tensor:
        """
        Args:
            path: the candidate that runs, or the two that are gated.
            gates: (2,) binary, with gradient; None for a single candidate.
        """
        if gates is None:
            out: Tensor = self.candidates[path[0]](x)
            return out
        out = gates[0] * self.candidates[path[0]](x) + gates[1] * self.candidates[path[1]](x)
        return out


class GatedChain(nn.Module):
    """The over-parametrised chain; alpha (layers, candidates), -inf where a layer lacks a candidate."""

    def __init__(self, settings: ChainSettings, stem: int, in_channels: int, num_classes: int, side: int) -> None:
        super().__init__()
        self.stem = chain_stem(in_channels, stem)
        self.layers = nn.ModuleList()
        costs: list[list[float]] = []
        channels = stem
        for width, stride in zip(settings.widths, settings.strides, strict=True):
            for number in range(1 + settings.layers):
                names = SPACES[settings.space] + (("identity",) if number else ())
                layer = GatedLayer(names, channels, width, stride if number == 0 else 1)
                costs.append([count_macs(block, (channels, side, side)).total for block in layer.candidates])
                self.layers.append(layer)
                if number == 0:
                    side, channels = -(-side // stride), width
        self.classifier = nn.Linear(channels, num_classes)
        most = max(map(len, costs))
        table = torch.tensor([row + [0.0] * (most - len(row)) for row in costs])
        self.register_buffer("costs", table / table.max(1).values.sum())  # 1: the dearest chain
        self.register_buffer("mask", torch.tensor([[i < len(row) for i in range(most)] for row in costs]))
        self.alpha = nn.Parameter(1e-3 * torch.randn(len(costs), most))

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alpha]

    def weight_parameters(self) -> list[nn.Parameter]:
        return [value for name, value in self.named_parameters() if name != "alpha"]

    def probabilities(self) -> Tensor:
        """softmax(alpha) over each layer's candidates."""
        return self.alpha.masked_fill(~self.get_buffer("mask"), -torch.inf).softmax(1)

    def expected_cost(self) -> Tensor:
        """Sum over layers of sum_j p_j * cost_j, as a share of the dearest chain's."""
        return (self.probabilities() * self.get_buffer("costs")).sum()

    def forward(self, x: Tensor, paths: Sequence[Sequence[int]], gates: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            x = layer(x, paths[number], None if gates is None else gates[number])
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class GatedSearch(GradientSearch):
    """Weights learn on a sampled path; in an architecture step two paths of every layer are compared."""

    model: GatedChain

    def build(self, phase: int) -> GatedChain:
        task = self.task
        chain = self.settings.chain
        return GatedChain(chain, self.settings.init_channels, task.in_channels, task.num_classes, task.side)

    def _sample(self, moment: Moment, count: int) -> Tensor:
        """(layers, count) different candidates of each layer, drawn by their probabilities; the same on all workers."""
        draws = self.draws_of_all(moment, *self.model.alpha.shape)
        scores = draws.clamp(min=1e-9).log() / self.model.probabilities().detach().cpu()  # Efraimidis and Spirakis
        return scores.topk(count, dim=1).indices

    def draws_of_all(self, moment: Moment, *shape: int) -> Tensor:
        """Uniform numbers that belong to the mini-batch as a whole."""
        generator = torch.Generator().manual_seed(
            self.task.seed * 1_000_003 + 2 * moment.number + int(moment.architecture)
        )
        return torch.rand(*shape, generator=generator)

    def loss(self, batch: Batch, moment: Moment) -> Tensor:
        with self.autocast():
            logits = self.model(batch.images, self._sample(moment, 1).tolist())
        return F.cross_entropy(logits.float(), batch.labels)

    def arch_gradients(self, weight_batch: Batch, arch_batch: Batch, moment: Moment) -> list[Tensor]:
        """dL/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i) over the two sampled, plus the expected cost's gradient."""
        self.pairs = self._sample(moment, 2).to(self.runtime.device)
        self.before = self.model.alpha.detach().clone()
        shares = self.before.gather(1, self.pairs).softmax(1)
        # The first gate is open with its share of the two; a draw of its own, behind those of the sampling.
        draw = self.draws_of_all(moment, len(self.pairs), 2 + self.before.shape[1])[:, -1].to(shares.device)
        open_first = (draw < shares[:, 0]).float()
        gates = torch.stack([open_first, 1 - open_first], 1).requires_grad_(True)
        with self.autocast():
            logits = self.model(arch_batch.images, self.pairs.tolist(), gates)
        loss = F.cross_entropy(logits.float(), arch_batch.labels)
        (by_gate,) = torch.autograd.grad(loss, gates)
        pair_gradient = shares * (by_gate - (by_gate * shares).sum(1, keepdim=True))
        (by_cost,) = torch.autograd.grad(self.settings.chain.cost_weight * self.model.expected_cost(), self.model.alpha)
        gradient = torch.zeros_like(self.before).scatter(1, self.pairs, pair_gradient + by_cost.gather(1, self.pairs))
        return [gradient]

    @torch.no_grad()
    def after_arch_step(self) -> None:
        """Only the two sampled move, shifted so that the probabilities of the others stay."""
        moved = self.model.alpha.gather(1, self.pairs)
        total = self.before.gather(1, self.pairs).logsumexp(1, keepdim=True)
        moved = moved + total - moved.logsumexp(1, keepdim=True)
        self.model.alpha.copy_(self.before.scatter(1, self.pairs, moved))

    def _best(self) -> list[int]:
        return [int(index) for index in self.model.probabilities().argmax(1)]

    def logits(self, images: Tensor) -> Tensor:
        with self.autocast():
            logits: Tensor = self.model(images, [[index] for index in self._best()])
        return logits

    def describe_epoch(self) -> dict[str, float]:
        return {"expected_cost": float(self.model.expected_cost().detach())}

    def architecture(self) -> Chain:
        layers = []
        for layer, index in zip(self.model.layers, self._best(), strict=True):
            assert isinstance(layer, GatedLayer)
            layers.append(ChainLayer(block=layer.names[index], channels=layer.width, stride=layer.stride))  # type: ignore[arg-type]
        kept = [layer for layer in layers if layer.block != "identity"]
        return Chain(stem=self.settings.init_channels, layers=tuple(kept))
