"""The published HydraNets, and their cost (spec hydranet sections 2.9, 4 and 6)."""

from dataclasses import dataclass

from dataeff.dynamic.hydranet.model import HydraConfig, HydraNet
from dataeff.metrics.cost import parameters

CONVENTIONS = {"mac": 1, "mul+add": 2}


@dataclass(frozen=True)
class Preset:
    """A published network: its settings, classes, and (height, width) of its images."""

    config: HydraConfig
    num_classes: int
    input_size: tuple[int, int]


def _imagenet(depth: int, w_stem: float, w_gate: float) -> Preset:
    config = HydraConfig(
        base="ressep",
        depth=depth,
        n_branches=50,
        k=5,
        w_stem=w_stem,
        w_branch=0.125,
        w_gate=w_gate,
        gate_head="classes",
    )
    return Preset(config, 1000, (224, 224))


# Table 3.4 prints w_g = 0.5 for E; its counts fit 0.75 only.
HYDRA_PRESETS: dict[str, Preset] = {
    "Hydra-ResSep-A": _imagenet(2, 0.5, 0.125),
    "Hydra-ResSep-B": _imagenet(3, 0.5, 0.25),
    "Hydra-ResSep-C": _imagenet(2, 0.75, 0.25),
    "Hydra-ResSep-D": _imagenet(3, 0.75, 0.5),
    "Hydra-ResSep-E": _imagenet(3, 1.0, 0.75),
    "Hydra-ResSep-E-printed": _imagenet(3, 1.0, 0.5),
    **{
        f"Hydra-Res-d{depth}": Preset(HydraConfig(base="resnet", depth=depth, gate_head="classes"), 100, (32, 32))
        for depth in (1, 2, 3, 4, 5, 6, 7, 9)
    },
    **{
        f"Hydra-Dense-d{depth}": Preset(HydraConfig(base="densenet", depth=depth, gate_head="classes"), 100, (32, 32))
        for depth in (2, 3, 4, 6)
    },
}


def count_cost(model: HydraNet, input_size: tuple[int, int], convention: str = "mac") -> dict[str, float]:
    """Parameters, and multiply-adds of one image by part; `conditional` with the model's k, `total` with all branches.

    Args:
        input_size: (height, width).
        convention: "mac", a multiply-add is one (the ImageNet tables); "mul+add", it is two (Table 3.3).

    Raises:
        ValueError: another convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be 'mac' or 'mul+add', got {convention!r}")
    costs = model.costs(*input_size)
    parts = {
        "conditional": costs.conditional(model.config.k),
        "total": costs.total,
        "stem": costs.stem,
        "gate": costs.gate,
        "branch": costs.branch,
        "combiner": costs.combiner,
    }
    return {"params": parameters(model), **{name: CONVENTIONS[convention] * macs for name, macs in parts.items()}}
