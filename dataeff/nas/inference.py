"""Trained architectures behind the `Predictor` protocol: norms folded into convolutions, fused operators on the CPU."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.core.artifact import Card
from dataeff.metrics.cost import count_macs
from dataeff.nn.fold import InferenceConv, channels_last, fold_conv, inference_conv
from dataeff.nn.predictor import Answer, NetworkPredictor


class FoldedSequence(nn.Module):
    """A `Sequential` for inference: convolution, norm and ReLU in one operator wherever they follow each other."""

    def __init__(self, sequence: nn.Sequential) -> None:
        super().__init__()
        layers = list(sequence)
        self.steps: list[tuple[Any, bool | None]] = []  # a convolution with its ReLU or not, or (None) another layer
        position = 0
        while position < len(layers):
            layer = layers[position]
            position += 1
            if not isinstance(layer, nn.Conv2d):
                self.steps.append((layer, None))
                continue
            conv: InferenceConv
            if position < len(layers) and isinstance(layers[position], nn.BatchNorm2d):
                conv = fold_conv(layer, layers[position])
                position += 1
            else:
                conv = inference_conv(layer, layer.weight.detach(), torch.zeros(layer.out_channels).to(layer.weight))
            relu = position < len(layers) and isinstance(layers[position], nn.ReLU)
            position += relu
            self.steps.append((conv, relu))

    def forward(self, x: Tensor) -> Tensor:
        for layer, relu in self.steps:
            if relu is not None:
                x = layer(x, relu)
            elif isinstance(layer, nn.ReLU):
                x = F.relu(x)  # never in place: another operation may read the same features
            else:
                x = layer(x)
        return x


def folded(model: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode with every `Sequential` folded; the same answers within rounding.

    Raises:
        ValueError: the network is in training mode.
    """
    if model.training:
        raise ValueError("the network is in training mode: call eval() before folding it")
    copied = copy.deepcopy(model)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Sequential):
                setattr(module, name, FoldedSequence(child))
    return copied


def cell_predictor(model: nn.Module, card: Card, device: str) -> NetworkPredictor:
    """Answers of a static network: `path` is empty and `budget` has no effect.

    Args:
        model: trained; moved to `device`.
    """
    model = model.to(torch.device(device)).eval()
    spent = count_macs(model, card.input_shape).total
    network = folded(model)

    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        if x.dim() != 4 or tuple(x.shape[1:]) != tuple(card.input_shape):
            raise ValueError(f"expected images (B, {', '.join(map(str, card.input_shape))}), got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("images hold values that are not finite")
        logits = network(channels_last(x))
        return logits, torch.full((len(x),), spent, dtype=torch.float64), torch.empty(len(x), 0, dtype=torch.bool)

    return NetworkPredictor(card, device, [], answer)
