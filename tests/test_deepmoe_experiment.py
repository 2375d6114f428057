"""DeepMoE's experiment: stages, arms, resuming, workers, warnings, artifacts and figures, on the embedded digits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dataeff.core.config import merge, parse_config
from dataeff.core.runtime import Runtime
from dataeff.dynamic.deepmoe import analysis
from dataeff.dynamic.deepmoe.experiment import DeepMoEConfig, DeepMoEExperiment
from dataeff.dynamic.deepmoe.model import DeepMoE
from tests.experiment_helpers import answers, assert_resumes_at_any_step, finish
from tests.worker_helpers import on_two_workers

TINY: dict[str, Any] = {
    "arch": "vgg6",
    "width": 1,
    "embedding_widths": [4, 4, 4, 4],
    "augment": "none",
    "report_every": 3,
    "joint": {"iterations": 6, "batch": 16},
    "finetune": {"iterations": 4, "batch": 16},
}
ARMS = ("deepmoe", "static", "per_layer", "noisy_topk", "hard_moe", "rnp")

pytestmark = pytest.mark.filterwarnings("ignore:embedding network and heads cost", "ignore:static gating")


def make(**changes: Any) -> DeepMoEExperiment:
    return DeepMoEExperiment(parse_config(DeepMoEConfig, merge(TINY, changes)), "digits", Runtime("cpu"))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_its_artifact_answers_as_it_was_evaluated(arm: str, tmp_path: Path) -> None:
    experiment = make(arm=arm)
    rows = finish(experiment)
    assert len(rows) == experiment.total_steps and all(np.isfinite(row["train_loss"]) for row in rows)
    predictor, inputs, prediction = answers(experiment, tmp_path / "artifact")
    assert prediction.path.shape == (len(inputs), len(predictor.path_names))
    if arm in ("deepmoe", "noisy_topk"):  # in a large batch the patterns may run as unions
        assert float(prediction.macs.mean()) >= predictor.card.cost["macs"] * 0.999
    else:
        assert float(prediction.macs.mean()) == pytest.approx(predictor.card.cost["macs"], rel=1e-3)


ADAPTED = {"target_share": 0.3, "joint": {"iterations": 80, "batch": 32}, "report_every": 40}


@pytest.mark.parametrize(
    "changes", [ADAPTED, {"arm": "per_layer"}, {"arm": "rnp"}, {"arm": "noisy_topk"}, {"arm": "hard_moe"}]
)
def test_a_run_resumed_at_any_step_ends_like_the_undisturbed_one(changes: dict[str, Any]) -> None:
    assert_resumes_at_any_step(lambda: make(**changes))


def test_fine_tuning_moves_the_base_and_nothing_of_the_router() -> None:
    experiment = make()
    for _ in range(2):
        experiment.step()
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    row = experiment.step()
    assert row["stage"] == 2 and row["train_loss"] == pytest.approx(row["train_base"])
    after = experiment.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("network.body") for name in moved)
    assert not any(name.startswith(("embedding.", "heads.", "class_head.")) for name in moved)


def test_fine_tuning_fixes_the_heads_of_gates_per_layer_too() -> None:
    experiment = make(arm="per_layer")
    for _ in range(2):
        experiment.step()
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    experiment.step()
    after = experiment.model.state_dict()
    assert not any(name.startswith("heads.") and not torch.equal(before[name], after[name]) for name in before)
    assert any(name.startswith("network.body") and not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("arm", ["deepmoe", "per_layer", "static", "noisy_topk"])
def test_uniform_weights_are_smaller_than_he_s(arm: str) -> None:
    he, uniform = (make(arm=arm, init=init).model for init in ("he", "uniform"))
    first = "network.body.3.conv.weight"
    ratio = he.state_dict()[first].std() / uniform.state_dict()[first].std()
    assert 1.5 < float(ratio) < 3.5
    if arm in ("deepmoe", "noisy_topk"):
        layer = "embedding.features.3.weight"
        assert float(he.state_dict()[layer].std() / uniform.state_dict()[layer].std()) > 1.5


def test_gate_heads_have_no_weight_decay() -> None:
    experiment = make()
    experiment.step()
    assert experiment.optimizer is not None
    decays = [(group["weight_decay"], len(group["params"])) for group in experiment.optimizer.param_groups]
    assert decays[1] == (0.0, 1) and decays[0][0] > 0


def test_a_larger_lambda_leaves_fewer_channels_on() -> None:
    shares = []
    for lam in (0.0, 20.0):
        experiment = make(lam=lam, joint={"iterations": 60, "batch": 32}, finetune={"iterations": 0}, report_every=60)
        shares.append(finish(experiment)[-1]["val_active_share"])
    assert shares[1] < shares[0] - 0.1


def test_lambda_moves_towards_the_target_share_once_an_epoch() -> None:
    experiment = make(target_share=0.01, joint={"iterations": 160, "batch": 16}, finetune={"iterations": 0}, lam=0.01)
    epoch = len(experiment.splits.train) // 16
    finish(experiment)
    assert experiment.lam == pytest.approx(0.01 * 1.1 ** (160 // epoch)) and 160 // epoch >= 2
    # While lambda is ramped every channel is on, which says nothing about lambda.
    ramped = make(
        target_share=0.01, joint={"iterations": 160, "batch": 16}, finetune={"iterations": 0}, lam=0.01, lam_ramp=0.5
    )
    finish(ramped)
    assert ramped.lam == pytest.approx(0.01 * 1.1 ** (160 // epoch - 80 // epoch))


def test_the_report_counts_channels_over_the_split() -> None:
    experiment = make()
    metrics = experiment.evaluate("val")
    assert isinstance(experiment.model, DeepMoE)
    assert metrics["always_on_share"] == 1 and metrics["dead_share"] == 0  # heads start around one
    with torch.no_grad():
        next(experiment.model.heads.parameters())[:4] = -1
    with pytest.warns(UserWarning, match="static gating"):
        metrics = experiment.evaluate("val")
    assert metrics["dead_share"] == pytest.approx(4 / sum(experiment.base.gate_channels))
    assert metrics["base_macs"] < metrics["macs"] < experiment.full_macs()


def test_a_layer_that_is_closed_for_an_image_is_reported_as_dead() -> None:
    experiment = make()
    with torch.no_grad():
        next(experiment.model.heads.parameters())[:8] = -1  # type: ignore[union-attr, operator]
    with pytest.warns(UserWarning, match="dead layer"):
        experiment.evaluate("val")


def test_an_embedding_that_costs_more_than_four_percent_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="cost .* of the base network"):
        make(embedding_widths=[32, 32, 32, 32])


def test_single_layer_moe_gates_the_widened_layer_only() -> None:
    experiment = make(arch="vgg16", widening="W1-High", target_params=14.8e6, joint={"iterations": 1})
    assert len(experiment.base.gate_channels) == 1 and experiment.base.gate_channels[0] > 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0.5}, "width must be at least 1 for arm 'deepmoe', got 0.5"),
        ({"width": 0}, "width = 0 is not allowed"),
        ({"lam": -1}, "lam = -1 is not allowed"),
        ({"mu": -1}, "mu = -1 is not allowed"),
        ({"target_share": 0}, "target_share = 0 is not allowed"),
        ({"target_share": 1.5}, "target_share = 1.5 is not allowed"),
        ({"arch": "vgg7"}, "unknown arch 'vgg7'"),
        ({"arm": "rnp", "finetune": {"iterations": 0}}, "itself in finetune"),
        ({"arm": "rnp", "arch": "resnet8"}, "RNP prunes plain networks"),
        ({"widening": "W1-High"}, "use it with arch vgg16"),
        ({"rnp_epsilon": [2, 0]}, "rnp_epsilon"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("changes", [{"width": 2}, {"latent": 12}, {"arch": "resnet8"}])
def test_a_checkpoint_of_another_network_is_refused_before_loading(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="another network"):
        make().load_state_dict(make(**changes).state_dict())


def gradient_step(changes: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after a step without batch statistics, which are each worker's own: norms in evaluation mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepMoEExperiment, "train_mode", lambda self, stage: self.model.eval())
        experiment = make(**changes)
        experiment.step()
    return experiment.model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["deepmoe", "noisy_topk"])
def test_two_workers_take_the_same_gradient_step_as_one(arm: str) -> None:
    changes = {"arm": arm, "report_every": 1, "joint": {"iterations": 1}, "finetune": {"iterations": 0}}
    one, two = gradient_step(changes), on_two_workers(gradient_step, changes)[0]
    start = make(**changes).model.state_dict()
    moved = 0
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
        moved += not torch.equal(value, start[name])
    assert moved > 10


def test_swapping_embeddings_shows_whose_gates_an_image_needs() -> None:
    experiment = make(arm="deepmoe")
    model = experiment.model.eval()
    assert isinstance(model, DeepMoE)
    accuracy = analysis.shuffle_embeddings(model, experiment.splits.test, experiment.preprocess, repeats=1, limit=100)
    assert accuracy.shape == (10, 10) and not np.isnan(accuracy).any()
    again = analysis.shuffle_embeddings(model, experiment.splits.test, experiment.preprocess, repeats=1, limit=100)
    assert np.array_equal(accuracy, again)


def test_a_swap_matrix_is_summed_up_by_class_and_by_coarse_group() -> None:
    accuracy = np.array([[0.9, 0.7, 0.1], [0.5, 0.8, 0.2], [0.0, 0.3, np.nan]])
    summary = analysis.swap_summary(accuracy, groups=(0, 0, 1))
    assert summary["same_class"] == pytest.approx(0.85) and summary["other_class"] == pytest.approx(1.8 / 6)
    assert summary["in_group"] == pytest.approx(0.6) and summary["out_of_group"] == pytest.approx(0.15)
    assert np.bincount(analysis.CIFAR100_GROUPS).tolist() == [5] * 20


def test_the_figures_of_a_run_are_png_files_beside_their_numbers(tmp_path: Path) -> None:
    experiment = make()
    finish(experiment)
    experiment.plots(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gate_balance.png", "embedding_swap.png", "analysis.json"}
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    assert len(numbers["dead_share_by_layer"]) == 6 and "same_class" in numbers["swap"]
