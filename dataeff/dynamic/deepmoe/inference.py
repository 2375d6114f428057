"""DeepMoE that computes active channels only (spec deepmoe section 2.6).

All gates are known before the base network starts, so images are grouped by pattern, and a group runs through one
smaller dense network: weights cut to the active channels, packed once and kept for the patterns used last.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped]
from torch import Tensor, nn

from dataeff.dynamic.deepmoe.model import DeepMoE, MoEOutput, check_embedding, normalized
from dataeff.dynamic.deepmoe.network import GatedBlock, GatedNetwork, MoEConv2d
from dataeff.nn.channels import ChannelConv, add_channels_, padded
from dataeff.nn.fold import InferenceConv, channels_last, fold_conv
from dataeff.nn.predictor import check_budget

Bits = NDArray[np.bool_]
# Time that one more group takes per convolution, in multiply-adds that run meanwhile (10 us at 1e11 a second).
CALL_MACS = 1e6
FEW_PATTERNS = 8
BISECTIONS = 20


Scales = tuple[Tensor, ...] | None


@dataclass
class GroupedOutput(MoEOutput):
    """`MoEOutput` with the group that each image was executed in, int64 (B,); `macs` is what was executed: in a group
    with several patterns the channels of all of them."""

    groups: Tensor


class DeepMoEInference:
    """Evaluation-mode `DeepMoE` with folded BatchNorm on active channels only. Threads may share one instance.

    Args:
        model: in evaluation mode, on the device to run on; its weights are copied.
        cached_patterns: patterns whose cut weights are kept.

    Raises:
        ValueError: for a model in training mode.

    Example:
        fast = DeepMoEInference(model.eval())
        output = fast(images, budget=torch.full((len(images),), 1e7, dtype=torch.float64))
    """

    def __init__(self, model: DeepMoE, cached_patterns: int = 64):
        if model.training or any(module.training for module in model.modules()):
            raise ValueError("the model is in training mode: call model.eval() before DeepMoEInference(model)")
        self.model = model
        self.heads, self.class_head = copy.deepcopy(model.heads), copy.deepcopy(model.class_head)
        layers = list(model.embedding.features)
        self.router = [
            fold_conv(conv, norm) for conv, norm in zip(layers, layers[1:], strict=False) if isinstance(conv, nn.Conv2d)
        ]
        output = model.embedding.output
        self.latent_weight, self.latent_bias = output.weight.detach().clone(), output.bias.detach().clone()
        self.network = ChannelNetwork(model.network, cached_patterns)

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        budget: Tensor | None = None,
        embedding: Tensor | None = None,
        max_groups: int | None = None,
    ) -> GroupedOutput:
        """Classify images.

        Args:
            x: float (B, C, H, W), normalised.
            budget: multiply-adds allowed for each image, float64 (B,), inf for no limit. An image whose gates ask for
                more keeps its channels with the largest gates, relative to the mean gate of their layer, down to the
                threshold that meets the budget: what a larger lambda does first. A layer keeps its largest channel;
                an image that cannot meet its budget spends that minimum.
            embedding: (B, d), in place of the images' own.
            max_groups: bound on the groups; 1 runs the union of all patterns. None decides by the cost: exact
                patterns, or unions where patterns are so many that smaller networks would not pay.

        Returns:
            What `DeepMoE` returns in evaluation mode, within rounding, if no budget binds.
        """
        model = self.model
        model.network.check_images(x, model.smallest)
        check_budget(budget, len(x))
        if max_groups is not None and max_groups < 1:
            raise ValueError(f"max_groups must be at least 1, got {max_groups}")
        height, width = x.shape[2:]
        router_macs = model.router_macs(height, width)
        latent, e = self._embed(x)
        if embedding is not None:
            check_embedding(embedding, len(x), model.embedding.latent)
            e = embedding
        gates: list[Tensor] = self.heads(e)
        allowed = None
        if budget is not None:
            allowed = budget.to(x.device) - router_macs
            gates = fit_budget(gates, model.network, allowed, height, width)
        applied = torch.cat(normalized(gates) if model.normalize_gates else gates, 1)
        logits, macs, groups, counts = self.network(x, applied, allowed, max_groups)
        return GroupedOutput(
            logits, gates, e, self.class_head(latent), macs + router_macs, model.active_share(counts), groups
        )

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = channels_last(x.to(self.latent_weight.dtype))
        for conv in self.router:
            x = conv(x, True)
        latent = F.linear(x.mean((2, 3)), self.latent_weight, self.latent_bias)
        return latent, self.model.embedding.activate(latent)


def fit_budget(gates: list[Tensor], network: GatedNetwork, allowed: Tensor, height: int, width: int) -> list[Tensor]:
    """Close the smallest gates of the images that would spend more than `allowed` (B,) multiply-adds.

    Gates compare relative to the mean positive gate of their layer: BatchNorm behind the next convolution leaves the
    scale of a layer's gates free. The threshold of each image is found by bisection.
    """
    channels = network.gate_channels
    counts = torch.stack([(gate > 0).sum(1) for gate in gates], 1)
    over = (network.macs(counts, height, width) > allowed).nonzero().view(-1)
    if not len(over):
        return gates
    chosen = [gate[over] for gate in gates]
    scores = torch.cat(normalized(chosen), 1)
    top = torch.cat([F.one_hot(gate.argmax(1), gate.shape[1]).bool() & (gate > 0) for gate in chosen], 1)
    low, high = scores.new_zeros(len(over), 1), scores.amax(1, keepdim=True)
    limit = allowed[over]

    def kept(threshold: Tensor) -> Tensor:
        return (scores > threshold) | top

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        active = torch.stack([part.sum(1) for part in kept(middle).split(channels, 1)], 1)
        fits = (network.macs(active, height, width) <= limit)[:, None]
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    result = []
    for gate, part, keep in zip(gates, chosen, kept(high).split(channels, 1), strict=True):
        result.append(gate.index_copy(0, over, part * keep))
    return result


class ChannelNetwork:
    """A `GatedNetwork` in evaluation mode that computes the channels whose gates are above 0.

    Args:
        network: its weights are copied.
        cached_patterns: patterns whose cut weights are kept, those used last.
    """

    def __init__(self, network: GatedNetwork, cached_patterns: int = 64):
        self.network = network
        self.channels = network.gate_channels
        self.convs = {layer: ChannelConv(layer.conv, layer.norm) for layer in network.convs()}
        self.shortcuts: dict[GatedBlock, InferenceConv] = {}
        for part in network.body:
            if isinstance(part, GatedBlock) and isinstance(part.shortcut, nn.Sequential):
                conv, norm = part.shortcut
                assert isinstance(conv, nn.Conv2d)
                self.shortcuts[part] = fold_conv(conv, norm)
        head = network.head
        assert isinstance(head, nn.Linear | nn.Conv2d) and head.bias is not None
        self.head_weight, self.head_bias = head.weight.detach().flatten(1).clone(), head.bias.detach().clone()
        self.cached_patterns = cached_patterns
        self._patterns: OrderedDict[Any, Pattern] = OrderedDict()
        self._lock = Lock()

    def __call__(
        self, x: Tensor, gates: Tensor, allowed: Tensor | None = None, max_groups: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images and gates (B, sum of C_l) -> logits, executed multiply-adds float64 (B,), groups (B,), and active
        channels of each image (B, L). `allowed` (B,) bounds the multiply-adds that a union of patterns may cost."""
        bits = (gates > 0).cpu().numpy()
        size = (x.shape[2], x.shape[3])
        x = channels_last(x.to(self.head_weight.dtype))
        gates = gates.to(x.dtype)
        counts = self._counts(bits)
        if len(x) == 1:
            unions, group_of = bits, np.zeros(1, dtype=np.int64)
        else:
            unions, group_of = self._group(bits, size, allowed, max_groups)
        macs = self.network.macs(self._counts(unions), *size)
        logits: Tensor | None = None
        for number, union in enumerate(unions):
            pattern = self.pattern(union, size)
            if len(unions) == 1:
                logits = pattern.run(x, gates)
                break
            rows = torch.from_numpy((group_of == number).nonzero()[0]).to(x.device)
            answer = pattern.run(channels_last(x[rows]), gates[rows])
            if logits is None:
                logits = answer.new_empty(len(x), *answer.shape[1:])
            logits[rows] = answer
        groups = torch.from_numpy(group_of).to(x.device)
        assert logits is not None, "a batch has at least one image"
        return logits, macs.to(x.device)[groups], groups, counts.to(x.device)

    @torch.inference_mode()
    def dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> logits and multiply-adds of the whole network without gates, with the same operators."""
        size = (x.shape[2], x.shape[3])
        pattern = self.pattern(np.ones(sum(self.channels), dtype=bool), size)
        macs = torch.full((len(x),), self.network.full_macs(*size), dtype=torch.float64)
        return pattern.run(channels_last(x.to(self.head_weight.dtype)), None), macs

    def pattern(self, bits: Bits, size: tuple[int, int]) -> "Pattern":
        """The network cut to the channels `bits` (sum of C_l,) for images of this size; kept for the next time."""
        key = (size, np.packbits(bits).tobytes())
        with self._lock:
            found = self._patterns.get(key)
            if found is not None:
                self._patterns.move_to_end(key)
                return found
        made = Pattern(self, bits, size)
        with self._lock:
            self._patterns[key] = made
            while len(self._patterns) > self.cached_patterns:
                self._patterns.popitem(last=False)
        return made

    def _counts(self, bits: Bits) -> Tensor:
        starts = np.cumsum([0, *self.channels[:-1]])
        return torch.from_numpy(np.add.reduceat(bits.astype(np.int64), starts, axis=1))

    def _group(
        self, bits: Bits, size: tuple[int, int], allowed: Tensor | None, max_groups: int | None
    ) -> tuple[Bits, NDArray[np.int64]]:
        """The channels (G, sum of C_l) that each group computes, and the group of each image."""
        packed, group_of, images = np.unique(np.packbits(bits, axis=1), axis=0, return_inverse=True, return_counts=True)
        patterns = np.unpackbits(packed, axis=1, count=bits.shape[1]).astype(bool)
        group_of = group_of.reshape(-1)
        distinct = len(patterns)
        if max_groups is None and (distinct <= FEW_PATTERNS or distinct * FEW_PATTERNS <= len(bits)):
            return patterns, group_of
        if distinct <= (max_groups or 1):
            return patterns, group_of
        limits = np.full(distinct, np.inf)
        if allowed is not None:
            np.minimum.at(limits, group_of, allowed.double().cpu().numpy())
        tree = linkage(patterns, "average", metric="hamming")
        sizes = [max_groups] if max_groups else [distinct, *(2**k for k in range(distinct.bit_length()))]
        labels = min(
            (fcluster(tree, count, "maxclust") - 1 for count in sizes),
            key=lambda found: self._estimate(patterns, found, images, limits, size),
        )
        labels = self._split_where_over(patterns, labels, limits, size)
        unions = np.stack([patterns[labels == label].any(0) for label in np.unique(labels)])
        return unions, np.unique(labels, return_inverse=True)[1].reshape(-1)[group_of]

    def _union_macs(self, patterns: Bits, labels: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float64]:
        """Multiply-adds that an image of each pattern spends in its group, (P,)."""
        kinds, numbers = np.unique(labels, return_inverse=True)
        unions = np.stack([patterns[labels == kind].any(0) for kind in kinds])
        macs: NDArray[np.float64] = self.network.macs(self._counts(unions), *size).numpy()[numbers.reshape(-1)]
        return macs

    def _estimate(
        self,
        patterns: Bits,
        labels: NDArray[Any],
        images: NDArray[np.int64],
        limits: NDArray[np.float64],
        size: tuple[int, int],
    ) -> float:
        macs = self._union_macs(patterns, self._split_where_over(patterns, labels, limits, size), size)
        return float((macs * images).sum() + len(np.unique(labels)) * len(self.convs) * CALL_MACS)

    def _split_where_over(
        self, patterns: Bits, labels: NDArray[Any], limits: NDArray[np.float64], size: tuple[int, int]
    ) -> NDArray[np.int64]:
        """Labels where each pattern of a union that breaks a member's budget is a group of its own."""
        over = self._union_macs(patterns, labels, size) > limits
        broken = np.isin(labels, labels[over])
        return np.where(broken, len(labels) + np.arange(len(labels)), labels).astype(np.int64)


