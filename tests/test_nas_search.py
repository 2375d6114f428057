"""The search as an experiment: phases, labels, resuming, workers, and the way to a served network."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import dataeff
from dataeff.core.config import merge, parse_config
from dataeff.core.runtime import Runtime
from dataeff.data import open_splits
from dataeff.nas.differentiable import DifferentiableSearch
from dataeff.nas.experiment_search import NasSearchConfig, NasSearchExperiment
from dataeff.nas.experiment_train import NasTrainConfig, NasTrainExperiment
from dataeff.nas.genotype import GENOTYPES, Genotype
from tests.test_data_sources import encoded
from tests.worker_helpers import on_two_workers

TINY: dict[str, Any] = {
    "arm": "pcp_darts", "init_channels": 8, "phases": [[3, 8], [4, 5], [5, 3]], "phase_epochs": 2,
    "phase_arch_start": 1, "layers": 3, "epochs": 2, "arch_start": 1, "search_images": 64, "batch": 16,
    "arch_lr": 0.05, "augment": "shift",
    "train": {
        "cells": 3, "channels": 4, "cutout": 2, "augment": "shift", "report_every": 2,
        "stage": {"iterations": 4, "batch": 16},
    },
}  # fmt: skip


def make(**changes: Any) -> NasSearchExperiment:
    config = parse_config(NasSearchConfig, merge(TINY, changes))
    return NasSearchExperiment(config, "digits", Runtime("cpu"))


def searcher_of(experiment: NasSearchExperiment) -> DifferentiableSearch:
    assert isinstance(experiment.searcher, DifferentiableSearch)
    return experiment.searcher


def finish(experiment: NasSearchExperiment) -> list[dict[str, float]]:
    """The remaining rows, without the seconds."""
    rows = [experiment.step() for _ in range(experiment.total_steps - experiment.steps_done)]
    return [{name: value for name, value in row.items() if name != "search_seconds"} for row in rows]


def arch(search: DifferentiableSearch) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in search.arch_parameters]


def equal(first: Any, second: Any) -> bool:
    """Nested states, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def test_phases_keep_8_5_and_3_operations_and_start_from_nothing_each_time() -> None:
    experiment = make()
    search = searcher_of(experiment)
    counts, cells, before_phase = [], [], []
    for step in range(6):
        if step % 2 == 0:
            before_phase.append({len(names) for kind in search.sets.values() for names in kind})
        row = experiment.step()
        counts.append(int(search.model.get_buffer("mask_normal").sum(1).unique()))
        cells.append(len(search.model.cells))
        assert row["phase"] == 1 + step // 2
        if step % 2 == 0:  # the warm-up epoch of a phase, whose alpha and beta are new
            assert float(search.model.get_parameter("alpha_normal").detach().abs().max()) < 0.01
    assert counts == [8, 8, 5, 5, 3, 3] and cells == [3, 3, 4, 4, 5, 5]
    assert before_phase == [{8}, {5}, {3}]


def test_alpha_and_beta_stand_still_in_the_warm_up_and_move_afterwards() -> None:
    experiment = make()
    search = searcher_of(experiment)
    first = arch(search)
    weight = search.weight_parameters[0].detach().clone()
    experiment.step()
    assert all(map(torch.equal, first, arch(search))) and not torch.equal(weight, search.weight_parameters[0])
    experiment.step()
    assert not any(map(torch.equal, first, arch(search)))


def test_the_two_halves_share_no_image() -> None:
    search = searcher_of(make(search_images=None))
    rows = [set(source._rows.tolist()) for source in (search.weight_half, search.arch_half)]
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == len(search.task.splits.train)


@pytest.mark.parametrize("second_order", [False, True])
def test_an_architecture_step_leaves_the_weights_and_a_weight_step_the_architecture(second_order: bool) -> None:
    search = searcher_of(make(arm="pc_darts", arch_start=0, second_order=second_order))
    batch = next(search._batches("weights", search.weight_half, 0))
    from dataeff.nas.search import Moment

    weights = [parameter.detach().clone() for parameter in search.weight_parameters]
    before = arch(search)
    search._arch_step(batch, batch, Moment(0, 1, 0))
    assert all(map(torch.equal, weights, search.weight_parameters)) and not any(map(torch.equal, before, arch(search)))
    before = arch(search)
    search._weight_step(batch, Moment(0, 1, 0))
    assert all(map(torch.equal, before, arch(search))) and not torch.equal(weights[0], search.weight_parameters[0])


