"""Hand-crafted networks with torchvision's layers and names: ResNet, DenseNet and VGG-16-BN, for 224x224 or for CIFAR.

The CIFAR form (spec nas_adversarial_robustness section 2.4) begins with a 3x3 convolution of stride 1, keeps the 3x3
max-pool, and draws convolutions from Kaiming's fan-out normal distribution; VGG pools to 1x1 before its head. `width`
and `depth` multiply channels and repeats by the rule of compound scaling, so that a family can be made small.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import make_layers

from dataeff.nas.efficientnet import scaled_channels, scaled_repeats
from dataeff.nn.pointwise import PointwiseConv2d

Form = Literal["cifar", "imagenet"]

RESNETS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
}
DENSENETS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32)}
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions between pools


class ResNet(nn.Module):
    """torchvision's residual network with free widths: images (B, in_channels, H, W) -> logits (B, num_classes).

    Args:
        widths: channels of the four stages; the stem has those of the first.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        repeats: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_channels: int,
        form: Form,
    ) -> None:
        super().__init__()
        channels = widths[0]
        self.conv1 = _first_convolution(in_channels, channels, form)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage, (width, count) in enumerate(zip(widths, repeats, strict=True)):
            blocks: list[nn.Module] = []
            for position in range(count):
                stride = 2 if stage and not position else 1
                out = width * block.expansion
                shortcut = None
                if stride > 1 or channels != out:
                    shortcut = nn.Sequential(PointwiseConv2d(channels, out, stride), nn.BatchNorm2d(out))
                blocks.append(block(channels, width, stride, shortcut))
                channels = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        _draw_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Vgg(nn.Module):
    """torchvision's VGG with batch norm and free widths: images (B, in_channels, H, W) -> logits (B, num_classes)."""

    def __init__(
        self, layers: Sequence[tuple[int, int]], hidden: int, num_classes: int, in_channels: int, form: Form
    ) -> None:
        super().__init__()
        plan = [entry for channels, count in layers for entry in (*[channels] * count, "M")]
        self.features = make_layers(plan, batch_norm=True)
        self.features[0] = nn.Conv2d(in_channels, layers[0][0], 3, padding=1)
        side = 7 if form == "imagenet" else 1
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Linear(layers[-1][0] * side * side, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )
        _draw_convolutions(self)
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        if form == "cifar":
            _pool_to_one_pixel(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def resnet(layers: int, num_classes: int, in_channels: int, form: Form, width: float = 1, depth: float = 1) -> ResNet:
    """ResNet-18 or -50."""
    block, repeats = RESNETS[layers]
    return ResNet(
        block,
        [scaled_repeats(count, depth) for count in repeats],
        [scaled_channels(channels, width) for channels in (64, 128, 256, 512)],
        num_classes,
        in_channels,
        form,
    )


def densenet(
    layers: int, num_classes: int, in_channels: int, form: Form, width: float = 1, depth: float = 1
) -> DenseNet:
    """DenseNet-121 or -169: growth 32, compression 0.5."""
    stem = scaled_channels(64, width)
    first, second, third, fourth = (scaled_repeats(count, depth) for count in DENSENETS[layers])
    model = DenseNet(scaled_channels(32, width), (first, second, third, fourth), stem, num_classes=num_classes)
    model.features.conv0 = _first_convolution(in_channels, stem, form)
    if form == "cifar":
        _draw_convolutions(model)
        _pool_to_one_pixel(model)
    return model


def vgg16_bn(num_classes: int, in_channels: int, form: Form, width: float = 1, depth: float = 1) -> Vgg:
    """VGG-16 with batch norm."""
    layers = [(scaled_channels(channels, width), scaled_repeats(count, depth)) for channels, count in VGG16]
    return Vgg(layers, scaled_channels(4096, width), num_classes, in_channels, form)


def _first_convolution(in_channels: int, channels: int, form: Form) -> nn.Conv2d:
    if form == "cifar":
        return nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
    return nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)


def _draw_convolutions(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _pool_to_one_pixel(model: nn.Module) -> None:
    """Halve maps of odd sides too, down to one pixel; even sides, such as 32 to 2, are halved as ever."""
    for layer in model.modules():
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            layer.ceil_mode = True
