"""Statically pruned networks behind the `Predictor` protocol."""

import torch
from torch import Tensor

from dataeff.core.artifact import Card
from dataeff.dynamic.pruning.model import PrunableResNet, shrink
from dataeff.nn.backbone import backbone_macs
from dataeff.nn.fold import FoldedResNet
from dataeff.nn.predictor import Answer, NetworkPredictor


def pruning_predictor(model: PrunableResNet, card: Card, device: str) -> NetworkPredictor:
    """Answers of the physically smaller dense network. Nothing is optional in it: `path` is empty, `budget` ignored.

    Args:
        model: trained; moved to `device`.
    """
    small = shrink(model.to(torch.device(device)))
    network = FoldedResNet(small)

    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        logits = network(x)
        spent = backbone_macs(small, x.shape[2], x.shape[3])
        macs = torch.full((len(x),), spent, dtype=torch.float64)
        return logits, macs, torch.empty(len(x), 0, dtype=torch.bool)

    return NetworkPredictor(card, device, [], answer)