def test_the_second_order_gradient_is_that_of_the_unrolled_step() -> None:
    from dataeff.nas.differentiable import unrolled_gradients

    w = torch.nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))
    a = torch.nn.Parameter(torch.tensor([0.3, 0.9], dtype=torch.float64))
    train: Callable[[Any], Any] = lambda w: (a * w**3).sum() + w.prod()  # noqa: E731
    valid: Callable[[Any], Any] = lambda w: (w * a.exp()).square().sum()  # noqa: E731
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=0.01)
    (found,) = unrolled_gradients([w], [a], lambda: train(w), lambda: valid(w), optimizer, Runtime("cpu"))
    (step,) = torch.autograd.grad(train(w), w, create_graph=True)
    (exact,) = torch.autograd.grad(valid(w - 0.1 * (step + 0.01 * w)), a)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)
    assert w.tolist() == [0.7, -0.4]


def test_without_labels_in_the_loss_permuted_labels_give_the_identical_search() -> None:
    states = []
    for permuted in (False, True):
        experiment = make(ss_factor=1.0, train={"stage": {"iterations": 0}})
        if permuted:
            for source in (experiment.task.splits.train, experiment.task.splits.val):
                source.labels = np.random.default_rng(1).permutation(source.labels)
            searcher_of(experiment).weight_half.labels[:] = -1
            searcher_of(experiment).arch_half.labels[:] = -1
        finish(experiment)
        states.append(experiment.searcher.state_dict())
    assert equal(*states)
    assert states[0]["history"][-1] == states[1]["history"][-1]


def test_a_search_without_labels_sees_images_that_have_none(tmp_path: Path) -> None:
    splits = open_splits("digits")
    rows = [encoded(Image.fromarray(image[0].numpy())) for image in splits.train.images(range(64))]
    pq.write_table(pa.table({"image": rows}), tmp_path / "train.parquet")
    few = "digits?labels=20"
    experiment = NasSearchExperiment(
        parse_config(NasSearchConfig, merge(TINY, {"ss_factor": 1.0, "search_data": f"parquet:{tmp_path}"})),
        few,
        Runtime("cpu"),
    )
    halves = (searcher_of(experiment).weight_half, searcher_of(experiment).arch_half)
    assert [len(half) for half in halves] == [32, 32] and len(experiment.task.splits.train) == 20
    finish(experiment)
    assert experiment.training is not None and len(experiment.training.splits.train) == 20
    assert experiment.evaluate("test")["accuracy"] >= 0
    alone = NasSearchExperiment(parse_config(NasSearchConfig, merge(TINY, {"ss_factor": 1.0})), few, Runtime("cpu"))
    assert experiment.data_fingerprint != alone.data_fingerprint == alone.task.splits.fingerprint
    with pytest.raises(ValueError, match=r"images are \(1, 8, 8\), those of letters are \(1, 16, 16\)"):
        NasSearchExperiment(experiment.config, "letters", Runtime("cpu"))


def test_with_a_share_of_labels_permuted_labels_change_the_search() -> None:
    states = []
    for permuted in (False, True):
        experiment = make(ss_factor=0.5, phases=[[3, 8]], skip_dropout=[0.0], train={"stage": {"iterations": 0}})
        if permuted:
            half = searcher_of(experiment).weight_half
            half.labels = np.random.default_rng(1).permutation(half.labels)
        finish(experiment)
        states.append(experiment.searcher.state_dict())
    assert not equal(states[0]["model"], states[1]["model"])


def test_without_labels_the_classifier_does_not_learn() -> None:
    experiment = make(ss_factor=1.0)
    before = searcher_of(experiment).model.classifier.weight.detach().clone()
    experiment.step()
    assert torch.equal(before, searcher_of(experiment).model.classifier.weight)


