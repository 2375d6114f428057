"""Barlow Twins, the mixture with labels, and the distorted views."""

import math

import pytest
import torch
import torch.nn.functional as F

from dataeff.nas.self_supervised import VIEW_DRAWS, BarlowTwinsLoss, MixedSelfSupervisedLoss, distort


def embeddings(seed: int) -> torch.Tensor:
    return torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))


def test_the_loss_has_the_values_of_the_source_on_known_embeddings() -> None:
    loss, one = BarlowTwinsLoss(), embeddings(0)
    assert float(loss(one, one)) == pytest.approx(0.08, abs=0.01)
    assert float(loss(one, embeddings(1))) == pytest.approx(64.6, abs=4)
    same = one[:, :1].expand(-1, 64)
    assert float(loss(same, same)) == pytest.approx(5e-3 * 64 * 63, rel=1e-3)


def test_the_loss_is_that_of_the_formula_written_out() -> None:
    one, two = embeddings(2)[:16, :5], embeddings(3)[:16, :5] * 3 + 1
    expected = 0.0
    for i in range(5):
        for j in range(5):
            a, b = one[:, i], two[:, j]
            c = float(((a - a.mean()) * (b - b.mean())).mean() / (a.std(correction=0) * b.std(correction=0)))
            expected += (1 - c) ** 2 if i == j else 0.1 * c**2
    assert float(BarlowTwinsLoss(0.1)(one, two)) == pytest.approx(expected, rel=1e-5)
    assert float(BarlowTwinsLoss(0.1, normalize=True)(one, two)) == pytest.approx(expected / 5, rel=1e-5)


def test_features_that_do_not_vary_are_counted_and_leave_the_loss_finite() -> None:
    loss, one = BarlowTwinsLoss(), embeddings(0).clone()
    one[:, 3] = 2.0
    one.requires_grad_(True)
    value = loss(one, embeddings(1))
    value.backward()
    assert int(loss.constant_features) == 1 and math.isfinite(float(value.detach()))
    assert one.grad is not None and bool(torch.isfinite(one.grad).all())


def test_a_single_image_cannot_be_standardised() -> None:
    with pytest.raises(ValueError, match="needs at least 2 images on a worker, got 1"):
        BarlowTwinsLoss()(torch.ones(1, 4), torch.ones(1, 4))


def test_the_mixture_is_convex_and_averages_the_cross_entropy_over_both_views() -> None:
    logits = [torch.randn(8, 3) for _ in range(2)]
    outputs = [(logits[i], embeddings(i)[:8]) for i in range(2)]
    labels = torch.arange(8) % 3
    entropy = (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)) / 2
    barlow = BarlowTwinsLoss()(outputs[0][1], outputs[1][1])
    for factor in (0.25, 0.5, 1.0):
        mixed = MixedSelfSupervisedLoss(factor, BarlowTwinsLoss())(outputs, labels)
        torch.testing.assert_close(mixed, factor * barlow + (1 - factor) * entropy)


def test_only_the_pure_self_supervised_loss_does_without_labels() -> None:
    outputs = [(torch.randn(8, 3), embeddings(i)[:8]) for i in range(2)]
    assert bool(torch.isfinite(MixedSelfSupervisedLoss(1.0, BarlowTwinsLoss())(outputs, None)))
    with pytest.raises(ValueError, match="ss_factor = 0.5 needs labels"):
        MixedSelfSupervisedLoss(0.5, BarlowTwinsLoss())(outputs, None)
    with pytest.raises(ValueError, match="ss_factor = 1.5 must be from 0"):
        MixedSelfSupervisedLoss(1.5, BarlowTwinsLoss())


NEUTRAL = torch.full((VIEW_DRAWS,), 0.9)  # beyond every probability: no flip, perspective, jitter, grey or erasing


def view(images: torch.Tensor, **changes: float) -> torch.Tensor:
    draws = NEUTRAL.repeat(len(images), 1)
    draws[:, 1:3] = 0.5  # the crop in the middle
    for name, value in changes.items():
        draws[:, int(name[1:])] = value
    return distort(images, draws)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_without_any_distortion_is_the_image(channels: int) -> None:
    images = torch.rand(2, channels, 16, 12)
    torch.testing.assert_close(view(images), images, atol=1e-4, rtol=0)


def test_flip_crop_grey_and_erasing_do_what_they_say() -> None:
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(view(images, u0=0.1), images.flip(3), atol=1e-4, rtol=0)
    moved = view(images, u1=0.0, u2=0.999)  # two pixels to the left, two down
    torch.testing.assert_close(moved[:, :, :-2, 2:], images[:, :, 2:, :-2], atol=1e-4, rtol=0)
    grey = view(images, u18=0.1)
    torch.testing.assert_close(grey[:, 0], grey[:, 1])
    erased = view(images, u19=0.1)
    share = float((erased == 0).float().mean())
    assert 0.02 <= share <= 0.25


def test_every_distortion_changes_the_image_and_stays_in_range() -> None:
    images = torch.rand(2, 3, 16, 16)
    for place in (0, 3, 12, 18, 19):
        changed = view(images, **{f"u{place}": 0.1})
        assert float((changed - images).abs().max()) > 0.05
        assert float(changed.min()) >= -1e-5 and float(changed.max()) <= 1 + 1e-5


def test_a_view_is_a_function_of_its_own_draws() -> None:
    images, draws = torch.rand(4, 3, 8, 8), torch.rand(4, VIEW_DRAWS)
    torch.testing.assert_close(distort(images, draws)[2:], distort(images[2:], draws[2:]))
