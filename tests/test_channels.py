"""Convolutions on some of their channels equal the dense ones with the other channels set to zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.channels import ChannelConv, add_channels_, padded, take_conv, take_linear, take_norm


def layers(inputs: int = 10, outputs: int = 20, kernel: int = 3, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    norm = nn.BatchNorm2d(outputs).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    return conv, norm


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("batch", [1, 5])
def test_selected_channels_equal_the_masked_dense_convolution(kernel: int, stride: int, batch: int) -> None:
    conv, norm = layers(kernel=kernel, stride=stride)
    inputs, outputs = torch.tensor([0, 3, 4, 9]), torch.tensor([1, 2, 7, 11, 19])
    x = torch.randn(batch, 10, 9, 9)
    masked = torch.zeros_like(x)
    masked[:, inputs] = x[:, inputs]
    compact = channels_last(F.pad(x[:, inputs], (0, 0, 0, 0, 0, 16 - 4)))
    with torch.inference_mode():
        dense = norm(conv(masked))[:, outputs]
        run = ChannelConv(conv, norm).select(inputs, outputs, 16, 16)
        result = run(compact, relu=True)
        scale = torch.rand(batch, 16, 1, 1)
        scaled = run.relu_scale(compact, scale)
    assert result.shape[1] == 16 and not result[:, 5:].any()
    torch.testing.assert_close(result[:, :5], dense.relu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled[:, :5], dense.relu() * scale[:, :5], rtol=1e-5, atol=1e-5)


def test_weights_of_unselected_channels_may_be_nan() -> None:
    conv, norm = layers()
    inputs, outputs = torch.tensor([0, 3]), torch.tensor([1, 2, 7])
    x = channels_last(torch.randn(2, 16, 6, 6))
    expected = ChannelConv(conv, norm).select(inputs, outputs, 16, 16)(x, relu=False)
    with torch.no_grad():
        keep = torch.zeros_like(conv.weight, dtype=torch.bool)
        keep[outputs[:, None], inputs] = True
        conv.weight[~keep] = torch.nan
        assert norm.running_mean is not None
        norm.running_mean[0] = torch.nan
    assert torch.equal(ChannelConv(conv, norm).select(inputs, outputs, 16, 16)(x, relu=False), expected)


def test_a_convolution_without_inputs_is_its_bias_and_without_outputs_has_no_channels() -> None:
    conv, norm = layers(stride=2)
    channels, none = ChannelConv(conv, norm), torch.empty(0, dtype=torch.int64)
    expected = norm(conv(torch.zeros(3, 10, 7, 7)))
    torch.testing.assert_close(channels.select(none, None)(torch.empty(3, 0, 7, 7), relu=False), expected)
    assert channels.select(None, none)(torch.zeros(3, 10, 7, 7), relu=True).shape == (3, 0, 4, 4)


def test_channels_are_computed_sixteen_at_a_time() -> None:
    assert [padded(count) for count in (0, 1, 16, 17, 40, 90)] == [0, 16, 16, 32, 48, 96]


def test_adding_channels_leaves_the_others_alone() -> None:
    into = channels_last(torch.randn(2, 6, 3, 3))
    before, x = into.clone(), torch.randn(2, 16, 3, 3)
    add_channels_(into, torch.tensor([1, 4]), channels_last(x))
    before[:, [1, 4]] += x[:, :2]
    assert torch.equal(into, before)


def test_taken_layers_make_the_network_that_remains_when_channels_are_cut() -> None:
    conv, norm = layers()
    following, _ = layers(20, 6)
    linear = nn.Linear(6, 3)
    keep, last = [0, 2, 13], [1, 5]
    x = torch.randn(2, 10, 8, 8)
    mask = torch.zeros(20).index_fill(0, torch.tensor(keep), 1).view(1, -1, 1, 1)
    hidden = following(norm(conv(x)).relu() * mask).mean((2, 3))
    cut = torch.zeros(6).index_fill(0, torch.tensor(last), 1)
    smaller = take_conv(following, inputs=keep, outputs=last)(
        take_norm(norm, keep)(take_conv(conv, outputs=keep)(x)).relu()
    )
    torch.testing.assert_close(take_linear(linear, last)(smaller.mean((2, 3))), linear(hidden * cut))
    assert take_conv(conv, outputs=keep).out_channels == 3 and take_norm(norm, keep).num_features == 3


@pytest.mark.parametrize("channels", [[-1], [20], [3, 3], [4, 2]])
def test_channel_numbers_must_ascend_within_the_layer(channels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ascending numbers in \[0, 20\)"):
        take_conv(layers()[0], outputs=channels)


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="groups 1, got 2"):
        take_conv(nn.Conv2d(4, 4, 3, groups=2), outputs=[0])
