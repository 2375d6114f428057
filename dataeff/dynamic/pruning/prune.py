"""One pass over a trained network that decides what is removed, block by block."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.dynamic.pruning.criteria import (
    contributions,
    entropy_scores,
    keep_largest,
    l1_scores,
    lasso_channels,
    reconstructed_weight,
    thinet_channels,
    thinet_scales,
)
from dataeff.dynamic.pruning.model import PrunableResNet
from dataeff.nn.backbone import residual_blocks
from dataeff.nn.positions import PaddedRows

Criterion = Literal["l1", "entropy", "lasso", "thinet"]


@torch.no_grad()
def prune_channels(
    model: PrunableResNet,
    criterion: Criterion,
    counts: Mapping[str, int],
    images: Tensor,
    positions: int = 10,
    seed: int = 0,
) -> None:
    """Set the masks of `model`, and for "lasso" and "thinet" the weights of the layers that read what is left.

    "l1" and "entropy" judge the trained network. "lasso" and "thinet" go from the first layer to the last: each layer's
    input is that of the network pruned so far. "lasso" reconstructs the output of the trained network, "thinet" that of
    the network pruned so far.

    Args:
        model: trained, in evaluation mode, nothing removed yet.
        counts: channels to keep in each layer.
        images: calibration images (N, C, H, W), on the model's device.
        positions: sampled in each image by "lasso" and "thinet".
        seed: of these positions.
    """
    generator = torch.Generator().manual_seed(seed)
    x = trained = model.backbone.stem(images)
    for number, block in enumerate(residual_blocks(model.backbone)):
        inputs, outputs = [trained], []  # of the block's convolutions in the trained network
        for conv, norm in zip(block.convs, block.norms, strict=True):
            outputs.append(conv(inputs[-1]))
            inputs.append(F.relu(norm(outputs[-1])))
        trained = F.relu(block.norms[-1](outputs[-1]) + block.shortcut(trained))
        inner = x
        for position, conv in enumerate(list(block.convs)[:-1]):
            assert isinstance(conv, nn.Conv2d)
            name = f"{number}_{position}"
            inner = F.relu(block.norms[position](conv(inner)))
            if criterion == "l1":
                kept = keep_largest(l1_scores(conv.weight), counts[name])
            elif criterion == "entropy":
                kept = keep_largest(entropy_scores(inputs[position + 1].mean((2, 3))), counts[name])
            else:
                sample = _Sample(inner, block.convs[position + 1], outputs[position + 1], positions, generator)
                kept = sample.reconstruct(criterion, counts[name])
            model.keep(name, kept)
            inner = inner * model.mask(name).view(1, -1, 1, 1)
        x = model.run_block(number, x)


class _Sample:
    """Input patches (n, k*k, C) of a convolution and its wanted output (n, C') at the same random positions."""

    def __init__(self, inputs: Tensor, conv: nn.Module, wanted: Tensor, positions: int, generator: torch.Generator):
        assert isinstance(conv, nn.Conv2d)
        self.conv = conv
        count, _, height, width = wanted.shape
        places = torch.randint(height * width, (count, positions), generator=generator).flatten()
        image = torch.arange(count).repeat_interleave(positions)
        where = torch.stack([image, places // width, places % width], 1).to(inputs.device)
        rows, kernel = PaddedRows(inputs), conv.kernel_size[0]
        patches = rows.patches(rows.row_of(where, conv.stride[0]), kernel)
        self.patches = patches.view(len(where), kernel * kernel, inputs.shape[1])
        self.wanted = wanted[where[:, 0], :, where[:, 1], where[:, 2]]

    def reconstruct(self, criterion: Criterion, count: int) -> Tensor:
        """Change the convolution's weights for `count` input channels, which are returned."""
        weight = self.conv.weight
        moments = contributions(self.patches, weight, self.wanted)
        if criterion == "lasso":
            kept = lasso_channels(moments, count)
            weight.copy_(reconstructed_weight(self.patches, kept, self.wanted, weight))
        else:
            kept = thinet_channels(moments, count)
            scales = thinet_scales(moments, kept).to(weight.dtype)
            index = kept.to(weight.device)
            weight[:, index] = weight[:, index] * scales.view(1, -1, 1, 1)
        return kept
