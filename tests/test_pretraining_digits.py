"""The CPU recipe on scikit-learn's digits (spec initial_pools_active_learning section 8)."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dataeff.metrics.clustering import purity
from dataeff.pretraining.clusters import KMeansOnFeatures
from dataeff.pretraining.fit import fit_pretext, restore_task
from dataeff.pretraining.settings import SimCLRConfig, VAEConfig


def pool(seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """1,200 digits and, for the test alone, their classes."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))[:1200]
    pixels = (digits.images[order] * (255 / 16)).round().astype(np.uint8)
    return torch.from_numpy(pixels)[:, None], digits.target[order]


@pytest.mark.slow
def test_simclr_finds_the_digits_and_only_the_score_with_negatives_tells_images_apart() -> None:
    images, classes = pool(0)
    task = fit_pretext(SimCLRConfig(), images, 0)
    assert purity(KMeansOnFeatures.fit(task, images, 10, 0).assign(images), classes) > 0.8
    assert task.loss_per_sample(images).std() > 1e-3
    single = restore_task(SimCLRConfig(score="single_pair"), (1, 8, 8), task.state_dict())
    assert np.abs(single.loss_per_sample(images)).max() < 1e-6


@pytest.mark.slow
def test_the_digits_that_a_vae_finds_hardest_are_of_few_classes() -> None:
    images, classes = pool(0)
    losses = fit_pretext(VAEConfig(), images, 0).loss_per_sample(images)
    counts = np.bincount(classes[np.argsort(-losses)[:60]], minlength=10)
    chance = np.bincount(np.random.default_rng(0).permutation(classes)[:60], minlength=10)
    assert counts.std() / counts.mean() > 1.5 * chance.std() / chance.mean()
