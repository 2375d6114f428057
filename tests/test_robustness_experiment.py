"""The robustness study as an experiment: training, attacks as resumable steps, artifacts, tables and figures."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.trial import TrialState

import dataeff
from dataeff.core.checkpoint import load_checkpoint, save_checkpoint
from dataeff.core.config import Choice, Range, merge, parse_config, parse_space
from dataeff.core.registry import get_method
from dataeff.core.run import train
from dataeff.core.runtime import Runtime
from dataeff.data import open_splits
from dataeff.nas import figures_robustness
from dataeff.nas.attacks import pgd
from dataeff.nas.experiment_robustness import RobustnessConfig, RobustnessExperiment
from dataeff.nas.threat import AdversarialTrainingError
from dataeff.nas.zoo import MODEL_ZOO
from ray_jobs.claims import load_claims, plan
from ray_jobs.cli import read_settings
from ray_jobs.sweep import SWEEPS, StudySearch, Sweep, distributions, read_sweep, searching_study
from tests.worker_helpers import on_two_workers

DATA = "digits?labels=64"
TINY: dict[str, Any] = {
    "network": "resnet18", "width": 0.125, "depth": 0.34, "cells": 3, "channels": 4, "ensemble": {"cells": [2, 1]},
    "aux_weight": 0.0, "drop_path": 0.0, "cutout": 0, "augment": "shift", "report_every": 4,
    "stage": {"iterations": 8, "batch": 16, "lr": 0.05},
    "images": 12, "chunk": 8, "budget": {"steps": 3, "alpha": 0.02, "restarts": 2},
}  # fmt: skip


def make(data: str = DATA, **changes: Any) -> RobustnessExperiment:
    return RobustnessExperiment(parse_config(RobustnessConfig, merge(TINY, changes)), data, Runtime("cpu"))


def finish(experiment: RobustnessExperiment) -> list[dict[str, float]]:
    return [experiment.step() for _ in range(experiment.total_steps - experiment.steps_done)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("network", ["resnet18", "ensemble"])
def test_a_run_resumed_at_any_step_of_training_or_attack_ends_like_the_undisturbed_one(
    network: str, tmp_path: Path
) -> None:
    undisturbed = make(network=network)
    rows = finish(undisturbed)
    assert len(rows) == undisturbed.total_steps == undisturbed.training_steps + 5 * 2
    running = make(network=network)
    for step in range(1, undisturbed.total_steps):
        running.step()
        if step % 3 and step < undisturbed.training_steps:
            continue
        (tmp_path / str(step)).mkdir()
        save_checkpoint(tmp_path / str(step), {"experiment": running.state_dict()})
        fresh = make(network=network)
        fresh.load_state_dict(load_checkpoint(tmp_path / str(step))["experiment"])
        assert finish(fresh) == rows[step:]
        assert same(fresh.model.state_dict(), undisturbed.model.state_dict())
        assert fresh.report() == undisturbed.report()


def test_every_attack_is_a_step_and_rows_hold_what_is_complete() -> None:
    experiment = make(chunk=12)
    rows = finish(experiment)[experiment.training_steps :]
    named = [set(row) - {"params", "hrs"} for row in rows]
    expected = ["clean", "fgsm", "ffgsm", "pgd", "apgd"]
    assert named == [set(expected[: n + 1]) for n in range(5)]
    assert "hrs" in rows[-1] and "hrs" not in rows[-2]
    assert rows[-1]["hrs"] == experiment.report().hrs


def test_attacks_leave_weights_and_statistics_as_they_were_and_warn_of_nothing() -> None:
    experiment = make()
    for _ in range(experiment.training_steps):
        experiment.step()
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = make()
        fresh.load_state_dict(experiment.state_dict())
        finish(fresh)
    assert same(before, fresh.model.state_dict())


def test_adversarial_images_that_leak_into_training_stop_it() -> None:
    experiment = make()
    experiment.step()
    batch = next(experiment.eval_stream("train"))
    pixels = torch.rand(4, 1, 8, 8)
    attack = experiment.config.attack_list()["pgd"]
    moved = pgd(experiment.model.eval(), pixels, batch.labels[:4], attack)
    experiment.train_mode(0)
    with pytest.raises(AdversarialTrainingError, match="trains on clean images only"):
        experiment.batch_loss(batch._replace(images=moved, labels=batch.labels[:4]), 0, 0)


@pytest.mark.parametrize("network", sorted(name for name, found in MODEL_ZOO.items() if found.arm is None))
def test_every_network_of_the_zoo_that_is_defined_here_can_be_built_small(network: str) -> None:
    experiment = make(network=network)
    assert experiment.macs > 0 and experiment.total_steps > experiment.training_steps > 0
    with torch.no_grad():
        assert experiment.model.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("network", ["vgg16_bn", "densenet121", "efficientnet_b0", "darts", "ensemble"])
def test_the_artifact_answers_as_the_network_that_was_evaluated(network: str, tmp_path: Path) -> None:
    experiment = make(network=network, attacks=["fgsm"], images=4, aux_weight=0.4)
    finish(experiment)
    experiment.export(tmp_path / "artifact")
    predictor = dataeff.load(tmp_path / "artifact")
    test = open_splits(DATA).test
    inputs = experiment.preprocess(test.images(np.arange(50)))
    with torch.no_grad():
        expected = experiment.model.eval()(inputs).softmax(1)
    torch.testing.assert_close(predictor.predict(inputs).probabilities, expected, rtol=1e-3, atol=1e-4)
    card = predictor.card
    assert card.metrics["test_fgsm"] == experiment.report().per_attack["fgsm"]
    assert card.cost["params"] == pytest.approx(1e6 * experiment.report().params_m)


def test_a_given_artifact_is_attacked_as_it_is_and_written_again_with_what_was_found(tmp_path: Path) -> None:
    summary = train("robustness", DATA, tmp_path / "first", TINY, report=lambda row, total: None)
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    again = make(trained=str(tmp_path / "first" / "artifact"))
    assert again.training_steps == 0
    finish(again)
    assert again.report().to_dict() == report["report"]
    again.export(tmp_path / "second")
    cards = [dataeff.load(folder).card for folder in (tmp_path / "first" / "artifact", tmp_path / "second")]
    assert cards[0].metrics == cards[1].metrics and cards[1].files == cards[0].files
    assert summary["metrics"]["test_hrs"] == report["report"]["hrs"]
    transfer = make(trained=str(tmp_path / "second"), surrogate=str(tmp_path / "second"), attacks=["pgd"])
    finish(transfer)
    assert transfer.report().per_attack["pgd"] == again.report().per_attack["pgd"]
    with pytest.raises(ValueError, match="its classes are"):
        make("letters?labels=52", trained=str(tmp_path / "second"))


def test_a_searched_network_is_attacked_under_the_name_it_is_given(tmp_path: Path) -> None:
    settings = {
        "genotype": {"stem": 8, "layers": [{"block": "mb3_3", "channels": 8}]}, "cutout": 0, "augment": "shift",
        "report_every": 2, "stage": {"iterations": 2, "batch": 16},
    }  # fmt: skip
    train("nas_train", DATA, tmp_path / "found", settings, report=lambda row, total: None)
    experiment = make(network="proxylessnas", trained=str(tmp_path / "found" / "artifact"), attacks=["pgd"])
    finish(experiment)
    experiment.plots(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["network"], found["group"]) == ("proxylessnas", "NAS")
    experiment.export(tmp_path / "again")
    assert dataeff.load(tmp_path / "again").card.method == "nas_train"


def test_model_input_space_reports_the_clamp_alone_and_masking_probes_are_judged(tmp_path: Path) -> None:
    experiment = make(attacks=["pgd"], budget={"space": "model_input"}, masking=True, sweep_eps=[2])
    assert finish(experiment)[-1].keys() >= {"clean", "clamp_only", "pgd", "noise", "pgd@2/255", "hrs"}
    experiment.plots(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["report"]["clamp_only"] is not None
    assert set(found["masking"]) >= {"large_eps_above_chance", "noise_stronger"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "resnet19"}, "unknown network 'resnet19'"),
        ({"network": "densenas_a"}, "nas_search arm=densenas and give its artifact as trained"),
        ({"attacks": ["pgd", "pgd"]}, "each can be named once"),
        ({"stage": {"iterations": 0}}, "nothing to train"),
        ({"budget": {"eps": -0.1}}, "budget.eps = -0.1 is not allowed"),
        ({"budget": {"alpha": 0}}, "budget.alpha = 0 is not allowed"),
        ({"budget": {"steps": 0}}, "budget.steps = 0 is not allowed"),
        ({"budget": {"restarts": 0}}, "budget.restarts = 0 is not allowed"),
        ({"topk": 11}, "topk = 11: digits.* has 10 classes"),
        ({"masking": True, "budget": {"eps": 0}}, "budget.eps must be above 0"),
    ],
)
def test_what_cannot_be_studied_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_an_artifact_without_a_network_to_attack_is_refused(tmp_path: Path) -> None:
    settings = {"arm": "base", "gate": "none", "depth": 8, "report_every": 1, "stage1": {"iterations": 1, "batch": 16}}
    train("skipnet", DATA, tmp_path / "run", settings, report=lambda row, total: None)
    with pytest.raises(ValueError, match="an artifact of skipnet has no network to attack"):
        make(trained=str(tmp_path / "run" / "artifact"))


# --- two workers ------------------------------------------------------------------------------------------------------


class Steady(RobustnessExperiment):
    """Norms by their running statistics, which do not depend on how a batch is shared out."""

    def train_mode(self, stage: int) -> None:
        self.network.eval()


def steady_run() -> tuple[list[dict[str, float]], dict[str, torch.Tensor], int]:
    """The rows, the weights, and how many of the steps train."""
    changes = {"network": "ensemble", "drop_path": 0.3, "cutout": 2, "attacks": ["pgd"]}
    experiment = Steady(parse_config(RobustnessConfig, merge(TINY, changes)), DATA, Runtime("cpu"))
    return finish(experiment), experiment.model.state_dict(), experiment.training_steps


@pytest.mark.slow
def test_two_workers_with_half_the_batch_each_train_members_and_combiner_like_one() -> None:
    their_rows, their_weights, _ = on_two_workers(steady_run)[0]
    rows, weights, training_steps = steady_run()
    for name, value in weights.items():
        torch.testing.assert_close(their_weights[name], value, rtol=1e-4, atol=1e-5)
    for row, other in zip(rows[:training_steps], their_rows, strict=False):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    assert len(rows) == len(their_rows) and set(rows[-1]) == set(their_rows[-1])


# --- the study's table and figures ------------------------------------------------------------------------------------


def report_of(network: str, clean: float, pgd: float, params: float, seed: int = 0, data: str = "digits") -> Any:
    attacks = {"fgsm": pgd + 2, "ffgsm": pgd + 1, "pgd": pgd, "apgd": pgd - 1}
    return {
        "network": network, "group": MODEL_ZOO[network].group, "data": data, "seed": seed, "masking": None,
        "report": {
            "clean": clean, "per_attack": attacks, "hrs": 2 * clean * pgd / (clean + pgd), "params_m": params,
            "topk": 1, "space": "pixel", "clamp_only": None, "n": 200, "top1": {}, "flags": {"degenerate": False},
        },
    }  # fmt: skip


REPORTS = [
    report_of("resnet18", 90, 40, 1.0),
    report_of("resnet50", 92, 50, 2.0),
    report_of("densenet169", 91, 30, 1.5),
    report_of("darts", 95, 20, 3.0),
    report_of("random", 80, 30, 2.0, 0),
    report_of("random", 84, 34, 2.4, 1),
    report_of("darts", 70, 10, 3.0, data="parquet:some/where/cifar10?labels=100"),
]


def test_the_table_has_means_and_deviations_over_repeats_and_ranks_by_hrs() -> None:
    rows = figures_robustness.table(REPORTS)
    assert [row["network"] for row in rows if row["data"] == "digits"] == [
        "resnet50", "resnet18", "random", "densenet169", "darts",
    ]  # fmt: skip
    found = next(row for row in rows if row["network"] == "random")
    assert (found["clean"], found["pgd"], found["params_m"]) == (82, 32, 2.2)
    assert found["sd"]["clean"] == pytest.approx(8**0.5) and found["repeats"] == 2
    assert rows[0]["sd"]["clean"] is None
    low, high = found["hrs_interval"]
    assert low < found["hrs"] < high and high - low < 12


def test_families_are_scored_against_their_smallest_member_and_say_when_it_is_missing() -> None:
    found = {(f["data"], f["family"]): f for f in figures_robustness.families(figures_robustness.table(REPORTS))}
    scores = found["digits", "ResNet"]["pp_hrs"]
    rows = {row["network"]: row for row in figures_robustness.table(REPORTS)}
    assert scores["resnet18"] == pytest.approx(rows["resnet18"]["hrs"])
    assert scores["resnet50"] == pytest.approx(rows["resnet50"]["hrs"] / 2)
    single = found["digits", "DenseNet"]
    assert single["pp_hrs"]["densenet169"] == pytest.approx(rows["densenet169"]["hrs"]) and "single" in single["note"]
    without = [report_of("efficientnet_b4", 90, 40, 2), report_of("efficientnet_b7", 90, 40, 3)]
    (missing,) = figures_robustness.families(figures_robustness.table(without))
    assert missing["pp_hrs"] == {} and "baseline efficientnet_b0 is not among" in missing["note"]


def test_the_best_by_clean_accuracy_and_by_hrs_are_both_named() -> None:
    rows = figures_robustness.table([*REPORTS, report_of("p_darts", 94, 35, 3.0)])
    found = next(f for f in figures_robustness.best(rows) if f["data"] == "digits" and f["group"] == "NAS")
    assert (found["clean"], found["hrs"]) == ("darts", "p_darts")


def test_the_study_writes_its_data_and_three_pictures_and_nothing_without_reports(tmp_path: Path) -> None:
    for number, report in enumerate(REPORTS):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "report.json").write_text(json.dumps(report))
    (tmp_path / "unfinished").mkdir()
    get_method("robustness").compare(sorted(path for path in tmp_path.iterdir() if path.is_dir()), tmp_path / "study")
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == [
        "robustness.json", "robustness_by_data.png", "robustness_clean_pgd.png", "robustness_params.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 1000 for path in (tmp_path / "study").iterdir())
    get_method("robustness").compare([tmp_path / "unfinished"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


# --- sweeps and claims ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("robustness_*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_of_the_study_names_settings_that_exist_and_as_many_trials_as_its_grid(path: Path) -> None:
    sweep = read_sweep(path.stem, "robustness")
    base = merge(read_settings("robustness", None, [], "cpu"), sweep.set)
    space = parse_space(RobustnessConfig, sweep.space, base, path.stem)
    if sweep.sampler == "grid":
        assert sweep.trials == np.prod([len(choice.values) for choice in space.values() if isinstance(choice, Choice)])


def test_a_complete_grid_ends_and_rows_before_the_attacks_need_no_objective(tmp_path: Path) -> None:
    space: dict[str, Range | Choice] = {"network": Choice(("resnet18", "vgg16_bn"))}
    settings = Sweep(method="robustness", sampler="grid", objectives={"pgd": "minimize"})
    study = searching_study(tmp_path, settings, space, 0)
    search = StudySearch(study, {"robustness": distributions(space)}, dict(settings.objectives))
    for trial in ("a", "b"):
        search.suggest(trial)
        search.on_trial_result(trial, {"step": 1, "total_steps": 2})
        search.on_trial_complete(trial, {"step": 2, "total_steps": 2, "pgd": 10.0})
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2


def test_every_claim_has_runs_whose_settings_are_valid_and_orders_are_reported_not_judged() -> None:
    found = load_claims("robustness", "cpu", None)
    for run in plan(found):
        parse_config(RobustnessConfig, run.settings)
    judged = {claim.id for claim in found if claim.runs and not claim.untestable}
    assert judged == {"8", "10", "11", "A1", "A2", "A3", "A4"}
    assert {str(number) for number in range(1, 14)} <= {claim.id for claim in found}
