"""Trained AdaSkips networks behind the `Predictor` protocol."""

import torch
from torch import Tensor

from dataeff.core.artifact import Artifact, Card
from dataeff.dynamic.adaskips.inference import AdaSkipInference
from dataeff.dynamic.adaskips.model import AdaSkipResNet
from dataeff.nn.predictor import Answer, NetworkPredictor

DRAW_SEED = 0


class AdaSkipsPredictor(NetworkPredictor):
    """Leaves out skips below the threshold that the network was trained with; `budget` in multiply-adds is spent as
    `inference` says. Random skip weights are the same for every image and call, so that an answer depends on nothing
    but the image. `path` tells which hypernetworks ran and which skips were taken.

    Args:
        model: trained network; moved to `device` and put into evaluation mode.
        card: of the artifact.
    """

    def __init__(self, model: AdaSkipResNet, card: Card, device: str):
        model = model.to(device).eval()
        self.network = AdaSkipInference(model)
        self.tau = model.cfg.sparsity_tau
        self.stages = model.stages
        self.changed = [number - 1 for number in sorted(model.cfg.modules)]
        self.hyper = [number for number in self.changed if model.stages[number].hyper is not None]
        self.draws = torch.rand(model.num_draws, generator=torch.Generator().manual_seed(DRAW_SEED)).to(device)
        names = [f"hypernetwork {number + 1}" for number in self.hyper]
        for number in self.changed:
            names += [f"skip {number + 1}: {i} to {j}" for i, j in model.stages[number].pairs]
        super().__init__(card, device, names, self._run)

    def _run(self, x: Tensor, budget: Tensor | None) -> Answer:
        answer = self.network(x, self.tau, budget, self.draws.expand(len(x), -1))
        parts = [answer.asked[:, self.hyper], *(answer.active[number] for number in self.changed)]
        return answer.logits, answer.macs, torch.cat(parts, 1)

    def skip_matrices(self, inputs: Tensor) -> dict[str, Tensor]:
        """lambda of each changed module as a matrix (B, k, k): row j - 1, column i, NaN where there is no skip."""
        answer = self.network(inputs, self.tau, None, self.draws.expand(len(inputs), -1))
        return {
            f"module {number + 1}": as_matrix(answer.weights[number], self.stages[number].pairs)
            for number in self.changed
        }


def load_student(student: AdaSkipResNet, artifact: Artifact) -> AdaSkipResNet:
    """Give a fresh network the weights of an artifact."""
    prefix = "student."
    own = {name.removeprefix(prefix): value for name, value in artifact.state.items() if name.startswith(prefix)}
    student.load_state_dict(own)
    return student


def as_matrix(weights: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """Skip weights (..., n) as matrices (..., k, k): row j - 1, column i, NaN elsewhere."""
    size = max(j for _, j in pairs)
    matrix = weights.new_full((*weights.shape[:-1], size, size), float("nan"))
    for column, (i, j) in enumerate(pairs):
        matrix[..., j - 1, i] = weights[..., column]
    return matrix
