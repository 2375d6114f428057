"""Trained SkipNet and its baselines behind the `Predictor` protocol."""

from collections.abc import Callable

import torch
from torch import Tensor

from dataeff.core.artifact import Card, Predictor
from dataeff.dynamic.skipnet.inference import SkipNetInference
from dataeff.dynamic.skipnet.model import SkipNet, SkipNetOutput, survival_probabilities
from dataeff.nn.fold import FoldedResNet
from dataeff.nn.predictor import Answer, NetworkPredictor

DRAW_SEED = 0


def skipnet_predictor(model: SkipNet, arm: str, keep: float, card: Card, device: str) -> Predictor:
    """Answers of one arm of the SkipNet experiment; see `dataeff.core.artifact.Predictor`.

    Gated arms really skip blocks, and spend at most `budget` multiply-adds on an image wherever the parts that cannot
    be skipped fit into it. "base" is the dense network with folded BatchNorm: it has no optional parts. "sdv" drops
    blocks at random, the same ones for every image and call, so that an answer depends on nothing but the image;
    "stochastic_depth" runs them all, scaled. These three ignore `budget`.

    Args:
        model: trained network; moved to `device` and put into evaluation mode.
        arm: of `SkipNetConfig`.
        keep: execute-probability of "sdv".
        card: of the artifact.
        device: "cpu", "cuda", ...
    """
    model = model.to(device).eval()
    path_names = [] if arm == "base" else [f"block {number}" for number in range(2, model.num_gates + 2)]
    answer: Callable[[Tensor, Tensor | None], Answer]
    if arm == "base":
        answer = _dense(model)
    elif arm == "sdv":
        draws = torch.rand(model.num_gates, generator=torch.Generator().manual_seed(DRAW_SEED))
        answer = _masked(model, "random", torch.tensor(keep), draws.to(device))
    elif arm == "stochastic_depth":
        answer = _masked(model, "expected", survival_probabilities(model.num_gates), None)
    else:
        answer = _skipping(model)
    return NetworkPredictor(card, device, path_names, answer)


def _dense(model: SkipNet) -> Callable[[Tensor, Tensor | None], Answer]:
    network = FoldedResNet(model.backbone)

    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        logits = network(x)
        macs = torch.full((len(x),), model.costs(x.shape[2], x.shape[3]).full, dtype=torch.float64)
        return logits, macs, torch.empty(len(x), 0, dtype=torch.bool)

    return answer


def _skipping(model: SkipNet) -> Callable[[Tensor, Tensor | None], Answer]:
    network = SkipNetInference(model)
    return lambda x, budget: _parts(network(x, budget))


def _masked(model: SkipNet, mode: str, keep: Tensor, draws: Tensor | None) -> Callable[[Tensor, Tensor | None], Answer]:
    def answer(x: Tensor, budget: Tensor | None) -> Answer:
        rows = draws.expand(len(x), -1) if draws is not None else None
        return _parts(model(x, mode=mode, draws=rows, keep=keep))

    return answer


def _parts(output: SkipNetOutput) -> Answer:
    return output.logits, output.macs, output.gates > 0
