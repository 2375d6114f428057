"""A trained network as something to attack, which serving sees of the methods `robustness` and `nas_train`.

Source: spec ss_pcp_darts section 9, spec nas_adversarial_robustness section 9.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from dataeff.core.artifact import Card
from dataeff.core.config import parse_config
from dataeff.data import Preprocess
from dataeff.nas.analysis import structure
from dataeff.nas.architecture import Architecture, Chain
from dataeff.nas.attacks import attack
from dataeff.nas.fgsm_curve import EPS_GRID, fgsm_probability_curve
from dataeff.nas.genotype import Pair, structure_stats
from dataeff.nas.random_cells import RandomCellEnsemble
from dataeff.nas.threat import AttackConfig, GradientMaskingError, NormalizedModel


class AttackableNetwork:
    """A differentiable network with frozen weights. One thread at a time: attacks switch its modules.

    Images are float (B, C, H, W) in [0, 1] of the card's `input_shape`, without normalisation; all answers are on the
    CPU.

    Args:
        network: normalised images -> logits (B, K); moved to `device`.
        architectures: its cells, of an ensemble one pair for each member, or its chain; empty: it has none.

    Attributes:
        model: images -> logits, in evaluation mode.
        eps_grid: default budgets of `fgsm_curve`.
    """

    eps_grid: Sequence[float] = EPS_GRID

    def __init__(
        self, card: Card, network: nn.Module, architectures: Sequence[Architecture], device: str = "cpu"
    ) -> None:
        preprocess = Preprocess.from_dict(card.preprocess)
        self.card, self.device = card, torch.device(device)
        model = NormalizedModel(network, preprocess.mean, preprocess.std)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._members = list(network.members) if isinstance(network, RandomCellEnsemble) else []
        self._architectures = architectures
        channels = preprocess.channels
        unscaled = {"mean": (0.0,) * channels, "std": (1 / 255,) * channels}  # leaves the values 0 to 255
        self._cut = preprocess.model_copy(update=unscaled)

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Images of any size to those that the network takes.

        Raises:
            ValueError: an image that cannot be decoded.
        """
        return self._cut.from_pil(images) / 255

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Of the classes: (B, K)."""
        logits: Tensor = self.model(x.to(self.device))
        return logits.float().softmax(1).cpu()

    @torch.no_grad()
    def member_probabilities(self, x: Tensor) -> list[Tensor]:
        """What each member of an ensemble says alone, (B, K) each; empty for other networks."""
        normalised = self.model.normalize(x.to(self.device))
        return [member(normalised).float().softmax(1).cpu() for member in self._members]

    def attack(
        self, x: Tensor, y: Tensor, name: str, eps: float, steps: int, alpha: float | None = None, **settings: Any
    ) -> Tensor:
        """Adversarial images (B, C, H, W).

        Args:
            y: true classes, int64 (B,).
            name, eps, steps, settings: see `AttackConfig`.
            alpha: step of ffgsm, pgd and bim; None: eps / 4 as in the study, or more where so few steps would not reach
                eps, and 1.25 eps for ffgsm.

        Raises:
            ValueError: bad settings, images or labels, steps of `alpha` that cannot reach eps, or no gradient.
        """
        if alpha is not None and name in ("pgd", "bim") and steps * alpha < eps:
            raise ValueError(f"alpha = {alpha:g}: {steps} steps cannot reach eps = {eps:g}; raise alpha or steps")
        # Divided by a power of two, at most `steps`, so that no rounding keeps the steps from eps; where that is 0, any
        # step will do.
        step = alpha or eps / min(4, 1 << (steps.bit_length() - 1)) or AttackConfig(name="pgd").alpha
        values = {"name": name, "eps": eps, "steps": steps, "alpha": step, "ffgsm_alpha": alpha or 1.25 * eps or step}
        cfg = parse_config(AttackConfig, values | settings, "attack")
        with _one_error():
            return attack(self.model, x.to(self.device), y.to(self.device), cfg).as_subclass(Tensor).cpu()

    def fgsm_curve(self, x: Tensor, y: Tensor, eps_grid: Sequence[float]) -> Mapping[str, Tensor]:
        """`fgsm_probability_curve` of this network.

        Raises:
            ValueError: bad images, labels or budgets, or no gradient to follow.
        """
        with _one_error():
            curve = fgsm_probability_curve(self.model, x.to(self.device), y.to(self.device), eps_grid)
        return {name: values.cpu() for name, values in curve.items()}

    def architectures(self) -> list[dict[str, Any]]:
        """Plain values of each member: cells with their edges and `structure_stats`, or a chain's blocks."""
        return [_plain(architecture) for architecture in self._architectures]


@contextmanager
def _one_error() -> Iterator[None]:
    try:
        yield
    except GradientMaskingError as error:
        raise ValueError(f"no gradient to follow: {error}") from error


def _plain(architecture: Architecture) -> dict[str, Any]:
    if isinstance(architecture, Chain):
        return {"stem": architecture.stem, **structure(architecture)}
    return {
        "normal": _cell(architecture.normal, architecture.normal_concat),
        "reduce": _cell(architecture.reduce, architecture.reduce_concat),
    }


def _cell(pairs: Sequence[Pair], concat: Sequence[int]) -> dict[str, Any]:
    edges = [
        {"from": source, "to": 2 + position // 2, "operation": operation}
        for position, (operation, source) in enumerate(pairs)
    ]
    return {"edges": edges, "concat": list(concat), "stats": structure_stats(pairs)}
