"""Collaborative layers that compute nothing where their companion is zero."""

import torch
from torch import Tensor, nn

from dataeff.dynamic.lccl.model import Companion, Counter, LcclOutput, LcclResNet
from dataeff.nn.backbone import residual_blocks
from dataeff.nn.fold import FoldedResNet, InferenceConv, channels_last, fold_conv
from dataeff.nn.positions import PaddedRows, PositionConv, list_positions
from dataeff.nn.resnet import ResidualBlock


class LcclInference:
    """Evaluation-mode `LcclResNet`; a position whose companions are all zero is not computed.

    Args:
        model: in evaluation mode, on the device to run on; its weights are copied.

    Raises:
        ValueError: for a model in training mode or without BatchNorm.
    """

    def __init__(self, model: LcclResNet):
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() before LcclInference(model)")
        self.model = model
        self.network = FoldedResNet(model.backbone)
        self.blocks = [_fold(model, b, block) for b, block in enumerate(residual_blocks(model.backbone))]

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> LcclOutput:
        """Images float (B, C, H, W) -> what `LcclResNet` returns in evaluation mode, within rounding.

        Raises:
            ValueError: for images that `ResNet.check_images` refuses.
        """
        network = self.network
        network.check_images(x)
        counter = Counter(self.model, len(x), x.shape[2], x.shape[3], x.device)
        x = network.stem(x)
        for block, convs in zip(network.blocks, self.blocks, strict=True):
            shortcut = channels_last(block.shortcut(x))
            for number, conv in enumerate(convs):
                last = number + 1 == len(convs)
                x = conv(x, counter) if isinstance(conv, _SparseConv) else conv(x, False)
                x = x.add_(shortcut).relu_() if last else x.relu_()
        return counter.output(network.classify(x))


class _SparseConv:
    """A convolution with its companion, and the norm behind it: scale * (conv * companion) + shift."""

    def __init__(self, conv: nn.Module, norm: nn.Module, companion: Companion):
        assert isinstance(conv, nn.Conv2d)
        self.layer = conv
        self.companion = fold_conv(companion.conv, companion.norm)
        self.conv = PositionConv(conv, norm)

    def __call__(self, x: Tensor, counter: Counter) -> Tensor:
        companion = channels_last(self.companion(x, True))
        counter.add(self.layer, companion)
        count, _, height, width = companion.shape
        channels = self.conv.out_channels
        rows = self.conv.bias.expand(count * height * width, channels).contiguous()
        positions = list_positions((companion > 0).any(1, keepdim=True))
        if len(positions):
            image, y, place = positions.unbind(1)
            index = (image * height + y) * width + place
            weights = companion.permute(0, 2, 3, 1).reshape(len(rows), -1).index_select(0, index)
            values = self.conv.scaled(PaddedRows(x), positions).mul_(weights).add_(self.conv.bias)
            rows.index_copy_(0, index, values)
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def _fold(model: LcclResNet, number: int, block: ResidualBlock) -> "list[_SparseConv | InferenceConv]":
    convs: list[_SparseConv | InferenceConv] = []
    for position, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
        companion = model.companion_of(number, position)
        assert isinstance(conv, nn.Conv2d)
        convs.append(fold_conv(conv, norm) if companion is None else _SparseConv(conv, norm, companion))
    return convs
