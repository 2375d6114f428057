"""The cascade as an Experiment: from artifacts and from tables to one artifact that needs nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dataeff
from dataeff.cascades.idk.analysis import throughput
from dataeff.cascades.idk.artifact import add_ons, read_spec
from dataeff.cascades.idk.cascade import evaluate_tables
from dataeff.cascades.idk.experiment import IdkConfig, IdkExperiment
from dataeff.cascades.idk.predictor import CascadePredictor, load_cascade
from dataeff.core.artifact import read_artifact
from dataeff.core.config import parse_config
from dataeff.core.run import RunState
from dataeff.core.runtime import Runtime
from dataeff.data import Preprocess, eval_batches, open_splits
from dataeff.data.scores import Scores, ScoreTable, write_scores
from tests.worker_helpers import on_two_workers

DATA = "digits?val=0.4"
NETWORKS = {"small": ([2, 3, 4], 120), "large": ([6, 12, 16], 160)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, and a table of the answers of each."""
    folder = tmp_path_factory.mktemp("stages")
    for name, (widths, iterations) in NETWORKS.items():
        stage = {"iterations": iterations, "batch": 64, "lr": 0.1, "schedule": "cosine"}
        settings = {"arm": "base", "gate": "none", "depth": 8, "widths": widths, "augment": "none", "stage1": stage}
        dataeff.train("skipnet", DATA, folder / name, settings | {"clip_norm": 5.0}, report=lambda row, total: None)
        score(folder / name / "artifact", folder / f"{name}.parquet")
    return folder


def score(artifact: Path, out: Path, **about: Any) -> None:
    """What ray_jobs.score writes, without Ray."""
    predictor, splits = dataeff.load(artifact), open_splits(DATA)
    preprocess = Preprocess.from_dict(predictor.card.preprocess)
    found = {}
    for split in ("val", "test"):
        source = getattr(splits, split)
        parts = [predictor.predict(batch.images) for batch in eval_batches(source, preprocess, 256)]
        found[split] = Scores(
            torch.cat([part.probabilities for part in parts]).numpy(),
            source.labels,
            np.arange(len(source)),
            torch.cat([part.macs for part in parts]).numpy(),
        )
    cost = predictor.card.cost
    write_scores(out, found, {"artifact": str(artifact), "macs": cost["macs"], "full_macs": cost["full_macs"]} | about)


def artifacts(runs: Path) -> list[str]:
    return [str(runs / name / "artifact") for name in NETWORKS]


def experiment(runs: Path, **settings: Any) -> IdkExperiment:
    config = parse_config(IdkConfig, {"stages": artifacts(runs), "kind": "entropy", "eps": 0.01} | settings)
    return IdkExperiment(config, DATA, Runtime("cpu"))


