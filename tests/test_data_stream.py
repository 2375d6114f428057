import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dataeff.data import (
    Augment,
    BadImageError,
    Batch,
    ImageSource,
    Preprocess,
    TrainStream,
    eval_batches,
    longtail_subset,
    open_splits,
    stratified_split,
    stratified_subset,
    uniform_draws,
)
from dataeff.data.sources import ArrayStore


@pytest.fixture(scope="module")
def train() -> ImageSource:
    return open_splits("digits?labels=100").train


@pytest.fixture(scope="module")
def preprocess(train: ImageSource) -> Preprocess:
    return Preprocess.fit(train)


def take(source: ImageSource, preprocess: Preprocess, count: int, batch_size: int = 16, **options: int) -> list[Batch]:
    with TrainStream(source, preprocess, Augment("shift_flip"), batch_size, seed=3, **options) as stream:
        return [next(stream) for _ in range(count)]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)


def test_loader_workers_change_nothing(train: ImageSource, preprocess: Preprocess) -> None:
    assert_same(take(train, preprocess, 15), take(train, preprocess, 15, workers=2))


def test_ranks_share_each_global_batch(train: ImageSource, preprocess: Preprocess) -> None:
    parts = [take(train, preprocess, 10, rank=rank, world_size=2) for rank in range(2)]
    joined = [Batch(*(torch.cat(pair) for pair in zip(one, two, strict=True))) for one, two in zip(*parts, strict=True)]
    assert_same(take(train, preprocess, 10), joined)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_where_the_first_stopped(
    train: ImageSource, preprocess: Preprocess, workers: int
) -> None:
    whole = take(train, preprocess, 20)
    assert_same(whole[9:], take(train, preprocess, 11, start_iteration=9, workers=workers))


def test_the_stream_counts_iterations_and_epochs(train: ImageSource, preprocess: Preprocess) -> None:
    stream = TrainStream(train, preprocess, Augment(), 16, seed=0, start_iteration=5)
    assert (stream.iterations_per_epoch, stream.iteration, stream.epoch) == (6, 5, 0)
    next(stream)
    assert (stream.iteration, stream.epoch) == (6, 1)


