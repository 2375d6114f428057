"""Whether calibration data can be trusted: over-confidence, entropy histograms, leakage (spec idk_cascades 2.10)."""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dataeff.cascades.idk.search import Floats
from dataeff.cascades.idk.uncertainty import check_probabilities, entropy

LEAKAGE_GAP = 0.03


@dataclass(frozen=True)
class EntropyHistogram:
    """Share of images in each bin of entropy: edges (bins + 1,) in nats, and one row of shares (bins,) a set."""

    edges: Floats
    train: Floats
    held_out: Floats


def entropy_histogram(train: Tensor, held_out: Tensor, bins: int = 30) -> EntropyHistogram:
    """Histograms of a model's entropies over 0..ln k, on its training images and on others; probabilities (n, k)."""
    sets = [check_probabilities(train, "train"), check_probabilities(held_out, "held-out")]
    edges = np.linspace(0, math.log(train.shape[1]), bins + 1)
    shares = [np.histogram(entropy(table).numpy().clip(0, edges[-1]), edges)[0] / len(table) for table in sets]
    return EntropyHistogram(edges, *shares)


def overconfidence_gap(train: Tensor, held_out: Tensor) -> float:
    """Mean entropy on held-out images less that on training images, in nats; far above 0 for an over-fitted model."""
    means = [float(entropy(check_probabilities(table)).mean()) for table in (train, held_out)]
    return means[1] - means[0]


def warn_of_leakage(name: str, calibration: float, images: int, held_out: float) -> None:
    """Warn when a model is more accurate on the calibration set than on held-out images by more than 3 points.

    A small calibration set differs by chance; two standard errors are allowed for.

    Args:
        calibration, held_out: accuracies. images: of the calibration set.
    """
    chance = 2 * math.sqrt(held_out * (1 - held_out) / images)
    if calibration - held_out > max(LEAKAGE_GAP, chance):
        warnings.warn(
            f"calibration leakage: {name} has accuracy {calibration:.3f} on the calibration set and {held_out:.3f} on "
            "held-out images, so it has probably been trained on the former and its entropies there are too low; "
            "calibrate on images that it has not seen",
            stacklevel=3,
        )
