"""Trained DeepMoE and its baselines behind the `Predictor` protocol."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataeff.core.artifact import Card
from dataeff.dynamic.deepmoe.baselines import PlainOutput, RuntimePruning, RuntimePruningInference, StaticNetwork
from dataeff.dynamic.deepmoe.inference import ChannelNetwork, DeepMoEInference
from dataeff.dynamic.deepmoe.model import DeepMoE
from dataeff.nn.predictor import Answer, NetworkPredictor


def make_predictor(model: nn.Module, card: Card, device: str) -> NetworkPredictor:
    """The predictor of a network in evaluation mode on `device`.

    DeepMoE and the noisy top-k gate compute active channels only and keep to `budget` (see `DeepMoEInference`); RNP
    computes the kept channel groups, Hard MoE one tail, the static network everything, all three whatever the budget.
    `path` tells which channels were active (for Hard MoE: which tail, for RNP: which channel groups).
    """
    answer: Callable[[Tensor, Tensor | None], Answer]
    if isinstance(model, DeepMoE):
        names = [
            f"layer {layer} channel {channel}"
            for layer, count in enumerate(model.network.gate_channels, start=1)
            for channel in range(count)
        ]
        answer = _sparse(DeepMoEInference(model))
    elif isinstance(model, StaticNetwork):
        names, answer = [], _static(model)
    elif isinstance(model, RuntimePruning):
        layers = range(1, len(model.network.gate_channels) + 1)
        names = [f"layer {layer} group {group}" for layer in layers for group in range(1, model.groups + 1)]
        answer = _plain(RuntimePruningInference(model))
    else:
        names = [f"tail {expert}" for expert in range(1, int(model.experts) + 1)]  # type: ignore[arg-type]
        answer = _plain(model)
    return NetworkPredictor(card, device, names, answer)


def _sparse(network: DeepMoEInference) -> Callable[[Tensor, Tensor | None], Answer]:
    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        output = network(x, budget)
        return output.logits, output.macs, torch.cat(output.gates, 1) > 0

    return answer


def _static(model: StaticNetwork) -> Callable[[Tensor, Tensor | None], Answer]:
    network = ChannelNetwork(model.network)

    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        model.network.check_images(x, 1)
        logits, macs = network.dense(x)
        return logits, macs, torch.empty(len(x), 0, dtype=torch.bool)

    return answer


def _plain(network: Callable[[Tensor], PlainOutput]) -> Callable[[Tensor, Tensor | None], Answer]:
    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        output = network(x)
        return output.logits, output.macs, output.path

    return answer
