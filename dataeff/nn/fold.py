"""Networks rebuilt for inference: BatchNorm folded into the convolutions, ReLU and residual sum fused.

The rebuilt parts copy the weights: build them again after the network was trained further.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.resnet import ResidualBlock, ResNet

MANY = 64  # images that weights for batches are packed for
# Multiply-adds up to which a convolution is faster without fusion: the fused operator takes 50 us more before it starts
# (PyTorch 2.14).
SMALL_MACS = 4e6


class InferenceConv(Protocol):
    """A convolution with its normalisation, and the ReLU that follows."""

    def __call__(self, x: Tensor, relu: bool) -> Tensor:
        """Features (B, C, H, W) -> a new tensor (B, C', H', W')."""

    def relu_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        """ReLU(conv(x)) * scale, a new tensor; `scale` (B, C', 1, 1) is not negative."""

    def add_relu_(self, x: Tensor, into: Tensor) -> None:
        """into = ReLU(conv(x) + into), in place; `into` is channels-last."""


def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals `norm(conv(x))` in evaluation mode.

    weight' = weight * s, bias' = (bias - mean) * s + shift with s = scale / sqrt(var + eps), computed in float64.

    Raises:
        ValueError: for a norm without running statistics, because its result depends on the batch.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("BatchNorm without running statistics cannot be folded (track_running_stats=False)")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale = scale * norm.weight.double()
        shift = norm.bias.double()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    dtype = conv.weight.dtype
    return weight.to(dtype).detach(), ((bias - norm.running_mean.double()) * scale + shift).to(dtype).detach()


def fold_conv(conv: nn.Conv2d, norm: nn.Module) -> InferenceConv:
    """The fastest available form of a convolution and its norm (BatchNorm folded, GroupNorm kept)."""
    if not isinstance(norm, nn.BatchNorm2d):
        return _PlainConv(conv, conv.weight.detach().clone(), None, norm)
    return inference_conv(conv, *fold_batch_norm(conv, norm))


def inference_conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> InferenceConv:
    """The fastest available form of a convolution of `conv`'s stride, padding, dilation and groups with these weights,
    which may have other channel counts than `conv`."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):
        return _OneDnnConv(conv, weight, bias)
    return _PlainConv(conv, weight, bias, None)


class _OneDnnConv:
    """oneDNN's convolution with fused ReLU and sum: the operators torch.compile uses, without a compiler.

    A small convolution uses PyTorch's public operators instead, see `SMALL_MACS`.
    """

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor):
        self.unfused = _PlainConv(conv, weight, bias, None)
        outputs = SMALL_MACS / weight.numel() if conv.groups == 1 else 0  # places, of all images
        self.small = outputs * math.prod(self.unfused.stride) * weight.shape[1]  # numbers in the input
        padding, stride, dilation = (list(map(int, value)) for value in (conv.padding, conv.stride, conv.dilation))
        self.geometry = (padding, stride, dilation, conv.groups)
        self.packed: dict[bool, Tensor] = {}
        self.bias = bias
        self.run = torch.ops.mkldnn._convolution_pointwise.default
        self.run_binary = torch.ops.mkldnn._convolution_pointwise.binary
        self.run_add_ = torch.ops.mkldnn._convolution_pointwise_.binary

    def weight(self, x: Tensor) -> Tensor:
        """The weights, packed once: packing is a third of the time of a convolution on one small image.

        For the size of the first input, and for one image or many: without a size, or for the other kind, oneDNN
        chooses layouts that are up to 30 times slower for some numbers of channels (such as 48 or 384 on small maps).
        """
        single = len(x) == 1
        packed = self.packed.get(single)
        if packed is None:
            size = [1 if single else MANY, *x.shape[1:]]
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.unfused.weight, *self.geometry, size)
            self.packed[single] = packed
        return packed

    def __call__(self, x: Tensor, relu: bool) -> Tensor:
        if x.numel() <= self.small:
            return self.unfused(x, relu)
        attribute = "relu" if relu else "none"
        result: Tensor = self.run(x, self.weight(x), self.bias, *self.geometry, attribute, [], "")
        return result

    def relu_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        if x.numel() <= self.small:
            return self.unfused.relu_scale(x, scale)
        # ReLU(z) * s = ReLU(z * s), since s is not negative.
        result: Tensor = self.run_binary(
            x, scale, self.weight(x), self.bias, *self.geometry, "mul", None, "relu", [], ""
        )
        return result

    def add_relu_(self, x: Tensor, into: Tensor) -> None:
        if x.numel() <= self.small:
            self.unfused.add_relu_(x, into)
            return
        self.run_add_(into, x, self.weight(x), self.bias, *self.geometry, "add", 1.0, "relu", [], "")


class _PlainConv:
    """Any device and type: the operators of PyTorch, with a norm that could not be folded."""

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, norm: nn.Module | None):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias, self.norm = bias, norm
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def __call__(self, x: Tensor, relu: bool) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x.relu_() if relu else x

    def relu_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        return self(x, relu=True).mul_(scale)

    def add_relu_(self, x: Tensor, into: Tensor) -> None:
        into.add_(self(x, relu=False)).relu_()


class FoldedBlock:
    """A `ResidualBlock` for inference."""

    def __init__(self, block: ResidualBlock):
        self.changes_shape = block.changes_shape
        convs = [fold_conv(conv, norm) for conv, norm in _pairs(block.convs, block.norms)]
        self.first_convs, self.last_conv = convs[:-1], convs[-1]
        self.projection: InferenceConv | None = None
        self.parameter_free = block.shortcut
        if isinstance(block.shortcut, nn.Sequential):
            ((conv, norm),) = _pairs(block.shortcut[:1], block.shortcut[1:])
            self.projection = fold_conv(conv, norm)

    def shortcut(self, x: Tensor) -> Tensor:
        """Projection or pooled and padded features; `x` itself where the shape stays."""
        if self.projection is not None:
            return self.projection(x, relu=False)
        shortcut: Tensor = self.parameter_free(x)
        return shortcut

    def execute_(self, x: Tensor, shortcut: Tensor) -> None:
        """shortcut = ReLU(residual(x) + shortcut), in place, channels-last. Both may be the same tensor."""
        for conv in self.first_convs:
            x = conv(x, True)
        self.last_conv.add_relu_(x, shortcut)


class FoldedResNet:
    """A `ResNet` for inference; gives what `ResNet` gives in evaluation mode, within rounding.

    Args:
        network: in evaluation mode; its weights are copied.

    Raises:
        ValueError: for a network in training mode.

    Example:
        logits = FoldedResNet(network.eval())(images)
    """

    def __init__(self, network: ResNet):
        if network.training:
            raise ValueError("the network is in training mode: call eval() before building its inference form")
        self.check_images = network.check_images
        ((conv, norm),) = _pairs(network.stem[:1], network.stem[1:2])
        self.stem_conv = fold_conv(conv, norm)
        self.stem_pool = network.stem[3] if len(network.stem) > 3 else None
        self.blocks = [FoldedBlock(block) for block in network.blocks if isinstance(block, ResidualBlock)]
        head = network.head
        self.head_weight, self.head_bias = head.weight.detach().clone(), head.bias.detach().clone()

    def stem(self, x: Tensor) -> Tensor:
        """Checked images (B, C, H, W) -> features, channels-last."""
        x = x.to(self.head_weight.dtype)
        x = self.stem_conv(x.contiguous(memory_format=torch.channels_last), True)
        return channels_last(x if self.stem_pool is None else self.stem_pool(x))

    def run_block(self, block: FoldedBlock, x: Tensor) -> Tensor:
        """Features of a block that every image executes; overwrites `x` where the shape stays."""
        shortcut = channels_last(block.shortcut(x)) if block.changes_shape else x
        block.execute_(x, shortcut)
        return shortcut

    def classify(self, x: Tensor) -> Tensor:
        """Features of the last block -> logits (B, K)."""
        return F.linear(x.mean((2, 3)), self.head_weight, self.head_bias)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Images float (B, C, H, W) -> logits (B, K); errors as for `ResNet.check_images`."""
        self.check_images(x)
        x = self.stem(x)
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.classify(x)


def channels_last(x: Tensor) -> Tensor:
    """`x` with the strides of channels-last memory, unambiguous also where a dimension is 1; a copy only if needed."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _pairs(convs: nn.Module, norms: nn.Module) -> list[tuple[nn.Conv2d, nn.Module]]:
    pairs = []
    for conv, norm in zip(convs.children(), norms.children(), strict=True):
        assert isinstance(conv, nn.Conv2d)
        pairs.append((conv, norm))
    return pairs
