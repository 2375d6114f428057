"""Residual networks of the CIFAR family (depth 6n+2) and the ImageNet family (34, 50, 101), post-activation.

Source: spec skipnet section 2.1; the layer tables are those of "Deep Residual Learning for Image Recognition".
The parts that other methods take apart are separate: `stem`, `blocks` (a list) and `head`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.pointwise import PointwiseConv2d

Norm = Literal["batch", "group"]
Shortcut = Literal["projection", "pool_pad"]
Family = Literal["cifar", "imagenet"]
Init = Literal["he", "uniform"]  # `init_weights`, or PyTorch's own

CIFAR_DEPTHS = (38, 74, 110, 152)
IMAGENET_LAYOUTS = {34: ("basic", (3, 4, 6, 3)), 50: ("bottleneck", (3, 4, 6, 3)), 101: ("bottleneck", (3, 4, 23, 3))}
DEFAULT_WIDTHS = {"cifar": (16, 32, 64), "imagenet": (64, 128, 256, 512)}


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """BatchNorm2d, or GroupNorm with min(8, channels) groups for training without batch statistics."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        groups = min(8, channels)
        if channels % groups:
            raise ValueError(f"norm='group' needs widths divisible by {groups} (its groups), got {channels}")
        return nn.GroupNorm(groups, channels)
    raise ValueError(f"norm must be 'batch' or 'group', got {norm!r}")


def conv2d(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias that keeps the size at stride 1."""
    if kernel == 1:
        return PointwiseConv2d(in_channels, out_channels, stride)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def conv2d_macs(conv: nn.Conv2d, height: int, width: int) -> tuple[float, int, int]:
    """Multiply-adds of one `height` x `width` image in a convolution made by `conv2d`, and the size of its output."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    height, width = ((size + 2 * (kernel // 2) - kernel) // stride + 1 for size in (height, width))
    return float(conv.weight.numel() * height * width), height, width


def init_weights(module: nn.Module) -> None:
    """Convolutions ~ N(0, 2/(k*k*C_out)), linear weights ~ N(0, 2/(in*out)), biases 0 (spec skipnet section 2.1)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (math.prod(layer.kernel_size) * layer.out_channels)))
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (layer.in_features * layer.out_features)))
            nn.init.zeros_(layer.bias)


class PoolPad(nn.Module):
    """Parameter-free shortcut: average-pool by the stride, append zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.extra_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))


