import pytest
import torch
from torch import nn

from dataeff.metrics.cost import conv_macs
from dataeff.nn.resnet import ResidualBlock, ResNet


def small(**options):
    return ResNet(20, 10, widths=(8, 16, 32), **options)


@pytest.mark.parametrize(("depth", "blocks"), [(20, 9), (38, 18), (74, 36), (110, 54), (152, 75)])
def test_a_cifar_network_of_depth_6n_plus_2_has_3n_blocks_and_as_many_weighted_layers(depth, blocks):
    net = ResNet(depth)
    assert len(net.blocks) == blocks
    on_main_path = 1 + sum(len(block.convs) for block in net.blocks) + 1
    assert on_main_path == depth


@pytest.mark.parametrize(("depth", "blocks"), [(34, 16), (50, 16), (101, 33)])
def test_imagenet_networks_have_their_published_blocks_and_layers(depth, blocks):
    with torch.device("meta"):
        net = ResNet(depth, 1000, family="imagenet")
    assert len(net.blocks) == blocks
    assert 2 + sum(len(block.convs) for block in net.blocks) == depth


@pytest.mark.parametrize("depth", [34, 50])
def test_an_imagenet_network_has_the_parameters_and_shapes_of_torchvisions(depth):
    import torchvision

    with torch.device("meta"):
        ours = ResNet(depth, 1000, family="imagenet")
        reference = torchvision.models.get_model(f"resnet{depth}")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())
    assert sorted(p.shape for p in ours.parameters()) == sorted(p.shape for p in reference.parameters())


def test_resnet34_gives_the_same_logits_as_torchvisions_with_the_same_weights():
    import torchvision

    ours = ResNet(34, 7, family="imagenet").eval()
    reference = torchvision.models.resnet34(num_classes=7).eval()
    # Both register stem, blocks (main path, then shortcut) and head in the order of execution.
    ours_by_kind, theirs_by_kind = ([m for m in net.modules() if _has_state(m)] for net in (ours, reference))
    assert len(ours_by_kind) == len(theirs_by_kind)
    for mine, other in zip(_execution_order(ours), _execution_order(reference), strict=True):
        mine.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-4)


def _has_state(module):
    return isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)


def _execution_order(net):
    order, handles = [], []
    for module in filter(_has_state, net.modules()):
        handles.append(module.register_forward_hook(lambda m, i, o: order.append(m)))
    net(torch.zeros(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize("depth", [37, 2, 8 + 1])
def test_a_depth_that_is_not_6n_plus_2_lists_the_allowed_ones(depth):
    with pytest.raises(ValueError, match="6n\\+2.*38, 74, 110, 152.*got"):
        ResNet(depth)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layer"},
        {"shortcut": "none"},
        {"family": "mnist"},
        {"widths": (8, 16)},
        {"num_classes": 0},
        {"norm": "group", "widths": (12, 16, 32)},
    ],
)
def test_a_wrong_option_is_refused_with_the_value_seen(options):
    with pytest.raises(ValueError, match="got"):
        ResNet(**{"depth": 20, "num_classes": 10, **options})


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_block_that_keeps_the_shape_has_an_identity_shortcut(kind):
    width = 8 if kind == "basic" else 2
    block = ResidualBlock(8, width, kind=kind).eval()
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block.shortcut(x), x)
    torch.testing.assert_close(block(x), torch.relu(block.residual(x) + x))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["projection", "pool_pad"])
def test_a_shape_changing_block_halves_the_size_and_its_shortcut_matches(kind, shortcut):
    block = ResidualBlock(8, 16, 2, kind, shortcut)
    x = torch.randn(2, 8, 8, 8)
    channels = 16 if kind == "basic" else 64
    assert block(x).shape == block.shortcut(x).shape == (2, channels, 4, 4)
    assert block.changes_shape


def test_pool_pad_averages_and_appends_zero_channels():
    shortcut = ResidualBlock(1, 2, 2, shortcut="pool_pad").shortcut
    x = torch.arange(16.0).view(1, 1, 4, 4)
    out = shortcut(x)
    assert torch.equal(out[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert torch.equal(out[0, 1], torch.zeros(2, 2))


def test_weights_start_with_the_spread_of_the_specification():
    net = ResNet(38)
    conv = net.blocks[-1].convs[0]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert net.head.weight.std().item() == pytest.approx((2 / (64 * 10)) ** 0.5, rel=0.15)
    assert not net.head.bias.any()


def test_group_norm_makes_an_image_independent_of_its_batch_in_training():
    torch.manual_seed(0)
    net = small(norm="group").train()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_parts_run_one_by_one_give_the_same_logits():
    net = small().eval()
    x = torch.randn(3, 3, 12, 20)
    features = net.stem(x)
    for block in net.blocks:
        features = block(features)
    assert torch.equal(net.classify(features), net(x))


@pytest.mark.parametrize("shortcut", ["projection", "pool_pad"])
def test_costs_from_the_formula_agree_with_counting_on_a_real_pass(shortcut):
    net = small(shortcut=shortcut)
    total, height, width = net.stem_macs(16, 24)
    for block in net.blocks:
        residual, projection, height, width = block.macs(height, width)
        total += residual + projection
    assert total == conv_macs(net, (3, 16, 24))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 16, 16), "got shape"),
        (torch.zeros(2, 1, 16, 16), "B x 3 x H x W"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 3, 4, 16), "at least 8"),
        (torch.zeros(2, 3, 16, 18), "multiples of 4"),
        (torch.full((2, 3, 16, 16), float("nan")), "1536 NaN or Inf"),
        (torch.full((2, 3, 16, 16), float("inf")), "NaN or Inf"),
    ],
)
def test_bad_images_are_refused_with_what_was_seen(x, message):
    with pytest.raises(ValueError, match=message):
        small().eval().check_images(x)


def test_training_refuses_an_empty_batch_and_batch_norm_a_single_image():
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="at least 2"):
        small().train().check_images(x)
    with pytest.raises(ValueError, match="empty batch"):
        small().train().check_images(x[:0])
    small(norm="group").train().check_images(x)