MIXED: dict[str, Any] = {"ss_factor": 0.5, "sampling": "random"}
# Before, in and after phase 2, before and in the training.
SUPERVISED_STEPS, MIXED_STEPS = (2, 3, 4, 6, 7), (3, 7)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        pytest.param({}, SUPERVISED_STEPS, id="supervised"),
        pytest.param(MIXED, MIXED_STEPS, id="mixed", marks=pytest.mark.slow),
    ],
)
def test_a_search_resumed_at_any_step_ends_like_the_undisturbed_one(
    changes: dict[str, Any], steps: tuple[int, ...]
) -> None:
    undisturbed = make(**changes)
    rows, states = [], []
    for _ in range(undisturbed.total_steps):
        states.append(copy.deepcopy(undisturbed.state_dict()))
        rows += [{name: value for name, value in undisturbed.step().items() if name != "search_seconds"}]
    final = undisturbed.state_dict()
    for step in steps:
        fresh = make(**changes)
        fresh.load_state_dict(states[step])
        assert finish(fresh) == rows[step:]
        state = fresh.state_dict()
        measured = {"search_seconds": 0, "peak_memory": 0}
        assert equal({**state, **measured}, {**final, **measured})


def test_a_checkpoint_with_other_operation_sets_or_of_another_search_is_refused() -> None:
    experiment = make()
    for _ in range(3):
        experiment.step()
    state = copy.deepcopy(experiment.state_dict())
    state["searcher"]["sets"]["normal"][4] = ["none", "skip_connect"]
    with pytest.raises(ValueError, match="normal cell has other operation sets than its phase allows"):
        make().load_state_dict(state)
    with pytest.raises(ValueError, match="the checkpoint is of another search"):
        make(phases=[[3, 8], [4, 4], [5, 3]]).load_state_dict(experiment.state_dict())


def test_a_gradient_that_is_not_finite_ends_the_phase_with_the_state_before_the_epoch() -> None:
    experiment = make()
    search = searcher_of(experiment)
    experiment.step()
    before = copy.deepcopy(search._learned())
    search.loss = lambda batch, moment: search.model.get_parameter("alpha_normal").sum() * float("nan")  # type: ignore[method-assign, assignment]
    with pytest.warns(UserWarning, match="phase 1, epoch 2: loss or gradient not finite; the phase ends"):
        experiment.step()
    del search.loss
    assert equal(before, search._learned()) and search.halted
    assert np.isfinite(experiment.step()["search_loss"]) and not search.halted  # phase 2 searches again


