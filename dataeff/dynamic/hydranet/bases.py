"""The static base networks, as a first block and stages that a HydraNet can take apart.

ResSep (spec hydranet section 2.6), the CIFAR ResNet and DenseNet (section 2.8), and the small network for two-digit
images (section 8.1). A HydraNet keeps the first stages as its stem and replicates the others.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dataeff.dynamic.hydranet.blocks import (
    Bare,
    BasicUnit,
    Block,
    ConvBlock,
    DenseLayer,
    Folded,
    NormRelu,
    Pool,
    SepConv,
    SepUnit,
    Stack,
    Transition,
)
from dataeff.nn.branches import Fold
from dataeff.nn.fold import channels_last

BaseName = Literal["resnet", "densenet", "ressep", "mini"]
StridePlacement = Literal["last", "first"]
Init = Literal["he", "uniform"]
SMALLEST_GROUP = 4  # channels of a branch that grouped convolutions still run well with


class Base(Protocol):
    """A base network at some depth.

    Attributes:
        stages: how many follow the first block.
        stride: of the whole network; an image must have at least this height and width.
        pools_last: the classifier pools; branches put out feature maps rather than vectors.
        last_channels: filters of the last stage at width 1.
    """

    stages: int
    stride: tuple[int, int]
    pools_last: bool
    last_channels: int

    def first(self, in_channels: int, width: float) -> Block:
        """The block that reads the image."""

    def stage(self, index: int, in_channels: int, width: float, branches: int = 1, shared: bool = False) -> list[Block]:
        """Stage `index` from 0, filters scaled by `width`, in each of `branches` branches."""

    def finish(self, channels: int, branches: int = 1) -> list[Block]:
        """What turns the last stage's maps into features."""

    def feature_size(self, width: float) -> int:
        """Channels of the features that the classifier reads."""


def scaled(channels: int, width: float, branches: int = 1) -> int:
    """`channels * width` rounded, at least 1.

    Raises:
        ValueError: below 4 channels in each of several branches.
    """
    found = max(1, round(channels * width))
    if branches > 1 and found < SMALLEST_GROUP:
        raise ValueError(
            f"w_branch = {width:g} leaves {found} channels of {channels} in a branch; "
            f"grouped convolutions need at least {SMALLEST_GROUP}: use a larger w_branch"
        )
    return found


class ResNetBase:
    """Three stages of `depth` basic units with 16, 32, 64 channels; depth 6d+2, parameter-free shortcuts."""

    stages, stride, pools_last, last_channels = 3, (4, 4), False, 64

    def __init__(self, depth: int):
        self.depth = depth

    def first(self, in_channels: int, width: float) -> Block:
        return ConvBlock(in_channels, scaled(16, width))

    def stage(self, index: int, in_channels: int, width: float, branches: int = 1, shared: bool = False) -> list[Block]:
        channels, stride = scaled(16 * 2**index, width, branches), 2 if index else 1
        first = BasicUnit(in_channels, channels, stride, branches=branches, shared=shared)
        return [first, *(BasicUnit(channels, channels, branches=branches) for _ in range(self.depth - 1))]

    def finish(self, channels: int, branches: int = 1) -> list[Block]:
        return [Pool(channels)]

    def feature_size(self, width: float) -> int:
        return scaled(64, width)


class DenseNetBase:
    """Three blocks of `depth` layers with growth 24 after 48 channels; no bottleneck, no compression. The transition
    before a block belongs to it."""

    stages, stride, pools_last, last_channels = 3, (4, 4), False, 24

    def __init__(self, depth: int):
        self.depth = depth

    def first(self, in_channels: int, width: float) -> Block:
        return Bare(in_channels, scaled(48, width))

    def stage(self, index: int, in_channels: int, width: float, branches: int = 1, shared: bool = False) -> list[Block]:
        growth = scaled(24, width, branches)
        blocks: list[Block] = [Transition(in_channels, branches, shared)] if index else []
        return blocks + [DenseLayer(in_channels + i * growth, growth, branches) for i in range(self.depth)]

    def finish(self, channels: int, branches: int = 1) -> list[Block]:
        return [NormRelu(channels, branches), Pool(channels)]

    def feature_size(self, width: float) -> int:
        return scaled(48, width) + 3 * self.depth * scaled(24, width)


