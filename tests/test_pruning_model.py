"""Masked networks, their smaller dense form, costs, and the pass that prunes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.dynamic.pruning.criteria import keep_largest, l1_scores
from dataeff.dynamic.pruning.model import PrunableResNet, shrink
from dataeff.dynamic.pruning.prune import prune_channels
from dataeff.metrics.cost import conv_macs, parameters
from dataeff.nn.backbone import backbone_macs, residual_blocks
from dataeff.nn.fold import FoldedResNet
from dataeff.nn.resnet import ResNet

CIFAR: dict[str, Any] = {"depth": 20, "widths": (8, 16, 32)}
IMAGENET: dict[str, Any] = {"depth": 50, "widths": (8, 8, 8, 8), "family": "imagenet"}
NETWORKS = pytest.mark.parametrize("options", [CIFAR, {**CIFAR, "shortcut": "pool_pad"}, IMAGENET])
CHANNEL_CRITERIA = ("l1", "entropy", "lasso", "thinet")


def images(count: int = 8, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def small(options: dict[str, Any] = CIFAR, structure: Any = "channels", scaled: bool = False) -> PrunableResNet:
    torch.manual_seed(0)
    model = PrunableResNet(ResNet(num_classes=10, **options), structure, scaled)
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
            nn.init.normal_(layer.bias, std=0.2, generator=generator)
    with torch.no_grad():
        model.train()(images(16, 64 if "family" in options else 16))
    return model.eval()


def prune_half(model: PrunableResNet) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, size in model.sizes.items():
        model.keep(name, torch.randperm(size, generator=generator)[: (size + 1) // 2].sort().values)


def fill_removed_with_nan(model: PrunableResNet) -> None:
    """Every weight that only a removed channel has."""
    for name in model.sizes:
        number, position = (int(part) for part in name.split("_"))
        block = residual_blocks(model.backbone)[number]
        gone = model.mask(name) == 0
        before, norm, after = block.convs[position], block.norms[position], block.convs[position + 1]
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
        with torch.no_grad():
            before.weight[gone] = float("nan")
            after.weight[:, gone] = float("nan")
            norm.weight[gone] = norm.running_mean[gone] = float("nan")


@NETWORKS
def test_the_smaller_network_equals_the_masked_one_and_needs_no_removed_weight(options: dict[str, Any]) -> None:
    model, x = small(options), images(size=64 if "family" in options else 16)
    prune_half(model)
    expected = model(x).detach()
    fill_removed_with_nan(model)
    network = shrink(model)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(FoldedResNet(network)(x), expected, rtol=1e-4, atol=1e-4)
    assert parameters(network) < 0.8 * parameters(model.backbone)


@NETWORKS
def test_macs_are_those_of_the_smaller_network(options: dict[str, Any]) -> None:
    model, size = small(options), 64 if "family" in options else 16
    assert model.macs(size, size) == backbone_macs(model.backbone, size, size)
    prune_half(model)
    counted = conv_macs(shrink(model), (3, size, size))
    assert model.macs(size, size) == pytest.approx(counted, rel=1e-12)
    assert counted == backbone_macs(shrink(model), size, size)


@pytest.mark.parametrize("structure", ["channels", "blocks"])
def test_factors_of_any_sign_are_multiplied_into_the_smaller_network(structure: Any) -> None:
    model = small(structure=structure, scaled=True)
    generator = torch.Generator().manual_seed(5)
    for name, factor in model.factors.items():
        nn.init.normal_(factor, generator=generator)
        if structure == "blocks" and int(name) % 2:
            model.keep(name, torch.zeros(0, dtype=torch.int64))
    if structure == "channels":
        prune_half(model)
    network = shrink(model)
    torch.testing.assert_close(network(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert conv_macs(network, (3, 16, 16)) == pytest.approx(model.macs(16, 16), rel=1e-12)
    if structure == "blocks":
        assert len(network.blocks) == len(network.group_of_block) < 9


@pytest.mark.parametrize("reduction", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("options", [CIFAR, {**IMAGENET, "widths": (16, 16, 16, 16)}])
def test_the_kept_channels_give_the_reduction_that_is_asked_for(options: dict[str, Any], reduction: float) -> None:
    model, size = small(options), 64 if "family" in options else 16
    counts = model.counts_for(reduction, size, size)
    found = 1 - model.macs(size, size, counts) / backbone_macs(model.backbone, size, size)
    assert reduction - 1e-9 <= found < reduction + 0.13  # widths of 8 channels: coarse steps
    assert reduction > 0 or counts == model.sizes


def test_a_reduction_beyond_the_inner_channels_names_the_most_that_goes() -> None:
    with pytest.raises(ValueError, match=r"reduction = 0.99 is not reachable: .* at most 0\.\d+"):
        small().counts_for(0.99, 16, 16)


def test_removed_channels_get_no_gradient_and_all_others_do() -> None:
    model = small().train()
    prune_half(model)
    F.cross_entropy(model(images()), torch.arange(8)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    gradient = residual_blocks(model.backbone)[0].convs[0].weight.grad
    assert gradient is not None
    gone = model.mask("0_0") == 0
    assert not gradient[gone].any() and gradient[~gone].flatten(1).any(1).all()


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
@pytest.mark.parametrize("options", [CIFAR, IMAGENET])
def test_every_criterion_keeps_the_counts_and_the_same_channels_again(criterion: Any, options: dict[str, Any]) -> None:
    size = 64 if "family" in options else 16
    masks = []
    for _ in range(2):
        model = small(options)
        counts = model.counts_for(0.4, size, size)
        prune_channels(model, criterion, counts, images(16, size), positions=6)
        assert {name: int(model.mask(name).sum()) for name in counts} == counts
        assert torch.isfinite(model(images(size=size))).all()
        masks.append(torch.cat([model.mask(name) for name in counts]))
    assert torch.equal(*masks)


def test_l1_pruning_keeps_the_filters_of_largest_norm_and_changes_no_weight() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    counts = model.counts_for(0.4, 16, 16)
    prune_channels(model, "l1", counts, images())
    for name, count in counts.items():
        number, position = (int(part) for part in name.split("_"))
        weight = residual_blocks(model.backbone)[number].convs[position].weight
        assert torch.equal(model.kept(name), keep_largest(l1_scores(weight), count))
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


def test_lasso_reconstruction_stays_closer_to_the_trained_network_than_l1() -> None:
    errors = {}
    criteria: tuple[Any, ...] = ("lasso", "l1")
    for name in criteria:
        model = small()
        x = images(64)
        expected = model(x).detach()
        prune_channels(model, name, model.counts_for(0.4, 16, 16), x, positions=20)
        errors[name] = float((model(x).detach() - expected).square().mean())
    assert errors["lasso"] < 0.7 * errors["l1"]


def test_without_removal_reconstruction_changes_nothing() -> None:
    for criterion in ("lasso", "thinet"):
        model = small()
        expected = model(images(32)).detach()
        prune_channels(model, criterion, model.sizes, images(32), positions=40)  # type: ignore[arg-type]
        torch.testing.assert_close(model(images(32)), expected, rtol=1e-2, atol=1e-2)
