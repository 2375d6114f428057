"""VAAL: the discriminator tells labelled images from others; losses by hand; resumable bit for bit."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.active.queries import QUERIES, ALContext
from dataeff.active.vaal import LOG_VARIANCE, VaalConfig, VaalTraining, Vae, build_discriminator, vae_loss
from dataeff.core.config import parse_config

SMALL = VaalConfig(epochs=4, batch=16, latent=8, widths=(8, 8, 16, 16), hidden=32)


def images_of_two_kinds(size: int = 120) -> Tensor:
    """The first half bright at the top, the other half at the bottom, with noise; (N, 1, 8, 8) in [-1, 1]."""
    images = 0.3 * torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    images[: size // 2, :, :4] += 1
    images[size // 2 :, :, 4:] += 1
    return images.clamp(-1, 1)


def training(config: VaalConfig = SMALL, seed: int = 3, labelled: int = 30) -> VaalTraining:
    """Labelled images are all of the first kind; unlabelled ones of both."""
    images = images_of_two_kinds()
    return VaalTraining(
        lambda rows: images[torch.from_numpy(rows)], np.arange(labelled), np.arange(labelled, 120), config, seed
    )


def finish(run: VaalTraining, steps: int | None = None) -> VaalTraining:
    while run.steps_done < (run.total_steps if steps is None else steps):
        run.step()
    return run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_discriminator_finds_labelled_images_more_labelled_than_others(seed: int) -> None:
    run = finish(training(SMALL.model_copy(update={"epochs": 20}), seed))
    everyone = run.labelledness(np.arange(120))
    labelled, unlabelled, other_kind = everyone[:30], everyone[30:], everyone[60:]
    assert labelled.mean() > unlabelled.mean() and everyone.dtype == np.float64
    assert (labelled[:, None] > other_kind).mean() > 0.9
    # The query leaves alone what looks like the labelled images, labelled or not.
    ctx = ALContext(np.arange(30, 120), np.arange(30), np.random.default_rng(0), labelledness=unlabelled)
    assert (QUERIES["vaal"]().query(ctx, 30) >= 60).all()


def test_the_networks_have_the_sources_sizes() -> None:
    vae = Vae(3, 32, VaalConfig())
    convolutions = [layer for layer in vae.encoder if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [128, 256, 512, 1024]
    assert all(layer.kernel_size == (4, 4) and layer.stride == (2, 2) for layer in convolutions)
    mean, log_variance = vae.encode(torch.zeros(2, 3, 32, 32))
    assert mean.shape == log_variance.shape == (2, 32) and vae.decode(mean).shape == (2, 3, 32, 32)
    linear = [layer for layer in build_discriminator(32, 512) if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [512, 512, 512, 512, 1]


def test_the_loss_is_a_mean_in_both_terms() -> None:
    images, reconstruction = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5)
    mean, log_variance = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [math.log(2.0), 0.0]])
    # KL of each dimension: 1/2, 0, (2 - 1 - log 2) / 2, 4 / 2; their mean, not their sum.
    divergence = (0.5 + 0 + (1 - math.log(2)) / 2 + 2) / 4
    assert float(vae_loss(reconstruction, images, mean, log_variance, 3.0)) == pytest.approx(0.25 + 3 * divergence)


def test_a_step_follows_the_gradients_of_the_two_losses() -> None:
    """One step against the same losses written out, with Adam's first step of lr times the sign of the gradient."""
    run, reference = training(), training()
    vae, discriminator = reference.vae.train(), reference.discriminator
    batches = [reference._batch(number, rows) for number, rows in enumerate((reference.labelled, reference.unlabelled))]
    means, log_variances = vae.encode(torch.cat(batches))
    decoded = vae.decode(means + (log_variances / 2).exp() * reference._noise(means.shape))
    total = torch.zeros(())
    for part, batch in zip((slice(0, 16), slice(16, 32)), batches, strict=True):
        mean, log_variance = means[part], log_variances[part]
        divergence = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).mean()
        reconstruction = (decoded[part] - F.interpolate(batch, (16, 16), mode="bilinear")).square().mean()
        deceive = -torch.log(discriminator(mean).sigmoid()).mean()
        total = total + reconstruction + SMALL.beta * divergence + SMALL.gamma * deceive
    total.backward()
    discriminator.zero_grad()
    verdicts = discriminator(means.detach()).sigmoid()
    told = -torch.log(verdicts[:16]).mean() - torch.log(1 - verdicts[16:]).mean()
    told.backward()
    losses = run.step()
    assert losses == pytest.approx({"vae_loss": total.item(), "discriminator_loss": told.item()}, rel=1e-5)
    for ours, theirs in ((run.vae, vae), (run.discriminator, discriminator)):
        for after, before in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert before.grad is not None
            clear = before.grad.abs() > 1e-4
            assert torch.allclose((after - before)[clear], -SMALL.lr * before.grad.sign()[clear], rtol=0.01)


