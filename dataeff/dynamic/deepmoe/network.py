"""Base networks of DeepMoE: VGG, ResNet and DRN whose channels can be weighted, and their multiply-adds.

Source: spec deepmoe sections 2.3, 2.6, 2.7 and 2.9. A gate multiplies a channel behind its norm (and ReLU); shortcuts,
the stem of residual networks and the classifier are never gated.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.pointwise import PointwiseConv2d
from dataeff.nn.resnet import Init, conv2d_macs, init_weights

Block = Literal["basic", "bottleneck_a", "bottleneck_b"]
# Number of a gated layer and the features it reads -> its gates (B, C), not negative; None lets all pass.
GateOf = Callable[[int, Tensor], Tensor | None]


@dataclass(frozen=True)
class Layout:
    """A base network before widening.

    Attributes:
        family: "vgg" (`widths` of the convolutions, `pools` after which of them, from 1), or "resnet" and "drn"
            (`widths` and block `counts` of the groups).
        small_stem: 3x3 convolution, no pooling (CIFAR), in place of 7x7/2 and max-pool.
        block: residual design when none is asked for.
    """

    family: Literal["vgg", "resnet", "drn"]
    widths: tuple[int, ...]
    pools: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    small_stem: bool = True
    block: Block = "basic"


VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
IMAGENET = (64, 128, 256, 512)
LAYOUTS: dict[str, Layout] = {
    "vgg6": Layout("vgg", (8, 8, 16, 16, 32, 32), (2, 4)),
    "vgg16": Layout("vgg", VGG16, (2, 4, 7, 10, 13)),
    **{
        f"resnet{depth}": Layout("resnet", (16, 32, 64), counts=((depth - 2) // 6,) * 3)
        for depth in (8, 14, 20, 32, 56, 110)
    },
    "resnet18_cifar": Layout("resnet", IMAGENET, counts=(2, 2, 2, 2), block="bottleneck_b"),
    "resnet18": Layout("resnet", IMAGENET, counts=(2, 2, 2, 2), small_stem=False),
    "resnet34": Layout("resnet", IMAGENET, counts=(3, 4, 6, 3), small_stem=False),
    "resnet50": Layout("resnet", IMAGENET, counts=(3, 4, 6, 3), small_stem=False, block="bottleneck_a"),
    "resnet101": Layout("resnet", IMAGENET, counts=(3, 4, 23, 3), small_stem=False, block="bottleneck_a"),
    "drn10": Layout("drn", (16, 32, 64, 64), counts=(1, 1, 1, 1)),
    "drn_a_50": Layout("drn", IMAGENET, counts=(3, 4, 6, 3), small_stem=False, block="bottleneck_a"),
}
GATED_CONVS: dict[str, tuple[int, ...]] = {"basic": (0, 1), "bottleneck_a": (0, 1), "bottleneck_b": (1,)}


@dataclass(frozen=True)
class ConvCost:
    """One convolution: multiply-adds of a pair of channels, its channels, the gated layers (or None) they belong to,
    and the width of its output."""

    pair: float
    inputs: int
    outputs: int
    source: int | None
    target: int | None
    width: int


class MoEConv2d(nn.Module):
    """Convolution, BatchNorm, ReLU (left out before a residual sum) and the weight of each channel.

    Attributes:
        gate_index: which gated layer this is, or None; set by the network.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        gated: bool = True,
        relu: bool = True,
    ):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.gated, self.relu = gated, relu
        self.gate_index: int | None = None

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Features (B, C, H, W), gates (B, C') or None -> (B, C', H', W')."""
        x = self.norm(self.conv(x))
        if self.relu:
            x = F.relu(x)
        return x if gate is None else x * gate[:, :, None, None].to(x.dtype)

    def ask(self, x: Tensor, gate_of: GateOf) -> Tensor:
        """`forward` with the gates of this layer."""
        result: Tensor = self(x, None if self.gate_index is None else gate_of(self.gate_index, x))
        return result


class GatedBlock(nn.Module):
    """ReLU(residual(x) + shortcut(x)); see the table in spec section 2.3.

    Args:
        in_channels, outer: channels of input and output.
        inner: channels of the convolutions but the last.
        stride, dilation: of the first 3x3 convolution; all 3x3 are dilated.
        block: the design.
        gated_convs: which convolutions are gated.
    """

    def __init__(
        self,
        in_channels: int,
        inner: tuple[int, ...],
        outer: int,
        stride: int,
        dilation: int,
        block: Block,
        gated_convs: tuple[int, ...],
    ):
        super().__init__()
        kernels, strided = ((3, 3), 0) if block == "basic" else ((1, 3, 1), 1)
        channels = (in_channels, *inner, outer)
        self.convs = nn.ModuleList(
            MoEConv2d(
                channels[i],
                channels[i + 1],
                kernel,
                stride if i == strided else 1,
                dilation if kernel == 3 else 1,
                gated=i in gated_convs,
                relu=i + 1 < len(kernels),
            )
            for i, kernel in enumerate(kernels)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != outer:
            projection = PointwiseConv2d(in_channels, outer, stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor, gate_of: GateOf) -> Tensor:
        y = x
        for conv in self.convs:
            assert isinstance(conv, MoEConv2d)
            y = conv.ask(y, gate_of)
        return F.relu(y + self.shortcut(x))


class GatedNetwork(nn.Module):
    """A chain of convolutions, pools and residual blocks, and a classifier.

    Attributes:
        body: `MoEConv2d`, `nn.MaxPool2d` and `GatedBlock` in order.
        head: nn.Linear on pooled features, or for dense answers a 1x1 nn.Conv2d.
        gate_channels: C_l of every gated layer.
        stride: input pixels per pixel of the last feature map.
    """

    def __init__(self, body: list[nn.Module], channels: int, num_classes: int, stride: int, dense: bool = False):
        super().__init__()
        self.body = nn.ModuleList(body)
        self.head: nn.Module = nn.Conv2d(channels, num_classes, 1) if dense else nn.Linear(channels, num_classes)
        self.num_classes, self.stride, self.dense = num_classes, stride, dense
        self._cost_table: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor, Tensor, float]] = {}
        self.gate_channels: list[int] = []
        for conv in self.convs():
            if conv.gated:
                conv.gate_index = len(self.gate_channels)
                self.gate_channels.append(conv.conv.out_channels)
        first = next(self.convs()).conv
        self.in_channels = first.in_channels

    def convs(self) -> Iterator[MoEConv2d]:
        """Every convolution but shortcuts, in the order of execution."""
        return (module for module in self.body.modules() if isinstance(module, MoEConv2d))

    def features(self, x: Tensor, gate_of: GateOf) -> Tensor:
        """Images -> the last feature map."""
        for part in self.body:
            if isinstance(part, MoEConv2d):
                x = part.ask(x, gate_of)
            elif isinstance(part, GatedBlock):
                x = part(x, gate_of)
            else:
                x = part(x)
        return x

    def classify(self, x: Tensor, size: torch.Size) -> Tensor:
        """Features -> logits float32 (B, K), or (B, K, H, W) of images of this size; float32 also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            if self.dense:
                scores = self.head(x.float())
                return F.interpolate(scores, size=size[2:], mode="bilinear", align_corners=False)
            logits: Tensor = self.head(x.mean((2, 3), dtype=torch.float32))
            return logits

    def conv_costs(self, height: int, width: int) -> tuple[list[ConvCost], float]:
        """Gateable convolutions for images of this size, and the multiply-adds of the shortcuts."""
        costs: list[ConvCost] = []
        shortcuts, source = 0.0, None
        for part in self.body:
            if isinstance(part, nn.MaxPool2d):
                height, width = (_pooled(part, extent) for extent in (height, width))
                continue
            convs: list[nn.Module] = list(part.convs) if isinstance(part, GatedBlock) else [part]
            if isinstance(part, GatedBlock) and isinstance(part.shortcut, nn.Sequential):
                projection = part.shortcut[0]
                assert isinstance(projection, nn.Conv2d)
                shortcuts += conv2d_macs(projection, height, width)[0]
            for layer in convs:
                assert isinstance(layer, MoEConv2d)
                macs, height, width = conv2d_macs(layer.conv, height, width)
                inputs, outputs = layer.conv.in_channels, layer.conv.out_channels
                costs.append(ConvCost(macs / (inputs * outputs), inputs, outputs, source, layer.gate_index, width))
                source = layer.gate_index
            if isinstance(part, GatedBlock):
                source = None  # a sum with the shortcut has all channels
        return costs, shortcuts

    def macs(self, counts: Tensor, height: int, width: int) -> Tensor:
        """Multiply-adds of images with active channels `counts` (B, L), float64 (B,).

        sum_l |A_(l-1)| |A_l| k^2 H W, all channels where there is no gate (spec section 2.6), and the shortcuts.
        """
        key = (height, width, counts.device)
        if key not in self._cost_table:
            self._cost_table[key] = self._tabulate(height, width, counts.device)
        sources, targets, weights, shortcuts = self._cost_table[key]
        active = F.pad(counts.double(), (0, 1), value=1.0)
        return (active[:, sources] * active[:, targets]) @ weights + shortcuts

    def _tabulate(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
        """Columns of the active counts, with a last one of 1 for sides without a gate, that every convolution
        multiplies, and what a pair of them costs."""
        costs, shortcuts = self.conv_costs(height, width)
        ungated = len(self.gate_channels)
        sources, targets, weights = [], [], []
        for cost in costs:
            sources.append(ungated if cost.source is None else cost.source)
            targets.append(ungated if cost.target is None else cost.target)
            inputs = cost.inputs if cost.source is None else 1
            weights.append(cost.pair * inputs * (cost.outputs if cost.target is None else 1))
        columns = torch.tensor([sources, targets], device=device)
        return columns[0], columns[1], torch.tensor(weights, dtype=torch.float64, device=device), shortcuts

    def full_macs(self, height: int, width: int) -> float:
        """Multiply-adds of one image with every channel; the classifier is not counted, as everywhere."""
        return float(self.macs(torch.tensor([self.gate_channels]), height, width))

    def conv_weights(self) -> int:
        """Weights of all convolutions."""
        return sum(module.weight.numel() for module in self.body.modules() if isinstance(module, nn.Conv2d))

    def check_images(self, x: Tensor, smallest: int) -> None:
        """Check images (B, C, H, W); their values in evaluation only, where bad input comes from outside.

        Raises:
            ValueError: for a wrong shape, type or size, an empty batch in training, or NaN and Inf.
        """
        expected = f"expected images float B x {self.in_channels} x H x W"
        if x.dim() != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ValueError(f"{expected}, got {x.dtype} {tuple(x.shape)}")
        smallest = max(smallest, self.stride)
        if min(x.shape[2:]) < smallest:
            raise ValueError(
                f"{expected} with H and W at least {smallest} for this network's strides, got {tuple(x.shape)}"
            )
        if self.training and len(x) < 2:
            raise ValueError(f"BatchNorm in training mode needs batches of at least 2 images, got {len(x)}")
        if not self.training and not torch.compiler.is_compiling() and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{expected} with finite values, got shape {tuple(x.shape)} with NaN or Inf")


def build_network(
    arch: str,
    num_classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    block: Block | None = None,
    widths: tuple[int, ...] | None = None,
    gated_convs: tuple[int, ...] | None = None,
    gated_layers: tuple[int, ...] | None = None,
    init: Init = "he",
) -> GatedNetwork:
    """A base network with all channels on until gates say otherwise.

    Args:
        arch: a key of `LAYOUTS`.
        width: multiplies every width of VGG and basic blocks, the inner widths of "bottleneck_a", and the gated inner
            width of "bottleneck_b"; outer widths of bottlenecks stay (spec section 2.3).
        block: residual design; None for the architecture's own.
        widths: in place of the architecture's, before `width` is applied.
        gated_convs: which convolutions of a block are gated; None for the design's (`GATED_CONVS`).
        gated_layers: VGG: numbers (from 0) of the gated layers; None for all.
        init: "he", or "uniform", PyTorch's own, whose weights are less than half as large: behind a norm they learn
            several times faster, which short trainings need.

    Raises:
        ValueError: unknown names, or options that do not fit the architecture.
    """
    if arch not in LAYOUTS:
        raise ValueError(f"unknown arch {arch!r}; known: {', '.join(LAYOUTS)}")
    if not 0 < width <= 16:
        raise ValueError(f"width must be above 0 and at most 16, got {width}")
    layout = LAYOUTS[arch]
    widths = tuple(widths) if widths is not None else layout.widths
    if len(widths) != len(layout.widths) or min(widths) < 1:
        raise ValueError(f"widths of {arch} must be {len(layout.widths)} positive numbers, got {list(widths)}")
    if layout.family == "vgg":
        if block is not None or gated_convs is not None:
            raise ValueError(f"block and gated_convs are for residual networks, {arch} has no blocks")
        return _initialised(_build_vgg(layout, widths, num_classes, in_channels, width, gated_layers), init)
    if gated_layers is not None:
        raise ValueError(f"gated_layers is for VGG networks, use gated_convs for {arch}")
    block = block or layout.block
    if block not in GATED_CONVS:
        raise ValueError(f"block must be one of {', '.join(GATED_CONVS)}, got {block!r}")
    gated = GATED_CONVS[block] if gated_convs is None else gated_convs
    last = 1 if block == "basic" else 2
    if any(not 0 <= position <= last for position in gated):
        raise ValueError(f"gated_convs of {block} must be numbers from 0 to {last}, got {list(gated)}")
    return _initialised(_build_resnet(layout, widths, num_classes, in_channels, width, block, gated), init)


def _initialised(network: GatedNetwork, init: Init) -> GatedNetwork:
    if init == "he":
        init_weights(network)
    return network


def _build_vgg(
    layout: Layout,
    widths: tuple[int, ...],
    num_classes: int,
    in_channels: int,
    width: float,
    gated_layers: tuple[int, ...] | None,
) -> GatedNetwork:
    body: list[nn.Module] = []
    channels = in_channels
    for number, extent in enumerate(widths):
        outputs = _scaled(extent, width)
        body.append(MoEConv2d(channels, outputs, 3, gated=gated_layers is None or number in gated_layers))
        channels = outputs
        if number + 1 in layout.pools:
            body.append(nn.MaxPool2d(2))
    return GatedNetwork(body, channels, num_classes, 2 ** len(layout.pools))


def _build_resnet(
    layout: Layout,
    widths: tuple[int, ...],
    num_classes: int,
    in_channels: int,
    width: float,
    block: Block,
    gated: tuple[int, ...],
) -> GatedNetwork:
    basic = block == "basic"
    channels = _scaled(widths[0], width if basic else 1)
    if layout.small_stem:
        body: list[nn.Module] = [MoEConv2d(in_channels, channels, 3, gated=False)]
        total_stride = 1
    else:
        body = [MoEConv2d(in_channels, channels, 7, 2, gated=False), nn.MaxPool2d(3, 2, 1)]
        total_stride = 4
    dilation = 1
    for group, (count, extent) in enumerate(zip(layout.counts, widths, strict=True)):
        wide = _scaled(extent, width)
        inner, outer = {
            "basic": ((wide,), wide),
            "bottleneck_a": ((wide, wide), 4 * extent),
            "bottleneck_b": ((extent, wide), 4 * extent),
        }[block]
        # DRN: the strides of the last two groups become dilation (spec section 2.9).
        dilated = layout.family == "drn" and group >= len(widths) - 2
        for index in range(count):
            stride = 2 if group > 0 and index == 0 and not dilated else 1
            if dilated and index == 0:
                dilation *= 2
            body.append(GatedBlock(channels, inner, outer, stride, dilation, block, gated))
            channels = outer
            total_stride *= stride
    return GatedNetwork(body, channels, num_classes, total_stride, dense=layout.family == "drn")


def _scaled(extent: int, width: float) -> int:
    return max(1, round(extent * width))


def _pooled(pool: nn.MaxPool2d, extent: int) -> int:
    kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
    assert isinstance(kernel, int) and isinstance(stride, int) and isinstance(padding, int)
    return (extent + 2 * padding - kernel) // stride + 1


WIDENING: dict[str, tuple[int, ...]] = {
    "W1-High": (11,),
    "W1-Mid": (5,),
    "W4-Low": (0, 1, 2, 3),
    "W13-All": tuple(range(13)),
}


def solve_widening(strategy: str, target_params: float, in_channels: int = 3) -> tuple[int, ...]:
    """Widths of VGG-16 in which the chosen layers are scaled by one factor until the convolutions have
    `target_params` weights, as nearly as whole channels allow (spec section 2.7; Table 3.4: 24.15e6).

    Args:
        strategy: a key of `WIDENING`.

    Raises:
        ValueError: unknown strategy, or a target below the unwidened network's.
    """
    if strategy not in WIDENING:
        raise ValueError(f"strategy must be one of {', '.join(WIDENING)}, got {strategy!r}")

    def scaled(factor: float) -> tuple[int, ...]:
        return tuple(round(w * factor) if i in WIDENING[strategy] else w for i, w in enumerate(VGG16))

    def weights(widths: tuple[int, ...]) -> int:
        return sum(9 * a * b for a, b in zip((in_channels, *widths), widths, strict=False))

    if target_params < weights(VGG16):
        raise ValueError(f"target_params must be at least VGG-16's {weights(VGG16)}, got {target_params:g}")
    low, high = 1.0, 2.0
    while weights(scaled(high)) < target_params:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if weights(scaled(middle)) < target_params else (low, middle)
    return min((scaled(low), scaled(high)), key=lambda widths: abs(weights(widths) - target_params))