def test_an_epoch_repeats_no_image_and_the_next_has_another_order(train: ImageSource, preprocess: Preprocess) -> None:
    batches = take(train, preprocess, 12)
    epochs = [torch.cat([batch.indices for batch in batches[start : start + 6]]) for start in (0, 6)]
    assert all(len(epoch.unique()) == 96 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(batches[0].labels, torch.from_numpy(train.labels)[batches[0].indices])


def test_an_images_augmentation_changes_from_epoch_to_epoch(train: ImageSource, preprocess: Preprocess) -> None:
    one = train.subset(range(16))
    first, second = (batch.images[batch.indices.argsort()] for batch in take(one, preprocess, 2))
    assert not torch.equal(first, second)


def test_a_batch_above_the_source_spans_permutations(train: ImageSource, preprocess: Preprocess) -> None:
    few = train.subset(range(10))
    with TrainStream(few, preprocess, Augment("shift"), 25, seed=0) as stream:
        batch = next(stream)
        assert stream.iterations_per_epoch == 1
    counts = batch.indices.bincount(minlength=10)
    assert counts.sum() == 25 and counts.min() == 2 and counts.max() == 3
    assert len(batch.images[batch.indices == batch.indices[-1]].unique(dim=0)) > 1


def test_the_global_random_state_is_left_alone(train: ImageSource, preprocess: Preprocess) -> None:
    before = torch.get_rng_state()
    take(train, preprocess, 2, workers=1)
    assert torch.equal(before, torch.get_rng_state())


def test_closing_ends_the_loader_processes(train: ImageSource, preprocess: Preprocess) -> None:
    before = set(multiprocessing.active_children())
    stream = TrainStream(train, preprocess, Augment(), 16, seed=0, workers=2)
    next(stream)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    stream.close()
    assert not set(multiprocessing.active_children()) - before
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


def test_a_bad_image_in_a_loader_process_arrives_as_one_line(tmp_path: Path, preprocess: Preprocess) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for n in range(5):
            Image.effect_noise((8, 8), 50).save(tmp_path / name / f"{n}.png")
    splits = open_splits(f"folder:{tmp_path}?val=0&test=0.2")
    victim = splits.train.describe(2)
    (tmp_path / victim).write_bytes(b"broken")
    with (
        pytest.raises(BadImageError, match=f"^{victim} is not a readable image") as error,
        TrainStream(splits.train, preprocess, Augment(), 8, seed=0, workers=1) as stream,
    ):
        next(stream)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 15, "world_size": 2}, "15 is not a positive multiple of the 2"), ({"rank": 1}, "rank 1: must be")],
)
def test_impossible_shares_are_refused(
    train: ImageSource, preprocess: Preprocess, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainStream(train, preprocess, Augment(), **{"batch_size": 16, "seed": 0, **options})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_image_once(
    train: ImageSource, preprocess: Preprocess, workers: int, world_size: int
) -> None:
    batches = [b for r in range(world_size) for b in eval_batches(train, preprocess, 9, r, world_size, workers)]
    assert torch.equal(torch.cat([b.indices for b in batches]), torch.arange(100))
    assert torch.equal(torch.cat([b.images for b in batches]), preprocess(train.images(range(100))))


def test_evaluating_an_empty_split_gives_no_batches(train: ImageSource, preprocess: Preprocess) -> None:
    assert list(eval_batches(train.subset([]), preprocess, 8)) == []


# Preprocessing


def test_fitted_inputs_have_zero_mean_and_unit_deviation(train: ImageSource, preprocess: Preprocess) -> None:
    inputs = preprocess(train.images(range(100)))
    assert inputs.dtype == torch.float32
    assert inputs.mean().abs() < 1e-5 and inputs.std(correction=0) == pytest.approx(1, abs=1e-4)


def test_a_constant_channel_is_only_centred() -> None:
    source = ImageSource(ArrayStore(torch.full((4, 1, 8, 8), 51, dtype=torch.uint8), "flat"), np.zeros(4, np.int64))
    preprocess = Preprocess.fit(source)
    assert preprocess.mean == pytest.approx((0.2,)) and preprocess(source.images([0])).abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_images_are_prepared_as_in_training(tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for n in range(5):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{n}.{'png' if n % 2 else 'jpg'}")
    train = open_splits(f"folder:{tmp_path}?val=0&channels={channels}").train
    preprocess = Preprocess.fit(train)
    opened = [Image.open(tmp_path / train.describe(i)) for i in range(len(train))]
    assert torch.equal(preprocess.from_pil(opened), preprocess(train.images(range(len(train)))))


def test_foreign_sizes_are_scaled_to_cover_and_cut_at_the_centre() -> None:
    preprocess = Preprocess(channels=1, size=(8, 8), mean=(0.0,), std=(1.0,))
    wide = np.zeros((16, 48), dtype=np.uint8)
    wide[:, 16:32] = 255
    assert preprocess.from_pil([Image.fromarray(wide)]).mean() > 0.9
    assert preprocess.from_pil([]).shape == (0, 1, 8, 8)


def test_an_input_below_the_image_size_is_a_centre_crop() -> None:
    pixels = torch.arange(100, dtype=torch.uint8).view(1, 1, 10, 10)
    source = ImageSource(ArrayStore(pixels, "ramp"), np.zeros(1, np.int64))
    preprocess = Preprocess.fit(source, size=(4, 6))
    expected = (pixels[:, :, 3:7, 2:8] / 255 - preprocess.mean[0]) / preprocess.std[0]
    torch.testing.assert_close(preprocess(pixels), expected)
    torch.testing.assert_close(preprocess.from_pil([Image.fromarray(pixels[0, 0].numpy())]), expected)


def test_preprocessing_survives_a_round_trip_and_refuses_unknown_keys(preprocess: Preprocess) -> None:
    values = preprocess.to_dict()
    assert Preprocess.from_dict(values) == preprocess
    with pytest.raises(ValueError, match="unknown key 'sise'"):
        Preprocess.from_dict({**values, "sise": 3})
    with pytest.raises(ValueError, match="mean and std need 1 values"):
        Preprocess.from_dict({**values, "mean": [0.1, 0.2]})


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8)])
def test_wrong_channels_or_dtype_are_refused_with_the_shape(preprocess: Preprocess, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 images \[B, 1, H, W\], got"):
        preprocess(images)


# Augmentation


def test_a_shift_cuts_the_window_that_its_draws_name() -> None:
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(3, 1, 1, 1)
    draws = torch.tensor([[0.5, 0.5, 0.9], [0.0, 0.99, 0.9], [0.5, 0.5, 0.1]], dtype=torch.float64)
    centre, corner, mirrored = Augment("shift_flip")(images, draws, (8, 8))
    assert torch.equal(centre, images[0]) and torch.equal(mirrored, images[0].flip(-1))
    assert torch.equal(corner[0, 1:, :-1], images[0, 0, :-1, 1:])
    assert (corner[0, 0] == 0).all() and (corner[0, :, -1] == 0).all()


def test_the_cifar_recipe_pads_four_pixels() -> None:
    image = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    shifted = Augment("shift_flip")(image, torch.zeros(1, 3, dtype=torch.float64), (32, 32))
    assert (shifted[0, 0] == 0).sum() == 32 * 32 - 28 * 28


def test_random_windows_fill_the_network_input() -> None:
    images = torch.randint(0, 256, (20, 3, 40, 30), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    draws = torch.from_numpy(uniform_draws(0, 0, range(20), 5))
    out = Augment("imagenet")(images, draws, (24, 24))
    assert out.shape == (20, 3, 24, 24) and out.dtype == torch.uint8
    assert torch.equal(out[3:4], Augment("imagenet")(images[3:4], draws[3:4], (24, 24)))
    mirrored = draws.clone()
    mirrored[:, 4] = (draws[:, 4] + 0.5) % 1
    assert torch.equal(Augment("imagenet")(images, mirrored, (24, 24)), out.flip(-1))


def test_draws_depend_only_on_seed_epoch_and_image() -> None:
    all_draws = uniform_draws(1, 2, range(1000), 3)
    assert np.array_equal(uniform_draws(1, 2, [70, 5], 2), all_draws[[70, 5], :2])
    for other in (uniform_draws(2, 2, range(1000), 3), uniform_draws(1, 3, range(1000), 3)):
        assert not np.isin(other, all_draws).any()
    assert not np.isin(uniform_draws(1, 2, range(1000), 3, stream=1), all_draws).any()


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = uniform_draws(0, 0, range(20_000), 3)
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(np.histogram(draws, 10, (0, 1))[0] / draws.size, 0.1, atol=0.005)
    neighbours = np.column_stack([draws[:-1], draws[1:]])
    assert np.abs(np.corrcoef(neighbours.T) - np.eye(6)).max() < 0.03


# Subsets


def test_a_stratified_subset_keeps_shares_and_every_class() -> None:
    labels = np.repeat([0, 1, 2], [700, 290, 10])
    assert np.bincount(labels[stratified_subset(labels, 100, 0)]).tolist() == [70, 29, 1]
    assert np.bincount(labels[stratified_subset(labels, 10, 0)]).min() == 1
    assert not np.array_equal(stratified_subset(labels, 100, 0), stratified_subset(labels, 100, 1))
    with pytest.raises(ValueError, match="labels=2: must be from 3"):
        stratified_subset(labels, 2, 0)


def test_a_stratified_split_covers_everything_once() -> None:
    labels = np.repeat([0, 1], [60, 40])
    rest, cut = stratified_split(labels, 0.25, 0)
    assert np.array_equal(np.sort(np.concatenate([rest, cut])), np.arange(100))
    assert np.bincount(labels[cut]).tolist() == [15, 10]


def test_a_long_tail_is_exponential() -> None:
    labels = np.repeat(np.arange(3), 100)
    assert np.bincount(labels[longtail_subset(labels, 100, 0)]).tolist() == [100, 10, 1]
    with pytest.raises(ValueError, match="at least 1"):
        longtail_subset(labels, 0.5, 0)
