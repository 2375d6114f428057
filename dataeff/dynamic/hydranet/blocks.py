"""The blocks that stems, branches and gates are built of, each for one network or for a bank of branches.

Every block has `forward(x, branch=None)` (see `dataeff.nn.branches`), `out_channels` (of one branch), and
`fold(fold)`: the same computation for inference, BatchNorm folded and operators fused, on channels-last features, for
the branches of `fold`.

Source: spec hydranet sections 2.6, 2.8 and 8.1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.branches import BranchConv2d, BranchNorm2d, Fold, spread
from dataeff.nn.fold import InferenceConv, channels_last

Folded = Callable[[Tensor], Tensor]
StrideAt = Literal["depthwise", "pointwise"]


class Block(nn.Module, ABC):
    """What the blocks have in common."""

    out_channels: int

    @abstractmethod
    def fold(self, fold: Fold) -> Folded:
        """The block for inference, for the branches of `fold`."""


class Stack(Block):
    """Blocks in a row; `out_channels` is the last one's."""

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.out_channels = blocks[-1].out_channels

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, branch)
        return x

    def fold(self, fold: Fold) -> Folded:
        folded = [block.fold(fold) for block in self.blocks if isinstance(block, Block)]

        def run(x: Tensor) -> Tensor:
            for block in folded:
                x = block(x)
            return x

        return run


class ConvBlock(Block):
    """Convolution, BatchNorm, ReLU unless `relu=False`, and a 3x3/2 max pool if `pool`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        branches: int = 1,
        relu: bool = True,
        pool: bool = False,
    ):
        super().__init__()
        self.conv = BranchConv2d(in_channels, out_channels, kernel, stride, branches)
        self.norm = BranchNorm2d(out_channels, branches)
        self.relu, self.out_channels = relu, out_channels
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        x = self.norm(self.conv(x, branch), branch)
        return self.pool(F.relu(x) if self.relu else x)  # type: ignore[no-any-return]

    def fold(self, fold: Fold) -> Folded:
        conv, relu, pool = fold.conv(self.conv, self.norm), self.relu, self.pool
        return lambda x: channels_last(pool(conv(x, relu)))


class Bare(Block):
    """A 3x3 convolution alone."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = BranchConv2d(in_channels, out_channels, 3)
        self.out_channels = out_channels

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        return self.conv(x, branch)  # type: ignore[no-any-return]

    def fold(self, fold: Fold) -> Folded:
        conv = fold.conv(self.conv, None)
        return lambda x: conv(x, False)


class BasicUnit(Block):
    """ReLU(two 3x3 convolutions with BatchNorm + shortcut).

    Args:
        shortcut: where the shape changes, "zero_pad" (subsample, append zero channels; no parameters) or "projection"
            (1x1 convolution).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        shortcut: Literal["zero_pad", "projection"] = "zero_pad",
        branches: int = 1,
        shared: bool = False,
    ):
        super().__init__()
        self.conv1 = BranchConv2d(in_channels, out_channels, 3, stride, branches, shared)
        self.norm1 = BranchNorm2d(out_channels, branches)
        self.conv2 = BranchConv2d(out_channels, out_channels, 3, 1, branches)
        self.norm2 = BranchNorm2d(out_channels, branches)
        project = shortcut == "projection"
        self.shortcut = Shortcut(in_channels, out_channels, stride, project, branches, shared, norm=not project)
        self.out_channels = out_channels

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        residual = F.relu(self.norm1(self.conv1(x, branch), branch))
        residual = self.norm2(self.conv2(residual, branch), branch)
        return F.relu(residual + self.shortcut(x, branch))

    def fold(self, fold: Fold) -> Folded:
        first, second = (fold.conv(conv, norm) for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)))
        shortcut = self.shortcut.fold(fold)

        def run(x: Tensor) -> Tensor:
            result = shortcut(x)
            second.add_relu_(first(x, True), result)
            return result

        return run


class Shortcut(Block):
    """The path beside a residual: identity where the shape stays, else subsample and pad with zeros, or project by a
    1x1 convolution, with BatchNorm unless `norm=False`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        project: bool,
        branches: int = 1,
        shared: bool = False,
        norm: bool = True,
    ):
        super().__init__()
        self.stride, self.branches, self.shared = stride, branches, shared
        self.in_channels, self.out_channels = in_channels, out_channels
        self.conv: BranchConv2d | None = None
        self.norm: BranchNorm2d | None = None
        if in_channels > out_channels or (project and (stride > 1 or in_channels != out_channels)):
            self.conv = BranchConv2d(in_channels, out_channels, 1, stride, branches, shared)
            self.norm = BranchNorm2d(out_channels, branches) if norm else None

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        if self.conv is not None:
            projected: Tensor = self.conv(x, branch)
            return projected if self.norm is None else self.norm(projected, branch)
        return self._parameter_free(x, self.branches if self.shared and branch is None else 1)

    def _parameter_free(self, x: Tensor, copies: int) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        extra = self.out_channels - self.in_channels
        if extra:
            x = x.unflatten(1, (-1, self.in_channels))
            x = F.pad(x, (0, 0, 0, 0, 0, extra)).flatten(1, 2)
        return spread(x, copies)

    def fold(self, fold: Fold) -> Folded:
        if self.conv is not None:
            conv = fold.conv(self.conv, self.norm)
            return lambda x: channels_last(conv(x, False))

        copies = fold.copies(self.branches, self.shared)

        def run(x: Tensor) -> Tensor:
            result = channels_last(self._parameter_free(x, copies))
            # The residual is added in place, and a shared input belongs to other branches as well.
            return result.clone() if self.shared and result.data_ptr() == x.data_ptr() else result

        return run


