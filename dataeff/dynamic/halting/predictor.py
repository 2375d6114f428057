"""Trained ACT and SACT networks behind the `Predictor` protocol."""

import torch
from torch import Tensor

from dataeff.core.artifact import Card
from dataeff.dynamic.halting.inference import HaltingInference
from dataeff.dynamic.halting.model import HaltingResNet
from dataeff.nn.predictor import Answer, NetworkPredictor


def halting_predictor(model: HaltingResNet, card: Card, device: str) -> NetworkPredictor:
    """Answers that stop early; `path` is which units ran anywhere in an image. `budget` makes an image stop earlier, in
    both methods, but never before the first unit of each group.

    Args:
        model: trained; moved to `device` and put into evaluation mode.
    """
    network = HaltingInference(model.to(torch.device(device)).eval())
    optional = [number for number in range(len(network.network.blocks)) if number not in network.first_units]

    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        output = network(x, budget)
        return output.logits, output.macs, output.executed[:, optional] > 0

    return NetworkPredictor(card, device, [f"block {number + 1}" for number in optional], answer)