class ResSepBase:
    """Four blocks of `depth` units of separable convolutions with 128, 256, 512, 1024 filters.

    Args:
        stride_placement: "last": block strides 2, 2, 2, 1, in a block's last unit, on a pointwise convolution (what
            the published counts fit); "first": stride 2 in the first convolution of every block, as the caption says.
    """

    stages, pools_last, last_channels = 4, True, 1024

    def __init__(self, depth: int, stride_placement: StridePlacement):
        self.depth, self.placement = depth, stride_placement
        self.stride = (32, 32) if stride_placement == "last" else (64, 64)

    def first(self, in_channels: int, width: float) -> Block:
        return ConvBlock(in_channels, 64, stride=2, pool=True)

    def stage(self, index: int, in_channels: int, width: float, branches: int = 1, shared: bool = False) -> list[Block]:
        channels = scaled(128 * 2**index, width, branches)
        last = self.placement == "last"
        stride = 1 if last and index == 3 else 2
        strides = [1] * self.depth
        strides[-1 if last else 0] = stride
        blocks: list[Block] = []
        for i, unit_stride in enumerate(strides):
            at: Literal["depthwise", "pointwise"] = "pointwise" if last else "depthwise"
            blocks.append(SepUnit(in_channels, channels, unit_stride, at, not last, branches, shared and i == 0))
            in_channels = channels
        return blocks

    def finish(self, channels: int, branches: int = 1) -> list[Block]:
        return []

    def feature_size(self, width: float) -> int:
        return scaled(1024, width)


class MiniBase:
    """For small grey images: 8 and 16 channels in the stem, 4 in a branch, pooled to 1x2 (spec section 8.1)."""

    stages, stride, pools_last, last_channels = 2, (4, 8), False, 4
    GRID = (1, 2)
    FEATURES = 32

    def __init__(self, depth: int):
        self.depth = depth

    def first(self, in_channels: int, width: float) -> Block:
        return ConvBlock(in_channels, scaled(8, width))

    def stage(self, index: int, in_channels: int, width: float, branches: int = 1, shared: bool = False) -> list[Block]:
        channels = scaled((16, 4)[index], width, branches)
        first = BasicUnit(in_channels, channels, 2, "projection", branches, shared)
        return [first, *(BasicUnit(channels, channels, branches=branches) for _ in range(self.depth - 1))]

    def finish(self, channels: int, branches: int = 1) -> list[Block]:
        return [Pool(channels, self.GRID)]

    def feature_size(self, width: float) -> int:
        return self.FEATURES


