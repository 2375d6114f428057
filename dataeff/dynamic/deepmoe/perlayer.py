"""Gates that read the layer before instead of one shared embedding: what DeepMoE's batches are compared with.

Source: spec deepmoe section 5, "per-layer gate" (an open choice). The gates of a layer are known only when its input
is, so images with equal patterns cannot be found in advance: groups form anew at every layer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dataeff.dynamic.deepmoe.baselines import PlainOutput
from dataeff.dynamic.deepmoe.model import GateInit, SparseGatingHeads, active_counts, active_shares
from dataeff.dynamic.deepmoe.network import GatedBlock, GatedNetwork, MoEConv2d
from dataeff.nn.channels import ChannelConv
from dataeff.nn.fold import InferenceConv, channels_last, fold_conv


@dataclass
class PerLayerOutput(PlainOutput):
    """Also gates, float32 (B, C_l) per gated layer, and active_share (B,); `path`: which channels were active."""

    gates: list[Tensor]
    active_share: Tensor


class PerLayerHeads(nn.Module):
    """g^l = ReLU(W_g^l softmax(V^l s / T)) for the pooled input s (B, C) of gated layer l: heads as DeepMoE's, each on
    a latent of its own.

    Args:
        inputs, outputs: channels before and behind every gated layer.
        latent, temperature, init, keep_top: as for `ShallowEmbedding` and `SparseGatingHeads`.
    """

    def __init__(
        self,
        inputs: list[int],
        outputs: list[int],
        latent: int,
        temperature: float = 1.0,
        init: GateInit = "ones",
        keep_top: bool = False,
    ):
        super().__init__()
        self.temperature = temperature
        self.latents = nn.ModuleList(nn.Linear(channels, latent) for channels in inputs)
        self.heads = nn.ModuleList(SparseGatingHeads([channels], latent, init, keep_top) for channels in outputs)

    def forward(self, index: int, features: Tensor) -> Tensor:
        """Input (B, C, H, W) of gated layer `index` -> its gates float32 (B, C_l)."""
        with torch.autocast(features.device.type, enabled=False):
            pooled = features.mean((2, 3), dtype=torch.float32)
            gates: list[Tensor] = self.heads[index]((self.latents[index](pooled) / self.temperature).softmax(1))
        return gates[0]


class PerLayerMoE(nn.Module):
    """A base network whose gates read the layer before.

    Args:
        network: the base; the other arguments as for `PerLayerHeads`.
    """

    def __init__(
        self,
        network: GatedNetwork,
        latent: int,
        temperature: float = 1.0,
        gate_init: GateInit = "ones",
        keep_top: bool = False,
    ):
        super().__init__()
        if not network.gate_channels:
            raise ValueError("the base network has no gated layer")
        inputs = [layer.conv.in_channels for layer in network.convs() if layer.gate_index is not None]
        self.network = network
        self.heads = PerLayerHeads(inputs, network.gate_channels, latent, temperature, gate_init, keep_top)

    def forward(self, x: Tensor) -> PerLayerOutput:
        """Classify images (B, C, H, W) by masked execution."""
        self.network.check_images(x, self.network.stride)
        gates: list[Tensor] = []

        def gate_of(index: int, features: Tensor) -> Tensor:
            gates.append(self.heads(index, features))
            return gates[-1]

        logits = self.network.classify(self.network.features(x, gate_of), x.shape)
        return self.output(logits, gates, x)

    def output(self, logits: Tensor, gates: list[Tensor], x: Tensor) -> PerLayerOutput:
        """The answer to images `x`, with its cost."""
        counts = active_counts(gates)
        macs = self.network.macs(counts, x.shape[2], x.shape[3]) + self.router_macs()
        path = torch.cat(gates, 1) > 0
        return PerLayerOutput(logits, macs, path, gates, active_shares(counts, self.network.gate_channels))

    def router_macs(self) -> float:
        """Multiply-adds of all gates for one image."""
        return float(sum(p.numel() for name, p in self.heads.named_parameters() if name.endswith("weight")))


class PerLayerInference:
    """`PerLayerMoE` in evaluation mode that computes active channels only: at every convolution, images that read and
    give the same channels run together.

    Attributes:
        executions: groups that the last call ran, summed over the gated convolutions.
    """

    def __init__(self, model: PerLayerMoE):
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() before PerLayerInference(model)")
        self.model = model
        self.convs = {layer: ChannelConv(layer.conv, layer.norm) for layer in model.network.convs()}
        self.shortcuts: dict[GatedBlock, InferenceConv] = {}
        for part in model.network.body:
            if isinstance(part, GatedBlock) and isinstance(part.shortcut, nn.Sequential):
                conv, norm = part.shortcut
                assert isinstance(conv, nn.Conv2d)
                self.shortcuts[part] = fold_conv(conv, norm)
        self.executions = 0

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> PerLayerOutput:
        """Images -> what the model gives in evaluation mode, within rounding."""
        network, images = self.model.network, x
        network.check_images(x, network.stride)
        self.executions = 0
        gates: list[Tensor] = []
        source: Tensor | None = None  # gates of the channels that come next; None: all of them hold something
        x = channels_last(x)
        for part in network.body:
            if isinstance(part, MoEConv2d):
                x, source = self._layer(part, x, source, gates)
            elif isinstance(part, GatedBlock):
                shortcut = self.shortcuts.get(part)
                into = x if shortcut is None else shortcut(x, False)
                y, inside = x, source
                for layer in part.convs:
                    assert isinstance(layer, MoEConv2d)
                    y, inside = self._layer(layer, y, inside, gates)
                x, source = (y + into).relu_(), None
            else:
                x = channels_last(part(x))
        return self.model.output(network.classify(x, images.shape), gates, images)

    def _layer(
        self, layer: MoEConv2d, x: Tensor, source: Tensor | None, gates: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Features behind a layer, channels that are off 0, and the gates of its channels; adds to `gates`."""
        x = channels_last(x)
        if layer.gate_index is None:
            # All its outputs are needed; what is off among its inputs is 0.
            return self.convs[layer].all_channels(x, layer.relu), None
        gate: Tensor = self.model.heads(layer.gate_index, x)
        gates.append(gate)
        outputs = gate > 0
        inputs = outputs.new_ones(len(x), x.shape[1]) if source is None else source > 0
        bits = torch.cat([inputs, outputs], 1).cpu().numpy()
        patterns, group_of = np.unique(bits, axis=0, return_inverse=True)
        self.executions += len(patterns)
        result: Tensor | None = None
        for number, pattern in enumerate(patterns):
            rows = torch.from_numpy((group_of.reshape(-1) == number).nonzero()[0]).to(x.device)
            reads, gives = (
                torch.from_numpy(np.flatnonzero(part)).to(x.device) for part in np.split(pattern, [x.shape[1]])
            )
            y = self.convs[layer].select(reads, gives)(channels_last(x[rows][:, reads]), layer.relu)
            if result is None:
                result = y.new_zeros(len(x), layer.conv.out_channels, *y.shape[2:])
            # Rows and channels of an outer index.
            result[rows[:, None], gives[None]] = y * gate[rows[:, None], gives[None]][:, :, None, None].to(y.dtype)
        assert result is not None, "a batch has at least one image"
        return result, gate
