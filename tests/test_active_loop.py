"""The labelling loop: invariants, fair comparison, every pool and query, the classifier's batch rules, bad settings."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataeff
from dataeff.active.classifier import ClassifierConfig, Committee, answers_of, batch_size, class_weights, train_member
from dataeff.active.experiment import ActiveExperiment, check_disjoint, with_seed
from dataeff.active.oracle import with_labels
from dataeff.active.request import Situation, context
from dataeff.active.settings import ActiveConfig
from dataeff.active.study import write_study
from dataeff.core.config import Choice, merge, parse_config, parse_space, read_yaml
from dataeff.core.run import write_rows
from dataeff.core.runtime import Runtime
from dataeff.data import Preprocess, longtail_subset, open_splits
from dataeff.pretraining.networks import EncoderConfig
from ray_jobs.cli import CONFIGS
from ray_jobs.score import Job, Scorer, embedding_size
from ray_jobs.sweep import read_sweep
from tests.active_helpers import DATA, asked, config, experiment, finish, run

CPU = Runtime("cpu")


# --- the loop -------------------------------------------------------------------------------------------------------


def test_every_cycle_labels_what_the_budgets_say_and_the_oracle_tells_nothing_else() -> None:
    loop = experiment(cycles=3, query_budget=15)
    for cycle in range(4):
        metrics = loop.step()
        assert metrics["n_labelled"] == len(loop.labelled) == loop.oracle.n_calls == 20 + 15 * cycle
        assert len(set(loop.labelled.tolist())) == len(loop.labelled)
        assert not set(loop.labelled) & set(loop.unlabelled)
        assert len(loop.labelled) + len(loop.unlabelled) == len(loop.pool) == 150
        assert 0 <= metrics["test_accuracy"] <= 1 and metrics["labelled_share"] == len(loop.labelled) / 150
    assert loop.steps_done == loop.total_steps == 4
    assert loop.pending is None, "nothing is asked for after the last cycle"


def test_a_broken_invariant_stops_the_run() -> None:
    loop = experiment()
    loop.step()
    loop._names = frozenset({loop.pool.describe(int(loop.labelled[2]))})
    with pytest.raises(AssertionError, match="labelled images of the validation split"):
        loop._check_invariants()
    loop.batches.append(loop.batches[0][:3])
    with pytest.raises(AssertionError, match="labelled twice: "):
        loop._check_invariants()
    loop.batches[-1] = loop.unlabelled[:3]
    with pytest.raises(AssertionError, match="23 labelled images after 2 cycles, not 40"):
        loop._check_invariants()


def test_the_pools_see_no_label() -> None:
    loop = experiment()
    assert (loop.pool.labels == -1).all()


def test_validation_test_and_first_weights_are_the_same_for_all_strategies_of_a_seed_and_differ_between_seeds() -> None:
    first, other = experiment(query="random"), experiment(pool="vae", query="coreset")
    last = experiment(seed=1)
    for name in ("val", "train"):
        names = [
            [s.describe(i) for i in range(len(s))] for s in (getattr(e.splits, name) for e in (first, other, last))
        ]
        assert names[0] == names[1] != names[2]
    assert np.array_equal(first.test.labels, other.test.labels) and np.array_equal(first.test.labels, last.test.labels)
    weights = [e.committee.state_dict()["members.0.linear.weight"] for e in (first, other, last)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_the_same_seed_asks_for_the_same_images_and_another_for_others() -> None:
    assert asked(run()) == asked(run()) != asked(run(seed=1))


@pytest.mark.parametrize("pool", ["random", "vae", "simclr", "rotation", "inpainting", "kmeans", "scan", "deepcluster"])
def test_every_pool_gives_exactly_the_budget(pool: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # networks that are hardly trained may cluster badly
        chosen = experiment(pool=pool, budget=25)._choose_pool()
    assert len(set(chosen.tolist())) == 25 and chosen.min() >= 0 and chosen.max() < 150


@pytest.mark.parametrize(
    "query", ["random", "lc", "me", "mm", "dbal", "coreset", "vaal", "ens_varr", "ens_lc", "ens_me", "ens_mm"]
)
def test_every_query_runs_in_the_loop(query: str) -> None:
    loop = run(query=query, cycles=1, ensemble_size=2)
    assert [len(batch) for batch in loop.batches] == [20, 20]
    assert len(loop.committee) == (2 if query.startswith("ens") else 1)
    dropouts = [layer for layer in loop.committee.modules() if isinstance(layer, torch.nn.Dropout)]
    assert [layer.p for layer in dropouts] == ([0.5] if query == "dbal" else []), "dropout is for DBAL alone"


def test_members_of_an_ensemble_are_independent_and_their_mean_accuracy_is_reported() -> None:
    loop = experiment(query="ens_me", cycles=0)
    metrics = loop.step()
    answers = answers_of(loop.committee, loop.test, loop.preprocess, CPU)
    each = [(p.argmax(1) == loop.test.labels).mean() for p in answers.probabilities]
    assert len(each) == 3 and not np.allclose(answers.probabilities[0], answers.probabilities[1])
    assert metrics["test_accuracy"] == pytest.approx(np.mean(each))
    assert metrics["test_accuracy_averaged"] == pytest.approx((answers.mean.argmax(1) == loop.test.labels).mean())


def test_the_context_holds_answers_in_evaluation_mode_row_by_row() -> None:
    loop = run(cycles=0)
    now = Situation(0, loop.committee, loop.pool, loop.labelled, loop.unlabelled, loop.preprocess, CPU)
    found = context(frozenset({"model", "features"}), loop.config, now)
    row = 7
    with torch.no_grad():
        image = loop.preprocess(loop.pool.images([int(loop.unlabelled[row])]))
        logits, features = next(iter(loop.committee))(image, return_features=True)
    assert found.probabilities[row] == pytest.approx(logits[0].softmax(0).numpy(), abs=1e-5)
    assert found.features[row] == pytest.approx(features[0].numpy(), abs=1e-5)
    assert found.labelled_features.shape == (20, 8)


def test_an_empty_rest_ends_the_run_early_with_a_warning() -> None:
    loop = experiment(budget=100, query_budget=40, cycles=9)
    loop.step()
    with pytest.warns(UserWarning, match="k = 40 with 10 unlabelled images: all of them are taken"):
        loop.step()
    loop.step()
    assert len(loop.labelled) == 150 and loop.steps_done == loop.total_steps == 3


def test_a_reached_target_ends_the_run() -> None:
    loop = run(target_accuracy=0.01, cycles=9)
    assert loop.steps_done == loop.total_steps == 1


def test_a_warm_start_goes_on_from_the_weights_before_and_a_fresh_one_does_not() -> None:
    def begins(reinit: bool) -> bool:
        loop = experiment(reinit_each_cycle=reinit, classifier={"lr": 1e-9, "weight_decay": 0.0}, cycles=1)
        loop.step()
        before = loop.committee.state_dict()["members.0.linear.weight"].clone()
        loop.step()
        return torch.allclose(before, loop.committee.state_dict()["members.0.linear.weight"], atol=1e-6)

    assert begins(reinit=False)
    assert not begins(reinit=True)


def test_a_budget_of_a_few_images_and_of_one_class_trains() -> None:
    loop = experiment(budget=1, cycles=0)
    with pytest.warns(UserWarning, match="all 1 labelled images are of one class"):
        metrics = loop.step()
    assert metrics["missing_classes"] == 9


def test_a_long_tail_has_the_published_sizes_and_a_balanced_test_set() -> None:
    labels = np.repeat(np.arange(10), 5000)
    sizes = np.bincount(labels[longtail_subset(labels, 50, 0)])
    assert sizes.tolist() == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100] and sizes.sum() == 13_996
    loop = experiment("digits?longtail=10")
    counts = np.bincount(loop.splits.train.labels)
    assert counts[0] > 8 * counts[-1]
    assert np.ptp(np.bincount(loop.splits.test.labels)) <= 4


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["me", "ens_me", "dbal"])
def test_the_artifact_answers_as_the_last_classifier(tmp_path: Path, query: str) -> None:
    loop = run(query=query, cycles=0)
    loop.export(tmp_path / "artifact")
    predictor = dataeff.load(tmp_path / "artifact")
    inputs = loop.preprocess(loop.test.images(range(10)))
    with torch.no_grad():
        expected = torch.stack([member(inputs).softmax(1) for member in loop.committee]).mean(0)
    assert torch.allclose(predictor.predict(inputs).probabilities, expected, atol=1e-5)
    assert predictor.card.metrics["test_accuracy"] == pytest.approx(loop.evaluate("test")["accuracy"])


def test_scoring_gives_the_penultimate_embedding_of_every_image(tmp_path: Path) -> None:
    loop = run(cycles=0)
    loop.export(tmp_path / "artifact")
    job = Job(str(tmp_path / "artifact"), DATA, batch=50, device="cpu", threads=1, embeddings=True)
    part = {"number": np.array([0]), "split": np.array(["test"]), "first": np.array([3]), "last": np.array([120])}
    (table,) = Scorer(job)(part)
    images = open_splits(DATA).test.images(range(3, 120))
    with torch.no_grad():
        _, expected = next(iter(loop.committee))(loop.preprocess(images), return_features=True)
    assert np.stack(table["embedding"].to_numpy()) == pytest.approx(expected.numpy(), abs=1e-5)
    assert embedding_size(tmp_path / "artifact") == 8


def test_the_record_has_every_index_and_the_accuracy_of_every_class(tmp_path: Path) -> None:
    loop = run()
    loop.plots(tmp_path)
    record = json.loads((tmp_path / "active.json").read_text())
    assert [cycle["indices"] for cycle in record["cycles"]] == asked(loop)
    assert all(len(cycle["class_accuracy"]) == 10 for cycle in record["cycles"])
    assert sum(record["cycles"][-1]["class_counts"]) == 60
    assert (tmp_path / "asked.png").read_bytes().startswith(b"\x89PNG")


def finished_run(folder: Path, accuracy: list[float], pool_indices: list[int], **settings: Any) -> Path:
    """What a run of two cycles leaves, as far as a study reads it."""
    folder.mkdir()
    full = config(**settings).model_dump(mode="json")
    (folder / "summary.json").write_text(json.dumps({"config": full}))
    record = {"pool_size": 100, "cycles": [{"indices": pool_indices}, {"indices": [90]}]}
    (folder / "active.json").write_text(json.dumps(record))
    rows = [{"n_labelled": 20.0 * (n + 1), "test_accuracy": value} for n, value in enumerate(accuracy)]
    write_rows(folder / "metrics.parquet", rows)
    return folder


def test_a_study_compares_every_pool_and_query_with_random_seed_by_seed(tmp_path: Path) -> None:
    half = [*range(10), *range(50, 60)]
    runs = [
        finished_run(tmp_path / "1", [0.6, 0.8], list(range(20)), pool="random", query="me", seed=0),
        finished_run(tmp_path / "2", [0.7, 0.9], list(range(20)), pool="random", query="me", seed=1),
        finished_run(tmp_path / "3", [0.5, 0.8], half, pool="vae", query="me", seed=1),
        finished_run(tmp_path / "4", [0.3, 0.9], half, pool="vae", query="me", seed=0),
        finished_run(tmp_path / "5", [0.4, 0.7], half, pool="vae", query="random", seed=0),
        tmp_path / "unfinished",
    ]
    write_study(runs, tmp_path)
    study = json.loads((tmp_path / "study.json").read_text())
    rows = {(row["pool"], row["query"]): row for row in study["arms"]}
    vae = rows["vae", "me"]
    assert vae["seeds"] == [0, 1] and vae["accuracy"] == pytest.approx([0.4, 0.85])
    assert vae["accuracy_std"] == pytest.approx([0.02**0.5, 0.005**0.5])
    assert (vae["area"], rows["random", "me"]["area"]) == (pytest.approx(0.625), pytest.approx(0.75))
    # Differences of the same seed: -0.3 and -0.2, whatever the order of the runs.
    assert vae["against_random_pool_first"].startswith("-0.2500 +- 0.0707 (95 % from -0.8853 to +0.3853, p = 0.126")
    assert vae["against_random_pool_first"].endswith("2 seeds: not significant)")
    assert vae["against_random_query_last"] == "+0.2000 (1 seed: no standard deviation, no statement)"
    assert "against_random_pool_first" not in rows["random", "me"]
    assert rows["vae", "random"]["accuracy_std"] == [None, None], "one seed has no deviation"
    overlap = study["pool_overlap"]["20"]
    assert (overlap["pools"], overlap["chance"]) == (["random", "vae"], pytest.approx(0.2))
    assert overlap["shares"][0] == pytest.approx([1.0, 0.5])
    assert (tmp_path / "curves_me_20.png").is_file() and "0.400±0.141" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study.csv").read_text().count("\n") == 1 + 3 * 2


# --- the classifier -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "images", "workers", "expected"),
    [(32, 60, 1, 32), (32, 20, 1, 20), (32, 1, 1, 2), (32, 2, 1, 2), (32, 61, 2, 32), (32, 5, 2, 4), (64, 33, 2, 32)],
)
def test_a_batch_is_at_most_what_is_labelled_and_two_for_each_worker(
    wanted: int, images: int, workers: int, expected: int
) -> None:
    assert batch_size(wanted, images, workers) == expected


def test_a_last_batch_of_one_image_is_never_seen() -> None:
    splits = open_splits("digits")
    labelled = splits.train.subset(np.arange(33))
    sizes: list[int] = []
    committee = Committee.fresh(1, EncoderConfig(width=4, proj_dim=4), 0.0, 10, 1, 0)
    model = next(iter(committee))
    model.register_forward_pre_hook(lambda m, inputs: sizes.append(len(inputs[0])) if m.training else None)
    settings = ClassifierConfig(epochs=3, min_steps=0, batch=32)
    train_member(model, settings, labelled, splits.val, Preprocess.fit(splits.train), CPU, 0)
    assert sizes == [32, 32, 32]


def test_the_best_validation_weights_are_kept_not_the_last() -> None:
    splits = open_splits("digits")
    preprocess = Preprocess.fit(splits.train)
    labelled = splits.train.subset(np.arange(100))
    model = next(iter(Committee.fresh(1, EncoderConfig(width=8, proj_dim=8), 0.0, 10, 1, 0)))
    # A rate at which accuracy jumps from evaluation to evaluation.
    settings = ClassifierConfig(epochs=12, min_steps=0, lr=0.9, schedule="constant", eval_every=1)
    best = train_member(model, settings, labelled, splits.val, preprocess, CPU, 0)
    answers = answers_of(Committee([model]), splits.val, preprocess, CPU)
    assert (answers.mean.argmax(1) == splits.val.labels).mean() == pytest.approx(best)


def test_class_weights_balance_what_is_there_and_bear_a_missing_class() -> None:
    weights = class_weights(np.array([0, 0, 0, 2]), 4)
    assert weights.tolist() == pytest.approx([4 / 2 / 3, 0, 4 / 2 / 1, 0])
    loop = experiment(classifier={"balanced": True}, budget=5, cycles=0)
    assert math.isfinite(loop.step()["val_accuracy"])


def test_the_cosine_ends_at_its_least_factor() -> None:
    settings = ClassifierConfig(lr=0.2, cosine_min_factor=0.1)
    assert settings.lr_at(0) == pytest.approx(0.2) and settings.lr_at(1) == pytest.approx(0.02)
    assert settings.lr_at(0.5) == pytest.approx(0.11)


# --- settings and bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONFIGS / "active").glob("*.yaml")))
def test_a_shipped_preset_is_valid(preset: str) -> None:
    parse_config(ActiveConfig, read_yaml(CONFIGS / "active" / f"{preset}.yaml"))


@pytest.mark.parametrize("name", ["al_budgets", "al_classifier"])
def test_a_shipped_sweep_searches_settings_that_exist(name: str) -> None:
    sweep = read_sweep(name, "active")
    preset = merge(read_yaml(CONFIGS / "active" / "digits.yaml"), sweep.set)
    space = parse_space(ActiveConfig, sweep.space, preset, name)
    if name == "al_budgets":
        sizes = [len(dimension.values) for dimension in space.values() if isinstance(dimension, Choice)]
        assert np.prod(sizes) == sweep.trials and sizes == [3, 5, 6]
    else:
        assert (sweep.set["pool"], sweep.set["cycles"], list(sweep.objectives)) == ("random", 0, ["val_accuracy"])


def test_the_paper_preset_is_table_3_1() -> None:
    paper = parse_config(ActiveConfig, read_yaml(CONFIGS / "active" / "paper.yaml"))
    train = paper.classifier
    assert (train.epochs, train.optimizer, train.lr, train.schedule, train.batch) == (200, "sgd", 0.025, "cosine", 96)
    assert (train.momentum, train.weight_decay, train.cosine_min_factor) == (0.9, 3e-4, 0.0)
    assert (paper.budget, paper.k, paper.cycles, paper.dbal.passes, paper.ensemble_size) == (5000, 5000, 5, 25, 3)
    assert (paper.vae.epochs, paper.vae.batch, paper.vae.latent, paper.simclr.temperature) == (100, 200, 128, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget = 0 .*>= 1"),
        ({"budget": 2.5}, "budget = 2.5"),
        ({"query": "dbal", "dbal": {"dropout_p": 0}}, "DBAL needs dropout_p > 0"),
        ({"query": "ens_varr", "ensemble_size": 1}, "ensemble_size = 1.*at least 2"),
        ({"classifier": {"encoder": {"dropout_p": 0.5}}}, "dropout is for query dbal only"),
        ({"n_bins": 5}, "n_bins = 5 with pool 'random'"),
        ({"allocation": "proportional", "pool": "vae"}, "allocation with pool 'vae'"),
        ({"pool": "clever"}, "'kmeans'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_budget_beyond_the_pool_names_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"budget = 151 with 150 unlabelled images"):
        experiment(budget=151)


def test_an_image_in_pool_and_test_is_refused() -> None:
    splits = open_splits("digits")
    leaking = replace(splits, test=splits.train.subset([3, 4]))
    with pytest.raises(ValueError, match="2 images are in the pool and in the test split, such as digits train image"):
        check_disjoint(leaking)


def test_data_without_validation_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no validation images"):
        experiment("digits?val=0")


def test_the_seed_cuts_the_data_unless_the_data_names_one() -> None:
    assert with_seed("digits", 3) == "digits?seed=3"
    assert with_seed("digits?labels=50", 3) == "digits?labels=50&seed=3"
    assert with_seed("digits?seed=1", 3) == "digits?seed=1"


def test_a_state_of_another_run_is_refused() -> None:
    state = experiment(query="me").state_dict()
    with pytest.raises(ValueError, match="the checkpoint is of another run: .*query me.*query lc"):
        experiment(query="lc").load_state_dict(state)


def test_a_run_goes_on_in_another_object_bit_for_bit() -> None:
    whole, first = experiment(query="coreset"), experiment(query="coreset")
    rows = finish(whole)
    first.step()
    second = experiment(query="coreset")
    second.load_state_dict(first.state_dict())
    assert rows[1:] == finish(second)
    assert asked(whole) == asked(second) and second.oracle.n_calls == 60
    weights = [e.committee.state_dict() for e in (whole, second)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_labels_are_those_the_oracle_told() -> None:
    loop = run(cycles=1)
    truth = open_splits(with_seed(DATA, 0)).train.labels
    source = with_labels(loop.pool, loop.labelled, loop.oracle.known(loop.labelled))
    assert source.labels.tolist() == truth[loop.labelled].tolist()
    assert isinstance(loop, ActiveExperiment)