@pytest.fixture(scope="module")
def exported(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cascade") / "run"
    settings = {"stages": artifacts(runs), "kind": "cost", "eps": 0.01, "steps": 400}
    dataeff.train("idk", DATA, out, settings, report=lambda row, total: None)
    return out


def test_images(count: int | None = None) -> tuple[torch.Tensor, np.ndarray]:
    splits = open_splits(DATA)
    preprocess = Preprocess.fit(splits.train)
    rows = np.arange(count or len(splits.test))
    return preprocess(splits.test.images(rows)), splits.test.labels[rows]


test_images.__test__ = False  # type: ignore[attr-defined]


def test_a_run_leaves_a_cascade_that_is_cheaper_than_its_last_model(exported: Path) -> None:
    summary = json.loads((exported / "summary.json").read_text())
    metrics = summary["metrics"]
    assert metrics["test_relative_cost"] < 0.9
    assert metrics["test_accuracy"] > 0.9
    assert metrics["test_cost"] == pytest.approx(metrics["test_macs"])
    for name in ("cascade_curve.png", "entropies.png", "curves.png"):
        assert (exported / name).read_bytes().startswith(b"\x89PNG")


def test_the_artifact_answers_alone_after_its_stages_are_gone(runs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "stages"
    shutil.copytree(runs, moved)
    config = parse_config(IdkConfig, {"stages": [str(moved / name / "artifact") for name in NETWORKS], "eps": 0.02})
    fitted = IdkExperiment(config, DATA, Runtime("cpu"))
    fitted.step()
    fitted.export(tmp_path / "cascade")
    shutil.rmtree(moved)
    predictor = dataeff.load(tmp_path / "cascade")
    inputs, labels = test_images()
    prediction = predictor.predict(inputs)
    accuracy = float((prediction.probabilities.argmax(1).numpy() == labels).mean())
    assert accuracy == pytest.approx(predictor.card.metrics["test_accuracy"])
    assert float(prediction.macs.mean()) == pytest.approx(predictor.card.cost["macs"])
    assert predictor.path_names == ["small", "large"]
    assert prediction.path[:, 0].all() and 0 < prediction.path[:, 1].double().mean() < 1


def test_the_predictor_serves_points_of_the_curve_budgets_and_stages(exported: Path) -> None:
    predictor = dataeff.load(exported / "artifact")
    assert isinstance(predictor, CascadePredictor)
    inputs, labels = test_images()
    curve = predictor.spec.curve
    cheap, dear = predictor.point(relative_cost=curve[0].relative_cost), predictor.point(accuracy=1.0)
    shares = [
        float(predictor.cascade.predict(inputs, thresholds=torch.tensor(p.thresholds)).path[:, 1].double().mean())
        for p in (cheap, dear)
    ]
    assert shares[0] < shares[1]
    full = [stage.full_macs for stage in predictor.stages]
    tight = predictor.predict(inputs, torch.full((len(inputs),), full[0], dtype=torch.float64))
    assert not tight.path[:, 1].any() and (tight.macs <= full[0]).all()
    with pytest.raises(ValueError, match="budget needs one number"):
        predictor.predict(inputs, torch.ones(3))


def test_a_stage_is_loaded_without_the_networks_of_the_others(exported: Path) -> None:
    artifact = read_artifact(exported / "artifact")
    together = load_cascade(artifact, "cpu").predict(inputs := test_images(100)[0])
    for number in range(2):
        alone = load_cascade(artifact, "cpu", [number])
        assert [stage.predictor is not None for stage in alone.stages] == [n == number for n in range(2)]
        rows = together.stage == number
        answer = alone.stages[number].predict(inputs[rows])
        assert torch.allclose(answer.probabilities, together.probabilities[rows], atol=1e-6)
    with pytest.raises(ValueError, match="stage 2 must be 0 to 1"):
        load_cascade(artifact, "cpu", [2])


def test_the_artifact_names_stages_thresholds_costs_and_calibration(runs: Path, exported: Path) -> None:
    spec = read_spec(read_artifact(exported / "artifact"))
    assert [stage.name for stage in spec.stages] == ["small", "large"]
    for stage, path in zip(spec.stages, artifacts(runs), strict=True):
        card = read_artifact(path).card
        assert stage.weights == card.files["model.safetensors"]
        assert (stage.cost, stage.full_macs) == (card.cost["macs"], card.cost["full_macs"])
    assert spec.calibration.images == 252 and spec.calibration.split == "val"
    assert spec.calibration.entropy_mean[0] > 0
    assert len(spec.curve) > 5


def test_stored_tables_give_the_same_cascade_as_artifacts(runs: Path, tmp_path: Path) -> None:
    from_artifacts = experiment(runs)
    from_tables = experiment(runs, stages=[str(runs / "small.parquet"), str(runs / "large.parquet")])
    assert from_artifacts.step() == pytest.approx(from_tables.step(), abs=1e-6)
    from_tables.export(tmp_path / "artifact")
    inputs, labels = test_images()
    predictor = dataeff.load(tmp_path / "artifact")  # the tables name their artifacts, which are embedded
    found = predictor.predict(inputs).probabilities.argmax(1).numpy()
    assert float((found == labels).mean()) == pytest.approx(from_artifacts.evaluate("test")["accuracy"])


def black_box(folder: Path) -> list[str]:
    """Tables of models that nobody has: labels with noise."""
    splits = open_splits(DATA)
    rng = np.random.default_rng(0)
    paths = []
    for name, strength in (("a", 2.0), ("b", 5.0)):
        found = {}
        for split in ("val", "test"):
            labels = getattr(splits, split).labels
            logits = np.eye(10)[labels] * strength + rng.normal(size=(len(labels), 10))
            values = torch.from_numpy(logits).softmax(1).numpy().astype(np.float32)
            found[split] = Scores(values, labels, np.arange(len(labels)), np.full(len(labels), np.nan))
        paths.append(str(folder / f"{name}.parquet"))
        write_scores(paths[-1], found)
    return paths


def test_a_cascade_of_models_that_nobody_has_is_fitted_from_tables_and_keeps_its_thresholds(tmp_path: Path) -> None:
    config = parse_config(IdkConfig, {"stages": black_box(tmp_path), "costs": [1.0, 5.0], "eps": 0.02})
    fitted = IdkExperiment(config, DATA, Runtime("cpu"))
    row = fitted.step()
    assert row["feasible"] == 1 and row["val_relative_cost"] < 1
    fitted.export(tmp_path / "artifact")
    artifact = read_artifact(tmp_path / "artifact")
    idk = add_ons(artifact, read_spec(artifact))
    tables = [ScoreTable(path).read("test") for path in config.stages]
    probabilities = [torch.from_numpy(table.probabilities) for table in tables]
    report = evaluate_tables(probabilities, tables[0].labels, idk, [1.0, 5.0])
    assert report.accuracy == pytest.approx(artifact.card.metrics["test_accuracy"])
    with pytest.raises(ValueError, match=r"stage 1 \(a\) has no network"):
        dataeff.load(tmp_path / "artifact")


def test_a_table_without_costs_asks_for_them(tmp_path: Path) -> None:
    config = parse_config(IdkConfig, {"stages": black_box(tmp_path)})
    with pytest.raises(ValueError, match=r"stage a has no known cost: give costs="):
        IdkExperiment(config, DATA, Runtime("cpu"))


def test_a_table_of_other_data_is_refused(runs: Path, tmp_path: Path) -> None:
    table = ScoreTable(runs / "small.parquet").read("val")
    wrong = Scores(table.probabilities, (table.labels + 1) % 10, table.indices, table.macs)
    write_scores(tmp_path / "wrong.parquet", {"val": wrong}, {"macs": 1.0})
    with pytest.raises(ValueError, match=r"image \d+ of split 'val' has label \d+, the data says \d+"):
        experiment(runs, stages=[str(tmp_path / "wrong.parquet"), artifacts(runs)[1]]).step()
    write_scores(tmp_path / "short.parquet", {"val": table.rows(slice(0, 100))}, {"macs": 1.0})
    with pytest.raises(ValueError, match="score"):
        experiment(runs, stages=[str(tmp_path / "short.parquet"), artifacts(runs)[1]]).step()
    write_scores(tmp_path / "classes.parquet", {"val": table}, {"macs": 1.0, "classes": ["x", "y"]})
    with pytest.raises(ValueError, match="its classes are"):
        experiment(runs, stages=[str(tmp_path / "classes.parquet"), artifacts(runs)[1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, "stages"),
        ({"stages": ["a", "b"], "order": "1-3"}, "order = '1-3' must be different numbers from 1 to 2"),
        ({"stages": ["a", "b"], "order": "2-2"}, "order = '2-2'"),
        ({"stages": ["a", "b"], "costs": [1.0]}, "costs needs 2 numbers"),
        ({"stages": ["a", "b"], "costs": [1.0, -1.0]}, "must be at least 0"),
        ({"stages": ["a", "b"], "lambda": 1}, "unknown key 'lambda'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(IdkConfig, settings)


def test_a_missing_stage_is_named(runs: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        experiment(runs, stages=[str(runs / "nothing"), artifacts(runs)[1]])
    with pytest.raises(FileNotFoundError, match=r"nothing.parquet: no such file"):
        experiment(runs, stages=[str(runs / "nothing.parquet"), artifacts(runs)[1]])


def test_order_chooses_stages_and_a_single_model_is_a_point_to_compare_with(runs: Path) -> None:
    alone = experiment(runs, order="2")
    row = alone.step()
    assert row["val_relative_cost"] == 1.0
    assert experiment(runs, order="1-2").costs == [*experiment(runs, order="1").costs, *alone.costs]
    with pytest.warns(UserWarning, match="put the cheaper one first"):
        experiment(runs, order="2-1").step()


def test_calibration_and_validation_images_are_apart_and_drawn_by_the_seed(runs: Path) -> None:
    found = experiment(runs, seed=1)
    assert not set(found.calibration_indices) & set(found.val_indices)
    assert len(found.calibration_indices) + len(found.val_indices) == 503
    again, other = experiment(runs, seed=1), experiment(runs, seed=2)
    assert (again.calibration_indices == found.calibration_indices).all()
    assert (other.calibration_indices != found.calibration_indices).any()
    assert len(experiment(runs, calibration_size=40).calibration_indices) == 40


def test_calibrating_on_training_images_warns_of_leakage(runs: Path, tmp_path: Path) -> None:
    splits = open_splits(DATA)
    sure = np.eye(10, dtype=np.float32)[splits.train.labels] * 0.9 + 0.01
    val = ScoreTable(runs / "small.parquet").read("val")
    known = Scores(sure, splits.train.labels, np.arange(len(sure)), np.ones(len(sure)))
    write_scores(tmp_path / "over.parquet", {"train": known, "val": val}, {"macs": 1.0, "full_macs": 1.0})
    found = experiment(runs, stages=[str(tmp_path / "over.parquet"), artifacts(runs)[1]], calibration="train")
    with pytest.warns(UserWarning, match="calibration leakage: over has accuracy 1.000"):
        found.step()


def test_a_human_stage_meets_an_absolute_goal_and_is_in_the_artifact(runs: Path, tmp_path: Path) -> None:
    found = experiment(runs, order="1", human_cost=1e9, accuracy_goal=0.97, kind="entropy")
    row = found.step()
    assert row["calibration_accuracy"] >= 0.97 and 0 < row["calibration_idk_rate_1"] < 1
    found.export(tmp_path / "artifact")
    predictor = dataeff.load(tmp_path / "artifact")
    assert isinstance(predictor, CascadePredictor) and predictor.human
    inputs, labels = test_images()
    output = predictor.predict(inputs)
    right = (output.labels.numpy() == labels) | output.idk.numpy()
    assert float(right.mean()) == pytest.approx(predictor.card.metrics["test_accuracy"])
    assert float(output.idk.double().mean()) == pytest.approx(predictor.card.metrics["test_idk_rate_1"])
    assert predictor.card.cost["full_macs"] < 1e9


@pytest.mark.parametrize("kind", ["entropy", "oblivious"])
def test_a_resumed_run_exports_what_the_undisturbed_one_exports(runs: Path, tmp_path: Path, kind: str) -> None:
    settings = {"kind": kind, "steps": 100}
    undisturbed = RunState(experiment(runs, **settings))
    list(undisturbed.advance())
    (tmp_path / "checkpoint").mkdir()
    undisturbed.save(tmp_path / "checkpoint")
    resumed = RunState(experiment(runs, **settings), tmp_path / "checkpoint")
    assert resumed.finished
    undisturbed.experiment.export(tmp_path / "a")
    resumed.experiment.export(tmp_path / "b")
    for name in ("config.yaml", "model.safetensors", "card.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(ValueError, match="of other stages"):
        RunState(experiment(runs, order="1"), tmp_path / "checkpoint")


def test_stages_with_different_normalisation_see_their_own_inputs(runs: Path, exported: Path) -> None:
    """The second stage's card is given another mean and deviation; its inputs are converted."""
    artifact = read_artifact(exported / "artifact")
    stage = artifact.config["stages"][1]
    stage["card"]["preprocess"] |= {"mean": [0.1], "std": [0.9]}
    predictor = IdkExperiment.load_predictor(artifact, "cpu")
    assert isinstance(predictor, CascadePredictor)
    pixels = open_splits(DATA).test.images(range(20))
    own = Preprocess.from_dict(stage["card"]["preprocess"])(pixels)
    expected = dataeff.load(artifacts(runs)[1]).predict(own).probabilities
    found = predictor.stages[1].predict(Preprocess.from_dict(predictor.card.preprocess)(pixels)).probabilities
    assert torch.allclose(found, expected, atol=1e-5)
    stage["card"]["preprocess"] |= {"size": [6, 6]}
    with pytest.raises(ValueError, match="train the stages on one image size"):
        IdkExperiment.load_predictor(artifact, "cpu")


@pytest.mark.slow
def test_the_comparison_has_the_eleven_methods(runs: Path, tmp_path: Path) -> None:
    found = experiment(runs, compare=True, nn_hidden=[16, 8], nn_steps=60, steps=200, kind="entropy")
    found.step()
    found.plots(tmp_path)
    rows = {row["method"]: row for row in json.loads((tmp_path / "comparison.json").read_text())}
    assert len(rows) == 11
    fast = rows["fast alone"]
    assert rows["oracle"]["idk_rate"] == pytest.approx(1 - fast["accuracy"])
    assert rows["oracle"]["accuracy"] >= max(row["accuracy"] for name, row in rows.items() if name != "human") - 1e-12
    assert rows["accurate alone"]["relative_cost"] == 1.0 and fast["idk_rate"] == 0.0
    assert (tmp_path / "comparison.png").is_file()


def test_the_throughput_of_a_cheap_model_is_higher() -> None:
    small, large = torch.nn.Linear(64, 8), torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(60)])
    rates = throughput({"small": small, "large": large}, torch.randn(256, 64))
    assert rates["small"] > rates["large"] > 0


def _fit(stages: list[str], artifact: Path) -> dict[str, float]:
    config = parse_config(IdkConfig, {"stages": stages, "kind": "cost", "eps": 0.01, "steps": 100})
    found = IdkExperiment(config, DATA, Runtime("cpu"))
    row = found.step()
    found.export(artifact)
    return row


@pytest.mark.slow
def test_two_workers_share_the_scoring_and_fit_what_one_fits(runs: Path, tmp_path: Path) -> None:
    rows = on_two_workers(_fit, artifacts(runs), tmp_path / "artifact")
    assert rows[0] == rows[1]
    alone = experiment(runs, kind="cost", steps=100)
    assert alone.step() == pytest.approx(rows[0], abs=1e-6)
    alone.export(tmp_path / "alone")
    one, two = (read_artifact(tmp_path / name) for name in ("alone", "artifact"))
    assert one.card.metrics == pytest.approx(two.card.metrics)
    for name, tensor in one.state.items():
        assert torch.allclose(tensor, two.state[name], atol=1e-6)
