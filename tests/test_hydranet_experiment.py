"""HydraNet's experiment: stages, arms, resuming, frozen branches, two workers, artifacts, figures, claims."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dataeff.core.config import merge, parse_config, read_yaml
from dataeff.core.runtime import Runtime
from dataeff.data import open_splits
from dataeff.dynamic.hydranet.experiment import HydraNetConfig, HydraNetExperiment, build_network
from dataeff.dynamic.hydranet.model import HydraNet
from ray_jobs.claims import HOLDS, Verdict, load_claims, plan
from ray_jobs.cli import CONFIGS
from tests.experiment_helpers import answers, finish, same
from tests.worker_helpers import on_two_workers

TINY: dict[str, Any] = {
    "base": "mini",
    "depth": 1,
    "n_branches": 5,
    "k": 2,
    "w_gate": 0.5,
    "augment": "shift",
    "report_every": 3,
    "features": {"iterations": 4, "batch": 16},
    "joint": {"iterations": 5, "batch": 16},
}


def make(data: str = "digits", **changes: Any) -> HydraNetExperiment:
    return HydraNetExperiment(parse_config(HydraNetConfig, merge(TINY, changes)), data, Runtime("cpu"))


ARMS: list[dict[str, Any]] = [
    {},
    {"gate_head": "classes", "combine": "concat"},
    {"strategy": "random"},
    {"strategy": "learn"},
    {"strategy": "learn_balance", "lambda_bal": 1.0},
    {"strategy": "no_gating"},
    {"arm": "static"},
    {"arm": "base"},
]


@pytest.mark.parametrize("changes", ARMS, ids=lambda changes: "-".join(map(str, changes.values())) or "cluster")
def test_every_arm_trains_and_its_artifact_answers_as_it_was_evaluated(changes: dict[str, Any], tmp_path: Path) -> None:
    experiment = make(**changes)
    rows = finish(experiment)
    assert all(np.isfinite(row["train_loss"]) for row in rows)
    assert [row["stage"] for row in rows] == ([1, 1, 2, 2] if experiment.config.needs_features else [2, 2])
    predictor, inputs, prediction = answers(experiment, tmp_path / "artifact")
    assert float(prediction.macs.mean()) == pytest.approx(predictor.card.cost["macs"], rel=1e-9)
    gated = experiment.gated is not None
    assert prediction.path.shape == (len(inputs), 5 if gated else 0) and len(predictor.path_names) == 5 * gated
    if gated:
        assert prediction.path.sum(1).eq(2).all()
        cheap = predictor.predict(inputs[:2], torch.zeros(2, dtype=torch.float64))
        assert cheap.path.sum(1).tolist() == [1, 1]


def test_a_run_resumed_at_any_step_ends_like_the_undisturbed_one() -> None:
    undisturbed = make(feature_width=2.0)
    rows = finish(undisturbed)
    for step in range(1, undisturbed.total_steps):
        interrupted, fresh = make(feature_width=2.0), make(feature_width=2.0)
        for _ in range(step):
            interrupted.step()
        fresh.load_state_dict(interrupted.state_dict())
        assert finish(fresh) == rows[step:]
        assert same(fresh.model.state_dict(), undisturbed.model.state_dict())
        assert fresh.class_fingerprint == undisturbed.class_fingerprint != ""
        assert fresh.centres is not None and undisturbed.centres is not None
        assert torch.equal(fresh.centres, undisturbed.centres)


def test_the_partition_comes_from_the_trained_classifier_and_never_changes() -> None:
    experiment = make()
    experiment.step()
    experiment.step()
    assert experiment.hydra is not None and not experiment.hydra.has_partition
    assert experiment.model.classifier is not None
    before = {name: value.clone() for name, value in experiment.model.classifier.state_dict().items()}
    experiment.step()
    part = experiment.hydra.part.clone()
    assert torch.bincount(part).tolist() == [2] * 5
    experiment.step()
    assert torch.equal(part, experiment.hydra.part) and same(before, experiment.model.classifier.state_dict())


def test_joint_training_moves_everything_but_the_first_stage_only_its_classifier() -> None:
    experiment = make()
    start = {name: value.clone() for name, value in experiment.model.net.named_parameters()}
    experiment.step()
    assert all(torch.equal(value, start[name]) for name, value in experiment.model.net.named_parameters())
    finish(experiment)
    assert not any(torch.equal(value, start[name]) for name, value in experiment.model.net.named_parameters())


@pytest.mark.parametrize("freeze", [True, False])
def test_a_branch_that_no_image_selects_stands_still_unless_it_is_let_go(freeze: bool) -> None:
    experiment = make(strategy="random", freeze_unselected=freeze, joint={"weight_decay": 0.1, "iterations": 9})
    experiment.step()
    net = experiment.gated
    assert net is not None and net.gate is not None and experiment.optimizer is not None
    with torch.no_grad():
        net.gate.output.weight.zero_()
        net.gate.output.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))  # selects branches 0 and 1 only
    net.gate.output.requires_grad_(False)

    def rows(branches: list[int]) -> list[Tensor]:
        found = []
        for parameter in net.branch_parameters():
            momentum = experiment.optimizer.state[parameter]["momentum_buffer"]
            found += [tensor.detach().unflatten(0, (5, -1))[branches].clone() for tensor in (parameter, momentum)]
        return found

    idle, busy = rows([2, 3, 4]), rows([0, 1])
    batch = next(experiment.eval_stream("train"))
    experiment.model.train()
    experiment._train_batch(batch, 1, 3)
    still = [torch.equal(a, b) for a, b in zip(idle, rows([2, 3, 4]), strict=True)]
    assert all(still) if freeze else not any(still)
    assert not any(torch.equal(a, b) for a, b in zip(busy, rows([0, 1]), strict=True))


def test_branches_idle_for_an_epoch_and_a_collapsed_gate_are_warned_of() -> None:
    experiment = make(strategy="random", report_every=200, joint={"iterations": 70, "batch": 16})
    net = experiment.gated
    assert net is not None and net.gate is not None
    net.gate.output.weight.data.zero_()
    net.gate.output.bias.data.copy_(torch.tensor([9e3, 8e3, 0, 0, 0]))
    net.gate.output.weight.register_hook(torch.zeros_like)
    net.gate.output.bias.register_hook(torch.zeros_like)
    with (
        pytest.warns(UserWarning, match="branches never selected in this epoch: 2, 3, 4"),
        pytest.warns(UserWarning, match="gate collapse: utilisation entropy 0.43"),
    ):
        experiment.step()


def test_the_static_arm_costs_what_a_conditional_image_costs() -> None:
    for changes in ({}, {"base": "resnet", "n_branches": 10, "k": 3}, {"combine": "concat"}):
        config = parse_config(HydraNetConfig, merge(TINY, changes))
        hydra = build_network(config, 100, (1, 8, 16))
        static = build_network(config.model_copy(update={"arm": "static"}), 100, (1, 8, 16))
        assert isinstance(hydra, HydraNet) and isinstance(static, HydraNet) and static.gate is None
        target = hydra.costs(8, 16).conditional(config.k)
        assert static.costs(8, 16).total == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {"iterations": 0}}, "give features.iterations"),
        ({"joint": {"iterations": 0}}, "joint.iterations"),
        ({"k": 6}, "k = 6"),
        ({"lambda_gate": -1}, "lambda_gate = -1"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("other", [{"n_branches": 10}, {"strategy": "random"}, {"gate_head": "classes"}])
def test_a_checkpoint_of_another_network_is_refused(other: dict[str, Any]) -> None:
    state = make().state_dict()
    with pytest.raises(ValueError, match="another network"):
        make(**other).load_state_dict(state)


def test_a_checkpoint_with_another_partition_is_refused() -> None:
    first, second = make(strategy="random"), make(strategy="random", seed=1)
    first.step()
    second.step()
    with pytest.raises(ValueError, match="another partition"):
        second.load_state_dict(first.state_dict())


def test_the_figures_of_a_run_are_png_files_beside_their_numbers(tmp_path: Path) -> None:
    experiment = make()
    finish(experiment)
    experiment.plots(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"utilisation.png", "accuracy_by_k.png", "accuracy_by_group.png", "analysis.json"}
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    test = experiment.evaluate("test")
    assert numbers["utilisation_entropy"] == pytest.approx(test["utilisation_entropy"])
    assert numbers["gate_recall"] == pytest.approx(test["gate_recall"], abs=2e-3)
    assert numbers["accuracy_by_k"]["2"] == pytest.approx(test["accuracy"], abs=2e-3)
    assert set(numbers["specialisation"]) == {"all_branches", "without_own_branch", "without_another_branch"}
    assert sorted(sum(numbers["classes_by_branch"], [])) == list("0123456789")


@pytest.mark.parametrize("name", ["cpu", "gpu", "paper", "claims_cpu"])
def test_the_shipped_settings_are_valid(name: str) -> None:
    parse_config(HydraNetConfig, read_yaml(CONFIGS / "hydranet" / f"{name}.yaml"))


def test_digit_pairs_share_no_original_between_the_splits_and_label_both_digits() -> None:
    splits = open_splits("digit-pairs")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12_000, 1_200, 3_000)
    assert splits.image_shape == (1, 8, 16) and splits.classes[7] == "07" and len(splits.classes) == 100
    assert len(np.unique(splits.train.labels)) == 100
    # The noise has the standard deviation 0.25: it is all there is in the corner that every digit leaves empty.
    corner = splits.train.images(np.arange(4000))[:, 0, 0, 0].double() / 255 * 2.5 - 0.75
    assert float(corner.std()) == pytest.approx(0.25, abs=0.01) and abs(float(corner.mean())) < 0.02
    again = open_splits("digit-pairs?seed=1")
    assert not torch.equal(again.train.images([0, 1, 2]), splits.train.images([0, 1, 2]))


# --- two workers ------------------------------------------------------------------------------------------------------


class FixedStatistics(HydraNetExperiment):
    """BatchNorm with its running statistics, which alone would differ between half batches and whole ones."""

    def train_mode(self, stage: int) -> None:
        self.network.eval()


def gradient_step(changes: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    config = parse_config(HydraNetConfig, merge(TINY, {"report_every": 4, **changes}))
    experiment = FixedStatistics(config, "digits", Runtime("cpu"))
    row = finish(experiment)[-1]
    return {name: value.clone() for name, value in experiment.model.state_dict().items()}, row


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"features": {"iterations": 2, "batch": 16}, "joint": {"iterations": 4, "batch": 16}},
        # 4 images a worker select few of 10 branches; the balance term spans both workers' images.
        {
            "strategy": "learn_balance",
            "lambda_bal": 5.0,
            "n_branches": 10,
            "k": 1,
            "joint": {"iterations": 4, "batch": 8, "weight_decay": 0.1},
        },
    ],
    ids=["cluster", "learn_balance"],
)
def test_two_workers_with_half_the_batch_take_the_steps_of_one(changes: dict[str, Any]) -> None:
    alone, row = gradient_step(changes)
    for state, other in on_two_workers(gradient_step, changes):
        for name, value in alone.items():
            torch.testing.assert_close(
                state[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
        for name in ("train_loss", "val_accuracy", "val_utilisation_entropy"):
            assert other[name] == pytest.approx(row[name], rel=1e-4)
    assert math.isfinite(row["train_loss"])


# --- claims -----------------------------------------------------------------------------------------------------------


def test_the_claims_of_both_scales_can_be_planned_and_their_settings_are_valid() -> None:
    for scale, data in (("cpu", None), ("gpu", "parquet:cifar100")):
        for run in plan(load_claims("hydranet", scale, data)):
            parse_config(HydraNetConfig, dict(run.settings), run.name)
    with pytest.raises(ValueError, match="needs CIFAR100"):
        load_claims("hydranet", "gpu", None)


def test_the_price_of_capacity_is_as_published() -> None:
    claim = next(claim for claim in load_claims("hydranet", "cpu", None) if claim.id == "H3")
    verdict = Verdict(claim, {name: [value] for name, value in claim.measure({}).items()})
    assert verdict.status == HOLDS, verdict.reasons
