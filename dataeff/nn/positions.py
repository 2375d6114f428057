"""Convolutions at chosen positions of a feature map: gather the patches, multiply one matrix, scatter the results.

Gathering copies k*k*C numbers a position, and one matrix product computes a narrow layer (16 channels) less well than a
convolution does: on CPUs, half of the positions take less time than all of them from about 64 channels on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.nn.fold import fold_batch_norm

BORDER = 1  # the 3x3 and 1x1 convolutions of residual blocks need no more


class PaddedRows:
    """Features of B images as rows of C numbers, one a position, with a border of zero rows around each image.

    Neighbours within an image row lie behind each other, so a patch of k x k positions is k pieces of k*C numbers.

    Args:
        features: (B, C, H, W), copied.
    """

    def __init__(self, features: Tensor):
        self.count, self.channels, self.height, self.width = features.shape
        padded = F.pad(features.permute(0, 2, 3, 1), (0, 0, BORDER, BORDER, BORDER, BORDER))
        self.line = self.width + 2 * BORDER
        self.image = (self.height + 2 * BORDER) * self.line
        self.rows = padded.reshape(self.count * self.image, self.channels)

    @classmethod
    def zeros(cls, like: "PaddedRows", channels: int) -> "PaddedRows":
        """Zero features of the size of `like`."""
        return cls(like.rows.new_zeros(()).expand(like.count, channels, like.height, like.width))

    def row_of(self, positions: Tensor, stride: int = 1) -> Tensor:
        """Row of each position [image, y, x], int64 (P, 3), of an output with this stride."""
        image, y, x = positions.unbind(1)
        return image * self.image + (y * stride + BORDER) * self.line + x * stride + BORDER

    def patches(self, rows: Tensor, kernel: int) -> Tensor:
        """Patches around rows, (P, kernel * kernel * C), ordered by y, x, channel."""
        if kernel == 1:
            return self.rows.index_select(0, rows)
        reach = kernel // 2
        lines = torch.arange(-reach, reach + 1, device=rows.device) * self.line - reach
        pieces = self.rows.as_strided((max(0, len(self.rows) - kernel + 1), kernel * self.channels), (self.channels, 1))
        index = (rows[:, None] + lines).view(-1)
        return pieces.index_select(0, index).view(len(rows), kernel * kernel * self.channels)

    def features(self) -> Tensor:
        """(B, C, H, W), channels-last; a copy."""
        padded = self.rows.view(self.count, self.height + 2 * BORDER, self.line, self.channels)
        inner = padded[:, BORDER : BORDER + self.height, BORDER : BORDER + self.width]
        return inner.contiguous().permute(0, 3, 1, 2)


class PositionConv:
    """A convolution with its BatchNorm folded in, computed at single positions.

    Args:
        conv: kernel 1 or 3 that keeps the size at stride 1, without groups.
        norm: its BatchNorm in evaluation mode.

    Raises:
        ValueError: for a norm that mixes positions, such as GroupNorm, or another geometry.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module):
        kernel = conv.kernel_size[0]
        if not isinstance(norm, nn.BatchNorm2d):
            raise ValueError(f"single positions need norm='batch', got {type(norm).__name__}, which mixes positions")
        if kernel not in (1, 3) or conv.padding[0] != kernel // 2 or conv.groups != 1:
            raise ValueError(f"single positions need a 1x1 or 3x3 convolution that keeps the size, got {conv}")
        weight, self.bias = fold_batch_norm(conv, norm)
        self.kernel, self.stride = kernel, conv.stride[0]
        self.out_channels = conv.out_channels
        self.weight = weight.permute(2, 3, 1, 0).reshape(-1, conv.out_channels).contiguous()

    def __call__(self, features: PaddedRows, positions: Tensor) -> Tensor:
        """Output at positions [image, y, x] of the output map, (P, C')."""
        return self.scaled(features, positions).add_(self.bias)

    def scaled(self, features: PaddedRows, positions: Tensor) -> Tensor:
        """The same without `bias`, the part of the norm that is added."""
        return features.patches(features.row_of(positions, self.stride), self.kernel) @ self.weight


def dilate(active: Tensor, kernel: int) -> Tensor:
    """Positions that a convolution of this kernel reads to give the positions `active`, bool (B, 1, H, W)."""
    if kernel == 1:
        return active
    return F.max_pool2d(active.float(), kernel, 1, kernel // 2) > 0


def needed_positions(kernels: list[int], active: Tensor) -> list[Tensor]:
    """Where each of several convolutions in a row, stride 1, must be computed to give `active` of the last one.

    Args:
        kernels: of the convolutions, first to last.
        active: bool (B, 1, H, W).

    Returns:
        One bool (B, 1, H, W) for each convolution.
    """
    needed = [active]
    for kernel in reversed(kernels[1:]):
        needed.insert(0, dilate(needed[0], kernel))
    return needed


def list_positions(active: Tensor) -> Tensor:
    """[image, y, x] of the true entries of bool (B, 1, H, W), int64 (P, 3)."""
    return active[:, 0].nonzero()


def count_positions(active: Tensor) -> Tensor:
    """True entries of each image of bool (B, 1, H, W), float64 (B,)."""
    return active.flatten(1).sum(1).double()
