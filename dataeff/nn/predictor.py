"""A trained network behind the `Predictor` protocol, whatever the network is."""

from collections.abc import Callable, Sequence

import PIL.Image
import torch
from torch import Tensor

from dataeff.core.artifact import Card, Prediction
from dataeff.data import Preprocess

Answer = tuple[Tensor, Tensor, Tensor]  # logits (B, K), multiply-adds float64 (B,), path bool (B, P)


class NetworkPredictor:
    """Gives the answers of a function of images and budgets; see `dataeff.core.artifact.Predictor`.

    Args:
        card: of the artifact.
        device: "cpu", "cuda", ...; where `answer` expects its images.
        path_names: names of the network's optional parts, P of them.
        answer: images float32 (B, C, H, W) on `device`, and budgets float64 (B,) or None -> `Answer`.
    """

    def __init__(
        self, card: Card, device: str, path_names: Sequence[str], answer: Callable[[Tensor, Tensor | None], Answer]
    ):
        self.card = card
        self.input_shape = card.input_shape
        self.path_names = list(path_names)
        self._device = torch.device(device)
        self._preprocess = Preprocess.from_dict(card.preprocess)
        self._answer = answer

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Images of any size to float32 (B, C, H, W), as in training."""
        inputs: Tensor = self._preprocess.from_pil(images)
        return inputs

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        """Answer float32 (B, C, H, W); `budget` float64 (B,), multiply-adds allowed per image, inf for no limit.

        Raises:
            ValueError: for inputs of a wrong shape or with values that are not finite, or a budget of a wrong shape.
        """
        check_budget(budget, len(inputs))
        with torch.inference_mode():
            logits, macs, path = self._answer(inputs.to(self._device), budget)
            return Prediction(logits.float().softmax(1).cpu(), macs.cpu(), path.cpu())


def check_budget(budget: Tensor | None, count: int) -> None:
    """Refuse a budget that is not one number of multiply-adds per image.

    Raises:
        ValueError: for another shape, or NaN.
    """
    if budget is None:
        return
    if budget.shape != (count,):
        raise ValueError(
            f"budget needs one number of multiply-adds per image, ({count},), got shape {tuple(budget.shape)}"
        )
    if bool(torch.isnan(budget).any()):
        raise ValueError("budget must be multiply-adds or inf for no limit, got NaN")
