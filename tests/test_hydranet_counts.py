"""HydraNet's counting tables (spec hydranet sections 2.6, 2.8 and 2.9), each printed number within 0.5 %."""

import pytest
import torch
from torchvision.models import resnet18

from dataeff.dynamic.hydranet.bases import CifarDenseNet, CifarResNet, ResSep, mobilenet
from dataeff.dynamic.hydranet.model import HydraConfig, HydraNet
from dataeff.dynamic.hydranet.presets import HYDRA_PRESETS, count_cost
from dataeff.metrics.cost import count_macs, parameters

WITHIN = 0.005


def millions(value: float) -> float:
    return value / 1e6


@pytest.mark.parametrize(
    ("depth", "width", "params", "macs"),
    [(2, 0.5, 1.954, 180.3), (3, 0.5, 2.676, 289.8), (2, 0.75, 3.977, 379.1), (3, 0.75, 5.582, 620.5),
     (3, 1.0, 9.526, 1057.1)],
)  # fmt: skip
def test_ressep_has_the_published_parameters_and_multiply_adds(
    depth: int, width: float, params: float, macs: float
) -> None:
    network = ResSep(depth, width)
    assert millions(parameters(network)) == pytest.approx(params, rel=WITHIN)
    assert millions(count_macs(network, (3, 224, 224)).total) == pytest.approx(macs, rel=WITHIN)


@pytest.mark.parametrize(
    ("depth", "width", "macs"), [(2, 0.5, 84), (3, 0.5, 113), (2, 0.75, 154), (3, 0.75, 219), (3, 1.0, 364)]
)
def test_the_stride_in_the_first_unit_costs_what_the_caption_would(depth: int, width: float, macs: float) -> None:
    network = ResSep(depth, width, stride_placement="first")
    assert millions(count_macs(network, (3, 224, 224)).total) == pytest.approx(macs, rel=WITHIN)


@pytest.mark.parametrize(
    ("network", "params", "macs"),
    [(CifarResNet(d), p, m) for d, p, m in [(2, 0.178, 52), (3, 0.275, 81), (4, 0.372, 109), (5, 0.47, 137),
                                            (9, 0.858, 250), (18, 1.733, 505), (27, 2.608, 760)]]
    + [(CifarDenseNet(d), p, m) for d, p, m in [(3, 0.362, 212), (4, 0.585, 333), (6, 1.19, 655), (8, 2.005, 1084),
                                                (10, 3.032, 1619), (12, 4.271, 2260), (14, 5.721, 3008)]],
)  # fmt: skip
def test_static_cifar_networks_have_the_published_counts(network: torch.nn.Module, params: float, macs: float) -> None:
    assert millions(parameters(network)) == pytest.approx(params, rel=WITHIN)
    # The table prints multiplies and adds apart, truncated.
    assert int(2 * millions(count_macs(network, (3, 32, 32)).total)) == macs


def test_the_imagenet_reference_points_have_their_published_counts() -> None:
    assert millions(parameters(mobilenet())) == pytest.approx(4.23, rel=WITHIN)
    assert millions(count_macs(mobilenet(), (3, 224, 224)).total) == pytest.approx(569, rel=WITHIN)
    assert millions(parameters(resnet18())) == pytest.approx(11.69, rel=WITHIN)
    assert millions(count_macs(resnet18(), (3, 224, 224)).total) == pytest.approx(1814, rel=WITHIN)


def cost(name: str, convention: str = "mac", **changes: object) -> dict[str, float]:
    preset = HYDRA_PRESETS[name]
    config = HydraConfig(**{**preset.config.model_dump(), **changes})
    return count_cost(HydraNet(config, preset.num_classes), preset.input_size, convention)