class SepConv(Block):
    """Depthwise 3x3, BatchNorm, ReLU, pointwise 1x1, BatchNorm, and ReLU unless `relu=False`.

    Args:
        stride_at: which of the two convolutions has the stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        stride_at: StrideAt = "pointwise",
        relu: bool = True,
        branches: int = 1,
        shared: bool = False,
    ):
        super().__init__()
        strides = (stride, 1) if stride_at == "depthwise" else (1, stride)
        self.depthwise = BranchConv2d(in_channels, in_channels, 3, strides[0], branches, shared, depthwise=True)
        self.norm1 = BranchNorm2d(in_channels, branches)
        self.pointwise = BranchConv2d(in_channels, out_channels, 1, strides[1], branches)
        self.norm2 = BranchNorm2d(out_channels, branches)
        self.relu, self.out_channels = relu, out_channels

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        x = F.relu(self.norm1(self.depthwise(x, branch), branch))
        x = self.norm2(self.pointwise(x, branch), branch)
        return F.relu(x) if self.relu else x

    def fold(self, fold: Fold) -> Folded:
        run, last = self.fold_open(fold)
        return lambda x: last(run(x), self.relu)

    def fold_open(self, fold: Fold) -> tuple[Folded, InferenceConv]:
        """All but the last convolution, and that convolution."""
        first = fold.conv(self.depthwise, self.norm1)
        last = fold.conv(self.pointwise, self.norm2)
        copies = fold.copies(self.depthwise.branches, self.depthwise.shared)
        return lambda x: first(spread(x, copies), True), last


class SepUnit(Block):
    """ReLU(two separable convolutions + shortcut): a unit of ResSep; the stride is in the first of the two.

    The shortcut is a 1x1 convolution where the channels change; at equal channels and stride 2 it is one only if
    `project_stride`, else it subsamples.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        stride_at: StrideAt = "pointwise",
        project_stride: bool = False,
        branches: int = 1,
        shared: bool = False,
    ):
        super().__init__()
        self.first = SepConv(in_channels, out_channels, stride, stride_at, branches=branches, shared=shared)
        self.second = SepConv(out_channels, out_channels, relu=False, branches=branches)
        project = in_channels != out_channels or project_stride
        self.shortcut = Shortcut(in_channels, out_channels, stride, project, branches, shared)
        self.out_channels = out_channels

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        return F.relu(self.second(self.first(x, branch), branch) + self.shortcut(x, branch))

    def fold(self, fold: Fold) -> Folded:
        first, shortcut = self.first.fold(fold), self.shortcut.fold(fold)
        second, last = self.second.fold_open(fold)

        def run(x: Tensor) -> Tensor:
            result = shortcut(x)
            last.add_relu_(second(first(x)), result)
            return result

        return run


class NormRelu(Block):
    """BatchNorm and ReLU."""

    def __init__(self, channels: int, branches: int = 1, shared: bool = False):
        super().__init__()
        self.norm = BranchNorm2d(channels, branches, shared)
        self.out_channels = channels

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        return F.relu(self.norm(x, branch))

    def fold(self, fold: Fold) -> Folded:
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias.detach() - norm.running_mean * scale
        scale, shift = (fold.rows(tensor, self.out_channels).view(1, -1, 1, 1) for tensor in (scale, shift))
        copies = fold.copies(norm.branches, norm.shared)
        return lambda x: torch.addcmul(shift, spread(x, copies), scale).relu_()


class DenseLayer(Block):
    """Input and BN-ReLU-conv3x3 of it, concatenated: `growth` channels more."""

    def __init__(self, in_channels: int, growth: int, branches: int = 1):
        super().__init__()
        self.before = NormRelu(in_channels, branches)
        self.conv = BranchConv2d(in_channels, growth, 3, 1, branches)
        self.in_channels, self.out_channels = in_channels, in_channels + growth

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        return self._concatenate(x, self.conv(self.before(x, branch), branch))

    def _concatenate(self, x: Tensor, new: Tensor) -> Tensor:
        count = x.shape[1] // self.in_channels
        if count == 1:
            return torch.cat([x, new], 1)
        parts = [part.unflatten(1, (count, -1)) for part in (x, new)]
        return torch.cat(parts, 2).flatten(1, 2)

    def fold(self, fold: Fold) -> Folded:
        before, conv = self.before.fold(fold), fold.conv(self.conv, None)
        return lambda x: self._concatenate(x, conv(before(x), False))


class Transition(Block):
    """BN-ReLU-conv1x1 that keeps the channels, then a 2x2 average pool."""

    def __init__(self, channels: int, branches: int = 1, shared: bool = False):
        super().__init__()
        self.before = NormRelu(channels, branches, shared)
        self.conv = BranchConv2d(channels, channels, 1, 1, branches)
        self.out_channels = channels

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        return F.avg_pool2d(self.conv(self.before(x, branch), branch), 2)

    def fold(self, fold: Fold) -> Folded:
        before, conv = self.before.fold(fold), fold.conv(self.conv, None)
        return lambda x: F.avg_pool2d(conv(before(x), False), 2)


class Pool(Block):
    """Average pool to a grid of `size`, flattened: (B, n * C, H, W) -> (B, n * C * size)."""

    def __init__(self, channels: int, size: tuple[int, int] = (1, 1)):
        super().__init__()
        self.size, self.out_channels = size, channels * size[0] * size[1]

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        if self.size == (1, 1):
            return x.mean((2, 3))
        return F.adaptive_avg_pool2d(x, self.size).flatten(1)

    def fold(self, fold: Fold) -> Folded:
        return self.forward
