"""Trained HydraNet and its baselines behind the `Predictor` protocol."""

from collections.abc import Callable

import torch
from torch import Tensor

from dataeff.core.artifact import Card, Predictor
from dataeff.dynamic.hydranet.bases import StaticNet
from dataeff.dynamic.hydranet.inference import HydraInference
from dataeff.dynamic.hydranet.model import HydraNet, selection_mask
from dataeff.metrics.cost import count_macs
from dataeff.nn.predictor import Answer, NetworkPredictor


def hydra_predictor(net: HydraNet | StaticNet, card: Card, device: str, rescale: bool = False) -> Predictor:
    """The predictor of a trained network, in evaluation mode on `device`.

    A budget picks how many of the k branches an image executes, best first, at least one. Networks without a gate have
    no optional parts and ignore it.

    Args:
        rescale: bring the sum of fewer branches to the scale of the trained k.
    """
    if isinstance(net, StaticNet):
        return NetworkPredictor(card, device, [], _static(net, card.input_shape))
    fast = HydraInference(net)
    n = net.config.n_branches
    gated = net.gate is not None

    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        output = fast(x, budget, rescale=rescale)
        path = selection_mask(output.selected, n) if gated else torch.empty(len(x), 0, dtype=torch.bool)
        return output.logits, output.macs, path

    return NetworkPredictor(card, device, [f"branch {number}" for number in range(n)] if gated else [], answer)


def _static(net: StaticNet, shape: tuple[int, int, int]) -> Callable[[Tensor, Tensor | None], Answer]:
    features, macs = net.fold(), count_macs(net, shape).total

    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        spent = torch.full((len(x),), macs, dtype=torch.float64)
        return net.classifier(features(x)), spent, torch.empty(len(x), 0, dtype=torch.bool)

    return answer
