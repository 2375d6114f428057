"""Gates: tiny networks that read a feature map and return the logit of "execute the next block".

Source: spec skipnet section 2.4.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from dataeff.nn.resnet import Norm, conv2d, conv2d_macs, init_weights, make_norm

GateState = tuple[Tensor, Tensor]


class FeedForwardGate(nn.Module):
    """Feature map (B, C, H, W) -> logit float32 (B,).

    Args:
        channels: C.
        variant: "I" (max-pool, two convolutions; counted 15.6 % of a basic block), "II" (one strided convolution;
            12.5 %) or "linear" (global pool and linear layer only, the negative control).
        norm: normalisation after the convolutions, "batch" or "group".
        bias_init: bias of the output layer at the start; positive values start from "execute".
    """

    def __init__(
        self,
        channels: int,
        variant: Literal["I", "II", "linear"] = "I",
        norm: Norm = "batch",
        bias_init: float = 0.0,
    ):
        super().__init__()
        layers: dict[str, list[nn.Module]] = {
            "I": [nn.MaxPool2d(2, 2), *_conv_norm_relu(channels, 1, norm), *_conv_norm_relu(channels, 2, norm)],
            "II": _conv_norm_relu(channels, 2, norm),
            "linear": [],
        }
        if variant not in layers:
            raise ValueError(f"variant must be 'I', 'II' or 'linear', got {variant!r}")
        self.features = nn.Sequential(*layers[variant])
        self.output = nn.Linear(channels, 1)
        init_weights(self)
        nn.init.constant_(self.output.bias, bias_init)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        with torch.autocast(x.device.type, enabled=False):
            logit: Tensor = self.output(x.mean((2, 3), dtype=torch.float32))
        return logit.view(-1)

    def macs(self, height: int, width: int) -> float:
        """Convolution multiply-adds of one image."""
        total = 0.0
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                height, width = height // 2, width // 2
            elif isinstance(layer, nn.Conv2d):
                macs, height, width = conv2d_macs(layer, height, width)
                total += macs
        return total

    def linear_macs(self) -> float:
        """Multiply-adds of the output layer for one image."""
        return float(self.output.weight.numel())


class RecurrentGate(nn.Module):
    """All gates of a network as one shared LSTM that walks along the blocks.

    Global average pool, a linear projection of its own per position, one LSTM cell and one output layer for all
    positions. The pooled features are not detached: the policy gradient reaches the backbone through them.

    Args:
        channels: C of the feature map at each gate position; its length is the number of gates N.
        embed_dim: size of the projected features.
        hidden_dim: size of the LSTM state.
        bias_init: bias of the output layer at the start; positive values start from "execute".
    """

    def __init__(self, channels: list[int], embed_dim: int = 10, hidden_dim: int = 10, bias_init: float = 0.0):
        super().__init__()
        if embed_dim < 1 or hidden_dim < 1:
            raise ValueError(f"embed_dim and hidden_dim must be at least 1, got {embed_dim} and {hidden_dim}")
        self.projections = nn.ModuleList(nn.Linear(c, embed_dim) for c in channels)
        self.cell = nn.LSTMCell(embed_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, 1)
        init_weights(self.projections)
        for weight in (self.cell.weight_ih, self.cell.weight_hh, self.output.weight):
            nn.init.xavier_normal_(weight)
        nn.init.zeros_(self.cell.bias_ih)
        nn.init.zeros_(self.cell.bias_hh)
        nn.init.constant_(self.output.bias, bias_init)

    def forward(self, x: Tensor, state: GateState | None, position: int) -> tuple[Tensor, GateState]:
        """Feature map (B, C, H, W) and the state after the previous gate (None: zeros) -> (logit float32 (B,), state).

        Runs in float32 under autocast as well: a rounded logit would move decisions across the threshold.
        """
        with torch.autocast(x.device.type, enabled=False):
            embedding = self.projections[position](x.mean((2, 3), dtype=torch.float32))
            hidden, cell = self.cell(embedding, state)
            return self.output(hidden).view(-1), (hidden, cell)

    def linear_macs(self, position: int) -> float:
        """Multiply-adds of projection, LSTM and output layer for one image at one position (no convolutions)."""
        projection = self.projections[position]
        assert isinstance(projection, nn.Linear)
        weights = (projection.weight, self.cell.weight_ih, self.cell.weight_hh, self.output.weight)
        return float(sum(weight.numel() for weight in weights))


def _conv_norm_relu(channels: int, stride: int, norm: Norm) -> list[nn.Module]:
    return [conv2d(channels, channels, 3, stride), make_norm(norm, channels), nn.ReLU()]
