"""Trained DeepMoE and its baselines behind the `Predictor` protocol."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataeff.core.artifact import Card
from dataeff.dynamic.deepmoe.baselines import PlainOutput, RuntimePruning, RuntimePruningInference, StaticNetwork
from dataeff.dynamic.deepmoe.inference import ChannelNetwork, DeepMoEInference
from dataeff.dynamic.deepmoe.model import DeepMoE
from dataeff.dynamic.deepmoe.network import GatedNetwork
from dataeff.dynamic.deepmoe.perlayer import PerLayerInference, PerLayerMoE
from dataeff.nn.predictor import Answer, NetworkPredictor


def make_predictor(model: nn.Module, card: Card, device: str) -> NetworkPredictor:
    """The predictor of a network in evaluation mode on `device`.

    DeepMoE and the noisy top-k gate compute active channels only and keep to `budget` (see `DeepMoEInference`); gates
    that read the layer before compute them too, RNP computes the kept channel groups, Hard MoE one tail, the static
    network everything, all four whatever the budget.
    `path` tells which channels were active (for Hard MoE: which tail, for RNP: which channel groups).
    """
    return NetworkPredictor(card, device, *answer_of(model))


def answer_of(model: nn.Module) -> tuple[list[str], Callable[[Tensor, Tensor | None], Answer]]:
    """Names of a network's optional parts, and what answers images and budgets; see `make_predictor`."""
    answer: Callable[[Tensor, Tensor | None], Answer]
    if isinstance(model, DeepMoE):
        names, answer = channel_names(model.network), _sparse(DeepMoEInference(model))
    elif isinstance(model, PerLayerMoE):
        names, answer = channel_names(model.network), _plain(PerLayerInference(model))
    elif isinstance(model, StaticNetwork):
        names, answer = [], _static(model)
    elif isinstance(model, RuntimePruning):
        layers = range(1, len(model.network.gate_channels) + 1)
        names = [f"layer {layer} group {group}" for layer in layers for group in range(1, model.groups + 1)]
        answer = _plain(RuntimePruningInference(model))
    else:
        names = [f"tail {expert}" for expert in range(1, int(model.experts) + 1)]  # type: ignore[arg-type]
        answer = _plain(model)
    return names, answer


def channel_names(network: GatedNetwork) -> list[str]:
    """Names of all gated channels, in the order of their gates."""
    return [
        f"layer {layer} channel {channel}"
        for layer, count in enumerate(network.gate_channels, start=1)
        for channel in range(count)
    ]


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
