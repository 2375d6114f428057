"""The robustness study's networks: sizes, names, forms, compound scaling, families and where each is available."""

import math
from collections.abc import Callable

import pytest
import torch
import torchvision.models as published
from torch import nn

from dataeff.metrics.robustness import Member, family_scores
from dataeff.nas.efficientnet import VARIANTS, compound_scaling, efficientnet, scaled_channels, scaled_repeats
from dataeff.nas.handcrafted import densenet, resnet, vgg16_bn
from dataeff.nas.zoo import ALL, FAMILIES, MODEL_ZOO, entry, networks_for

HANDCRAFTED = ("resnet18", "resnet50", "densenet121", "densenet169", "vgg16_bn")


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Shapes and names without memory."""
    with torch.device("meta"):
        return build()


def make(name: str, *arguments: object) -> nn.Module:
    build = entry(name).build
    assert build is not None
    return build(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*HANDCRAFTED, *(f"efficientnet_{variant}" for variant in VARIANTS)])
def test_the_224_form_has_exactly_the_published_number_of_parameters(name: str) -> None:
    model = on_meta(lambda: make(name, 1000, 3, "imagenet", 1, 1))
    assert count(model) == published.get_model_weights(name).DEFAULT.meta["num_params"]
    assert count(model) / 1e6 == pytest.approx(entry(name).params, abs=0.0051)
    norm = next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    assert norm.eps == (1e-3 if name[-2:] in ("b5", "b6", "b7") else 1e-5)


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet50", "densenet169", "efficientnet_b1"])
def test_the_224_form_has_torchvisions_names_and_shapes(name: str) -> None:
    models = (on_meta(lambda: make(name, 1000, 3, "imagenet", 1, 1)), on_meta(lambda: getattr(published, name)()))
    own, other = ({key: value.shape for key, value in model.state_dict().items()} for model in models)
    assert own == other


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "efficientnet_b0"])
def test_with_torchvisions_weights_the_answers_are_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    other = getattr(published, name)(num_classes=7).eval()
    own = make(name, 7, 3, "imagenet", 1, 1).eval()
    own.load_state_dict(other.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(own(x), other(x), rtol=1e-4, atol=1e-5)


# From the layers' shapes: those of 224x224 with 1,000 classes, the first convolution and the head exchanged.
STEM, HEAD = 3 * 64 * (49 - 9), 990
CIFAR_COUNTS = {
    "resnet18": 11_689_512 - STEM - 513 * HEAD,
    "resnet50": 25_557_032 - STEM - 2049 * HEAD,
    "densenet121": 7_978_856 - STEM - 1025 * HEAD,
    "densenet169": 14_149_480 - STEM - 1665 * HEAD,
    "vgg16_bn": 138_365_992 - 512 * 48 * 4096 - 4097 * HEAD,
}


@pytest.mark.parametrize("name", HANDCRAFTED)
def test_the_cifar_form_differs_in_the_first_convolution_and_the_head_only(name: str) -> None:
    assert count(on_meta(lambda: make(name, 10, 3, "cifar", 1, 1))) == CIFAR_COUNTS[name]


def test_the_cifar_form_of_resnet18_has_the_well_known_size() -> None:
    assert CIFAR_COUNTS["resnet18"] == 11_173_962


@pytest.mark.parametrize("name", [*HANDCRAFTED, "efficientnet_b0", "efficientnet_b7", "resnet18_b4"])
@pytest.mark.parametrize("side", [8, 32])
def test_every_cifar_form_takes_small_grey_images_and_keeps_their_first_resolution(name: str, side: int) -> None:
    model = make(name, 5, 1, "cifar", 0.125, 0.34).eval()
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert first(torch.zeros(1, 1, side, side)).shape[2:] == (side, side)
    assert model(torch.zeros(2, 1, side, side)).shape == (2, 5)


def test_the_cifar_form_keeps_the_max_pool_and_vgg_the_whole_head() -> None:
    model = resnet(18, 10, 3, "cifar")
    assert model.maxpool.kernel_size == 3 and model.maxpool.stride == 2 and model.conv1.stride == (1, 1)
    head = on_meta(lambda: vgg16_bn(10, 3, "cifar"))
    sizes = [(layer.in_features, layer.out_features) for layer in head.modules() if isinstance(layer, nn.Linear)]
    assert sizes == [(512, 4096), (4096, 4096), (4096, 10)]


@pytest.mark.parametrize("build", [lambda: resnet(18, 10, 3, "cifar"), lambda: densenet(121, 10, 3, "cifar")])
def test_convolutions_of_the_cifar_form_are_drawn_by_kaimings_fan_out_rule(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    for layer in build().modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 20_000:
            deviation = math.sqrt(2 / (layer.out_channels * math.prod(layer.kernel_size)))
            assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg16_bn", "efficientnet_b0"])
def test_width_and_depth_make_a_network_smaller(name: str) -> None:
    sizes = [count(make(name, 10, 3, "cifar", *size)) for size in ((0.125, 0.34), (0.25, 0.34), (0.25, 1))]
    assert sizes == sorted(set(sizes)) and sizes[-1] < 2_500_000


# --- compound scaling -------------------------------------------------------------------------------------------------


def test_compound_scaling_doubles_the_cost_with_every_step_of_the_coefficient() -> None:
    assert compound_scaling(0) == (1, 1, 1)
    width, depth, resolution = compound_scaling(1)
    assert (width, depth, resolution) == (1.1, 1.2, 1.15)
    assert depth * width**2 * resolution**2 == pytest.approx(2, abs=0.1)
    twice = compound_scaling(2)
    assert twice == pytest.approx((width**2, depth**2, resolution**2))
    with pytest.raises(ValueError, match="-1: must be at least 0"):
        compound_scaling(-1)


def test_channels_go_to_multiples_of_8_and_never_below_nine_tenths_and_repeats_are_rounded_up() -> None:
    for channels in (16, 24, 40, 80, 112, 192, 320, 32):
        for width in (0.35, 1.0, 1.1, 1.2, 1.4, 2.0):
            scaled = scaled_channels(channels, width)
            assert scaled % 8 == 0 and scaled >= 0.9 * width * channels
    assert scaled_channels(24, 1.1) == 24 and scaled_channels(40, 1.1) == 48
    assert [scaled_repeats(3, depth) for depth in (1, 1.1, 3.1, 0.3)] == [3, 4, 10, 1]


def test_efficientnets_drop_more_the_larger_they_are_and_deeper_blocks_most_often() -> None:
    def rates(model: nn.Module) -> list[float]:
        return [layer.p for layer in model.modules() if type(layer).__name__ == "StochasticDepth"]

    small, large = (on_meta(lambda name=name: efficientnet(name, 10, 3)) for name in ("b0", "b7"))  # type: ignore[misc]
    assert (small.classifier[0].p, large.classifier[0].p) == (0.2, 0.5)  # type: ignore[index, union-attr]
    assert rates(small) == sorted(rates(small)) and 0.15 < rates(small)[-1] < 0.2


# --- the zoo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ALL)
def test_every_data_set_has_five_hand_crafted_networks_and_at_least_four_nas_networks(data: str) -> None:
    assert networks_for(data, "hand-crafted") == list(HANDCRAFTED)  # type: ignore[arg-type]
    assert len(networks_for(data, "NAS")) >= 4  # type: ignore[arg-type]


def test_networks_are_available_where_the_study_has_them() -> None:
    assert entry("nsga_net").data == ("cifar10", "cifar100", "flowers102")
    assert entry("proxylessnas").data == ("cifar10", "imagenet")
    assert all(found.data == ("imagenet",) for name, found in MODEL_ZOO.items() if name.startswith("densenas"))
    assert "efficientnet_b0" in networks_for("imagenet") and "efficientnet_b0" not in networks_for("cifar10")
    with pytest.raises(ValueError, match="unknown network 'resnet19'.*did you mean 'resnet18'"):
        entry("resnet19")


def test_families_have_the_published_members_from_small_to_large_and_the_smallest_is_the_baseline() -> None:
    published_families = list(FAMILIES)[:5]
    assert sum(len(FAMILIES[name]) for name in published_families) == 19
    for name in published_families:
        sizes = {member: entry(member).params or 0.0 for member in FAMILIES[name]}
        assert list(sizes.values()) == sorted(sizes.values())
        scores = family_scores({member: Member(size, 10.0) for member, size in sizes.items()})
        assert scores.baseline == FAMILIES[name][0]
        assert scores.pp_hrs[scores.baseline] == pytest.approx(10.0)


def test_the_compound_scaled_resnet_grows_with_the_rule() -> None:
    names = FAMILIES["ResNet-18, compound-scaled"]
    sizes = [count(on_meta(lambda name=name: make(name, 10, 3, "cifar", 1, 1))) for name in names]  # type: ignore[misc]
    assert sizes == sorted(sizes) and sizes[0] == CIFAR_COUNTS["resnet18"] and sizes[-1] > 10 * sizes[0]
