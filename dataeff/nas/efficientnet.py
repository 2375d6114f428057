"""EfficientNet B0 to B7: one network scaled in width and depth, with torchvision's layers and names.

Source: spec nas_adversarial_robustness section 2.4 (from "EfficientNet: Rethinking Model Scaling for CNNs").
"""

from functools import partial
from typing import Literal, NamedTuple

from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConvConfig

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15  # depth, width, resolution; alpha * beta^2 * gamma^2 is about 2

# Expansion, kernel, stride, input and output channels, repeats, of B0.
STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)


class Variant(NamedTuple):
    """Factors of width and depth, and the dropout before the head."""

    width: float
    depth: float
    dropout: float


VARIANTS = {
    "b0": Variant(1.0, 1.0, 0.2),
    "b1": Variant(1.0, 1.1, 0.2),
    "b2": Variant(1.1, 1.2, 0.3),
    "b3": Variant(1.2, 1.4, 0.3),
    "b4": Variant(1.4, 1.8, 0.4),
    "b5": Variant(1.6, 2.2, 0.4),
    "b6": Variant(1.8, 2.6, 0.5),
    "b7": Variant(2.0, 3.1, 0.5),
}


def compound_scaling(phi: float) -> tuple[float, float, float]:
    """Factors (width, depth, resolution) of the compound coefficient `phi`, at least 0: about 2^phi times the cost.

    Raises:
        ValueError: a negative coefficient.
    """
    if phi < 0:
        raise ValueError(
            f"compound coefficient {phi}: must be at least 0; the network of coefficient 0 is the smallest"
        )
    return BETA**phi, ALPHA**phi, GAMMA**phi


def scaled_channels(channels: int, width: float) -> int:
    """`width` times `channels`, to the nearest multiple of 8 and never below 90 % of it."""
    scaled: int = MBConvConfig.adjust_channels(channels, width)
    return scaled


def scaled_repeats(repeats: int, depth: float) -> int:
    """`depth` times `repeats`, rounded up."""
    scaled: int = MBConvConfig.adjust_depth(repeats, depth)
    return scaled


def efficientnet(
    variant: str,
    num_classes: int,
    in_channels: int,
    form: Literal["cifar", "imagenet"] = "imagenet",
    width: float = 1,
    depth: float = 1,
) -> EfficientNet:
    """A variant, its factors multiplied by `width` and `depth`. The CIFAR form has stride 1 in the stem.

    Raises:
        KeyError: a variant that is not of `VARIANTS`.
    """
    scaling = VARIANTS[variant]
    make = partial(MBConvConfig, width_mult=scaling.width * width, depth_mult=scaling.depth * depth)
    late = variant in ("b5", "b6", "b7")  # their published norms differ
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01) if late else nn.BatchNorm2d
    model = EfficientNet([make(*stage) for stage in STAGES], scaling.dropout, 0.2, num_classes, norm)
    stem = model.features[0]
    assert isinstance(stem, nn.Sequential)
    channels = scaled_channels(STAGES[0][3], scaling.width * width)
    first = nn.Conv2d(in_channels, channels, 3, 1 if form == "cifar" else 2, 1, bias=False)
    nn.init.kaiming_normal_(first.weight, mode="fan_out")
    stem[0] = first
    return model
