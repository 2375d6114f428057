"""Layers of several branches of one shape, side by side in the channels.

A bank of n branches is one network whose layers hold n times the channels: a convolution runs as one grouped
convolution over all branches, which is several times faster than a loop over n modules. `branch=b` runs the rows of
branch b alone, on its own input; the other branches' weights are not read then. n = 1 is the ordinary layer.

Shapes: a bank's features are (B, n * C, H, W), branch-major; the features of branch b alone (B, C, H, W). The first
layer of a bank is `shared`: it takes the same (B, C, H, W) for all branches.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.fold import InferenceConv, fold_batch_norm, fold_conv, inference_conv
from dataeff.nn.pointwise import thinned

Pairs = tuple[Tensor, Tensor, Tensor]  # outputs, image and branch of each


def rows_of(branch: int, size: int) -> slice:
    """The rows of a branch in a tensor whose first axis holds `size` of each branch."""
    return slice(branch * size, (branch + 1) * size)


def spread(x: Tensor, copies: int) -> Tensor:
    """Features (B, C, H, W) once for each of several branches, (B, copies * C, H, W)."""
    return x.repeat(1, copies, 1, 1) if copies > 1 else x


class BranchConv2d(nn.Conv2d):
    """Convolution without bias that keeps the size at stride 1, in each of `branches` branches.

    Args:
        in_channels, out_channels: of one branch.
        shared: the input is common to all branches.
        depthwise: one filter a channel; `out_channels` equals `in_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        branches: int = 1,
        shared: bool = False,
        depthwise: bool = False,
    ):
        self.branches, self.shared, self.depthwise = branches, shared, depthwise
        self.out_of_one = out_channels
        groups = self.groups_of(branches)
        inputs = in_channels if shared and not depthwise else in_channels * branches
        super().__init__(inputs, out_channels * branches, kernel, stride, kernel // 2, groups=groups, bias=False)

    def groups_of(self, branches: int) -> int:
        """Groups of the convolution over some of the branches."""
        if self.depthwise:
            return branches * self.out_of_one
        return 1 if self.shared else branches

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        stride, weight, groups = self.stride, self.weight, self.groups
        if self.kernel_size == (1, 1):  # see `PointwiseConv2d`
            x, stride = thinned(x, stride), (1, 1)
        if branch is None:
            x = spread(x, self.branches if self.shared and self.depthwise else 1)
        else:
            weight, groups = weight[rows_of(branch, self.out_of_one)], self.groups_of(1)
        return F.conv2d(x, weight, None, stride, self.padding, 1, groups)


class BranchNorm2d(nn.BatchNorm2d):
    """BatchNorm of each channel of each branch; a `shared` one repeats its input."""

    def __init__(self, channels: int, branches: int = 1, shared: bool = False):
        super().__init__(channels * branches)
        self.branches, self.shared, self.of_one = branches, shared, channels

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        if branch is None:
            return super().forward(spread(x, self.branches if self.shared else 1))
        rows = rows_of(branch, self.of_one)
        assert self.running_mean is not None and self.running_var is not None and not self.training
        return F.batch_norm(
            x, self.running_mean[rows], self.running_var[rows], self.weight[rows], self.bias[rows], eps=self.eps
        )


class BranchLinear(nn.Linear):
    """A linear layer without bias in each branch: (B, n * in) -> (B, n * out); for one branch (B, in) -> (B, out)."""

    def __init__(self, in_features: int, out_features: int, branches: int = 1):
        super().__init__(in_features, out_features * branches, bias=False)
        self.branches, self.out_of_one = branches, out_features

    def forward(self, x: Tensor, branch: int | None = None) -> Tensor:
        if branch is not None:
            return F.linear(x, self.weight[rows_of(branch, self.out_of_one)])
        rows = x.unflatten(1, (self.branches, self.in_features)).transpose(0, 1)
        weight = self.weight.unflatten(0, (self.branches, self.out_of_one))
        return torch.bmm(rows, weight.transpose(1, 2)).transpose(0, 1).flatten(1)


class Fold:
    """Layers of a bank for inference, BatchNorm folded: of all branches side by side, or of one.

    Args:
        branch: which; None for the whole bank.
        store: folded weights of whole banks, filled here and used again by other folds of the same bank.
    """

    def __init__(self, branch: int | None = None, store: dict[nn.Module, tuple[Tensor, Tensor]] | None = None):
        self.branch = branch
        self.store = {} if store is None else store

    def conv(self, conv: BranchConv2d, norm: BranchNorm2d | None) -> InferenceConv:
        """The convolution with the norm behind it, if there is one."""
        if norm is None:
            norm = BranchNorm2d(conv.out_of_one, conv.branches).to(conv.weight.device).eval()
            norm.eps = 0.0
        if self.branch is None:
            return fold_conv(conv, norm)
        if conv not in self.store:
            self.store[conv] = fold_batch_norm(conv, norm)
        weight, bias = (self.rows(tensor, conv.out_of_one) for tensor in self.store[conv])
        geometry = copy.copy(conv)
        geometry.groups = conv.groups_of(1)
        return inference_conv(geometry, weight, bias)

    def rows(self, values: Tensor, size: int) -> Tensor:
        """The entries of the branch in (n * size, ...)."""
        return values if self.branch is None else values[rows_of(self.branch, size)]

    def copies(self, branches: int, shared: bool) -> int:
        """How often the input of a layer in a bank of `branches` is repeated."""
        return branches if shared and self.branch is None else 1


def run_branches(x: Tensor, executed: Tensor, run: Callable[[int, Tensor], Tensor]) -> Pairs | None:
    """Run each branch on the images that execute it, and on no other.

    Args:
        x: features (B, C, H, W), channels-last for speed.
        executed: bool (B, n).
        run: (branch, features of its images) -> outputs, one row an image; it must not write to the features.

    Returns:
        Outputs of the P executed (image, branch) pairs, sorted by branch, with the image and the branch of each, int64
        (P,); None if no pair is executed.
    """
    branches, images = executed.T.nonzero(as_tuple=True)
    counts = executed.sum(0).tolist()
    outputs, start = [], 0
    for branch, count in enumerate(counts):
        if count:
            outputs.append(run(branch, take_rows(x, images[start : start + count])))
            start += count
    return (torch.cat(outputs), images, branches) if outputs else None


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Some images of (B, C, H, W) in ascending order, in channels-last memory; `x` itself if they are all."""
    if len(rows) == len(x):
        return x
    _, channels, height, width = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(len(x), -1).index_select(0, rows)
    return flat.view(len(rows), height, width, channels).permute(0, 3, 1, 2)
