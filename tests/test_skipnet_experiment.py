"""SkipNet's experiment: stages, arms, resuming, warnings, artifacts and figures, on the embedded digits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataeff.core.config import merge, parse_config
from dataeff.core.runtime import Runtime
from dataeff.dynamic.skipnet import analysis
from dataeff.dynamic.skipnet.experiment import ARMS, HRL, SkipNetConfig, SkipNetExperiment, StageConfig
from tests.experiment_helpers import answers, assert_resumes_at_any_step, finish, same

TINY: dict[str, Any] = {
    "depth": 8,
    "widths": [4, 8, 16],
    "augment": "shift",
    "gate_bias_init": 0.5,
    "report_every": 3,
    "stage1": {"iterations": 6, "batch": 16},
    "stage2": {"iterations": 5, "batch": 16},
}


def make(data: str = "digits", **changes: Any) -> SkipNetExperiment:
    config = parse_config(SkipNetConfig, merge(TINY, changes))
    return SkipNetExperiment(config, data, Runtime("cpu"))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_its_artifact_answers_as_it_was_evaluated(arm: str, tmp_path: Path) -> None:
    experiment = make(arm=arm, gate="none" if arm in ("base", "sdv", "stochastic_depth") else "rnn")
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    rows = finish(experiment)
    assert len(rows) == experiment.total_steps and all(np.isfinite(row["train_loss"]) for row in rows)
    assert not same(before, experiment.model.state_dict())
    draws = arm == "sdv"  # drops other blocks for each image in the evaluation
    predictor, _, prediction = answers(experiment, tmp_path / "artifact", as_evaluated=not draws)
    if not draws:
        assert float(prediction.macs.mean()) == pytest.approx(predictor.card.cost["macs"], rel=1e-3)


def test_a_run_resumed_at_any_step_ends_like_the_undisturbed_one() -> None:
    assert_resumes_at_any_step(make)


def test_another_seed_gives_another_run_and_the_same_seed_the_same() -> None:
    first, again, other = (finish(make(seed=seed))[-1] for seed in (0, 0, 1))
    assert first == again
    assert first["train_loss"] != other["train_loss"]


def test_stage_2_starts_with_a_new_optimiser_and_gates_softened_once() -> None:
    experiment = make(gate_temperature=2.0, stage2={"lr": 1e-9})
    experiment.step()
    experiment.step()
    assert experiment.optimizer_stage == 0
    weight = experiment.model.state_dict()["gates.output.weight"].clone()
    experiment.step()
    assert experiment.optimizer_stage == 1
    torch.testing.assert_close(experiment.model.state_dict()["gates.output.weight"], weight / 2, rtol=1e-5, atol=1e-7)
    experiment.step()
    torch.testing.assert_close(experiment.model.state_dict()["gates.output.weight"], weight / 2, rtol=1e-5, atol=1e-7)


def test_stage_2_can_start_from_the_artifact_of_a_stage_1_run(tmp_path: Path) -> None:
    stage1 = make(arm="sp")
    finish(stage1)
    stage1.export(tmp_path / "sp")
    shared = make(start_from=str(tmp_path / "sp"))
    assert same(shared.model.state_dict(), stage1.model.state_dict())
    assert shared.total_steps == 2 and shared.step()["stage"] == 2
    with pytest.raises(ValueError, match="its depth is 8, this run's is 14"):
        make(start_from=str(tmp_path / "sp"), depth=14)
    base = make(arm="base", gate="none")
    base.export(tmp_path / "base")
    with pytest.raises(ValueError, match="its gate is 'none'"):
        make(start_from=str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage1": {"iterations": 0}}, "stage 2 has no stage-1 weights"),
        ({"arm": "sp", "start_from": "x"}, "start_from is for arm 'hrl_sp'"),
        ({"gate": "none"}, "needs a gate"),
        ({"alpha": -1}, "alpha = -1 is not allowed"),
        ({"stage1": {"milestones": [0.7, 0.2]}}, "ascending fractions"),
        ({"gumbel_temperature": [0, 1]}, "gumbel_temperature"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_depth_that_is_not_6n_plus_2_lists_the_published_ones() -> None:
    with pytest.raises(ValueError, match="38, 74, 110, 152"):
        make(depth=9)


def test_a_checkpoint_of_another_network_is_refused_before_loading() -> None:
    experiment = make()
    with pytest.raises(ValueError, match="another network: .*depth 14"):
        experiment.load_state_dict(make(depth=14).state_dict())


def test_alpha_above_what_the_loss_can_cost_warns_that_skipping_everything_is_optimal() -> None:
    experiment = make(arm="hrl_scratch", alpha=4.0, beta=1.0)
    with pytest.warns(UserWarning, match="skipping every block is the optimum"):
        experiment.step()


def test_ten_gradients_in_a_row_that_are_not_finite_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make(arm="sp", report_every=20, stage1={"iterations": 20})
    loss = experiment._loss
    monkeypatch.setattr(experiment, "_loss", lambda *arguments: loss(*arguments) * float("nan"))
    before = {name: value.clone() for name, value in experiment.model.named_parameters()}
    with pytest.warns(UserWarning, match="gradient not finite"), pytest.raises(ValueError, match="10 times in a row"):
        experiment.step()
    assert same(before, dict(experiment.model.named_parameters()))


def test_the_draws_of_two_workers_are_the_halves_of_one_workers_draws() -> None:
    experiment = make()
    whole, _ = experiment._draws(HRL, 1, 7, 16)
    halves = []
    for rank in (0, 1):
        runtime = type("Half", (Runtime,), {"rank": property(lambda self, rank=rank: rank)})("cpu")
        experiment.runtime = runtime
        halves.append(experiment._draws(HRL, 1, 7, 8)[0])
    assert whole is not None and torch.equal(torch.cat(halves), whole)  # type: ignore[arg-type]


def test_learning_rates_follow_warmup_milestones_and_cosine() -> None:
    steps = StageConfig(iterations=100, lr=0.1, warmup_iterations=5, warmup_lr=0.01)
    assert [steps.lr_at(i) for i in (0, 5, 49, 50, 75)] == pytest.approx([0.01, 0.1, 0.1, 0.01, 0.001])
    cosine = StageConfig(iterations=100, lr=0.1, schedule="cosine")
    assert [cosine.lr_at(i) for i in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0.0])


def test_a_data_set_without_validation_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no validation images"):
        make("digits?val=0")


def profile() -> analysis.Profile:
    return analysis.Profile(
        executed=np.array([[1, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]], dtype=bool),
        labels=np.array([0, 0, 1, 1]),
        predicted=np.array([0, 0, 0, 1]),
        indices=np.arange(4),
    )


def test_skip_ratios_and_class_medians_count_skipped_blocks() -> None:
    assert analysis.skip_ratios(profile()).tolist() == [0.25, 0.5, 0.5]
    assert analysis.class_medians(profile(), 3)[:2].tolist() == [1.0, 1.5]
    assert np.isnan(analysis.class_medians(profile(), 3)[2])


def test_the_easiest_images_are_right_and_run_the_fewest_blocks() -> None:
    easy, hard = analysis.easiest_and_hardest(profile(), per_group=2)
    assert easy.tolist() == [1, 3]  # image 2 runs one block as well, but is classified wrongly
    assert hard[0] == 0


def test_the_figures_of_a_run_are_png_files_beside_their_numbers(tmp_path: Path) -> None:
    experiment = make()
    finish(experiment)
    experiment.plots(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"skip_ratios.png", "class_medians.png", "input_scales.png", "easy_hard.png", "analysis.json"}
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names if name.endswith(".png"))
