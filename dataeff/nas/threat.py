"""The threat model of the robustness study: what an attack may do, where it lives, and how it sees the network.

White-box, untargeted, L-infinity, normally trained networks in evaluation mode. Source: spec
nas_adversarial_robustness sections 2.1, 2.2, 7 and 10.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dataeff.core.config import Config
from dataeff.data import ImageSource
from dataeff.data.decode import centre_crop
from dataeff.data.transforms import uniform_draws

AttackName = Literal["fgsm", "ffgsm", "pgd", "apgd", "bim", "noise"]
Space = Literal["pixel", "model_input"]
LossName = Literal["ce", "dlr"]

# Keeps the draws of different attacks apart; 0 is augmentation's.
STREAMS: dict[AttackName, int] = {"ffgsm": 101, "pgd": 102, "apgd": 103, "noise": 104}


class AttackConfig(Config):
    """One attack and its budget. Defaults: spec section 4 (eps 8/255, alpha 2/255, 10 steps).

    Example::

        AttackConfig(name="apgd", restarts=10)
    """

    name: AttackName = Field(description="fgsm, ffgsm (random start), pgd, apgd (AutoPGD), bim, or uniform noise")
    eps: float = Field(8 / 255, ge=0, description="largest change of a value, in units of `space`")
    alpha: float = Field(2 / 255, gt=0, description="step of pgd and bim")
    steps: int = Field(10, ge=1, le=100_000, description="iterations of pgd, bim and apgd")
    restarts: int = Field(1, ge=1, le=10_000, description="random starts; a further one only for images still right")
    random_start: bool = Field(True, description="of pgd; false is bim")
    ffgsm_alpha: float = Field(10 / 255, gt=0, description="step of ffgsm; the source lists 2/255, its library 10/255")
    rho: float = Field(0.75, gt=0, le=1, description="apgd halves its step below this share of increasing losses")
    loss: LossName = Field("ce", description="ce: cross-entropy; dlr: difference of logits ratio")
    dlr_fallback: bool = Field(False, description="apgd uses dlr for images whose cross-entropy has no gradient")
    space: Space = Field(
        "pixel",
        description="pixel: images in [0, 1], normalisation inside the network; model_input: eps and the clamp to "
        "[0, 1] in normalised units, as in the public code of the study",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of the random starts")

    @model_validator(mode="after")
    def _consistent(self) -> "AttackConfig":
        if self.restarts > 1 and not self.draws:
            raise ValueError(
                f"restarts = {self.restarts}: {self.name} without a random start does the same each time; use 1"
            )
        if self.dlr_fallback and (self.name != "apgd" or self.loss != "ce"):
            raise ValueError(f"dlr_fallback is for apgd with loss ce, not {self.name} with loss {self.loss}")
        if self.name in ("pgd", "bim") and self.steps * self.alpha < self.eps:
            warnings.warn(
                f"{self.name}: {self.steps} steps of {self.alpha:g} cannot reach the boundary of the ball, "
                f"eps = {self.eps:g}; raise alpha or steps",
                stacklevel=2,
            )
        return self

    @property
    def draws(self) -> bool:
        """The attack starts at random."""
        return self.name in STREAMS and (self.name != "pgd" or self.random_start)


class GradientMaskingError(RuntimeError):
    """The gradient that an attack follows is missing, zero or not finite, so that its accuracy would say nothing.

    Attributes:
        zero_fraction: share of the images whose gradient is all zero.
    """

    def __init__(self, problem: str, zero_fraction: float) -> None:
        super().__init__(f"{problem} ({zero_fraction:.1%} of the images have a zero gradient)")
        self.zero_fraction = zero_fraction


class AdversarialTrainingError(RuntimeError):
    """Adversarial images met weights that learn. The study trains without them (spec sections 3 and 7)."""


class AdversarialImages(Tensor):
    """What an attack returns. Whatever is computed from it stays one, and it refuses to meet weights that learn.

    Evaluation (`torch.no_grad`) and gradients for the images alone, with frozen weights, are allowed.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_grad_enabled():
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if any(not isinstance(tensor, cls) and tensor.requires_grad for tensor in tensors):
                raise AdversarialTrainingError(
                    "adversarial images reached weights that learn; the study trains on clean images only: evaluate "
                    "under torch.no_grad(), or freeze the weights"
                )
        return super().__torch_function__(func, types, args, kwargs or {})


class NormalizedModel(nn.Module):
    """A network that takes normalised images, as one that takes pixels: the attack of space `pixel` goes through it.

    Args:
        model: normalised images (B, C, H, W) -> logits (B, K).
        mean, std: of each channel, on the scale 0..1.

    Raises:
        ValueError: mean and std of different lengths, or a std that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean) or min(std) <= 0:
            raise ValueError(f"mean {list(mean)} and std {list(std)} need one value a channel, std above 0")
        self.model = model
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def normalize(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> the network's input."""
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: Tensor = self.model(self.normalize(x))
        return logits


