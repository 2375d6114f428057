"""FGSM, F-FGSM, PGD, BIM and uniform noise, and one entrance for all attacks.

Source: spec nas_adversarial_robustness section 2.1. AutoPGD has a module of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Protocol

import torch
from torch import Tensor, nn

from dataeff.nas.autopgd import apgd
from dataeff.nas.threat import (
    AdversarialImages,
    AttackConfig,
    AttackName,
    Space,
    check_batch,
    clip,
    frozen,
    project,
    refuse_masked,
    respond,
    uniform_noise,
)

SWEEP_EPS = (0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255)


class Attack(Protocol):
    """Images (B, C, H, W), labels int64 (B,) -> adversarial images, for each a function of (model, image, cfg, index).

    Args of a call:
        model: images in the units of `cfg.space` -> logits; for `pixel` it holds its normalisation.
        indices: int64 (B,), the images' numbers in their data set, which random starts depend on; None: 0 to B - 1.

    Raises:
        ValueError: images, labels or indices of the wrong type, shape or range.
        GradientMaskingError: there is no gradient to follow.
    """

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor | None = None
    ) -> Tensor: ...


Single = Callable[[nn.Module, Tensor, Tensor, AttackConfig, Tensor, int], Tensor]


def _restarted(single: Single) -> Attack:
    """The attack whose one run is `single`: all images once, then the ones still right from other starts."""

    @wraps(single)
    def run(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor | None = None) -> Tensor:
        indices = check_batch(x, y, cfg, indices)
        if not len(x):
            return x.clone().as_subclass(AdversarialImages)
        with frozen(model):
            moved = single(model, x, y, cfg, indices, 0)
            for restart in range(1, cfg.restarts):
                with torch.no_grad():
                    right = model(moved).argmax(1) == y
                if not bool(right.any()):
                    break
                moved[right] = single(model, x[right], y[right], cfg, indices[right.cpu()], restart)
        return moved.detach().as_subclass(AdversarialImages)

    return run


@_restarted
def fgsm(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor, restart: int) -> Tensor:
    """One step of eps along the gradient's sign (Goodfellow et al. 2015)."""
    return clip(x + cfg.eps * _first_gradient(model, x, y, cfg).sign())


@_restarted
def ffgsm(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor, restart: int) -> Tensor:
    """One step of `ffgsm_alpha` from a random start, projected (Wong et al. 2020)."""
    start = clip(x + cfg.eps * uniform_noise(cfg, "ffgsm", indices, restart, x))
    return project(start + cfg.ffgsm_alpha * _first_gradient(model, start, y, cfg).sign(), x, cfg.eps)


@_restarted
def pgd(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor, restart: int) -> Tensor:
    """`steps` projected steps of alpha, by default from a random start (Madry et al. 2018)."""
    start = clip(x + cfg.eps * uniform_noise(cfg, "pgd", indices, restart, x)) if cfg.random_start else x
    return _descend(model, start, x, y, cfg)


@_restarted
def bim(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor, restart: int) -> Tensor:
    """PGD from the image itself (Kurakin et al. 2017)."""
    return _descend(model, x, x, y, cfg)


@_restarted
def noise(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor, restart: int) -> Tensor:
    """Uniform noise of size eps, which follows no gradient: the baseline that every attack must beat."""
    return clip(x + cfg.eps * uniform_noise(cfg, "noise", indices, restart, x))


ATTACKS: Mapping[AttackName, Attack] = {
    "fgsm": fgsm,
    "ffgsm": ffgsm,
    "pgd": pgd,
    "apgd": apgd,
    "bim": bim,
    "noise": noise,
}


def attack(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor | None = None) -> Tensor:
    """The attack that `cfg` names; see `Attack`.

    Example::

        adversarial = attack(NormalizedModel(network, mean, std), images, labels, AttackConfig(name="pgd"))
    """
    return ATTACKS[cfg.name](model, x, y, cfg, indices)


def standard_attacks(
    eps: float = 8 / 255, restarts: int = 10, space: Space = "pixel", seed: int = 0
) -> dict[str, AttackConfig]:
    """The study's four attacks at one budget, alpha = eps / 4: fgsm, ffgsm (1.25 eps), pgd, apgd with `restarts`."""
    step = {"eps": eps, "alpha": eps / 4, "ffgsm_alpha": 1.25 * eps} if eps else {"eps": 0.0}
    names: tuple[AttackName, ...] = ("fgsm", "ffgsm", "pgd", "apgd")
    return {
        name: AttackConfig(name=name, restarts=restarts if name == "apgd" else 1, space=space, seed=seed, **step)
        for name in names
    }


def eps_sweep(attacks: Sequence[AttackConfig], eps: Sequence[float] = SWEEP_EPS) -> dict[str, AttackConfig]:
    """Every attack at every budget, steps in proportion, named as `pgd@4/255`.

    Raises:
        ValueError: an attack without a budget to scale.
    """
    return {f"{cfg.name}@{255 * value:g}/255": scaled(cfg, value) for cfg in attacks for value in eps}


def scaled(cfg: AttackConfig, eps: float) -> AttackConfig:
    """`cfg` at another budget, its step sizes in proportion.

    Raises:
        ValueError: `cfg` has no budget to scale.
    """
    if cfg.eps == 0 or eps <= 0:
        raise ValueError(f"cannot scale {cfg.name} from eps = {cfg.eps:g} to {eps:g}; both must be above 0")
    ratio = eps / cfg.eps
    changed = {"eps": eps, "alpha": cfg.alpha * ratio, "ffgsm_alpha": cfg.ffgsm_alpha * ratio}
    return AttackConfig(**{**cfg.model_dump(), **changed})


def _first_gradient(model: nn.Module, x: Tensor, y: Tensor, cfg: AttackConfig) -> Tensor:
    gradient = respond(model, x, y, cfg.loss).gradient
    refuse_masked(gradient)
    return gradient


def _descend(model: nn.Module, start: Tensor, x: Tensor, y: Tensor, cfg: AttackConfig) -> Tensor:
    moved = start
    for step in range(cfg.steps):
        gradient = respond(model, moved, y, cfg.loss).gradient if step else _first_gradient(model, moved, y, cfg)
        moved = project(moved + cfg.alpha * gradient.sign(), x, cfg.eps)
    return moved