def test_a_training_that_was_stopped_ends_where_an_undisturbed_one_does() -> None:
    whole, stopped = finish(training()), finish(training(), steps=7)
    resumed = training()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.steps_done == 7
    torch.manual_seed(12345)  # the global generator is not looked at
    everyone = np.arange(120)
    assert (finish(resumed).labelledness(everyone) == whole.labelledness(everyone)).all()
    assert (finish(training(seed=4)).labelledness(everyone) != whole.labelledness(everyone)).any()


def test_the_state_holds_tensors_and_plain_values_only() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, (str, int)) and plain(item) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or isinstance(value, (Tensor, str, int, float, bool))

    assert plain(finish(training(), steps=2).state_dict())


def test_training_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    finish(training(), steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_the_learning_rates_fall_by_a_tenth_at_every_25th_of_the_training() -> None:
    run = training(SMALL.model_copy(update={"epochs": 4, "hidden": 8}))  # 30 steps
    rates = []
    while run.steps_done < run.total_steps:
        run.step()
        rates.append(
            [optimizer.param_groups[0]["lr"] for optimizer in (run.vae_optimizer, run.discriminator_optimizer)]
        )
    expected = [SMALL.lr * 0.9 ** (25 * step // 30) for step in range(30)]
    np.testing.assert_allclose(np.array(rates), np.array([expected, expected]).T)


@pytest.mark.parametrize("labelled", [1, 5])
def test_fewer_labels_than_a_batch_are_enough(labelled: int) -> None:
    run = finish(training(labelled=labelled), steps=3)
    assert np.isfinite(run.labelledness(np.arange(120))).all()


def test_what_an_image_looks_like_does_not_depend_on_its_batch() -> None:
    run, rows = finish(training(), steps=5), np.arange(120)
    one_by_one = np.concatenate([run.labelledness(rows[i : i + 1]) for i in range(10)])
    np.testing.assert_allclose(run.labelledness(rows)[:10], one_by_one, rtol=1e-5)
    assert run.labelledness(rows[:0]).shape == (0,)


def test_log_variances_are_bounded() -> None:
    vae = Vae(1, 16, SMALL)
    with torch.no_grad():
        vae.log_variance.bias.fill_(1e6)
    assert float(vae.encode(torch.zeros(2, 1, 16, 16))[1].detach().max()) == LOG_VARIANCE
    assert torch.isfinite(vae_loss(torch.zeros(1), torch.zeros(1), *vae.encode(torch.zeros(2, 1, 16, 16)), 1.0))


@pytest.mark.parametrize("side", [8, 28, 32])
def test_images_of_any_size_fit(side: int) -> None:
    images = torch.randn(20, 3, side, side, generator=torch.Generator().manual_seed(0))
    run = VaalTraining(lambda rows: images[torch.from_numpy(rows)], np.arange(5), np.arange(5, 20), SMALL, 0)
    assert run.vae.side == -(-side // 16) * 16 and math.isfinite(run.step()["vae_loss"])


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="beta = -1 is not allowed .*>= 0"):
        parse_config(VaalConfig, {"beta": -1})
    with pytest.raises(ValueError, match="unknown key 'latnet' .*latent"):
        parse_config(VaalConfig, {"latnet": 3})