def read_pixels(
    images: ImageSource, rows: Tensor, size: tuple[int, int] | None, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """What is attacked: pixels float (B, C, H, W) in [0, 1], and labels int64 (B,).

    Args:
        rows: int64 (B,), numbers of the images.
        size: (height, width) cut from the images' centres; None: as they are.
    """
    pixels = images.images(rows)
    if size is not None:
        pixels = centre_crop(pixels, size)
    return pixels.to(device).float() / 255, torch.from_numpy(images.labels[rows.numpy()]).to(device)


# --- what an attack does to images ------------------------------------------------------------------------------------


def clip(x: Tensor) -> Tensor:
    """Into [0, 1], whatever the units."""
    return x.clamp(0, 1)


def project(moved: Tensor, x: Tensor, eps: float) -> Tensor:
    """`moved` brought into the ball of radius `eps` around `x`, then into [0, 1]."""
    return clip(x + (moved - x).clamp(-eps, eps))


def uniform_noise(cfg: AttackConfig, name: AttackName, indices: Tensor, restart: int, x: Tensor) -> Tensor:
    """Uniform numbers in [-1, 1) like `x`: a function of (seed, attack, image index, restart) and nothing else."""
    numbers = uniform_draws(cfg.seed, restart, indices.numpy(), x[0].numel(), STREAMS[name])
    return torch.from_numpy(2 * numbers - 1).to(x).view_as(x)


# --- what an attack sees of the network -------------------------------------------------------------------------------


class Response(NamedTuple):
    """loss (B,), gradient of each image's loss by the image (B, C, H, W), logits (B, K); all detached."""

    loss: Tensor
    gradient: Tensor
    logits: Tensor


def respond(model: nn.Module, x: Tensor, y: Tensor, loss: LossName) -> Response:
    """Loss and gradient at `x`. Losses are summed, not averaged, so that the batch's size does not enter.

    Raises:
        GradientMaskingError: the logits do not depend on the input differentiably, or the gradient is not finite.
        ValueError: labels outside the network's classes.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        check_labels(logits, y)
        losses = LOSSES[loss](logits.float(), y)
        gradient = torch.autograd.grad(losses.sum(), x, allow_unused=True)[0] if losses.requires_grad else None
    if gradient is None:
        raise GradientMaskingError("the logits carry no gradient to the input: a detached or quantised operation", 1.0)
    finite = torch.isfinite(gradient).flatten(1).all(1)
    if not bool(finite.all()):
        raise GradientMaskingError(
            f"the gradient is not finite for {int((~finite).sum())} of {len(x)} images", zero_fraction(gradient)
        )
    return Response(losses.detach(), gradient, logits.detach())


def is_flat(gradient: Tensor) -> Tensor:
    """Whether the gradient of an image is zero everywhere: (B, ...) -> bool (B,)."""
    return (gradient == 0).flatten(1).all(1)


def zero_fraction(gradient: Tensor) -> float:
    """Share of the images whose gradient (B, ...) is zero everywhere."""
    return float(is_flat(gradient).double().mean())


def refuse_masked(gradient: Tensor) -> None:
    """
    Raises:
        GradientMaskingError: no image of the batch has a gradient to follow.
    """
    if zero_fraction(gradient) == 1:
        raise GradientMaskingError("every gradient is zero: a saturated softmax or a step function", 1.0)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Of each image, nats: (B, K), (B,) -> (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def logits_ratio(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, -(z_y - max_{j != y} z_j) / (z_1 - z_3) with z sorted downwards: (B, K) -> (B,).

    Invariant to the logits' scale, so that a saturated softmax does not hide it (Croce & Hein 2020, eq. 6).

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"loss dlr needs at least 3 classes, the network has {logits.shape[1]}; use loss ce")
    top, order = logits.topk(3, dim=1)
    rival = torch.where(order[:, 0] == y, top[:, 1], top[:, 0])
    own = logits.gather(1, y[:, None])[:, 0]
    return -(own - rival) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[LossName, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "dlr": logits_ratio}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for weights; afterwards everything is as it was.

    A network in training mode is met with a warning: its batch statistics would change, and its dropout hide it.
    """
    modes = {module: module.training for module in model.modules()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(modes.values()):
        warnings.warn("the network is in training mode: attacked in evaluation mode, then put back", stacklevel=3)
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in learning:
            parameter.requires_grad_(True)


# --- user input -------------------------------------------------------------------------------------------------------


def check_batch(x: Tensor, y: Tensor, cfg: AttackConfig, indices: Tensor | None) -> Tensor:
    """The images' numbers in their data set (by default 0 to B - 1), after a look at everything.

    Raises:
        ValueError: images of another type or, in space `pixel`, outside [0, 1]; labels of another type or number.
    """
    space_hint = 'images in other units need space="model_input"'
    if not x.is_floating_point() or x.ndim != 4:
        raise ValueError(f"images must be float (B, C, H, W) in [0, 1], got {describe(x)}; {space_hint}")
    if cfg.space == "pixel" and x.numel() and not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"images must lie in [0, 1] in pixel space, got {describe(x)}; {space_hint}")
    if y.dtype != torch.int64 or y.shape != (len(x),):
        raise ValueError(f"labels must be int64 ({len(x)},), got {y.dtype} {tuple(y.shape)}")
    if indices is None:
        return torch.arange(len(x))
    if indices.dtype != torch.int64 or indices.shape != (len(x),):
        raise ValueError(f"indices must be int64 ({len(x)},), got {indices.dtype} {tuple(indices.shape)}")
    return indices.cpu()


def check_labels(logits: Tensor, y: Tensor) -> None:
    """
    Raises:
        ValueError: labels outside 0 to K - 1.
    """
    low, high = (int(y.min()), int(y.max())) if len(y) else (0, 0)
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"labels must be 0 to {logits.shape[1] - 1}, the network's classes; got {low} to {high}")


def describe(x: Tensor) -> str:
    """Type, shape and range, for messages."""
    values = f" from {x.min().item():g} to {x.max().item():g}" if x.numel() else ""
    return f"{x.dtype} {tuple(x.shape)}{values}"
