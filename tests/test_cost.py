import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dataeff.dynamic.skipnet.model import build_skipnet
from dataeff.metrics.cost import conv_macs, count_macs, parameters
from dataeff.nn.resnet import ResNet


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (ResNet(20, 10, widths=(8, 16, 32)), (3, 16, 16)),
        (ResNet(38, 10), (3, 32, 32)),
        (ResNet(50, 10, family="imagenet", widths=(8, 8, 16, 16)), (3, 64, 96)),
        (build_skipnet(20, 10, "ffgate1", widths=(8, 16, 32)), (3, 16, 16)),
    ],
)
def test_the_count_is_exactly_half_of_torchs_flop_counter(net, shape):
    net.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *shape))
    assert count_macs(net, shape).total == counter.get_total_flops() / 2


def test_a_convolution_costs_what_its_definition_says():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    assert conv_macs(conv, (4, 8, 8)) == 4 * 4 * 6 * (9 * 4 / 2)
    up = nn.ConvTranspose2d(4, 6, 2, stride=2)
    assert conv_macs(up, (4, 8, 8)) == 8 * 8 * 4 * 6 * 4


def test_a_layer_called_twice_counts_twice_and_an_uncalled_one_not():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(self.used(x))

    count = count_macs(Twice(), (3,))
    assert count.by_module == {"used": 18.0}
    assert (count.conv, count.linear, count.total) == (0, 18, 18)


def test_counting_leaves_mode_statistics_and_hooks_as_they_were():
    net = ResNet(20, 10, widths=(8, 16, 32)).train()
    net.blocks[0].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    conv_macs(net, (3, 16, 16))
    assert net.training and not net.blocks[0].training and not net.blocks[0].convs[0].training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_parameters_count_trainable_scalars_once():
    shared = nn.Linear(3, 2)
    assert parameters(nn.Sequential(shared, shared)) == 8
    shared.bias.requires_grad_(False)
    assert parameters(shared) == 6


@pytest.mark.parametrize(("depth", "published"), [(38, 0.83e8), (74, 1.68e8), (110, 2.53e8), (152, 3.5e8)])
def test_full_networks_cost_what_the_specification_computed(depth, published):
    assert build_skipnet(depth).costs(32, 32).full == pytest.approx(published, rel=0.01)