@pytest.mark.parametrize(
    ("name", "params", "conditional", "total"),
    [
        ("Hydra-ResSep-A", 10.88, 192.8, 602.9),
        ("Hydra-ResSep-B", 13.29, 299.0, 786.4),
        ("Hydra-ResSep-C", 15.70, 373.5, 930.6),
        ("Hydra-ResSep-D", 19.50, 630.3, 1264.7),
        ("Hydra-ResSep-E-printed", 24.37, 964.0, 1745.5),
        ("Hydra-ResSep-E", 26.81, 1070.8, 1852.3),
    ],
)
def test_hydra_ressep_has_the_published_counts(name: str, params: float, conditional: float, total: float) -> None:
    counted = cost(name)
    assert millions(counted["params"]) == pytest.approx(params, rel=WITHIN)
    assert millions(counted["conditional"]) == pytest.approx(conditional, rel=WITHIN)
    assert millions(counted["total"]) == pytest.approx(total, rel=WITHIN)


@pytest.mark.parametrize(("n_branches", "params", "total"), [(10, 3.30, 239), (25, 6.14, 376)])
def test_fewer_branches_have_the_published_counts(n_branches: int, params: float, total: float) -> None:
    counted = cost("Hydra-ResSep-A", n_branches=n_branches)
    assert millions(counted["params"]) == pytest.approx(params, rel=WITHIN)
    assert millions(counted["total"]) == pytest.approx(total, rel=WITHIN)


def test_each_executed_branch_of_hydra_ressep_a_costs_9_million_and_k_counts_match() -> None:
    costs = HydraNet(HYDRA_PRESETS["Hydra-ResSep-A"].config, 1000).costs(224, 224)
    assert millions(costs.branch) == pytest.approx(9.1, rel=WITHIN)
    printed = {1: 156.3, 3: 174.6, 10: 238.4}
    assert {k: millions(costs.conditional(k)) for k in printed} == pytest.approx(printed, rel=WITHIN)


def test_branching_at_block_2_has_the_published_counts() -> None:
    counted = cost("Hydra-ResSep-A", branch_point="block2")
    assert millions(counted["params"]) == pytest.approx(9.67, rel=WITHIN)
    assert millions(counted["conditional"]) == pytest.approx(173.9, rel=WITHIN)
    assert millions(counted["total"]) == pytest.approx(692.0, rel=WITHIN)


@pytest.mark.parametrize(
    ("name", "params", "conditional", "total"),
    [
        ("Hydra-Res-d1", 1.285, 52.9, 166),
        ("Hydra-Res-d4", 6.015, 251.0, 817),
        ("Hydra-Res-d9", 13.900, 581.3, 1903),
        ("Hydra-Dense-d2", 2.775, 195.2, 504),
        ("Hydra-Dense-d3", 5.434, 360.2, 951),
        ("Hydra-Dense-d4", 8.979, 574.7, 1539),
        ("Hydra-Dense-d6", 18.726, 1152.0, 3135),
    ],
)
def test_hydra_cifar_networks_have_the_published_counts(
    name: str, params: float, conditional: float, total: float
) -> None:
    counted = cost(name, "mul+add")
    assert millions(counted["params"]) == pytest.approx(params, rel=1e-3)
    assert millions(counted["conditional"]) == pytest.approx(conditional, rel=WITHIN)
    assert millions(counted["total"]) == pytest.approx(total, rel=WITHIN)
    assert cost(name)["conditional"] == counted["conditional"] / 2


@pytest.mark.parametrize(
    ("depth", "printed"), [(1, 52), (2, 118), (3, 184), (4, 251), (5, 317), (6, 383), (7, 449), (9, 581)]
)
def test_table_3_3_prints_truncated_conditional_costs(depth: int, printed: int) -> None:
    assert int(millions(cost(f"Hydra-Res-d{depth}", "mul+add")["conditional"])) == printed


def test_the_small_network_for_digit_pairs_costs_what_the_spec_says() -> None:
    costs = HydraNet(HydraConfig(base="mini", depth=1, w_gate=0.5), 100, 1).costs(8, 16)
    assert (costs.stem, costs.branch, costs.gate, costs.combiner) == (123904, 6528, 2928, 4224)
    assert costs.conditional(4) == 157168


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="convention"):
        cost("Hydra-Res-d1", "flops")
