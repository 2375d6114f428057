"""Dynamic networks against static ones of equal multiply-adds: the common comparison of the family `dynamic`.

Every dynamic network is trained first; then its static base with as many channels as spend, for every image, what the
dynamic network spends on average over the test images, the costs of gates and routers included. Both see the same
mini-batches. Sources: spec skipnet section 6 (claims S3, S11), deepmoe section 6 (D1, D3), hydranet section 6.
"""

from collections.abc import Callable
from typing import Any

from dataeff.core.config import merge, read_yaml
from dataeff.data import open_splits
from dataeff.dynamic.deepmoe.network import build_network
from dataeff.dynamic.skipnet.model import build_skipnet
from ray_jobs.claims import Check, Claim, Result, Results, Run, data_at
from ray_jobs.cli import CONFIGS

Settings = dict[str, Any]
# What makes a static network of the settings, its widths times a factor; its multiply-adds for an image (C, H, W).
Narrowed = Callable[[Settings, float], Settings]
Cost = Callable[[Settings, tuple[int, int, int], int], float]
TOLERANCE = 0.005


def claims(scale: str, data: str | None) -> list[Claim]:
    """The table's rows at a scale.

    Args:
        data: data set in place of the digits, such as "parquet:DIR?labels=10000" of CIFAR-10; needed at scale "gpu".

    Raises:
        ValueError: scale "gpu" without data.
    """
    data = data_at(scale, data, "digits")
    settings: dict[str, Settings] = read_yaml(CONFIGS / "dynamic" / f"{scale}.yaml")
    narrow = merge(settings["deepmoe"], {"width": 1})
    return [
        _claim(
            "skipnet",
            "SkipNet (SP + HRL)",
            "SkipNet-110 halves the multiply-adds at 93.3 % against 93.6 % (CIFAR-10)",
            Run("skipnet", data, settings["skipnet"], method="skipnet"),
            _narrow_resnet,
            _resnet_macs,
        ),
        _claim(
            "deepmoe_wide",
            "Wide DeepMoE",
            "wide-DeepMoE-56: 6.0 % error against 6.6 % of ResNet-56 at about equal multiply-adds (CIFAR-10)",
            Run("deepmoe_wide", data, settings["deepmoe"], method="deepmoe"),
            _narrow_moe,
            _moe_macs,
        ),
        _claim(
            "deepmoe_narrow",
            "Narrow DeepMoE",
            "26.2 % top-1 error at 1.6e9 multiply-adds against 29.0 % at 1.7e9 (ThiNet, ImageNet)",
            Run("deepmoe_narrow", data, narrow, method="deepmoe"),
            _narrow_moe,
            _moe_macs,
        ),
        _hydranet(data, settings["hydranet"]),
    ]


def _claim(key: str, name: str, published: str, dynamic: Run, narrowed: Narrowed, cost: Cost) -> Claim:
    """`dynamic` against its base, as wide as equal multiply-adds allow."""

    def fill(results: Results) -> Settings:
        return equal_cost(dict(dynamic.settings), dynamic.data, macs(results[dynamic.name]), narrowed, cost)

    static = Run(f"{key}_static", dynamic.data, dynamic.settings, (dynamic,), fill, dynamic.method)
    return _comparison(key, name, published, dynamic, static)


def _hydranet(data: str, settings: Settings) -> Claim:
    dynamic = Run("hydranet", data, settings, method="hydranet")
    # The experiment's own arm finds the branch width of equal cost.
    static = Run("hydranet_static", data, merge(settings, {"arm": "static"}), method="hydranet")
    published = "Hydra-Res-d2: 71.2 % at 118e6 against 68.0 % at 137e6 of ResNet-32 (CIFAR-100)"
    return _comparison("hydranet", "HydraNet", published, dynamic, static)


def _comparison(key: str, name: str, published: str, dynamic: Run, static: Run) -> Claim:
    def measure(results: Results) -> dict[str, float]:
        ours, theirs = results[dynamic.name], results[static.name]
        return {
            "more_accurate": accuracy(ours) - accuracy(theirs),
            "accuracy": accuracy(ours),
            "static_accuracy": accuracy(theirs),
            "macs": macs(ours),
            "static_macs": macs(theirs),
            "reduction": ours.metrics["test_reduction"],
        }

    return Claim(
        key,
        f"{name} is at least as accurate as its static base at equal multiply-adds (within {100 * TOLERANCE:g} points)",
        published,
        (dynamic, static),
        measure,
        (Check("more_accurate", at_least=-TOLERANCE),),
    )


def accuracy(result: Result) -> float:
    return result.metrics["test_accuracy"]


def macs(result: Result) -> float:
    """Mean multiply-adds of a test image, with everything that decides what is executed."""
    return result.metrics["test_macs"]


def equal_cost(settings: Settings, data: str, target: float, narrowed: Narrowed, cost: Cost) -> Settings:
    """Settings of the narrowest static network that spends at least `target` multiply-adds on an image of `data`.

    All stages are scaled together, in steps of one channel of the widest: the static network has the advantage of the
    remainder.
    """
    splits = open_splits(data)
    shape, classes = splits.image_shape, len(splits.classes)
    steps = max(settings["widths"])
    channels = 1
    while cost(merge(settings, narrowed(settings, channels / steps)), shape, classes) < target:
        channels += 1
    return narrowed(settings, channels / steps)


def _narrow_resnet(settings: Settings, factor: float) -> Settings:
    both = settings["stage1"]["iterations"] + settings["stage2"]["iterations"]
    widths = [max(1, round(factor * width)) for width in settings["widths"]]
    return {"arm": "base", "gate": "none", "widths": widths, "stage1": {"iterations": both}}


def _resnet_macs(settings: Settings, shape: tuple[int, int, int], classes: int) -> float:
    widths = tuple(settings["widths"])
    network = build_skipnet(settings["depth"], classes, "none", in_channels=shape[0], widths=widths)
    costs = network.costs(shape[1], shape[2])
    return float(costs.minimum + costs.blocks.sum())


def _narrow_moe(settings: Settings, factor: float) -> Settings:
    both = settings["joint"]["iterations"] + settings["finetune"]["iterations"]
    return {"arm": "static", "width": factor, "joint": {"iterations": both}}


def _moe_macs(settings: Settings, shape: tuple[int, int, int], classes: int) -> float:
    network = build_network(settings["arch"], classes, shape[0], settings["width"], widths=tuple(settings["widths"]))
    return network.full_macs(shape[1], shape[2])
