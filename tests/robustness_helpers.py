"""Small networks that are trained on the embedded digits once in a test run, for the tests of attacks."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.data import ImageSource, Preprocess, open_splits
from dataeff.nas.threat import NormalizedModel


def conv_norm(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def small_vgg() -> nn.Module:
    """VGG with batch normalisation: two blocks of two convolutions."""
    return nn.Sequential(
        *conv_norm(1, 16),
        *conv_norm(16, 16),
        nn.MaxPool2d(2),
        *conv_norm(16, 32),
        *conv_norm(32, 32),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_norm(channels, channels), *conv_norm(channels, channels)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def small_resnet() -> nn.Module:
    return nn.Sequential(
        *conv_norm(1, 16),
        Residual(16),
        nn.MaxPool2d(2),
        *conv_norm(16, 32),
        Residual(32),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


BUILDERS = {"vgg": small_vgg, "resnet": small_resnet}


@cache
def digits() -> tuple[ImageSource, ImageSource]:
    """600 images to train on, and 837 to attack."""
    source = open_splits("digits?val=0").train
    return source.subset(range(600)), source.subset(range(600, len(source)))


def images_and_labels(source: ImageSource) -> tuple[Tensor, Tensor]:
    """Pixels (N, C, H, W) in [0, 1], labels int64 (N,)."""
    return source.images(range(len(source))).float() / 255, torch.from_numpy(source.labels)


@cache
def trained(kind: str, seed: int = 0, epochs: int = 8) -> NormalizedModel:
    """A trained network with its normalisation, in evaluation mode. Do not change it: tests share it."""
    statistics = Preprocess.fit(digits()[0])
    x, y = images_and_labels(digits()[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NormalizedModel(BUILDERS[kind](), statistics.mean, statistics.std)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                loss = F.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent."""
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())
