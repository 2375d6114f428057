"""The study's networks by name: how each is built, which data sets it is published for, and its family.

Source: spec nas_adversarial_robustness sections 2.3, 2.4, 3 and 5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from dataeff.core.config import nearest
from dataeff.nas.efficientnet import VARIANTS, efficientnet
from dataeff.nas.handcrafted import Form, densenet, resnet, vgg16_bn

Group = Literal["hand-crafted", "NAS", "scaled", "random cells"]
DataSet = Literal["cifar10", "cifar100", "imagenet", "flowers102"]
ALL: tuple[DataSet, ...] = ("cifar10", "cifar100", "imagenet", "flowers102")
CIFAR_CELLS: tuple[DataSet, ...] = ("cifar10", "cifar100", "flowers102")

# Classes, channels, form, factors of width and depth -> network.
Builder = Callable[[int, int, Form, float, float], nn.Module]


@dataclass(frozen=True)
class Entry:
    """One network.

    Args:
        group: what it is compared as; `scaled` and `random cells` are outside of the comparison of the other two.
        data: where the study has it.
        params: published, millions, with 1,000 classes at 224x224 or, of cells, with 10 classes at 32x32.
        build: None for networks that are made of cells, or that must be searched for.
        genotype: cells by their published name.
        arm: the search of `nas_search` that finds such a network.
    """

    group: Group
    data: tuple[DataSet, ...]
    params: float | None = None
    build: Builder | None = None
    genotype: str | None = None
    arm: str | None = None


def _scaled_resnet18(
    variant: str, num_classes: int, in_channels: int, form: Form, width: float, depth: float
) -> nn.Module:
    scaling = VARIANTS[variant]
    return resnet(18, num_classes, in_channels, form, scaling.width * width, scaling.depth * depth)


_EFFICIENTNET_PARAMS = (5.29, 7.79, 9.11, 12.23, 19.34, 30.39, 43.04, 66.35)
_DENSENAS_PARAMS = {"a": 4.77, "b": 5.58, "c": 6.13, "large": 6.48, "r1": 11.09, "r2": 19.47, "r3": 24.66}

MODEL_ZOO: dict[str, Entry] = {
    "resnet18": Entry("hand-crafted", ALL, 11.69, partial(resnet, 18)),
    "resnet50": Entry("hand-crafted", ALL, 25.56, partial(resnet, 50)),
    "densenet121": Entry("hand-crafted", ALL, 7.98, partial(densenet, 121)),
    "densenet169": Entry("hand-crafted", ALL, 14.15, partial(densenet, 169)),
    "vgg16_bn": Entry("hand-crafted", ALL, 138.37, vgg16_bn),
    "darts": Entry("NAS", ALL, 3.35, genotype="darts_v2"),
    "p_darts": Entry("NAS", ALL, 3.43, genotype="p_darts"),
    "pc_darts": Entry("NAS", CIFAR_CELLS, 3.63, genotype="pc_darts"),
    "pc_darts_imagenet": Entry("NAS", ("imagenet",), 5.3, genotype="pc_darts_imagenet"),
    "nsga_net": Entry("NAS", CIFAR_CELLS, genotype="nsga_net"),
    "proxylessnas": Entry("NAS", ("cifar10", "imagenet"), arm="proxyless"),
    **{
        f"densenas_{name}": Entry("NAS", ("imagenet",), params, arm="densenas")
        for name, params in _DENSENAS_PARAMS.items()
    },
    **{
        f"efficientnet_{name}": Entry("scaled", ("imagenet",), params, partial(efficientnet, name))
        for name, params in zip(VARIANTS, _EFFICIENTNET_PARAMS, strict=True)
    },
    # The spec's added arm: does the scaling rule help a network that was not searched?
    **{f"resnet18_{name}": Entry("scaled", (), None, partial(_scaled_resnet18, name)) for name in list(VARIANTS)[1:]},
    "random": Entry("random cells", ("cifar10",), 2.73),
    "ensemble": Entry("random cells", ("cifar10",), 2.74),
}

# Members from small to large; the first is the baseline of PP-HRS.
FAMILIES: dict[str, tuple[str, ...]] = {
    "EfficientNet": tuple(f"efficientnet_{name}" for name in VARIANTS),
    "DenseNAS (MobileNetV2 space)": ("densenas_a", "densenas_b", "densenas_c", "densenas_large"),
    "DenseNAS (ResNet space)": ("densenas_r1", "densenas_r2", "densenas_r3"),
    "ResNet": ("resnet18", "resnet50"),
    "DenseNet": ("densenet121", "densenet169"),
    "ResNet-18, compound-scaled": ("resnet18", *(f"resnet18_{name}" for name in list(VARIANTS)[1:])),
}


def entry(name: str) -> Entry:
    """A network's entry.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in MODEL_ZOO:
        raise ValueError(f"unknown network {name!r} ({nearest(name, MODEL_ZOO)})")
    return MODEL_ZOO[name]


def networks_for(data: DataSet, group: Group | None = None) -> list[str]:
    """Names of the networks that the study has for a data set."""
    return [name for name, found in MODEL_ZOO.items() if data in found.data and group in (None, found.group)]
