"""A trained committee behind the `Predictor` protocol."""

import torch
from torch import Tensor

from dataeff.active.classifier import Committee
from dataeff.core.artifact import Card
from dataeff.nn.predictor import Answer, NetworkPredictor


class CommitteePredictor(NetworkPredictor):
    """Answers with the mean of the members' probabilities; nothing of it is optional, so `path` is empty.

    Args:
        card: of the artifact.
        device: "cpu", "cuda", ...
        committee: trained; moved to `device` and put into evaluation mode.
    """

    def __init__(self, card: Card, device: str, committee: Committee) -> None:
        committee.to(torch.device(device)).eval()
        self._committee = committee

        def answer(x: Tensor, budget: Tensor | None) -> Answer:
            macs = torch.full((len(x),), card.cost["macs"], dtype=torch.float64)
            return committee(x), macs, torch.zeros(len(x), 0, dtype=torch.bool)

        super().__init__(card, device, [], answer)

    def embed(self, inputs: Tensor) -> Tensor:
        """Penultimate features of the first member, float32 (B, d), of images (B, C, H, W)."""
        with torch.inference_mode():
            embedding: Tensor = next(iter(self._committee)).encoder(inputs.to(self._device))
        return embedding.float().cpu()
