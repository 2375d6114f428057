"""The small-scale validation of spec idk_cascades section 8.1: three models on digits, and their probabilities."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

COSTS = (0.16, 0.34, 1.0)


@dataclass(frozen=True)
class Tables:
    """Probabilities of the fast, middle and accurate model, float32 (n, 10) each, and the labels of one set."""

    probabilities: tuple[Tensor, Tensor, Tensor]
    labels: NDArray[np.int64]

    def correct(self, model: int) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.probabilities[model].argmax(1).numpy() == self.labels
        return right

    def of(self, *models: int) -> list[Tensor]:
        return [self.probabilities[model] for model in models]


def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    fast = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    middle = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    accurate = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.5),  # not in the spec, whose accuracy of 0.987 it comes closer to
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )
    return fast, middle, accurate


def fit_network(network: nn.Module, images: Tensor, labels: Tensor, lr: float, steps: int) -> nn.Module:
    """Adam on mini-batches of 64; lr drops tenfold after 70 %."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.7 * steps)])
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@cache
def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """700 training, 500 calibration and 597 test images of a random permutation, float32 (n, 1, 8, 8) in 0..1."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = torch.from_numpy(data.images / 16).float()[:, None][order]
    labels = torch.from_numpy(data.target.astype(np.int64))[order]
    cuts = {"train": slice(0, 700), "calibration": slice(700, 1200), "test": slice(1200, None)}
    return {name: (images[cut], labels[cut]) for name, cut in cuts.items()}


@cache
def trained(seed: int) -> tuple[nn.Module, ...]:
    torch.manual_seed(seed)
    data = digits(seed)["train"]
    recipes = ((0.02, 400), (5e-3, 600), (3e-3, 500))
    return tuple(fit_network(net, *data, lr, steps) for net, (lr, steps) in zip(networks(), recipes, strict=True))


@cache
def tables(seed: int) -> dict[str, Tables]:
    found = {}
    for name, (images, labels) in digits(seed).items():
        fast, middle, accurate = (network(images).softmax(1).detach() for network in trained(seed))
        found[name] = Tables((fast, middle, accurate), labels.numpy())
    return found
