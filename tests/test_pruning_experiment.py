"""ACT, SACT, LCCL and static pruning as experiments on the embedded digits: training, resuming, artifacts, workers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dataeff.core.config import merge, parse_config
from dataeff.core.registry import get_method
from dataeff.core.runtime import Runtime
from dataeff.nn.backbone import backbone_macs, residual_blocks
from dataeff.supervised import SupervisedExperiment
from tests.experiment_helpers import answers, finish, same
from tests.worker_helpers import on_two_workers

STAGE = {"iterations": 6, "batch": 16, "lr": 0.05}
COMMON: dict[str, Any] = {"depth": 14, "widths": [4, 8, 16], "augment": "shift", "report_every": 3, "train": STAGE}
PRUNING: dict[str, Any] = {
    "sparsify": {"iterations": 12, "batch": 16, "lr": 0.1, "milestones": []},
    "finetune": {"iterations": 5, "batch": 16, "lr": 0.01},
    "reduction": 0.35,
    "calibration_images": 64,
    "sparsity_weight": 0.5,
}
LCCL: dict[str, Any] = {"depth": 8, "report_every": 20, "train": {"iterations": 40}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "act": ("act", {}),
    "sact": ("sact", {}),
    # Norms behind products need some mini-batches before their running statistics serve; behind 12 products, more.
    "lccl channels": ("lccl", LCCL),
    "lccl shared": ("lccl", LCCL | {"companion": "shared"}),
    **{f"pruning {name}": ("pruning", {"criterion": name}) for name in ("l1", "entropy", "lasso", "thinet", "sss")},
    "pruning sss blocks": ("pruning", {"criterion": "sss", "structure": "blocks"}),
}
EACH = pytest.mark.parametrize("case", CASES)


def make(case: str, data: str = "digits", **changes: Any) -> SupervisedExperiment:
    method, special = CASES[case]
    settings = merge(merge(COMMON, PRUNING if method == "pruning" else {}), {**special, **changes})
    experiment = get_method(method)
    made = experiment(parse_config(experiment.config_schema, settings), data, Runtime("cpu"))
    assert isinstance(made, SupervisedExperiment)
    return made


@EACH
def test_every_method_trains_and_its_artifact_answers_as_it_was_evaluated(case: str, tmp_path: Path) -> None:
    experiment = make(case)
    rows = finish(experiment)
    assert len(rows) == experiment.total_steps and all(np.isfinite(row["train_loss"]) for row in rows)
    predictor, inputs, prediction = answers(experiment, tmp_path / "artifact")
    assert float(prediction.macs.mean()) == pytest.approx(predictor.card.cost["macs"], rel=1e-3)
    assert prediction.path.shape == (len(inputs), len(predictor.path_names))
    with pytest.raises(ValueError, match="one number of multiply-adds per image"):
        predictor.predict(inputs[:3], torch.ones(2))


def test_a_network_whose_answers_overflow_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make("act")
    finish(experiment)
    monkeypatch.setattr(experiment, "evaluate", lambda split: {"accuracy": 0.1, "loss": math.nan, "macs": 1.0})
    with pytest.raises(ValueError, match="test_loss is nan: .*lower lr"):
        experiment.export(tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


@EACH
def test_a_run_resumed_at_any_step_ends_like_the_undisturbed_one(case: str) -> None:
    undisturbed = make(case)
    rows = finish(undisturbed)
    for step in range(1, undisturbed.total_steps):
        interrupted, fresh = make(case), make(case)
        for _ in range(step):
            interrupted.step()
        fresh.load_state_dict(interrupted.state_dict())
        assert finish(fresh) == rows[step:]
        assert same(fresh.model.state_dict(), undisturbed.model.state_dict())


@pytest.mark.parametrize("criterion", ["l1", "entropy", "lasso", "thinet"])
def test_pruning_happens_once_between_the_stages_and_reaches_the_reduction(criterion: str) -> None:
    experiment = make(f"pruning {criterion}")
    rows = finish(experiment)
    assert [row["val_reduction"] for row in rows[:2]] == [0.0, 0.0]
    assert all(0.35 <= row["val_reduction"] < 0.5 for row in rows[2:])
    assert rows[2]["kept_share"] == rows[3]["kept_share"] < 1


def test_a_pruned_network_without_fine_tuning_is_pruned() -> None:
    experiment = make("pruning l1", finetune={"iterations": 0})
    finish(experiment)
    assert experiment.evaluate("test")["reduction"] >= 0.35


@pytest.mark.parametrize("case", ["pruning sss", "pruning sss blocks"])
def test_sss_removes_what_the_penalty_has_driven_to_zero_and_a_light_penalty_removes_nothing(case: str) -> None:
    rows = finish(make(case))
    assert 0.1 < rows[-1]["kept_share"] < 0.9 and rows[-1]["val_reduction"] > 0.1
    with pytest.warns(UserWarning, match="sss keeps 100%"):
        finish(make(case, sparsity_weight=0.0))


def test_factors_move_only_in_the_stage_that_sparsifies() -> None:
    experiment = make("pruning sss", report_every=6, finetune={"iterations": 6})  # 1, 2 and 1 steps
    factors = experiment.model.factors
    seen = []
    for _ in range(4):
        experiment.step()
        seen.append(torch.cat([factor.detach().clone() for factor in factors.values()]))
    trained, halfway, sparsified, finetuned = seen
    assert bool((trained == 1).all()) and bool((halfway < 1).any())
    assert not torch.equal(sparsified, halfway) and torch.equal(finetuned, sparsified)
    assert bool((sparsified == 0).any())


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("act", {"tau": -1}, "tau = -1 is not allowed"),
        ("act", {"depth": 9}, "38, 74, 110, 152"),
        ("sact", {"norm": "group"}, "norm must be 'batch'"),
        ("lccl shared", {"norm": "group"}, "norm must be 'batch'"),
        ("lccl shared", {"companion": "both"}, "one of 'channels', 'shared'"),
        ("pruning l1", {"norm": "group"}, "norm must be 'batch'"),
        ("pruning l1", {"criterion": "l2"}, "criterion = 'l2' is not allowed"),
        ("pruning l1", {"structure": "blocks"}, "structure 'blocks' is for criterion 'sss'"),
        ("pruning l1", {"reduction": 0.99}, "reduction = 0.99 is not reachable"),
        ("pruning l1", {"train": {"iterations": 0}}, "train.iterations must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(case, **changes)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    for case in CASES:
        with pytest.raises(ValueError, match="another network: .*depth 20"):
            make(case).load_state_dict(make(case, depth=20).state_dict())


@pytest.mark.parametrize("case", ["act", "sact"])
def test_halting_that_collapses_is_reported(case: str) -> None:
    experiment = make(case, tau=10.0, train={"iterations": 60, "lr": 0.3}, report_every=60)
    with pytest.warns(UserWarning, match="halting collapsed"):
        finish(experiment)


def test_full_macs_are_those_of_the_base_network() -> None:
    for case in CASES:
        experiment = make(case)
        assert experiment.full_macs() == backbone_macs(experiment.model.backbone, 8, 8)
        assert len(residual_blocks(experiment.model.backbone)) == (experiment.config.depth - 2) // 2


WORKED = ("act", "sact", "lccl shared", "pruning thinet", "pruning sss")


def _train_all() -> dict[str, dict[str, Tensor]]:
    return {case: _trained_state(case) for case in WORKED}


def _trained_state(case: str) -> dict[str, Tensor]:
    """Two mini-batches a stage with frozen norms: batch statistics are those of a worker's part of the batch, without
    them the parts add up to the whole."""
    lccl = case.startswith("lccl")
    stage = {"iterations": 1 if lccl else 2, "lr": 1e-4 if lccl else 0.01, "milestones": []}
    changes: dict[str, Any] = {"report_every": 2, "train": stage}
    if case.startswith("pruning"):
        changes |= {"sparsify": stage, "finetune": stage, "sparsity_weight": 4.0}
    experiment = make(case, **changes)
    for layer in experiment.model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    images = experiment.preprocess(experiment.splits.train.images(np.arange(64)))
    with torch.no_grad():
        experiment.model.train()(images)
    experiment.train_mode = lambda stage: experiment.network.eval()  # type: ignore[method-assign, assignment]
    finish(experiment)
    return dict(experiment.model.state_dict())


@pytest.mark.slow
def test_two_workers_with_half_the_batch_each_take_the_steps_of_one() -> None:
    first, second = on_two_workers(_train_all)
    for case in WORKED:
        assert same(first[case], second[case])
        one = _trained_state(case)
        assert any(name.endswith("weight") for name in one)
        start = make(case).model.state_dict()
        for name, value in one.items():
            # lccl's gradients are products of many features, which magnify rounding: a fiftieth of the step.
            step = float((value - start[name]).abs().max()) if case.startswith("lccl") else 0.0
            torch.testing.assert_close(first[case][name], value, rtol=1e-4, atol=1e-5 + 0.02 * step)
        assert math.isfinite(sum(float(value.float().sum()) for value in one.values()))
