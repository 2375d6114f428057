"""Training of the self-supervised tasks: resume, workers, labels, bad input, artifacts."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dataeff
from dataeff.core.config import parse_config
from dataeff.core.runtime import Runtime, RuntimeConfig
from dataeff.data import open_splits
from dataeff.nn.workers import share_batch_norm
from dataeff.pretraining.clusters import KMeansOnFeatures
from dataeff.pretraining.experiment import PretrainConfig, PretrainExperiment
from dataeff.pretraining.fit import build_task, build_trainer, fit_pretext, restore_task
from dataeff.pretraining.networks import EncoderConfig, build_classifier, build_encoder
from dataeff.pretraining.pool import Pool
from dataeff.pretraining.predictor import PretextPredictor
from dataeff.pretraining.scan import Scan, SelfLabelStage
from dataeff.pretraining.settings import (
    DeepClusterConfig,
    InpaintingConfig,
    PretextConfig,
    PretextSettings,
    RotationConfig,
    ScanClusterConfig,
    ScanConfig,
    ScanSelfLabelConfig,
    SimCLRConfig,
    VAEConfig,
)
from dataeff.pretraining.task import Clusterer, PretextTask
from dataeff.pretraining.vae import VAE
from tests.worker_helpers import on_two_workers

ENCODER = EncoderConfig(width=4, proj_dim=6)
SMALL: dict[str, Any] = {"epochs": 3, "batch": 16}
WIDTHS = (4, 4, 4, 4)
SIMCLR = SimCLRConfig(encoder=ENCODER, references=10, **SMALL)
TASKS: dict[str, PretextConfig] = {
    "simclr": SIMCLR,
    "vae": VAEConfig(widths=WIDTHS, latent=3, **SMALL),
    "rotation": RotationConfig(encoder=ENCODER, **SMALL),
    "inpainting": InpaintingConfig(widths=WIDTHS, latent=5, **SMALL),
    "deepcluster": DeepClusterConfig(encoder=ENCODER, n_clusters=4, reassign=2, **SMALL),
    "scan": ScanConfig(
        n_clusters=4,
        simclr=SimCLRConfig(encoder=ENCODER, references=10, epochs=1, batch=16),
        cluster=ScanClusterConfig(epochs=2, batch=16, neighbours=3),
        selflabel=ScanSelfLabelConfig(epochs=2, batch=16, threshold=0.3),
    ),
}
every_task = pytest.mark.parametrize("name", list(TASKS))


@pytest.fixture(scope="module")
def pool() -> Tensor:
    source = open_splits("digits").train
    return source.images(np.arange(60))


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def trained(pool: Tensor) -> dict[str, Any]:
    return {name: fit_pretext(config, pool, 3) for name, config in TASKS.items()}


# --- the protocol -----------------------------------------------------------------------------------------------------


@every_task
def test_a_trained_task_scores_embeds_and_clusters(name: str, trained: dict[str, Any], pool: Tensor) -> None:
    task = trained[name]
    assert isinstance(task, PretextTask)
    losses, features = task.loss_per_sample(pool), task.features(pool)
    assert losses.shape == (60,) and losses.dtype == np.float64 and np.isfinite(losses).all()
    assert losses.std() > 1e-6
    assert features.shape[0] == 60 and features.ndim == 2 and features.dtype == np.float32
    assert isinstance(task, Clusterer) == (name in ("deepcluster", "scan"))
    clusterer = task if isinstance(task, Clusterer) else KMeansOnFeatures.fit(task, pool, 4, 0)
    clusters = clusterer.assign(pool)
    assert clusters.shape == (60,) and clusters.dtype == np.int64
    assert clusters.min() >= 0 and clusters.max() < clusterer.n_clusters == 4
    assert len(task.loss_per_sample(pool[:0])) == 0


@every_task
def test_scores_follow_the_image_and_not_its_place(name: str, trained: dict[str, Any], pool: Tensor) -> None:
    task, order = trained[name], np.random.default_rng(0).permutation(60)
    losses = task.loss_per_sample(pool)
    np.testing.assert_allclose(task.loss_per_sample(pool[torch.from_numpy(order)]), losses[order], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(task.loss_per_sample(pool.float() / 255), losses, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(task.loss_per_sample(pool[7:8]), losses[7:8], rtol=2e-4, atol=1e-6)


@every_task
def test_a_task_is_rebuilt_from_its_state(name: str, trained: dict[str, Any], pool: Tensor) -> None:
    task = trained[name]
    again = restore_task(TASKS[name], (1, 8, 8), task.state_dict())
    assert np.array_equal(again.loss_per_sample(pool), task.loss_per_sample(pool))


def test_a_split_that_is_read_on_demand_trains_like_the_same_images_in_memory(trained: dict[str, Any]) -> None:
    source = open_splits("digits").train.subset(np.arange(60))
    assert equal(fit_pretext(TASKS["vae"], source, 3).state_dict(), trained["vae"].state_dict())


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_loader_processes_change_nothing_and_the_generator_of_the_caller_is_left_alone(
    loader_workers: int, trained: dict[str, Any], pool: Tensor
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    runtime = Runtime("cpu", RuntimeConfig(loader_workers=loader_workers))
    task = fit_pretext(TASKS["simclr"], pool, 3, runtime)
    assert torch.equal(torch.rand(3), expected)
    assert equal(task.state_dict(), trained["simclr"].state_dict())


# --- resume, seeds, workers -------------------------------------------------------------------------------------------


@every_task
def test_training_goes_on_to_the_same_weights_from_any_epoch(
    name: str, trained: dict[str, Any], pool: Tensor, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    total = build_trainer(TASKS[name], pool, 3).total_steps
    for last in range(1, total):

        def stop(row: Any, steps: int, last: int = last) -> None:
            if row["step"] == last:
                raise Killed

        folder = tmp_path / str(last)
        with pytest.raises(Killed):
            fit_pretext(TASKS[name], pool, 3, progress=stop, checkpoint=folder)
        rows: list[Any] = []
        resumed = fit_pretext(
            TASKS[name], pool, 3, progress=lambda row, n, rows=rows: rows.append(row), checkpoint=folder
        )
        assert [row["step"] for row in rows] == list(range(last + 1, total + 1))
        assert equal(resumed.state_dict(), trained[name].state_dict())
        assert len(list(folder.iterdir())) == 1
    finished = fit_pretext(TASKS[name], pool, 3, checkpoint=tmp_path / "1")
    assert equal(finished.state_dict(), trained[name].state_dict())


def test_another_seed_gives_other_weights(trained: dict[str, Any], pool: Tensor) -> None:
    assert not equal(fit_pretext(TASKS["simclr"], pool, 4).state_dict(), trained["simclr"].state_dict())


@pytest.mark.parametrize("change", ["seed", "config", "pool"])
def test_a_checkpoint_of_another_pretraining_is_refused(change: str, pool: Tensor, tmp_path: Path) -> None:
    fit_pretext(TASKS["vae"], pool, 3, checkpoint=tmp_path)
    config = TASKS["vae"].model_copy(update={"lr": 0.5}) if change == "config" else TASKS["vae"]
    images = pool.flip(0) if change == "pool" else pool
    with pytest.raises(ValueError, match="the checkpoint is of another pretraining"):
        fit_pretext(config, images, 4 if change == "seed" else 3, checkpoint=tmp_path)


def _work() -> dict[str, Any]:
    run = experiment()
    rows = [run.step() for _ in range(run.total_steps)]
    reported = {"rows": rows, "test": run.evaluate("test")}
    return {**{name: _weights(name) for name in WORKED}, **reported}


# Rounding grows from step to step, so that few steps are compared. A cluster of DeepCluster can flip by rounding.
# Adam makes steps out of the rounding in gradients that are 0, as those of a bias before BatchNorm; SGD does not.
SGD = {name: {"optimizer": "sgd", "lr": 0.02} for name in ("simclr", "vae", "rotation", "inpainting")}
WORKED = ["simclr", "vae", "rotation", "inpainting", "scan"]


def _weights(name: str) -> dict[str, Tensor]:
    images = open_splits("digits").train.images(np.arange(60))
    trainer = build_trainer(TASKS[name].model_copy(update=SGD.get(name, {})), images, 3, Runtime("cpu"))
    rows = [trainer.step() for _ in range(3)]
    return {**trainer.task.state_dict(), "reported": torch.tensor([list(row.values())[1] for row in rows])}


@pytest.mark.slow
def test_two_workers_with_half_the_batch_each_train_like_one() -> None:
    first, second = on_two_workers(_work)
    assert first["rows"] == second["rows"] and first["test"] == second["test"]
    assert first["rows"][-1]["val_loss"] > 0
    for name in WORKED:
        assert equal(first[name], second[name]), name
        for key, value in _weights(name).items():
            torch.testing.assert_close(
                first[name][key], value, rtol=1e-2, atol=1e-3, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


def test_one_process_keeps_the_batch_norm_of_pytorch() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    share_batch_norm(network, Runtime("cpu"))
    assert type(network[1]) is nn.BatchNorm2d


# --- bad input and failure modes (spec section 10) --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(5, 8, 8), r"must be float32 or uint8 \(N, C, H, W\), got torch.float32 \[5, 8, 8\]"),
        (torch.zeros(5, 2, 8, 8), "must have 1 or 3 channels, got 2"),
        (torch.zeros(5, 1, 8, 8, dtype=torch.int64), "must be float32 or uint8"),
        (torch.full((5, 1, 8, 8), 2.0), r"must be in \[0, 1\], found 2 to 2; undo the normalisation"),
        (torch.full((5, 1, 8, 8), math.nan), r"must be in \[0, 1\], found nan to nan"),
        (torch.zeros(1, 1, 8, 8), "1 images on 1 workers are too few"),
        (torch.zeros(0, 1, 8, 8), "0 images of shape"),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_pretext(SIMCLR, images, 0)


def test_a_pool_smaller_than_the_mini_batch_is_one_mini_batch() -> None:
    trainer = build_trainer(SIMCLR, torch.rand(5, 1, 8, 8), 0)
    assert trainer.stages[0].batch_size == 5 and trainer.stages[0].iterations == 1
    trainer.step()


def test_the_last_incomplete_mini_batch_is_left_out_so_that_batch_norm_never_sees_one_image() -> None:
    trainer = build_trainer(SIMCLR, torch.rand(33, 1, 8, 8), 0)
    assert trainer.stages[0].iterations == 2
    trainer.step()


@pytest.mark.parametrize("name", ["deepcluster", "scan"])
def test_a_clusterer_needs_to_know_the_number_of_clusters(name: str, pool: Tensor) -> None:
    config = TASKS[name].model_copy(update={"n_clusters": None})
    with pytest.raises(ValueError, match=f"{name}: n_clusters is not set"):
        fit_pretext(config, pool, 0)
    assert PretextSettings(task=name).chosen(7).n_clusters == 7  # type: ignore[union-attr, arg-type]


def test_rotation_needs_square_images() -> None:
    with pytest.raises(ValueError, match="rotation needs square images, got 8x10"):
        build_task(TASKS["rotation"], (1, 8, 10), 0)


def test_more_neighbours_or_clusters_than_images_are_refused() -> None:
    few = torch.rand(3, 1, 8, 8)
    with pytest.raises(ValueError, match="neighbours = 3 must be from 1 to 2"):
        fit_pretext(TASKS["scan"], few, 0)
    with pytest.raises(ValueError, match="4 clusters of 3 images"):
        fit_pretext(TASKS["deepcluster"], few, 0)


def test_the_log_variance_is_clamped_and_kl_is_reported_a_dimension(trained: dict[str, Any], pool: Tensor) -> None:
    task: VAE = restore_task(TASKS["vae"], (1, 8, 8), trained["vae"].state_dict())  # type: ignore[assignment]
    kl = task.kl_per_dim(pool)
    assert kl.shape == (3,) and (kl >= 0).all()
    with torch.no_grad():
        task.log_variance.weight.fill_(1e6)
        task.log_variance.bias[0] = -1e9
        task.mu.weight.zero_()
        task.mu.bias.zero_()
    variance = task.encode(task.scaled(pool[:5].float() / 255))[1]
    assert float(variance.detach().abs().max()) <= 10
    assert np.isfinite(task.kl_per_dim(pool)).all() and np.isfinite(task.loss_per_sample(pool)).all()


def test_a_collapsed_posterior_is_seen_in_the_number_of_dimensions_in_use(pool: Tensor) -> None:
    rows: list[Any] = []
    fit_pretext(
        VAEConfig(widths=WIDTHS, latent=3, kl_weight=1e4, lr=0.01, epochs=40, batch=32),
        pool,
        0,
        progress=lambda r, n: rows.append(r),
    )
    assert rows[0]["active_dims"] == 3 and rows[-1]["active_dims"] <= 1


def test_a_loss_that_stays_not_finite_ends_training(pool: Tensor) -> None:
    config = VAEConfig(widths=WIDTHS, latent=3, epochs=10, batch=16)
    trainer = build_trainer(config, pool, 0)
    with torch.no_grad():
        next(trainer.task.parameters()).fill_(math.nan)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="not finite 10 times in a row"):
        warnings.simplefilter("ignore")
        while True:
            trainer.step()


def test_scan_without_a_confident_image_in_an_epoch_is_aborted(pool: Tensor) -> None:
    config = TASKS["scan"].model_copy(update={"selflabel": ScanSelfLabelConfig(epochs=2, batch=16, threshold=0.999999)})
    with pytest.raises(ValueError, match="selflabel.threshold = 0.999999 in a whole epoch; lower the threshold"):
        fit_pretext(config, pool, 0)


def test_a_mini_batch_without_a_confident_image_is_skipped_and_counted(pool: Tensor) -> None:
    trainer = build_trainer(TASKS["scan"], pool, 0)
    task, stage = trainer.task, trainer.stages[2]
    assert isinstance(task, Scan) and isinstance(stage, SelfLabelStage)
    with torch.no_grad():
        task.head.weight.zero_()
        task.head.bias.zero_()  # all clusters alike: nothing is above 0.3
    trainer.steps_done = 3
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(ValueError, match="no image was more certain"):
        trainer.step()
    assert stage.skipped == stage.iterations == 3
    assert equal(task.state_dict(), before)


def test_a_collapse_of_scan_is_warned_of(pool: Tensor) -> None:
    trainer = build_trainer(TASKS["scan"], pool, 0)
    trainer.step()
    assert isinstance(trainer.task, Scan)
    with torch.no_grad():
        trainer.task.head.bias[0] = 50.0
    with pytest.warns(UserWarning, match="SCAN has collapsed: the mean prediction has 0.0"):
        assert trainer.step()["entropy"] < 0.5


def test_an_image_is_no_negative_of_itself(pool: Tensor) -> None:
    task = fit_pretext(SIMCLR.model_copy(update={"references": 59}), pool, 3)
    assert len(task.references) == 60  # type: ignore[arg-type]
    keys = task.reference_keys
    assert isinstance(keys, Tensor) and len(torch.unique(keys)) == 60
    # With one more reference than is used, an image among them and a stranger have equally many negatives.
    assert len(fit_pretext(SIMCLR, pool, 3).references) == 11  # type: ignore[arg-type]


# --- the published variants -------------------------------------------------------------------------------------------


def test_the_single_pair_score_is_rounding_and_the_score_with_negatives_is_not(pool: Tensor) -> None:
    state = fit_pretext(SIMCLR, pool, 3).state_dict()
    single = restore_task(SIMCLR.model_copy(update={"score": "single_pair"}), (1, 8, 8), state)
    negatives = restore_task(SIMCLR, (1, 8, 8), state)
    assert np.abs(single.loss_per_sample(pool)).max() < 1e-6
    assert negatives.loss_per_sample(pool).std() > 1e-3


def test_the_elbo_score_adds_the_weighted_kl_and_draws_the_code(trained: dict[str, Any], pool: Tensor) -> None:
    state = trained["vae"].state_dict()
    elbo = restore_task(TASKS["vae"].model_copy(update={"score": "elbo"}), (1, 8, 8), state)
    difference = elbo.loss_per_sample(pool) - trained["vae"].loss_per_sample(pool)
    assert difference.mean() > 0 and np.array_equal(elbo.loss_per_sample(pool), elbo.loss_per_sample(pool))
    assert float(trained["vae"].kl_weight) == pytest.approx(16 / 57)  # mini-batch over training images


def test_normalised_input_is_beyond_the_reach_of_tanh(pool: Tensor) -> None:
    symmetric = build_task(TASKS["vae"], (1, 8, 8), 0)
    normalized = build_task(TASKS["vae"].model_copy(update={"input": "normalized"}), (1, 8, 8), 0)
    x = pool.float() / 255
    for task in (symmetric, normalized):
        task.set_statistics(*Pool(pool).statistics())
    assert float(symmetric.scaled(x).abs().max()) == pytest.approx(1)  # type: ignore[operator]
    assert float(normalized.scaled(x).abs().max()) > 1.5  # type: ignore[operator]


def test_the_vae_keeps_the_weights_of_its_best_held_out_epoch(pool: Tensor) -> None:
    config = VAEConfig(widths=WIDTHS, latent=3, lr=0.05, epochs=8, batch=16)
    rows: list[Any] = []
    trainer = build_trainer(config, pool, 0)
    while not trainer.finished:
        rows.append(trainer.step())
    best = min(row["held_out_loss"] for row in rows)
    assert trainer.stages[0].end_epoch(0)["held_out_loss"] == pytest.approx(best)


def test_inpainting_predicts_the_centre_and_can_do_without_an_adversary(pool: Tensor) -> None:
    plain = build_task(TASKS["inpainting"].model_copy(update={"adversarial": 0.0}), (1, 8, 8), 0)
    assert not any("discriminator" in name for name in plain.state_dict())
    x = pool[:4].float() / 255
    masked, square = plain.split(x)  # type: ignore[operator]
    assert square.shape == (4, 1, 4, 4) and float(masked[:, :, 2:6, 2:6].abs().max()) == 0
    changed = x.clone()
    changed[:, :, 3:5, 3:5] = 1 - changed[:, :, 3:5, 3:5]
    assert np.array_equal(plain.features(x), plain.features(changed))  # the hole is not seen
    assert not np.array_equal(plain.loss_per_sample(x), plain.loss_per_sample(changed))
    rows: list[Any] = []
    fit_pretext(TASKS["inpainting"], pool, 0, progress=lambda row, n: rows.append(row))
    assert rows[-1]["train_l2"] < rows[0]["train_l2"] and "train_discriminator" in rows[0]


def test_deepcluster_fills_mini_batches_uniformly_over_clusters(pool: Tensor) -> None:
    trainer = build_trainer(TASKS["deepcluster"], pool.repeat(10, 1, 1, 1), 0)
    stage: Any = trainer.stages[0]
    stage.labels = np.zeros(600, np.int64)
    stage.labels[:20] = 2  # a small cluster, and two that are empty
    counts = np.bincount(stage.labels[stage.order(0)], minlength=4)
    assert counts[1] == counts[3] == 0 and counts[2] == pytest.approx(counts[0], rel=0.3)


def test_deepcluster_puts_a_fresh_head_on_after_each_assignment(pool: Tensor) -> None:
    trainer = build_trainer(TASKS["deepcluster"], pool, 0)
    stage: Any = trainer.stages[0]
    heads = []
    for epoch in range(3):
        fresh = stage.begin_epoch(epoch)
        heads.append(trainer.task.head.weight.detach().clone())  # type: ignore[union-attr, operator]
        assert bool(fresh) == (epoch % 2 == 0)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


# --- the encoder ------------------------------------------------------------------------------------------------------


def test_resnet18_has_the_layers_of_the_source() -> None:
    encoder = build_encoder(EncoderConfig(kind="resnet18"), 3)
    assert encoder.width == 512 and encoder.proj_dim == 128
    convolutions = [layer for layer in encoder.trunk.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 17 + 3  # 1 + 4 * 2 * 2, and three projections of shortcuts
    assert convolutions[0].kernel_size == (3, 3) and convolutions[0].stride == (1, 1)
    assert [type(layer) for layer in encoder.project] == [nn.Linear, nn.ReLU, nn.Linear]
    # Kaiming, fan-out: a deviation of sqrt(2 / (9 * 512)).
    assert float(convolutions[-1].weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.05)
    pooled = build_encoder(EncoderConfig(kind="resnet18", width=4, stem_maxpool=True), 3)
    assert any(isinstance(layer, nn.MaxPool2d) for layer in pooled.trunk)


def test_dropout_exists_on_request_only_and_behind_the_trunk() -> None:
    assert not any(isinstance(layer, nn.Dropout) for layer in build_classifier(ENCODER, 10, 1).modules())
    classifier = build_classifier(ENCODER.model_copy(update={"dropout_p": 0.5}), 10, 1).eval()
    x = torch.rand(5, 1, 8, 8)
    logits, features = classifier(x, return_features=True)
    assert logits.shape == (5, 10) and features.shape == (5, 6)
    shared = classifier.encoder.trunk(x)
    torch.testing.assert_close(classifier.head(shared), logits)
    classifier.encoder.project.train()
    assert not torch.equal(classifier.head(shared), classifier.head(shared))


def test_an_option_of_the_other_network_is_refused() -> None:
    with pytest.raises(ValueError, match="stem_maxpool = True is an option of kind = 'resnet18'"):
        build_encoder(EncoderConfig(stem_maxpool=True), 1)


# --- the method `pretrain` --------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "simclr": {"epochs": 2, "batch": 64, "encoder": {"width": 4, "proj_dim": 6}, "references": 20},
    "scan": {
        "simclr": {"epochs": 1, "batch": 64, "encoder": {"width": 4, "proj_dim": 6}, "references": 20},
        "cluster": {"epochs": 1, "neighbours": 3},
        "selflabel": {"epochs": 1, "threshold": 0.2},
    },
}


@pytest.mark.parametrize("name", ["simclr", "scan"])
def test_the_artifact_answers_like_the_trained_task(name: str, tmp_path: Path) -> None:
    summary = dataeff.train("pretrain", "digits", tmp_path / "run", {"task": name, **RUN}, report=lambda row, n: None)
    assert {"test_loss", "test_cluster_accuracy", "test_nmi", "test_ari", "test_purity"} <= summary["metrics"].keys()
    predictor = dataeff.load(tmp_path / "run" / "artifact")
    assert isinstance(predictor, PretextPredictor) and predictor.card.classes[9] == "cluster 9"
    splits = open_splits("digits")
    inputs = predictor.preprocess([])
    assert inputs.shape == (0, 1, 8, 8)
    inputs = splits.test.images(np.arange(300)).float() / 255
    prediction = predictor.predict(inputs)
    torch.testing.assert_close(prediction.probabilities.sum(1), torch.ones(300))
    assert (prediction.probabilities.argmax(1).numpy() == predictor.assign(inputs)).mean() > 0.99
    whole = splits.test.images(np.arange(len(splits.test))).float() / 255
    assert predictor.loss_per_sample(whole).mean() == pytest.approx(summary["metrics"]["test_loss"], rel=1e-4)
    assert predictor.features(inputs).shape[0] == 300 and summary["cost"]["macs"] > 0


def experiment(data: str = "digits", **changes: Any) -> PretrainExperiment:
    return PretrainExperiment(parse_config(PretrainConfig, {**RUN, **changes}), data, Runtime("cpu"))


def test_labels_are_never_read_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, permuted = experiment(task="scan"), experiment(task="scan")
    labels = permuted.splits.train.labels
    labels[:] = np.random.default_rng(0).permutation(labels)
    for run in (plain, permuted):
        while run.steps_done < run.total_steps:
            run.step()
    assert equal(plain.task.state_dict(), permuted.task.state_dict())


def test_a_run_that_is_resumed_ends_like_the_undisturbed_one() -> None:
    undisturbed, first = experiment(), experiment()
    rows = [undisturbed.step() for _ in range(2)]
    first.step()
    second = experiment()
    second.load_state_dict(first.state_dict())
    assert second.step() == rows[1]
    third = experiment()
    third.load_state_dict(second.state_dict())
    assert third.evaluate("test") == undisturbed.evaluate("test")


def test_an_unfinished_pretraining_is_not_exported(tmp_path: Path) -> None:
    run = experiment()
    run.step()
    with pytest.raises(ValueError, match="the pretraining is not finished"):
        run.export(tmp_path / "artifact")


def test_the_first_weights_are_he_s_or_pytorch_s_own() -> None:
    for init, bound in (("he", False), ("uniform", True)):
        torch.manual_seed(0)
        weight = next(EncoderConfig(init=init).build(16).trunk.parameters())
        assert bool(weight.abs().max() <= (16 * 9) ** -0.5) == bound, init
        assert weight.std().item() == pytest.approx(
            (2 / (32 * 9)) ** 0.5 if init == "he" else (3 * 16 * 9) ** -0.5, rel=0.1
        )