class Pattern:
    """A network cut to one pattern of channels, for images of one size."""

    def __init__(self, owner: ChannelNetwork, bits: Bits, size: tuple[int, int]):
        self.owner = owner
        network = owner.network
        device = owner.head_weight.device
        ends = np.cumsum(owner.channels)
        active = [np.flatnonzero(part) for part in np.split(bits, ends[:-1])]
        costs, _ = network.conv_costs(*size)
        self.channels: list[Tensor | None] = [
            None if len(found) == count else torch.from_numpy(found).to(device)
            for found, count in zip(active, owner.channels, strict=True)
        ]
        self.sizes = [
            count if chosen is None else padded(len(chosen))
            for chosen, count in zip(self.channels, owner.channels, strict=True)
        ]
        self.runs: dict[MoEConv2d, InferenceConv] = {}
        for layer, cost in zip(network.convs(), costs, strict=True):
            inputs, columns = self._side(cost.source)
            outputs, rows = self._side(cost.target)
            self.runs[layer] = owner.convs[layer].select(inputs, outputs, columns, rows)
        # Gates in the order of the channels that are computed; padding reads gate 0 and multiplies zeros.
        columns_of = []
        for found, count, start in zip(active, self.sizes, ends - owner.channels, strict=True):
            columns_of.append(np.concatenate([found + start, np.zeros(count - len(found), dtype=np.int64)]))
        self.columns = torch.from_numpy(np.concatenate(columns_of)).to(device)
        last = costs[-1].target if not isinstance(network.body[-1], GatedBlock) else None
        chosen = self.channels[last] if last is not None else None
        self.head_weight = owner.head_weight if chosen is None else owner.head_weight[:, chosen]

    def _side(self, gate: int | None) -> tuple[Tensor | None, int | None]:
        return (None, None) if gate is None else (self.channels[gate], self.sizes[gate])

    def run(self, x: Tensor, gates: Tensor | None) -> Tensor:
        """Images of this pattern or parts of it, channels-last, and gates (n, sum of C_l) or None (all 1) -> logits."""
        images = x.shape
        scales = None
        if gates is not None:
            scales = gates.index_select(1, self.columns)[:, :, None, None].split(self.sizes, 1)
        for part in self.owner.network.body:
            if isinstance(part, MoEConv2d):
                x = self._layer(part, x, scales)
            elif isinstance(part, GatedBlock):
                x = self._block(part, x, scales)
            else:
                x = channels_last(part(x))
        if not self.owner.network.dense:
            x = x.mean((2, 3))[:, : self.head_weight.shape[1]]
            return F.linear(x, self.head_weight, self.owner.head_bias)
        scores = F.conv2d(x, self.head_weight[:, :, None, None], self.owner.head_bias)
        return F.interpolate(scores, size=images[2:], mode="bilinear", align_corners=False)

    def _layer(self, layer: MoEConv2d, x: Tensor, scales: Scales) -> Tensor:
        run = self.runs[layer]
        if scales is None or layer.gate_index is None:
            return run(x, True)
        return run.relu_scale(x, scales[layer.gate_index])

    def _block(self, block: GatedBlock, x: Tensor, scales: Scales) -> Tensor:
        shortcut = self.owner.shortcuts.get(block)
        into = x if shortcut is None else channels_last(shortcut(x, False))
        y = x
        *first, last = block.convs
        for layer in first:
            assert isinstance(layer, MoEConv2d)
            y = self._layer(layer, y, scales)
        assert isinstance(last, MoEConv2d)
        if scales is None or last.gate_index is None:
            self.runs[last].add_relu_(y, into)
            return into
        y = self.runs[last](y, False).mul_(scales[last.gate_index])
        chosen = self.channels[last.gate_index]
        if chosen is None:
            into.add_(y)
        else:
            add_channels_(into, chosen, y)
        return into.relu_()
