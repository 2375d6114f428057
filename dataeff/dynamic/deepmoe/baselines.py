"""Networks that DeepMoE is compared with (spec deepmoe section 5): static, noisy top-k, Hard MoE and RNP.

The pruned networks of the comparison are in `dataeff.dynamic.pruning`.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from dataeff.dynamic.deepmoe.network import GatedBlock, GatedNetwork, MoEConv2d
from dataeff.nn.channels import ChannelConv
from dataeff.nn.fold import channels_last


@dataclass
class PlainOutput:
    """logits float32 (B, K); macs float64 (B,); path bool (B, P), which optional parts ran."""

    logits: Tensor
    macs: Tensor
    path: Tensor


class StaticNetwork(nn.Module):
    """The base network, thin or widened, with every channel on."""

    def __init__(self, network: GatedNetwork):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> PlainOutput:
        self.network.check_images(x, 1)
        features = self.network.features(x, lambda index, _: None)
        macs = x.new_full((len(x),), self.network.full_macs(x.shape[2], x.shape[3]), dtype=torch.float64)
        return PlainOutput(self.network.classify(features, x.shape), macs, torch.ones(len(x), 0, dtype=torch.bool))


class NoisyTopKHeads(nn.Module):
    """Noisy top-k gating (Shazeer et al., 2017), one gate per layer on the shared embedding.

    H = e W_g + N(0, 1) * softplus(e W_n); the k largest of a layer stay and get k * softmax, so that they are 1 on
    average (the factor is an open choice); the others are 0.

    Args:
        channels: C_l; k = round(share * C_l), at least 1.
        latent: d.
        share: of the channels that stay on, in (0, 1].
    """

    def __init__(self, channels: list[int], latent: int, share: float):
        super().__init__()
        self.channels, self.share = list(channels), share
        self.weight = nn.Parameter(torch.empty(sum(channels), latent))
        self.noise_weight = nn.Parameter(torch.zeros(sum(channels), latent))
        nn.init.normal_(self.weight, 0.0, 0.3)

    def forward(self, embedding: Tensor, draws: Tensor | None = None) -> list[Tensor]:
        """e (B, d) and uniform numbers (B, sum of C_l) for the noise, None without noise -> gates (B, C_l)."""
        scores = F.linear(embedding, self.weight)
        if draws is not None:
            normal = math.sqrt(2) * torch.erfinv(2 * draws.clamp(1e-6, 1 - 1e-6) - 1)
            scores = scores + normal * F.softplus(F.linear(embedding, self.noise_weight))
        return [self._top(layer) for layer in scores.split(self.channels, 1)]

    def _top(self, scores: Tensor) -> Tensor:
        k = max(1, round(self.share * scores.shape[1]))
        values, positions = scores.topk(k, 1)
        return torch.zeros_like(scores).scatter(1, positions, k * F.softmax(values, 1))


def importance_loss(gates: list[Tensor], means: list[Tensor]) -> Tensor:
    """Squared coefficient of variation of the channels' total gate values, mean over layers.

    Args:
        gates: (B, C_l) of this worker.
        means: (C_l,), mean gate values over the batches of all workers; each worker's gradient is its part of that of
            the whole batch.
    """
    losses = []
    for gate, mean in zip(gates, means, strict=True):
        importance = gate.mean(0) + (mean - gate.mean(0)).detach()
        losses.append(importance.var(unbiased=False) / importance.mean().clamp(min=1e-12) ** 2)
    return torch.stack(losses).mean()


class HardMoE(nn.Module):
    """One expert tail per cluster of images, chosen by the nearest centre of pooled trunk features.

    Args:
        network: the base; the last third of its body and its classifier become `tails`.
        experts: number of tails.
    """

    centres: Tensor

    def __init__(self, network: GatedNetwork, experts: int):
        super().__init__()
        self.network = network  # trunk and first tail
        self.split = len(network.body) - max(1, len(network.body) // 3)
        rest = nn.ModuleList([*network.body[self.split :], network.head])
        self.others = nn.ModuleList(copy.deepcopy(rest) for _ in range(experts - 1))
        self.experts = experts
        self.register_buffer("centres", torch.zeros(experts, self._trunk_channels()))

    def _trunk_channels(self) -> int:
        layers = [part for part in self.network.body[: self.split] if not isinstance(part, nn.MaxPool2d)]
        last = layers[-1]
        conv = last.convs[-1] if isinstance(last, GatedBlock) else last
        assert isinstance(conv, MoEConv2d)
        return conv.conv.out_channels

    def tail(self, expert: int) -> nn.ModuleList:
        """The modules of one expert, the classifier last."""
        if expert == 0:
            return nn.ModuleList([*self.network.body[self.split :], self.network.head])
        chosen = self.others[expert - 1]
        assert isinstance(chosen, nn.ModuleList)
        return chosen

    def trunk_parts(self) -> list[nn.Module]:
        return list(self.network.body[: self.split])

    def trunk(self, x: Tensor) -> Tensor:
        """Images -> the features that decide the expert and enter its tail."""
        return _run(self.trunk_parts(), x)

    def forward(self, x: Tensor, one_tail: bool = False) -> PlainOutput:
        """Classify images; `one_tail` sends all of them to the first tail (training of the base)."""
        self.network.check_images(x, 1)
        features = self.trunk(x)
        chosen = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if not one_tail:
            chosen = torch.cdist(features.mean((2, 3)), self.centres).argmin(1)
        if one_tail:
            logits = self._answer(0, features)
        elif self.training:  # all tails on all images: every parameter gets a gradient, batch statistics are full
            logits = torch.stack([self._answer(i, features) for i in range(self.experts)], 1)
            logits = logits[torch.arange(len(x)), chosen]
        else:
            logits = features.new_empty(len(x), self.network.num_classes)
            for expert in chosen.unique().tolist():
                rows = (chosen == expert).nonzero().view(-1)
                logits[rows] = self._answer(expert, features[rows])
        macs = x.new_full((len(x),), self.network.full_macs(x.shape[2], x.shape[3]), dtype=torch.float64)
        return PlainOutput(logits, macs, F.one_hot(chosen, self.experts).bool())

    def _answer(self, expert: int, features: Tensor) -> Tensor:
        *parts, head = self.tail(expert)
        logits: Tensor = head(_run(parts, features).mean((2, 3)))
        return logits

    @torch.no_grad()
    def form_experts(self, batches: Iterable[Tensor], seed: int) -> None:
        """Cluster the pooled trunk features of images (k-means) and give every expert a copy of the first tail.

        Raises:
            ValueError: fewer images than experts.
        """
        self.eval()
        features = torch.cat([self.trunk(images).mean((2, 3)) for images in batches])
        if len(features) < self.experts:
            raise ValueError(f"Hard MoE needs at least {self.experts} training images, got {len(features)}")
        found = KMeans(self.experts, n_init=4, random_state=seed).fit(features.double().cpu().numpy())
        self.centres.copy_(torch.from_numpy(found.cluster_centers_))
        for expert in range(1, self.experts):
            self.tail(expert).load_state_dict(self.tail(0).state_dict())


def _run(parts: list[nn.Module], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x, lambda index, _: None) if isinstance(part, GatedBlock) else part(x)
    return x


@dataclass
class PruningOutput(PlainOutput):
    """Of RNP: q (B, L, k) values of every action and actions int64 (B, L); action a keeps a + 1 of k channel groups."""

    q: Tensor
    actions: Tensor


class RuntimePruning(nn.Module):
    """Runtime neural pruning (Lin et al., 2017): per layer an agent reads the pooled features of the layer before and
    keeps the first groups of its channels.

    Args:
        network: of family "vgg", all layers gated.
        groups: k, channel groups of a layer.
        hidden: size of the recurrent agent.

    Raises:
        ValueError: a residual network, whose sums have no nested channel groups.
    """

    def __init__(self, network: GatedNetwork, groups: int = 4, hidden: int = 32):
        super().__init__()
        if any(isinstance(part, GatedBlock) for part in network.body):
            raise ValueError("RNP prunes plain networks: choose a VGG arch")
        self.network, self.groups, self.hidden = network, groups, hidden
        inputs = [network.in_channels, *network.gate_channels[:-1]]
        self.encoders = nn.ModuleList(nn.Linear(channels, hidden) for channels in inputs)
        self.cell = nn.GRUCell(hidden, hidden)
        self.output = nn.Linear(hidden, groups)

    def decide(self, index: int, pooled: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (n, C) and the agent's state (n, h) -> Q values (n, k) and the next state."""
        state = self.cell(F.relu(self.encoders[index](pooled)), state)
        return self.output(state), state

    def kept(self, index: int, action: int | Tensor) -> Tensor:
        """Channels that an action keeps in a layer, int64."""
        channels = self.network.gate_channels[index]
        return -((-(torch.as_tensor(action) + 1) * channels) // self.groups)

    def forward(self, x: Tensor, draws: Tensor | None = None, epsilon: float = 0.0) -> PruningOutput:
        """Masked execution.

        Args:
            draws: uniform numbers (B, 2 L) for exploration.
            epsilon: probability of a random action.
        """
        self.network.check_images(x, 1)
        state = x.new_zeros(len(x), self.hidden)
        values: list[Tensor] = []
        actions: list[Tensor] = []

        def gate_of(index: int, features: Tensor) -> Tensor:
            nonlocal state
            # Detached: the agent's loss is not the base network's.
            q, state = self.decide(index, features.detach().mean((2, 3)), state)
            action = q.argmax(1)
            if draws is not None:
                explore, choice = draws[:, 2 * index], draws[:, 2 * index + 1]
                action = torch.where(explore < epsilon, (choice * self.groups).long(), action)
            values.append(q)
            actions.append(action)
            kept = self.kept(index, action)
            return (torch.arange(self.network.gate_channels[index], device=x.device) < kept[:, None]).to(x.dtype)

        logits = self.network.classify(self.network.features(x, gate_of), x.shape)
        chosen = torch.stack(actions, 1)
        return PruningOutput(logits, self._macs(chosen, x), self.path(chosen), torch.stack(values, 1), chosen)

    def path(self, actions: Tensor) -> Tensor:
        """Actions (B, L) -> which groups of which layer ran, bool (B, L k)."""
        return (torch.arange(self.groups, device=actions.device) <= actions[:, :, None]).flatten(1)

    def _macs(self, actions: Tensor, x: Tensor) -> Tensor:
        counts = torch.stack([self.kept(index, actions[:, index]) for index in range(actions.shape[1])], 1)
        agent = sum(p.numel() for name, p in self.named_parameters() if "weight" in name and "network" not in name)
        agent += (len(self.encoders) - 1) * sum(
            p.numel() for part in (self.cell, self.output) for name, p in part.named_parameters() if "weight" in name
        )
        return self.network.macs(counts, x.shape[2], x.shape[3]) + agent


def q_loss(output: PruningOutput, cross_entropy: Tensor, alpha: float) -> Tensor:
    """Squared error of Q(s_l, a_l) against r_l + max_a Q(s_{l+1}, a), with rewards r_l = -alpha * kept share / L, and
    -cross_entropy (B,) besides for the last layer.
    """
    taken = output.q.gather(2, output.actions[:, :, None]).squeeze(2)
    layers, groups = output.q.shape[1:]
    reward = -alpha * (output.actions + 1) / (groups * layers)
    following = torch.cat([output.q[:, 1:].amax(2), -cross_entropy[:, None]], 1)
    return F.mse_loss(taken, (reward + following).detach())


class RuntimePruningInference:
    """`RuntimePruning` in evaluation mode that computes the kept channels only: images that took the same actions so
    far stay together, and part where their actions do."""

    def __init__(self, model: RuntimePruning):
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() before RuntimePruningInference(model)")
        self.model = model
        self.convs = [ChannelConv(layer.conv, layer.norm) for layer in model.network.convs()]

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> PlainOutput:
        """Images -> what the model gives in evaluation mode, within rounding."""
        model = self.model
        model.network.check_images(x, 1)
        actions = torch.zeros(len(x), len(self.convs), dtype=torch.int64, device=x.device)
        state = x.new_zeros(len(x), model.hidden)
        groups: list[tuple[Tensor, Tensor]] = [(torch.arange(len(x), device=x.device), channels_last(x))]
        for part in model.network.body:
            if isinstance(part, MoEConv2d):
                assert part.gate_index is not None
                groups = [piece for group in groups for piece in self._layer(part.gate_index, group, state, actions)]
            else:
                groups = [(rows, channels_last(part(features))) for rows, features in groups]
        head = model.network.head
        assert isinstance(head, nn.Linear)
        logits = x.new_empty(len(x), model.network.num_classes)
        for rows, features in groups:
            logits[rows] = F.linear(features.mean((2, 3)), head.weight[:, : features.shape[1]], head.bias)
        return PlainOutput(logits, model._macs(actions, x), model.path(actions))

    def _layer(
        self, index: int, group: tuple[Tensor, Tensor], state: Tensor, actions: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Run one layer on a group; its pieces by action. `state` and `actions` of its images are overwritten."""
        rows, features = group
        encoder = self.model.encoders[index]
        assert isinstance(encoder, nn.Linear)
        pooled = features.new_zeros(len(rows), encoder.in_features)
        pooled[:, : features.shape[1]] = features.mean((2, 3))
        q, state[rows] = self.model.decide(index, pooled, state[rows])
        action = q.argmax(1)
        actions[rows, index] = action
        inputs = torch.arange(features.shape[1], device=rows.device)
        pieces = []
        for value in action.unique().tolist():
            mine = (action == value).nonzero().view(-1)
            outputs = torch.arange(int(self.model.kept(index, value)), device=rows.device)
            run = self.convs[index].select(inputs, outputs)
            pieces.append((rows[mine], run(channels_last(features[mine]), True)))
        return pieces
