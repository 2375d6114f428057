"""Trained LCCL networks behind the `Predictor` protocol."""

import torch
from torch import Tensor

from dataeff.core.artifact import Card
from dataeff.dynamic.lccl.inference import LcclInference
from dataeff.dynamic.lccl.model import LcclResNet
from dataeff.nn.predictor import Answer, NetworkPredictor


def lccl_predictor(model: LcclResNet, card: Card, device: str) -> NetworkPredictor:
    """Answers that leave out positions; `path` is which convolutions ran anywhere in an image. The companions alone
    decide what is left out, so a `budget` changes nothing.

    Args:
        model: trained; moved to `device` and put into evaluation mode.
    """
    network = LcclInference(model.to(torch.device(device)).eval())

    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        output = network(x)
        return output.logits, output.macs, output.executed > 0

    return NetworkPredictor(card, device, model.names, answer)
