"""What each pruning criterion removes, on hand-made cases and against independent solutions."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from dataeff.dynamic.pruning.criteria import (
    contributions,
    entropy_scores,
    keep_largest,
    l1_scores,
    lasso_channels,
    proximal_step,
    reconstructed_weight,
    soft_threshold,
    thinet_channels,
    thinet_scales,
)


def layer(samples: int = 300, channels: int = 6, outputs: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (n, 9, C), a weight (C', C, 3, 3) and the layer's output (n, C')."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(samples, 9, channels, generator=generator)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator)
    return patches, weight, torch.einsum("nuc,ocu->no", patches, weight.flatten(2))


def test_l1_scores_are_sums_of_absolute_weights() -> None:
    weight = torch.zeros(3, 2, 3, 3)
    weight[0, 0, 0, 0], weight[1, 1] = -5.0, 0.5
    assert l1_scores(weight).tolist() == [5.0, 4.5, 0.0]
    assert keep_largest(l1_scores(weight), 2).tolist() == [0, 1]


def test_the_kept_filters_are_the_largest_in_ascending_order_and_ties_keep_the_earlier() -> None:
    assert keep_largest(torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0]), 4).tolist() == [0, 1, 2, 3]


def test_entropy_is_zero_for_a_constant_filter_and_log_bins_for_a_uniform_one() -> None:
    pooled = torch.stack([torch.full((400,), 0.7), torch.linspace(0, 1, 400), (torch.arange(400) % 2).float()], 1)
    assert entropy_scores(pooled).tolist() == pytest.approx([0.0, math.log(100), math.log(2)], abs=1e-6)


def test_contributions_are_the_moments_of_what_each_channel_adds() -> None:
    patches, weight, output = layer(700)
    z = torch.einsum("nuc,ocu->noc", patches.double(), weight.flatten(2).double()).flatten(0, 1)
    found = contributions(patches, weight, output)
    torch.testing.assert_close(found.gram, z.T @ z)
    torch.testing.assert_close(found.correlation, z.T @ output.double().flatten())
    assert found.rows == 700 * 4


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_lasso_keeps_the_channels_of_scikit_learns_lasso(count: int) -> None:
    patches, weight, output = layer()
    weight = weight * torch.tensor([3.0, 0.1, 2.0, 0.5, 1.0, 0.2]).view(1, -1, 1, 1)
    output = torch.einsum("nuc,ocu->no", patches, weight.flatten(2))
    kept = lasso_channels(contributions(patches, weight, output), count)
    z = torch.einsum("nuc,ocu->noc", patches.double(), weight.flatten(2).double()).flatten(0, 1).numpy()
    for alpha in np.geomspace(10, 1e-6, 400):
        on = np.flatnonzero(Lasso(alpha, fit_intercept=False, tol=1e-8).fit(z, output.flatten().numpy()).coef_)
        if len(on) >= count:
            break
    assert len(on) == count and kept.tolist() == on.tolist()


def test_thinet_removes_the_channels_with_the_least_effect() -> None:
    patches, weight, output = layer()
    weight[:, [1, 4]] *= 0.01
    moments = contributions(patches, weight, output)
    assert thinet_channels(moments, 4).tolist() == [0, 2, 3, 5]
    assert thinet_channels(moments, 6).tolist() == list(range(6))
    # One greedy removal is the best one.
    best = min(range(6), key=lambda c: float(moments.gram[c, c]))
    assert best not in thinet_channels(moments, 5).tolist()


def test_thinets_greedy_choice_counts_channels_that_cancel_each_other() -> None:
    gram = torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.1, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    moments = type("Moments", (), {"gram": gram})()
    # 2 is the smallest by itself; after it 0 (4.0) and then 1, since 0 and 1 cancel.
    assert thinet_channels(moments, 2).tolist() == [0, 1]
    gram[2, 2] = 4.05
    assert thinet_channels(moments, 1).tolist() == [2]
    pairs = {pair: float(gram[list(pair)][:, list(pair)].sum()) for pair in itertools.combinations(range(3), 2)}
    assert min(pairs, key=lambda pair: pairs[pair]) == (0, 1)


def test_what_thinet_keeps_gives_the_output_better_than_most_other_channels_would() -> None:
    patches, weight, output = layer()
    gram = contributions(patches, weight, output).gram

    def error(kept: tuple[int, ...]) -> float:
        gone = [c for c in range(6) if c not in kept]
        return float(gram[gone][:, gone].sum())

    errors = sorted(error(kept) for kept in itertools.combinations(range(6), 3))
    found = thinet_channels(contributions(patches, weight, output), 3)
    assert error(tuple(found.tolist())) <= errors[2]


def test_thinets_scales_are_the_least_squares_factors() -> None:
    patches, weight, output = layer()
    z = torch.einsum("nuc,ocu->noc", patches.double(), weight.flatten(2).double()).flatten(0, 1)
    kept = torch.tensor([0, 2, 5])
    expected = torch.linalg.lstsq(z[:, kept], z.sum(1, keepdim=True)).solution[:, 0]
    found = thinet_scales(contributions(patches, weight, output), kept)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_reconstruction_gives_back_a_layer_that_needs_only_the_kept_channels_and_beats_plain_removal() -> None:
    patches, weight, output = layer()
    kept = torch.tensor([0, 2, 5])
    sparse = weight.clone()
    sparse[:, [1, 3, 4]] = 0
    wanted = torch.einsum("nuc,ocu->no", patches, sparse.flatten(2))
    torch.testing.assert_close(reconstructed_weight(patches, kept, wanted, weight), sparse, rtol=1e-2, atol=1e-2)
    new = reconstructed_weight(patches, kept, output, weight)
    assert not new[:, [1, 3, 4]].any()
    error = (torch.einsum("nuc,ocu->no", patches, new.flatten(2)) - output).square().sum()
    removed = (wanted - output).square().sum()
    assert error < 0.5 * removed


def test_proximal_steps_reach_the_minimum_of_a_lasso_with_exact_zeros() -> None:
    target = torch.tensor([2.0, -0.3, 0.05, -1.0])
    factor, velocity = torch.ones(4), torch.zeros(4)
    iterate = factor
    for _ in range(300):
        factor, velocity, iterate = proximal_step(factor, factor - target, velocity, 0.1, 0.5, 0.9)
    torch.testing.assert_close(iterate, soft_threshold(target, 0.5), rtol=1e-4, atol=1e-5)
    assert iterate[1] == 0 and iterate[2] == 0
