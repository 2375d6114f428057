"""LCCL: the product by hand, which positions count, and sparse execution against the dense product."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.dynamic.lccl.inference import LcclInference
from dataeff.dynamic.lccl.model import Companion, LcclResNet
from dataeff.metrics.cost import conv_macs
from dataeff.nn.backbone import backbone_macs, residual_blocks
from dataeff.nn.resnet import ResNet

KINDS = pytest.mark.parametrize("kind", ["channels", "shared"])


def images(count: int = 4, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def small(kind: Any, depth: int = 20, family: Any = "cifar", widths: tuple[int, ...] = (4, 8, 16)) -> LcclResNet:
    torch.manual_seed(0)
    model = LcclResNet(ResNet(depth, 10, 3, widths, family=family), kind)
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
            nn.init.normal_(layer.bias, std=0.2, generator=generator)
    for companion in model.companions.values():
        if kind == "channels":
            nn.init.constant_(companion.norm.bias, -1.5)  # else some channel is on almost everywhere
    with torch.no_grad():  # products grow from layer to layer, unless the norms have seen them
        for block in residual_blocks(model.backbone):
            for norm in block.norms:
                nn.init.constant_(norm.weight, 0.2)
        model.train()(images(16, 128 if family == "imagenet" else 16))
    return model.eval()


@KINDS
def test_an_output_is_the_convolution_times_its_companion_and_zero_where_that_is(kind: Any) -> None:
    conv = nn.Conv2d(3, 5, 3, 2, 1, bias=False)
    companion = Companion(conv, kind).eval()
    found = companion(images())
    assert found.shape == (4, 5 if kind == "channels" else 1, 8, 8)
    assert found.min() == 0 and found.max() > 0
    torch.testing.assert_close(found, F.relu(companion.norm(companion.conv(images()))))


@KINDS
@pytest.mark.parametrize(("depth", "family", "widths"), [(20, "cifar", (4, 8, 16)), (50, "imagenet", (8, 8, 8, 8))])
def test_leaving_positions_out_equals_the_dense_product(
    kind: Any, depth: int, family: str, widths: tuple[int, ...]
) -> None:
    model, x = small(kind, depth, family, widths), images(size=16 if family == "cifar" else 128)
    with torch.no_grad():
        expected = model(x)
    found = LcclInference(model)(x)
    assert 0.02 < float(expected.executed.mean()) < 0.98
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.macs, expected.macs) and torch.equal(found.executed, expected.executed)


def test_macs_are_companions_and_the_computed_positions_and_elementwise_never_more() -> None:
    model = small("channels")
    output = model(images())
    sizes = [(16, 4), (8, 8), (4, 16)]
    every = conv_macs(model, (3, 16, 16))
    dense = backbone_macs(model.backbone, 16, 16)
    companions = every - dense
    assert 0 < companions < dense / 5
    weights = [
        (conv.weight.numel(), sizes[group][0])
        for group, block in zip(model.backbone.group_of_block, residual_blocks(model.backbone), strict=True)
        for conv in block.convs
        if isinstance(conv, nn.Conv2d)
    ]
    left_out = sum(
        (1 - share.double()) * numel * size**2 for (numel, size), share in zip(weights, output.executed.T, strict=True)
    )
    torch.testing.assert_close(output.macs, every - left_out, rtol=1e-6, atol=0)
    assert bool((output.elementwise_macs < output.macs).all())


@KINDS
def test_weights_of_convolutions_without_positions_may_be_nan(kind: Any) -> None:
    model = small(kind)
    for companion in model.companions.values():
        assert isinstance(companion, Companion)
        nn.init.constant_(companion.norm.bias, -100.0)
    expected = model(images()).logits.detach()
    for block in residual_blocks(model.backbone):
        for conv in block.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.constant_(conv.weight, float("nan"))
    found = LcclInference(model)(images())
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    assert not found.executed.any() and found.macs.tolist() == [model.always_macs(16, 16)] * 4


@KINDS
def test_every_parameter_gets_a_gradient(kind: Any) -> None:
    model = small(kind).train()
    F.cross_entropy(model(images()).logits, torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_only_3x3_convolutions_have_companions() -> None:
    assert small("channels").names[:2] == ["block 1 conv 1", "block 1 conv 2"]
    assert small("channels", 50, "imagenet", (4, 4, 8, 8)).names[:2] == ["block 1 conv 2", "block 2 conv 2"]


def test_an_empty_batch_bad_images_and_training_mode() -> None:
    model = small("shared")
    assert LcclInference(model)(images()[:0]).logits.shape == (0, 10)
    with pytest.raises(ValueError, match="NaN or Inf"):
        LcclInference(model)(images() * float("nan"))
    with pytest.raises(ValueError, match="training mode"):
        LcclInference(model.train())