def test_an_architecture_step_in_the_warm_up_is_impossible() -> None:
    from dataeff.nas.search import Moment

    search = searcher_of(make())
    batch = next(search._batches("weights", search.weight_half, 0))
    with pytest.raises(AssertionError, match="no architecture step in the warm-up"):
        search._arch_step(batch, batch, Moment(0, 0, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ss_factor": 1.5}, "ss_factor = 1.5 is not allowed"),
        ({"phases": [[5, 8], [5, 5], [6, 3]]}, "phases must grow in cells, got .5, 5, 6."),
        ({"phases": [[5, 8], [6, 8], [7, 3]]}, "phases must fall in operations an edge.* got .8, 8, 3."),
        ({"phases": [[5, 9], [6, 8], [7, 3]]}, "phases ask for 9 operations an edge, there are 8"),
        ({"skip_dropout": [0.0, 0.5]}, "skip_dropout needs a probability below 1 for each of 3 phases"),
        ({"init_channels": 6}, "cell 0: 6 channels are not divisible by partial_k = 4"),
        ({"extra_ops": ["caps_dynamic"]}, "below the capsule dimension"),
        ({"extra_ops": ["caps"]}, "extra_ops must be different ones of caps_dynamic"),
        ({"arm": "random", "ss_factor": 1.0}, "ss_factor is for the arms"),
        ({"search_data": "digits"}, "search_data is for searches that read no label: set ss_factor to 1"),
        ({"ss_factor": 1.0, "search_data": "digit"}, "unknown data set 'digit'"),
        ({"second_order": True, "ss_factor": 0.5}, "second_order is for differentiable arms"),
        ({"batch": 1}, "batch = 1 is not allowed"),
        ({"chain": {"widths": [16, 8], "strides": [1, 2]}}, "widths must be positive and not fall"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_single_training_image_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match="cannot be halved"):
        searcher_of(make()).task.halves(1)


def test_capsules_can_be_candidates_and_their_weight_is_reported() -> None:
    experiment = make(arm="pc_darts", init_channels=16, extra_ops=["caps_dynamic", "caps_self"], layers=1)
    row = experiment.step()
    assert row["weight_caps_dynamic"] == pytest.approx(1 / 10, abs=0.01)


def test_a_found_genotype_goes_on_to_a_served_network_and_to_another_data_set(tmp_path: Path) -> None:
    dataeff.train("nas_search", "digits", tmp_path / "run", TINY, report=lambda row, total: None)
    predictor = dataeff.load(tmp_path / "run" / "artifact")
    experiment = make()
    finish(experiment)
    assert experiment.training is not None
    test = experiment.task.splits.test
    prediction = predictor.predict(experiment.task.preprocess(test.images(np.arange(len(test)))))
    accuracy = float((prediction.probabilities.argmax(1).numpy() == test.labels).mean())
    assert accuracy == pytest.approx(predictor.card.metrics["test_accuracy"], abs=2e-3)
    assert predictor.card.method == "nas_train"
    for name in ("cell_normal.svg", "cell_reduce.png", "evolution.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    analysis = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert analysis["classes"]["all"]["accuracy"] == pytest.approx(accuracy, abs=2e-3)
    cost = json.loads((tmp_path / "run" / "search.json").read_text())
    assert cost["workers"] == 1 and cost["device_days"] == pytest.approx(cost["seconds"] / 86_400)
    assert 0 < cost["seconds"] < 100 and 100 < cost["peak_memory_mib"] < 10_000
    settings = {**TINY["train"], "start_from": str(tmp_path / "run" / "artifact")}
    transferred = NasTrainExperiment(parse_config(NasTrainConfig, settings), "letters?size=8", Runtime("cpu"))
    assert transferred.architecture == experiment.training.architecture
    assert transferred.num_classes != 10
    transferred.step()


def test_a_network_is_trained_from_a_name_a_mapping_or_by_chance() -> None:
    small = {**TINY["train"], "cells": 2}

    def architecture(**changes: Any) -> Any:
        config = parse_config(NasTrainConfig, {**small, **changes})
        return NasTrainExperiment(config, "digits", Runtime("cpu")).architecture

    assert architecture(genotype="pc_darts") == GENOTYPES["pc_darts"]
    assert architecture(genotype=GENOTYPES["p_darts"].model_dump(mode="json")) == GENOTYPES["p_darts"]
    first, again, other = (architecture(genotype="random", seed=seed) for seed in (1, 1, 2))
    assert isinstance(first, Genotype) and first == again != other
    with pytest.raises(ValueError, match="unknown genotype 'dart'"):
        architecture(genotype="dart")
    with pytest.raises(ValueError, match="unknown operation 'sep'"):
        architecture(genotype={"normal": [["sep", 0], ["sep", 1]], "reduce": [["sep", 0], ["sep", 1]]})


WORKERS: dict[str, dict[str, Any]] = {"supervised": {}, "mixed": {"ss_factor": 0.5}, "none": {"ss_factor": 1.0}}


def _search_all() -> dict[str, dict[str, torch.Tensor]]:
    return {name: _searched(changes) for name, changes in WORKERS.items()}


def _searched(changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Two epochs with frozen norms: batch statistics are those of a worker's part of the batch."""
    experiment = make(**changes, arch_lr=0.01, skip_dropout=[0.3, 0.4, 0.5])
    search = searcher_of(experiment)
    images = search.task.preprocess(search.task.splits.train.images(np.arange(64)))
    for layer in search.model.modules():
        if hasattr(layer, "running_mean"):
            layer.momentum = 1.0
    with torch.no_grad():
        search.model.train()(images)
    search.model.train = lambda mode=True: search.model  # type: ignore[method-assign, assignment]
    for layer in search.model.modules():
        layer.training = False
    experiment.step()
    experiment.step()
    return dict(search.model.state_dict())


@pytest.mark.slow
def test_two_workers_with_half_the_batch_each_search_like_one() -> None:
    first, second = on_two_workers(_search_all)
    for name, changes in WORKERS.items():
        one = _searched(changes)
        assert equal(first[name], second[name])
        for key, value in one.items():
            torch.testing.assert_close(first[name][key], value, rtol=1e-3, atol=1e-5)
        assert float(one["alpha_normal"].abs().max()) > 0.01
