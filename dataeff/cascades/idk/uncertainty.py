"""The add-ons of a cascade: from a model's class probabilities to "I don't know" (spec idk_cascades section 2.2)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["prob", "entropy", "cost"]
Feature = Literal["entropy", "nn"]

NN_HIDDEN = (1024, 1024, 512, 512, 128, 64)
ROW_SUM_TOLERANCE = 1e-3
# Just beyond the range of the scores, so that also one-hot rows are passed on: alpha of "always IDK".
ALWAYS = {"prob": 1 + 1e-12, "entropy": -1e-12}
MIN_STD = 1e-6


def check_probabilities(probabilities: Tensor, where: str = "probabilities") -> Tensor:
    """The same numbers as float64 (n, k), if every row is a distribution over at least two classes.

    Raises:
        ValueError: names the first bad row; logits are recognised and refused with a hint.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(f"{where}: need (n, k) with k >= 2 classes, got shape {tuple(probabilities.shape)}")
    probs = probabilities.double()
    _refuse_row(torch.isnan(probs).any(1), probs, where, "holds NaN")
    outside = ((probs < 0) | (probs > 1 + ROW_SUM_TOLERANCE)).any(1)
    _refuse_row(outside, probs, where, "leaves [0, 1], as logits do; apply softmax first")
    _refuse_row(
        (probs.sum(1) - 1).abs() > ROW_SUM_TOLERANCE, probs, where, f"does not sum to 1 (+-{ROW_SUM_TOLERANCE})"
    )
    return probs


def _refuse_row(bad: Tensor, probs: Tensor, where: str, what: str) -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        shown = ", ".join(f"{value:.4g}" for value in probs[row, :4].tolist())
        raise ValueError(f"{where}: row {row} ({shown}, ...) {what}")


def entropy(probabilities: Tensor) -> Tensor:
    """H[p] = -sum_j p_j log p_j in nats, 0 log 0 = 0: (n, k) -> (n,) in [0, ln k] (spec section 2.2)."""
    values: Tensor = torch.special.entr(probabilities).sum(-1).clamp(min=0)
    return values


class IDKClassifier(nn.Module):
    """h_alpha(m(x)): says IDK where h > 0.5 (Eq. 4.2 to 4.6). Sees nothing of a model but its probabilities.

    All kinds are a score with a threshold: IDK where `score(p) > threshold`, with score -max_j p_j and threshold -alpha
    ("prob"), H[p] and alpha ("entropy"), alpha_1 f(p) + alpha_0 and 0 ("cost"). A request may bring a threshold of its
    own (a point of the calibration curve).

    Args:
        kind: "prob", "entropy", or "cost" for the learned one; cost-oblivious classifiers have the same form.
        classes: k.
        feature: of kind "cost": the standardised entropy, or "nn", a fully connected network.
        hidden: widths of that network; six hidden layers and the output make the seven of the source.

    Raises:
        ValueError: fewer than two classes.

    Example:
        >>> h = IDKClassifier("entropy", classes=10)
        >>> h.set_alpha(0.7)
        >>> h.predict_idk(probabilities)      # bool (n,)
    """

    alpha: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, kind: Kind, classes: int, feature: Feature = "entropy", hidden: tuple[int, ...] = NN_HIDDEN
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"an IDK classifier needs at least 2 classes, got {classes}")
        self.kind, self.classes, self.feature = kind, classes, feature
        self.network: nn.Sequential | None = None
        if kind != "cost":
            self.register_buffer("alpha", torch.tensor(ALWAYS[kind], dtype=torch.float64))
            return
        self.alpha_0 = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.alpha_1 = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("std", torch.ones((), dtype=torch.float64))
        if feature == "nn":
            self.network = _fully_connected(classes, hidden)

    def set_alpha(self, alpha: float) -> None:
        """Set the scalar of kind "prob" or "entropy".

        Raises:
            ValueError: outside [0, 1] (prob) or [0, ln k] (entropy), but for `ALWAYS`.
        """
        low, high = (0.0, ALWAYS["prob"]) if self.kind == "prob" else (ALWAYS["entropy"], math.log(self.classes))
        if not low <= alpha <= high + 1e-12:
            shown = "[0, 1]" if self.kind == "prob" else f"[0, ln {self.classes} = {high:.4g}]"
            raise ValueError(f"alpha = {alpha:g} of kind {self.kind!r} must be in {shown}")
        self.alpha.fill_(alpha)

    def scale_feature(self, values: Tensor) -> None:
        """Standardise the entropy feature by these values of the calibration set."""
        self.mean.copy_(values.mean())
        self.std.copy_(values.std(correction=0).clamp(min=MIN_STD))

    @property
    def threshold(self) -> float:
        """IDK where `score` is above it."""
        if self.kind == "cost":
            return 0.0
        return -float(self.alpha) if self.kind == "prob" else float(self.alpha)

    @property
    def macs(self) -> float:
        """Multiply-adds for one image; counted for the network only."""
        layers = [] if self.network is None else [layer for layer in self.network if isinstance(layer, nn.Linear)]
        return float(sum(layer.weight.numel() for layer in layers))

    def score(self, probabilities: Tensor) -> Tensor:
        """(n, k) -> float64 (n,), larger where the model is less certain."""
        probs = probabilities.double()
        if self.kind == "prob":
            return -probs.amax(-1).clamp(max=1.0)
        if self.kind == "entropy":
            return entropy(probs)
        return self.alpha_1 * self.feature_of(probs) + self.alpha_0

    def feature_of(self, probabilities: Tensor) -> Tensor:
        """f(p) of kind "cost", float64 (n,)."""
        if self.network is not None:
            output: Tensor = self.network(probabilities.float()).squeeze(1).double()
            return output
        return (entropy(probabilities.double()) - self.mean) / self.std

    def uncertainty(self, probabilities: Tensor) -> Tensor:
        """h in [0, 1], float64 (n,); above 0.5 means IDK. 0 or 1 for the kinds with a scalar."""
        return self.h(self.score(probabilities))

    def h(self, score: Tensor) -> Tensor:
        """`uncertainty` for a score that is known."""
        return torch.sigmoid(score) if self.kind == "cost" else (score > self.threshold).double()

    def predict_idk(self, probabilities: Tensor) -> Tensor:
        """bool (n,)."""
        return self.score(probabilities) > self.threshold


def _fully_connected(classes: int, hidden: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = classes
    for out in hidden:
        layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Linear(width, 1))


def confidence_loss(score: Tensor, wrong: Tensor) -> Tensor:
    """BCE(h, 1[model wrong]) per image, of the cost-oblivious twins (spec section 2.6); scores are logits."""
    return F.binary_cross_entropy_with_logits(score, wrong.expand_as(score), reduction="none")
