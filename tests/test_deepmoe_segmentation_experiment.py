"""DeepMoE's segmentation experiment: arms, resuming, workers, artifacts, on rendered shapes and Parquet."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataeff
from dataeff.core.config import merge, parse_config, read_yaml
from dataeff.core.registry import get_method
from dataeff.core.runtime import Runtime
from dataeff.data import Batch
from dataeff.data.segmentation import unpack
from dataeff.dynamic.deepmoe.segmentation import SegmentationConfig, SegmentationExperiment, SegmentationPredictor
from ray_jobs.cli import CONFIGS, check_data
from tests.experiment_helpers import assert_resumes_at_any_step, finish
from tests.test_deepmoe_segmentation_data import masks, write
from tests.worker_helpers import on_two_workers

TINY: dict[str, Any] = {
    "arch": "drn10",
    "width": 1,
    "widths": [4, 4, 8, 8],
    "embedding_widths": [4, 4, 4],
    "augment": "shift_flip",
    "report_every": 2,
    "joint": {"iterations": 4, "batch": 4, "lr": 0.05},
    "finetune": {"iterations": 2, "batch": 4},
}
DATA = "shapes?size=16&labels=24"

pytestmark = pytest.mark.filterwarnings(
    "ignore:embedding network and heads cost", "ignore:static gating", "ignore:dead layer", "ignore:every pixel"
)


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataeff.data.segmentation.SHAPES_OTHER", 20)


def make(data: str = DATA, **changes: Any) -> SegmentationExperiment:
    config = parse_config(SegmentationConfig, merge(TINY, changes))
    return SegmentationExperiment(config, data, Runtime("cpu"))


def test_the_method_is_registered_and_commands_look_at_its_kind_of_data() -> None:
    assert get_method("deepmoe_segmentation") is SegmentationExperiment
    check_data(["deepmoe_segmentation"], DATA)
    with pytest.raises(ValueError, match="not for images with classes of pixels"):
        check_data(["deepmoe_segmentation"], "digits")
    with pytest.raises(ValueError, match="it is for segmentation methods"):
        check_data(["deepmoe"], DATA)


@pytest.mark.parametrize("changes", [{}, {"arm": "static"}, {"mu": 0.3, "mu_mode": "presence"}], ids=str)
def test_every_arm_trains_and_its_artifact_answers_as_it_was_evaluated(changes: dict[str, Any], tmp_path: Path) -> None:
    experiment = make(**changes)
    rows = finish(experiment)
    assert [row["stage"] for row in rows] == ([1, 1] if changes.get("arm") else [1, 1, 2])
    assert all(np.isfinite(row["train_loss"]) and 0 <= row["val_miou"] <= 1 for row in rows)
    experiment.export(tmp_path / "artifact")
    experiment.plots(tmp_path)
    assert {"iou.png", "examples.png", "analysis.json"} <= {path.name for path in tmp_path.iterdir()}
    predictor = dataeff.load(tmp_path / "artifact")
    assert isinstance(predictor, SegmentationPredictor)
    images, targets = unpack(experiment.preprocess(experiment.splits.test.images(np.arange(20))))
    found = predictor.predict(images)
    counted = targets != 255
    accuracy = float((found.class_map[counted] == targets[counted]).double().mean())
    assert accuracy == pytest.approx(predictor.card.metrics["test_accuracy"], abs=1e-3)
    assert found.probabilities.shape == (20, 5)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(20))
    assert found.path.shape == (20, len(predictor.path_names))
    if not changes.get("arm"):
        assert len(predictor.path_names) == sum(experiment.base.gate_channels)
        least = predictor.predict(images, torch.zeros(20, dtype=torch.float64))
        assert bool((least.macs < found.macs).all()) and not torch.equal(least.path, found.path)


def test_a_run_resumed_at_any_step_ends_like_the_undisturbed_one() -> None:
    changes = {"mu": 0.3, "mu_mode": "presence", "target_share": 0.5, "lam_ramp": 0.5, "joint": {"iterations": 8}}
    undisturbed = make(**changes)
    finish(undisturbed)
    assert undisturbed.lam != undisturbed.config.lam  # an epoch is 6 mini-batches
    assert_resumes_at_any_step(lambda: make(**changes))


def test_metrics_are_those_of_the_whole_split_counted_pixel_by_pixel() -> None:
    experiment = make()
    finish(experiment)
    metrics = experiment.evaluate("val")
    images, targets = unpack(experiment.preprocess(experiment.splits.val.images(np.arange(20))))
    with torch.no_grad():
        output = experiment.model.eval()(images)
    predicted = output.logits.argmax(1)
    ious = []
    for number, name in enumerate(experiment.splits.classes):
        there, said = (targets == number), (predicted == number) & (targets != 255)
        if (there | said).any():
            ious.append(float((there & said).sum() / (there | said).sum()))
            assert metrics[f"iou_{name}"] == pytest.approx(ious[-1])
    assert metrics["miou"] == pytest.approx(np.mean(ious))
    assert metrics["macs"] == pytest.approx(float(output.macs.mean()))
    assert not any(name.startswith("pixels_") for name in metrics)


def test_crops_train_on_windows_and_whole_images_are_evaluated() -> None:
    experiment = make("shapes?size=32&labels=24", crop=16)
    sizes: list[tuple[int, ...]] = []
    experiment.model.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    experiment.step()
    assert set(sizes[:2]) == {(16, 16)} and set(sizes[2:]) == {(32, 32)}


def test_a_batch_of_ignored_pixels_has_loss_zero_and_moves_nothing_to_nan() -> None:
    experiment = make(lam=0.0)
    experiment.step()
    pairs = experiment.preprocess(experiment.splits.train.images(np.arange(4)))
    pairs[:, -1] = 255
    with pytest.warns(UserWarning, match="every pixel of the batch has the ignore label"):
        loss, _ = experiment.batch_loss(Batch(pairs, torch.zeros(4).long(), torch.arange(4)), 0, 3)
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in experiment.model.parameters())


def test_fine_tuning_moves_the_base_and_nothing_of_the_router() -> None:
    experiment = make()
    for _ in range(2):
        experiment.step()
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    experiment.step()
    after = experiment.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("network.body") for name in moved)
    assert not any(name.startswith(("embedding.", "heads.", "class_head.")) for name in moved)


def test_it_trains_on_parquet_with_masks(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.parquet", masks(20))
    write(tmp_path / "data" / "val.parquet", masks(6))
    experiment = make(f"parquet:{tmp_path}/data")
    assert (experiment.height, experiment.width, experiment.num_classes) == (16, 20, 2)
    rows = finish(experiment)
    assert math.isfinite(rows[-1]["train_loss"])
    assert experiment.evaluate("test")["miou"] > 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": 0.5}, "set mu_mode=presence or mu=0"),
        ({"width": 0.5}, "width must be at least 1 for arm 'deepmoe', got 0.5"),
        ({"arch": "resnet8"}, "arch = 'resnet8' is not allowed"),
        ({"augment": "imagenet"}, "augment = 'imagenet' is not allowed"),
        ({"crop": 32}, "crop = 32 must be at most the images' side, 16"),
        ({"lam": -1}, "lam = -1 is not allowed"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="another network"):
        make().load_state_dict(make(width=2).state_dict())


@pytest.mark.parametrize("name", ["cpu", "gpu", "paper", "claims_cpu"])
def test_the_shipped_settings_are_valid(name: str) -> None:
    parse_config(SegmentationConfig, read_yaml(CONFIGS / "deepmoe_segmentation" / f"{name}.yaml"))


def evaluation_mode(self: SegmentationExperiment, stage: int) -> None:
    """Batch statistics are each worker's own, so a step is compared without them."""
    self.model.eval()


ONE_STEP: dict[str, Any] = {
    "report_every": 1,
    "joint": {"iterations": 1, "batch": 8},
    "finetune": {"iterations": 0},
    "mu": 0.5,
    "mu_mode": "presence",
}


def gradient_step() -> tuple[dict[str, torch.Tensor], float]:
    SegmentationExperiment.train_mode = evaluation_mode  # type: ignore[method-assign]
    experiment = make("shapes?size=16", **ONE_STEP)
    row = experiment.step()
    return experiment.model.state_dict(), row["val_miou"]


@pytest.mark.slow
def test_two_workers_take_the_same_gradient_step_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Shapes leave more pixels on borders, which do not count, in one half of the batch than in the other.
    two = on_two_workers(gradient_step)
    monkeypatch.undo()  # the workers have all images of the splits
    monkeypatch.setattr(SegmentationExperiment, "train_mode", evaluation_mode)
    one = make("shapes?size=16", **ONE_STEP)
    start = {name: value.clone() for name, value in one.model.state_dict().items()}
    row = one.step()
    for state, miou in two:
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert miou == pytest.approx(row["val_miou"], rel=1e-5)
    assert sum(not torch.equal(value, start[name]) for name, value in one.model.state_dict().items()) > 10