class ResidualBlock(nn.Module):
    """ReLU(residual(x) + shortcut(x)): two 3x3 convolutions (basic) or 1x1, 3x3, 1x1 (bottleneck, 4x expansion).

    Args:
        in_channels: channels of the input.
        width: channels of the inner convolutions; the output has `width` (basic) or `4 * width` (bottleneck).
        stride: of the first 3x3 convolution and of the shortcut.
        kind: "basic" or "bottleneck".
        shortcut: where the shape changes, "projection" (1x1 convolution and norm) or "pool_pad".
        norm: "batch" or "group".
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        kind: str = "basic",
        shortcut: Shortcut = "projection",
        norm: Norm = "batch",
    ):
        super().__init__()
        layers = {
            "basic": [(in_channels, width, 3, stride), (width, width, 3, 1)],
            "bottleneck": [(in_channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)],
        }[kind]
        self.in_channels = in_channels
        self.out_channels = layers[-1][1]
        self.stride = stride
        self.changes_shape = stride > 1 or in_channels != self.out_channels
        self.convs = nn.ModuleList(conv2d(*layer) for layer in layers)
        self.norms = nn.ModuleList(make_norm(norm, layer[1]) for layer in layers)
        if not self.changes_shape:
            self.shortcut: nn.Module = nn.Identity()
        elif shortcut == "projection":
            projection = conv2d(in_channels, self.out_channels, 1, stride)
            self.shortcut = nn.Sequential(projection, make_norm(norm, self.out_channels))
        elif shortcut == "pool_pad":
            self.shortcut = PoolPad(in_channels, self.out_channels, stride)
        else:
            raise ValueError(f"shortcut must be 'projection' or 'pool_pad', got {shortcut!r}")

    def residual(self, x: Tensor) -> Tensor:
        """The branch that is added to the shortcut, before the last ReLU."""
        last = len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            if i < last:
                x = F.relu(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))

    def macs(self, height: int, width: int) -> tuple[float, float, int, int]:
        """Convolution multiply-adds of one image: (residual branch, shortcut, output height, output width)."""
        shortcut = 0.0
        if isinstance(self.shortcut, nn.Sequential):
            projection = self.shortcut[0]
            assert isinstance(projection, nn.Conv2d)
            shortcut = conv2d_macs(projection, height, width)[0]
        residual = 0.0
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            macs, height, width = conv2d_macs(conv, height, width)
            residual += macs
        return residual, shortcut, height, width


class ResNet(nn.Module):
    """Residual classifier; `stem`, `blocks` and `head` can be used one by one.

    Args:
        depth: 6n+2 for family "cifar" (38, 74, 110, 152, small runs 20); 34, 50 or 101 for "imagenet".
        num_classes: K.
        in_channels: channels of the image.
        widths: channels of the groups; None for 16, 32, 64 ("cifar") or 64, 128, 256, 512 ("imagenet").
        norm, shortcut: see `ResidualBlock`.
        family: "cifar" (3x3 stem, three groups) or "imagenet" (7x7/2 stem and max-pool, four groups).

    Raises:
        ValueError: for a depth, width or option outside the above.
    """

    def __init__(
        self,
        depth: int = 38,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: tuple[int, ...] | None = None,
        norm: Norm = "batch",
        shortcut: Shortcut = "projection",
        family: Family = "cifar",
    ):
        super().__init__()
        kind, counts = _layout(depth, family)
        widths = tuple(widths) if widths is not None else DEFAULT_WIDTHS[family]
        if len(widths) != len(counts) or min(widths) < 1:
            raise ValueError(f"widths must be {len(counts)} positive numbers for family {family!r}, got {widths}")
        if num_classes < 1 or in_channels < 1:
            raise ValueError(f"num_classes and in_channels must be at least 1, got {num_classes} and {in_channels}")
        self.depth, self.family, self.num_classes, self.in_channels = depth, family, num_classes, in_channels
        self.has_batch_norm = norm == "batch"
        if family == "cifar":
            stem = [conv2d(in_channels, widths[0], 3), make_norm(norm, widths[0]), nn.ReLU()]
        else:
            stem = [conv2d(in_channels, widths[0], 7, 2), make_norm(norm, widths[0]), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.ModuleList()
        self.group_of_block: list[int] = []
        channels = widths[0]
        for group, (count, width) in enumerate(zip(counts, widths, strict=True)):
            for index in range(count):
                stride = 2 if group > 0 and index == 0 else 1
                block = ResidualBlock(channels, width, stride, kind, shortcut, norm)
                self.blocks.append(block)
                self.group_of_block.append(group)
                channels = block.out_channels
        self.head = nn.Linear(channels, num_classes)
        init_weights(self)

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be multiples of this."""
        return 4 if self.family == "cifar" else 32

    def classify(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) of the last block -> logits float32 (B, K); float32 also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head(x.mean((2, 3), dtype=torch.float32))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits float32 (B, K)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)

    def stem_macs(self, height: int, width: int) -> tuple[float, int, int]:
        """Convolution multiply-adds of one image in the stem, and the size of the stem's output."""
        conv = self.stem[0]
        assert isinstance(conv, nn.Conv2d)
        macs, height, width = conv2d_macs(conv, height, width)
        if self.family == "imagenet":
            height, width = (height + 1) // 2, (width + 1) // 2
        return macs, height, width

    def check_images(self, x: Tensor) -> None:
        """Check images (B, C, H, W) before a forward pass.

        The values are looked at in evaluation only: there bad input comes from outside, whereas in training the
        check would make every step wait for the device.

        Raises:
            ValueError: for a wrong shape, type, size, batch size or a value that is not finite.
        """
        expected = f"expected images float B x {self.in_channels} x H x W"
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{expected}, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{expected}, got {x.dtype}: convert and normalise the images first")
        smallest = max(8, 2 * self.size_multiple)
        if min(x.shape[2:]) < smallest or any(size % self.size_multiple for size in x.shape[2:]):
            raise ValueError(
                f"height and width must be at least {smallest} and multiples of {self.size_multiple}, "
                f"got {x.shape[2]} x {x.shape[3]}: resize or pad the images"
            )
        if self.training:
            if len(x) == 0:
                raise ValueError("empty batch in training: a batch needs at least one image")
            if len(x) == 1 and self.has_batch_norm:
                raise ValueError("BatchNorm in training mode needs batches of at least 2 images, got 1 (drop the last)")
        elif not torch.compiler.is_compiling() and not math.isfinite(x.sum()):  # one operator; a large sum may overflow
            bad = x.numel() - int(torch.isfinite(x).sum())
            if bad:
                raise ValueError(f"{expected} with finite values, got shape {tuple(x.shape)} with {bad} NaN or Inf")


def _layout(depth: int, family: Family) -> tuple[str, tuple[int, ...]]:
    if family == "cifar":
        n, rest = divmod(depth - 2, 6)
        if rest or n < 1:
            listed = ", ".join(map(str, CIFAR_DEPTHS))
            raise ValueError(f"depth must be 6n+2 (published: {listed}; small runs: 20), got {depth}")
        return "basic", (n, n, n)
    if family == "imagenet":
        if depth not in IMAGENET_LAYOUTS:
            raise ValueError(f"depth of family 'imagenet' must be one of 34, 50, 101, got {depth}")
        return IMAGENET_LAYOUTS[depth]
    raise ValueError(f"family must be 'cifar' or 'imagenet', got {family!r}")
