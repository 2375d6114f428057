"""DenseNAS-style search: how many blocks there are and how wide, by routes between blocks of growing width.

Source: spec nas_adversarial_robustness section 2.4. Costs are multiply-adds.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.data import Batch
from dataeff.metrics.cost import count_macs
from dataeff.nas.architecture import Chain, ChainLayer, chain_stem
from dataeff.nas.blocks import SPACES, make_block
from dataeff.nas.search import GradientSearch, Moment
from dataeff.nas.settings import ChainSettings


class MixedBlock(nn.Module):
    """softmax(alpha)-weighted sum of candidates; `costs` are their multiply-adds."""

    def __init__(self, names: tuple[str, ...], channels: int, width: int, stride: int, side: int) -> None:
        super().__init__()
        self.names, self.width, self.stride = names, width, stride
        self.candidates = nn.ModuleList(make_block(name, channels, width, stride) for name in names)
        costs = [count_macs(block, (channels, side, side)).total for block in self.candidates]
        self.register_buffer("costs", torch.tensor(costs))
        self.alpha = nn.Parameter(1e-3 * torch.randn(len(names)))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.alpha.softmax(0)
        return torch.stack([w * block(x) for w, block in zip(weights, self.candidates, strict=True)]).sum(0)

    def cost(self) -> Tensor:
        return (self.alpha.softmax(0) * self.get_buffer("costs")).sum()

    def strongest(self) -> ChainLayer:
        name = self.names[int(self.alpha.argmax())]
        return ChainLayer(block=name, channels=self.width, stride=self.stride)  # type: ignore[arg-type]


class RoutedNetwork(nn.Module):
    """Blocks 0 (the stem) to n in order; block i feeds the next `reach` blocks of equal or half its resolution.

    beta: a parameter for each block, over its outgoing edges.
    """

    def __init__(self, settings: ChainSettings, stem: int, in_channels: int, num_classes: int, side: int) -> None:
        super().__init__()
        self.stem = chain_stem(in_channels, stem)
        widths = [stem, *settings.widths]
        levels = [0]
        for stride in settings.strides:
            levels.append(levels[-1] + (stride == 2))
        count = len(widths)
        self.outgoing = [
            [j for j in range(i + 1, min(count, i + 1 + settings.reach)) if levels[j] - levels[i] <= 1]
            for i in range(count)
        ]
        sides = [-(-side // 2**level) for level in levels]
        space = SPACES[settings.space]
        self.heads = nn.ModuleDict(
            {
                f"{i}-{j}": MixedBlock(space, widths[i], widths[j], 1 + levels[j] - levels[i], sides[i])
                for i, targets in enumerate(self.outgoing)
                for j in targets
            }
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                MixedBlock((*space, "identity"), widths[j], widths[j], 1, sides[j]) for _ in range(settings.layers)
            )
            for j in range(1, count)
        )
        self.beta = nn.ParameterList(nn.Parameter(1e-3 * torch.randn(len(t))) for t in self.outgoing if t)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def arch_parameters(self) -> list[nn.Parameter]:
        return [value for name, value in self.named_parameters() if "alpha" in name or "beta" in name]

    def weight_parameters(self) -> list[nn.Parameter]:
        return [value for name, value in self.named_parameters() if "alpha" not in name and "beta" not in name]

    def routes(self) -> dict[tuple[int, int], Tensor]:
        """Probability of each edge: softmax over the edges that leave a block."""
        found = {}
        for i, beta in enumerate(self.beta):
            for j, probability in zip(self.outgoing[i], beta.softmax(0), strict=True):
                found[i, j] = probability
        return found

    def forward(self, x: Tensor) -> Tensor:
        routes = self.routes()
        outs = [self.stem(x)]
        for j, layers in enumerate(self.blocks, start=1):
            sources = [i for i in range(j) if j in self.outgoing[i]]
            x = torch.stack([routes[i, j] * self.heads[f"{i}-{j}"](outs[i]) for i in sources]).sum(0)
            for layer in cast(nn.ModuleList, layers):
                x = layer(x)
            outs.append(x)
        logits: Tensor = self.classifier(outs[-1].mean((2, 3)))
        return logits

    def expected_cost(self) -> Tensor:
        """By recursion from the tail: cost_i = c_i + sum_j p_ij (c_head_ij + cost_j)."""
        routes = self.routes()
        costs: dict[int, Tensor] = {}
        for i in reversed(range(len(self.outgoing))):
            own = [layer.cost() for layer in cast(nn.ModuleList, self.blocks[i - 1])] if i else []  # type: ignore[operator]
            onward = [routes[i, j] * (self.heads[f"{i}-{j}"].cost() + costs[j]) for j in self.outgoing[i]]  # type: ignore[operator]
            costs[i] = torch.stack([*own, *onward]).sum()
        return costs[0]

    def best_path(self) -> list[int]:
        """Blocks of the most probable route from the stem to the last block (Viterbi)."""
        routes = {edge: float(p.detach().log()) for edge, p in self.routes().items()}
        last = len(self.outgoing) - 1
        best: dict[int, tuple[float, list[int]]] = {last: (0.0, [last])}
        for i in reversed(range(last)):
            score, path = max((routes[i, j] + best[j][0], best[j][1]) for j in self.outgoing[i])
            best[i] = (score, [i, *path])
        return best[0][1]


class RoutingSearch(GradientSearch):
    """Alternates weights (cross-entropy) and architecture (cross-entropy plus the logarithm of the expected cost)."""

    model: RoutedNetwork

    def build(self, phase: int) -> RoutedNetwork:
        task = self.task
        chain = self.settings.chain
        return RoutedNetwork(chain, self.settings.init_channels, task.in_channels, task.num_classes, task.side)

    def loss(self, batch: Batch, moment: Moment) -> Tensor:
        loss = F.cross_entropy(self.logits(batch.images).float(), batch.labels)
        if moment.architecture:
            loss = loss + self.settings.chain.cost_weight * self.model.expected_cost().log()
        return loss

    def logits(self, images: Tensor) -> Tensor:
        with self.autocast():
            logits: Tensor = self.model(images)
        return logits

    def describe_epoch(self) -> dict[str, float]:
        return {"expected_cost": float(self.model.expected_cost().detach())}

    def architecture(self) -> Chain:
        path = self.model.best_path()
        layers: list[ChainLayer] = []
        for i, j in zip(path, path[1:], strict=False):
            blocks = [self.model.heads[f"{i}-{j}"], *self.model.blocks[j - 1]]  # type: ignore[misc]
            layers += [block.strongest() for block in blocks]
        kept = tuple(layer for layer in layers if layer.block != "identity")
        return Chain(stem=self.settings.init_channels, layers=kept)
