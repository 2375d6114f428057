"""Running a layer on those images of a batch that need it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Images = NDArray[np.int64]


class Workspace:
    """Two buffers that `FeatureRows` fills in turn, kept between batches because fresh memory is slow."""

    def __init__(self) -> None:
        self.buffers = [torch.empty(0), torch.empty(0)]

    def next(self, rows: int, like: Tensor) -> Tensor:
        """The buffer that was not handed out last, as (rows, width) with width, type and device of `like`."""
        self.buffers.reverse()
        size = rows * like.shape[1]
        buffer = self.buffers[0]
        if buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self.buffers[0] = like.new_empty(size)
        return buffer[:size].view(rows, like.shape[1])


class FeatureRows:
    """Features of B images, of which any part can be replaced for the price of one copy.

    Gathering a part and scattering the result back costs two passes over memory, and scattering is the slow one. Here
    the gathered copy stays where it is and becomes the images' features: each image has a row, `take` copies the rows
    of the chosen images behind all others, and the caller overwrites them there. When the memory is full, one copy
    into another buffer of the same size drops the rows that nobody needs any more.

    Args:
        features: (B, C, H, W), channels-last; used and overwritten, not copied, as long as all images take part.
        workspace: may be shared by rows that are not in use at the same time.
    """

    SIZE = 2  # memory in multiples of the batch

    def __init__(self, features: Tensor, workspace: Workspace):
        self.shape = features.shape
        self.count = len(features)
        self.memory = features.permute(0, 2, 3, 1).reshape(self.count, features[:1].numel())
        self.workspace = workspace
        self.row_of_image = np.arange(self.count)
        self.end = self.count
        self.in_order = True
        self.all_rows = self._view(0, self.count)

    def ordered(self) -> Tensor:
        """Features of all images in order, (B, C, H, W); writing to them replaces them."""
        if not self.in_order:
            self._relocate(np.arange(self.count))
            self.in_order = True
            self.all_rows = self._view(0, self.count)
        return self.all_rows

    def take(self, images: Images) -> Tensor:
        """Features (n, C, H, W) of some images; writing to them replaces these images' features.

        `images` is ascending and without repeats. The tensor is valid until the next call of a method.
        """
        if len(images) == self.count:
            return self.ordered()
        end = self.end + len(images)
        if end > len(self.memory):
            others = np.ones(self.count, dtype=bool)
            others[images] = False
            self._relocate(np.concatenate([images, others.nonzero()[0]]))
            self.in_order = False
            return self._view(0, len(images))
        free = self.memory[self.end : end]
        torch.index_select(self.memory[: self.end], 0, self._index(self.row_of_image[images]), out=free)
        self.row_of_image[images] = np.arange(self.end, end)
        self.end, start = end, self.end
        self.in_order = False
        return self._view(start, end)

    def _relocate(self, order: Images) -> None:
        """Copy the rows of all images, in this order, to the start of the other buffer."""
        memory = self.workspace.next(self.SIZE * self.count, self.memory)
        torch.index_select(self.memory, 0, self._index(self.row_of_image[order]), out=memory[: self.count])
        self.memory = memory
        self.row_of_image[order] = np.arange(self.count)
        self.end = self.count

    def _index(self, rows: Images) -> Tensor:
        return torch.from_numpy(rows).to(self.memory.device)

    def _view(self, start: int, end: int) -> Tensor:
        _, channels, height, width = self.shape
        return self.memory[start:end].view(end - start, height, width, channels).permute(0, 3, 1, 2)