def make_base(name: BaseName, depth: int, stride_placement: StridePlacement = "last") -> Base:
    """The base network of a name.

    Raises:
        ValueError: unknown name, or depth below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if name == "ressep":
        return ResSepBase(depth, stride_placement)
    simple: dict[str, type[ResNetBase] | type[DenseNetBase] | type[MiniBase]] = {
        "resnet": ResNetBase,
        "densenet": DenseNetBase,
        "mini": MiniBase,
    }
    if name not in simple:
        raise ValueError(f"base must be 'resnet', 'densenet', 'ressep' or 'mini', got {name!r}")
    return simple[name](depth)


def make_stem(base: Base, in_channels: int, stages: int, width: float) -> Stack:
    """The first block and the first `stages` stages."""
    blocks: list[Block] = [base.first(in_channels, width)]
    for index in range(stages):
        blocks += base.stage(index, blocks[-1].out_channels, width)
    return Stack(blocks)


def make_tail(base: Base, in_channels: int, stages: int, width: float, branches: int = 1) -> Stack:
    """What follows a stem of `stages` stages, up to the features, in each of `branches` branches."""
    blocks: list[Block] = []
    for index in range(stages, base.stages):
        blocks += base.stage(index, in_channels, width, branches, shared=not blocks)
        in_channels = blocks[-1].out_channels
    return Stack(blocks + base.finish(in_channels, branches))


class StaticNet(nn.Module):
    """A base network as it is: all stages at one width, global pooling, one linear layer.

    Args:
        base: see `make_base`.
        num_classes, in_channels: of labels and images.
        width: scales the filters.
        last_width: of the last stage, in place of `width`.
        init: see `init_weights`.
    """

    def __init__(
        self,
        base: Base,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
        last_width: float | None = None,
        init: Init = "he",
    ):
        super().__init__()
        self.stem = make_stem(base, in_channels, base.stages - 1, width)
        self.tail = make_tail(base, self.stem.out_channels, base.stages - 1, last_width or width)
        if base.pools_last:
            self.tail = Stack([self.tail, Pool(self.tail.out_channels)])
        self.classifier = nn.Linear(self.tail.out_channels, num_classes)
        self.stride, self.in_channels = base.stride, in_channels
        init_weights(self, init)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> what the last linear layer reads, (B, D)."""
        features: Tensor = self.tail(self.stem(x))
        return features

    def fold(self) -> Folded:
        """`features` for inference, with folded BatchNorm; the weights are copied."""
        stem, tail = self.stem.fold(Fold()), self.tail.fold(Fold())

        def run(x: Tensor) -> Tensor:
            check_images(x, self.in_channels, self.stride)
            return tail(stem(channels_last(x)))

        return run

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K).

        Raises:
            ValueError: images of a wrong shape, too small, or in evaluation with values that are not finite.
        """
        check_images(x, self.in_channels, self.stride, values=not self.training)
        logits: Tensor = self.classifier(self.features(x))
        return logits


class CifarResNet(StaticNet):
    """ResNet-(6d+2) for images of 32x32."""

    def __init__(self, depth: int, num_classes: int = 100, in_channels: int = 3):
        super().__init__(ResNetBase(depth), num_classes, in_channels)


class CifarDenseNet(StaticNet):
    """DenseNet with d layers a block for images of 32x32."""

    def __init__(self, depth: int, num_classes: int = 100, in_channels: int = 3):
        super().__init__(DenseNetBase(depth), num_classes, in_channels)


class ResSep(StaticNet):
    """ResSep for images of 224x224."""

    def __init__(
        self,
        depth: int,
        width: float,
        num_classes: int = 1000,
        in_channels: int = 3,
        stride_placement: StridePlacement = "last",
    ):
        super().__init__(ResSepBase(depth, stride_placement), num_classes, in_channels, width)


def mobilenet(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """MobileNet v1 of width 1, the reference point of Table 3.1."""
    layers: list[nn.Module] = [ConvBlock(in_channels, 32, stride=2)]
    channels = 32
    for out_channels, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5] + [
        (1024, 2),
        (1024, 1),
    ]:
        layers.append(SepConv(channels, out_channels, stride, "depthwise"))
        channels = out_channels
    network = nn.Sequential(*layers, Pool(channels), nn.Linear(channels, num_classes))
    init_weights(network)
    return network


def check_images(x: Tensor, in_channels: int, stride: tuple[int, int], values: bool = True) -> None:
    """Refuse images that a network cannot read; `values`: also those that are not finite (makes a device wait).

    Raises:
        ValueError: another shape or type, smaller than the network's stride, or NaN or Inf.
    """
    if x.dim() != 4 or x.shape[1] != in_channels or not x.is_floating_point():
        raise ValueError(f"expected images float B x {in_channels} x H x W, got {x.dtype} of shape {tuple(x.shape)}")
    if x.shape[2] < stride[0] or x.shape[3] < stride[1]:
        raise ValueError(
            f"images of {x.shape[2]} x {x.shape[3]} are too small for this network: at least {stride[0]} x {stride[1]}"
        )
    if values and not torch.compiler.is_compiling() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"images of shape {tuple(x.shape)} hold NaN or Inf")


def init_weights(module: nn.Module, init: Init = "he") -> None:
    """Convolutions and linear layers He normal by fan-in of one branch, biases 0 (spec section 3). "uniform" leaves
    them as PyTorch makes them, uniform in +-1/sqrt(fan-in): less than half as large, so that behind a norm they learn
    several times faster, which short trainings need."""
    if init == "uniform":
        return
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
