"""Losses and scores of the self-supervised tasks against cases worked out by hand and independent references."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.pretraining.autoencoder import ConvDecoder, ConvEncoder, standard_normal
from dataeff.pretraining.deepcluster import whitening
from dataeff.pretraining.scan import balanced_weights, entropy, scan_loss
from dataeff.pretraining.simclr import nt_xent, score_single_pair, score_with_negatives, unit
from dataeff.pretraining.vae import kl_to_standard_normal

# --- SimCLR -----------------------------------------------------------------------------------------------------------


def written_out(first: Tensor, second: Tensor, temperature: float) -> float:
    """NT-Xent as the paper prints it, pair by pair."""
    z = torch.cat([first, second]).double()
    count = len(first)

    def sim(i: int, j: int) -> float:
        return float(z[i] @ z[j] / (z[i].norm() * z[j].norm())) / temperature

    total = 0.0
    for k in range(count):
        for i, j in ((k, k + count), (k + count, k)):
            total -= sim(i, j) - math.log(sum(math.exp(sim(i, m)) for m in range(2 * count) if m != i))
    return total / (2 * count)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_is_the_formula_written_out(temperature: float) -> None:
    first, second = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)) * 3
    assert float(nt_xent(first, second, temperature)) == pytest.approx(
        written_out(first, second, temperature), rel=1e-5
    )


def test_nt_xent_of_two_orthogonal_pairs_is_known() -> None:
    views = torch.eye(2)
    # Each anchor: the positive at cosine 1, two negatives at cosine 0.
    assert float(nt_xent(views, views, 1.0)) == pytest.approx(math.log(1 + 2 / math.e), rel=1e-6)


def test_nt_xent_does_not_care_for_the_length_of_embeddings_or_the_order_of_the_views() -> None:
    first, second = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    expected = nt_xent(first, second, 0.5)
    torch.testing.assert_close(nt_xent(7 * first, second / 3, 0.5), expected)
    torch.testing.assert_close(nt_xent(second, first, 0.5), expected)


def test_nt_xent_refuses_a_batch_of_one_image() -> None:
    with pytest.raises(ValueError, match="at least 2 images in a batch, got 1: there are no negatives"):
        nt_xent(torch.ones(1, 3), torch.ones(1, 3), 0.5)


def test_an_embedding_of_zeros_has_a_finite_loss_and_gradient() -> None:
    first = torch.randn(4, 3)
    first[1] = 0
    first.requires_grad_(True)
    loss = nt_xent(first, torch.randn(4, 3), 0.1)
    loss.backward()
    assert first.grad is not None
    assert math.isfinite(float(loss.detach())) and bool(torch.isfinite(first.grad).all())


def test_the_score_is_the_contrastive_loss_of_an_image_against_the_references() -> None:
    anchor = torch.tensor([[1.0, 0.0]])
    copies = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # the first like the image, the second orthogonal to it
    references = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    score = score_with_negatives(anchor, copies, copies @ references.T / 0.5, 0.5)
    # Copy 1: positive e^2, negatives e^0 and e^-2. Copy 2: positive e^0, negatives e^2 and e^0.
    one = -math.log(math.e**2 / (math.e**2 + 1 + math.e**-2))
    two = -math.log(1 / (1 + math.e**2 + 1))
    assert score.tolist() == pytest.approx([(one + two) / 2], rel=1e-6)


def test_a_single_pair_has_no_score_but_rounding() -> None:
    z = unit(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)))
    copies = unit(z + 0.3 * torch.randn(3, 500, 32, generator=torch.Generator().manual_seed(1)))
    scores = score_single_pair(z, copies, 0.5)
    assert float(scores.abs().max()) < 1e-6
    assert float(score_with_negatives(z, copies, copies @ z[:100].T / 0.5, 0.5).std()) > 1e-3


# --- VAE --------------------------------------------------------------------------------------------------------------


def test_kl_is_that_of_normal_distributions() -> None:
    mu, log_variance = torch.tensor([[0.0, 1.0, -2.0]]), torch.tensor([[0.0, 0.0, 1.5]])
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl_to_standard_normal(mu, log_variance), reference)
    assert kl_to_standard_normal(mu, log_variance)[0, :2].tolist() == pytest.approx([0.0, 0.5])


def test_uniform_draws_become_standard_normal_ones() -> None:
    draws = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    normal = standard_normal(draws)
    assert abs(float(normal.mean())) < 0.01 and float(normal.std()) == pytest.approx(1, abs=0.01)
    assert standard_normal(torch.tensor([0.5, 0.975])).tolist() == pytest.approx([0.0, 1.96], abs=1e-3)
    assert bool(torch.isfinite(standard_normal(torch.tensor([0.0, 1.0]))).all())


@pytest.mark.parametrize("side", [8, 11, 28, 32, 64])
def test_the_decoder_undoes_the_sizes_of_the_encoder(side: int) -> None:
    widths = (2, 3, 4, 5)
    features = ConvEncoder((3, side, side + 1), widths)(torch.rand(2, 3, side, side + 1))
    assert features.shape[1] == ConvEncoder((3, side, side + 1), widths).features
    images = ConvDecoder((3, side, side + 1), widths, 7, bounded=True)(torch.randn(2, 7))
    assert images.shape == (2, 3, side, side + 1) and float(images.detach().abs().max()) <= 1


def test_images_of_32_pixels_have_the_features_of_the_source() -> None:
    assert ConvEncoder((3, 32, 32), (32, 64, 128, 256)).features == 1024
    assert ConvEncoder((3, 64, 64), (32, 64, 128, 256)).features == 256 * 4 * 4


# --- SCAN -------------------------------------------------------------------------------------------------------------


def test_the_scan_loss_is_agreement_of_neighbours_less_weighted_entropy() -> None:
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    q = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    loss, consistency = scan_loss(p.log(), q.log(), 5.0)
    agreement = -(math.log(0.8 * 0.5 + 0.2 * 0.5) + math.log(0.4 * 0.1 + 0.6 * 0.9)) / 2
    spread = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))  # of the mean prediction of the anchors
    assert float(consistency) == pytest.approx(agreement, rel=1e-5)
    assert float(loss) == pytest.approx(agreement - 5 * spread, rel=1e-5)


def test_certain_clusters_leave_loss_and_entropy_finite() -> None:
    logits = torch.tensor([[1000.0, -1000.0], [1000.0, -1000.0]], requires_grad=True)
    loss, _ = scan_loss(logits, -logits, 5.0)
    loss.backward()
    assert logits.grad is not None
    assert math.isfinite(float(loss.detach())) and bool(torch.isfinite(logits.grad).all())
    assert float(entropy(torch.tensor([1.0, 0.0]))) == pytest.approx(0, abs=1e-6)


def test_weights_balance_the_clusters_and_tolerate_one_without_images() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    weights = balanced_weights(labels, 4)
    assert float(weights[:3].sum()) == pytest.approx(float(weights[3]))
    assert float(weights.mean()) == pytest.approx(1)
    torch.testing.assert_close(balanced_weights(torch.tensor([1, 1]), 3), torch.ones(2))


# --- DeepCluster ------------------------------------------------------------------------------------------------------


def test_whitened_features_are_uncorrelated_and_of_variance_one() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
    mean, projection = whitening(features, 4)
    white = (torch.from_numpy(features) - mean) @ projection
    assert white.shape == (500, 4)
    torch.testing.assert_close(white.T @ white / 500, torch.eye(4), atol=2e-3, rtol=0)


def test_directions_without_variance_do_not_explode() -> None:
    features = np.zeros((50, 5), np.float32)
    features[:, 0] = np.arange(50)
    mean, projection = whitening(features, 256)
    white = (torch.from_numpy(features) - mean) @ projection
    assert white.shape == (50, 5) and float(white.abs().max()) < 10
    assert bool(torch.isfinite(F.normalize(white, dim=1)).all())
