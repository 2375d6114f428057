"""Convolutions on some of their channels: physically smaller layers, and folded ones for inference.

`take_conv`, `take_norm` and `take_linear` make the layers of a smaller network (static pruning). `ChannelConv` runs a
convolution for one image, or for a group of images with one pattern, on the active input and output channels only
(spec deepmoe section 2.6).
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dataeff.nn.fold import InferenceConv, fold_batch_norm, inference_conv

LANES = 16

Channels = Sequence[int] | NDArray[np.int64] | Tensor


def channel_index(channels: Channels, count: int) -> Tensor:
    """Ascending int64 channel numbers.

    Raises:
        ValueError: a number outside [0, count), or numbers that do not ascend.
    """
    index = torch.as_tensor(channels, dtype=torch.int64).reshape(-1)
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= count or not bool((index.diff() > 0).all())):
        raise ValueError(f"channels must be ascending numbers in [0, {count}), got {index.tolist()[:8]}")
    return index


def take_conv(conv: nn.Conv2d, inputs: Channels | None = None, outputs: Channels | None = None) -> nn.Conv2d:
    """A new convolution with the weights of some channels; None keeps all. Not for grouped convolutions.

    Example:
        smaller = take_conv(conv, outputs=[0, 3, 5])
        following = take_conv(next_conv, inputs=[0, 3, 5])
    """
    if conv.groups != 1:
        raise ValueError(f"channels can be taken from convolutions with groups 1, got {conv.groups}")
    taken = copy.deepcopy(conv)
    weight, bias = conv.weight.detach(), conv.bias
    if outputs is not None:
        rows = channel_index(outputs, conv.out_channels).to(weight.device)
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.detach().index_select(0, rows)
    if inputs is not None:
        weight = weight.index_select(1, channel_index(inputs, conv.in_channels).to(weight.device))
    taken.out_channels, taken.in_channels = weight.shape[:2]
    taken.weight = nn.Parameter(weight.clone(), conv.weight.requires_grad)
    if bias is not None:
        taken.bias = nn.Parameter(bias.detach().clone(), conv.weight.requires_grad)
    return taken


def take_norm(norm: nn.BatchNorm2d, channels: Channels) -> nn.BatchNorm2d:
    """A new BatchNorm with parameters and statistics of some channels."""
    taken = copy.deepcopy(norm)
    index = channel_index(channels, norm.num_features)
    taken.num_features = len(index)
    for name, parameter in norm.named_parameters(recurse=False):
        chosen = parameter.detach().index_select(0, index.to(parameter.device)).clone()
        setattr(taken, name, nn.Parameter(chosen, parameter.requires_grad))
    for name in ("running_mean", "running_var"):
        buffer = getattr(norm, name)
        if buffer is not None:
            setattr(taken, name, buffer.index_select(0, index.to(buffer.device)).clone())
    return taken


def take_linear(linear: nn.Linear, inputs: Channels) -> nn.Linear:
    """A new linear layer that reads some of the features."""
    taken = copy.deepcopy(linear)
    weight = linear.weight.detach()
    index = channel_index(inputs, linear.in_features).to(weight.device)
    taken.in_features = len(index)
    taken.weight = nn.Parameter(weight.index_select(1, index).clone(), linear.weight.requires_grad)
    return taken


def padded(count: int) -> int:
    """Channels that a convolution should compute so that `count` are there: oneDNN's kernels compute 16 at a time."""
    return -(-count // LANES) * LANES


class ChannelConv:
    """A convolution with folded BatchNorm, ready to be cut to any pattern of channels. The weights are copied.

    Args:
        conv: without groups.
        norm: in evaluation mode, with running statistics.

    Example:
        convolution = ChannelConv(conv, norm)
        run = convolution.select(active_inputs, active_outputs)  # once a pattern; keep it
        y = run(x, relu=True)
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        if conv.groups != 1:
            raise ValueError(f"channels can be selected in convolutions with groups 1, got {conv.groups}")
        self.conv = conv
        self.weight, self.bias = fold_batch_norm(conv, norm)
        self.all_channels = inference_conv(conv, self.weight, self.bias)

    def select(
        self, inputs: Tensor | None, outputs: Tensor | None, columns: int | None = None, rows: int | None = None
    ) -> InferenceConv:
        """The convolution on some channels (ascending int64 numbers; None: all of them).

        Args:
            columns, rows: channels that it reads and gives, those behind the selected ones with zero weights (see
                `padded`); None for just the selected ones. Weights of unselected channels are not read.
        """
        if inputs is None and outputs is None:
            return self.all_channels
        weight, bias = self.weight, self.bias
        if outputs is not None:
            weight, bias = weight[outputs], bias[outputs]
        if inputs is not None:
            weight = weight[:, inputs]
        rows, columns = rows if rows is not None else len(weight), columns if columns is not None else weight.shape[1]
        if (rows, columns) != weight.shape[:2]:
            whole = weight.new_zeros(rows, columns, *weight.shape[2:])
            whole[: weight.shape[0], : weight.shape[1]] = weight
            weight, bias = whole, torch.cat([bias, bias.new_zeros(rows - len(bias))])
        if rows == 0 or columns == 0:
            return _WithoutChannels(self.conv, bias)
        return inference_conv(self.conv, weight, bias)


class _WithoutChannels:
    """What is left of a convolution without inputs or without outputs: the bias."""

    def __init__(self, conv: nn.Conv2d, bias: Tensor):
        self.bias = bias
        self.geometry = [(int(k), int(s), int(p), int(d)) for k, s, p, d in _sides(conv)]

    def __call__(self, x: Tensor, relu: bool) -> Tensor:
        size = [
            (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for extent, (kernel, stride, padding, dilation) in zip(x.shape[2:], self.geometry, strict=True)
        ]
        bias = self.bias.relu() if relu else self.bias
        result = bias.view(1, 1, 1, -1).expand(len(x), *size, -1).contiguous()
        return result.permute(0, 3, 1, 2)

    def relu_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        return self(x, relu=True).mul_(scale)

    def add_relu_(self, x: Tensor, into: Tensor) -> None:
        into.add_(self(x, False)).relu_()


def _sides(conv: nn.Conv2d) -> list[tuple[int, ...]]:
    assert not isinstance(conv.padding, str)
    return list(zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True))


def add_channels_(into: Tensor, channels: Tensor, x: Tensor) -> None:
    """into[:, channels] += x, in place; `into` is channels-last, `x` may have padding behind its channels."""
    if not len(channels):
        return
    rows = into.permute(0, 2, 3, 1).reshape(-1, into.shape[1])  # a view: both are channels-last
    # Along the columns of a matrix: twice as fast as along the second of four dimensions.
    rows.index_add_(1, channels, x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])[:, : len(channels)])
