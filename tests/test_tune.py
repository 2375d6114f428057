"""Sweeps: what a file may say, a study that survives its process, the chosen trial, and whole searches on Ray Tune."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.experiment import Trial

from dataeff.core.config import Choice
from ray_jobs import tune
from ray_jobs.sweep import StudySearch, Sweep, distributions, read_sweep, searching_study
from ray_jobs.tune import _scheduler, _settings, choose, parse_arguments, write_front
from tests.ray_helpers import TINY, local_ray, run, running, wait_until

TWO = {"val_accuracy": "maximize", "val_macs": "minimize"}
SPACE = {"alpha": FloatDistribution(0.0, 4.0)}
TINY_TRIAL = TINY | {"arm": "hrl_sp"}


def sweep(**changes: Any) -> Sweep:
    return Sweep(**({"method": "skipnet", "objectives": TWO, "space": {"alpha": {"low": 0, "high": 4}}} | changes))


def sweep_file(path: Path, **changes: Any) -> str:
    values = {"method": "skipnet", "objectives": TWO, "space": {"alpha": {"low": 0, "high": 4}}} | changes
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_shipped_sweep_is_read_by_name() -> None:
    assert read_sweep("skipnet_alpha", "skipnet").objectives == TWO


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {}}, "objectives"),
        ({"objectives": {"val_accuracy": "up"}}, "'maximize', 'minimize'"),
        ({"sampler": "best"}, "'tpe', 'nsga2', 'random', 'grid'"),
        ({"spaces": {}}, "did you mean 'space'"),
        ({"scheduler": "asha"}, "single objective, found 2"),
        ({"method": "deepmoe"}, "'deepmoe', not 'skipnet'"),
        ({"method": None}, "either method and space, or families"),
        ({"families": {"a": {"method": "skipnet", "space": {}}}}, "either method and space, or families"),
        ({"cpus": 0}, ">= 1"),
    ],
)
def test_a_wrong_sweep_file_is_named_with_what_is_allowed(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="sweep") as caught:
        read_sweep(sweep_file(tmp_path / "s.yaml", **changes), "skipnet")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_sweep_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="did you mean 'skipnet_alpha'"):
        read_sweep("skipnet_alfa", "skipnet")


def test_a_missing_sweep_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_sweep(str(tmp_path / "none.yaml"), "skipnet")


# --- the study ------------------------------------------------------------------------------------------------------


def study_in(folder: Path, objectives: dict[str, str] = TWO) -> optuna.Study:
    return searching_study(folder, sweep(objectives=objectives, sampler="random"), {}, 0)


def search_in(folder: Path, objectives: dict[str, str] = TWO) -> StudySearch:
    return StudySearch(study_in(folder, objectives), {"skipnet": dict(SPACE)}, objectives)


def result(step: int = 20, **values: float) -> dict[str, Any]:
    return {"step": step, "total_steps": 20, "val_accuracy": 0.5, "val_macs": 1e3} | values


def test_trials_of_a_dead_process_are_handed_out_first_with_their_number_and_parameters(tmp_path: Path) -> None:
    dead = search_in(tmp_path)
    suggested = [dead.suggest(name) for name in "abc"]
    dead.on_trial_complete("b", result())

    resumed = search_in(tmp_path)
    assert [resumed.suggest("x"), resumed.suggest("y")] == [suggested[0], suggested[2]]
    assert resumed.suggest("z")["number"] == 3
    for name in "xyz":
        resumed.on_trial_complete(name, result())
    states = [trial.state for trial in study_in(tmp_path).trials]
    assert states == [TrialState.COMPLETE] * 4


def test_a_resumed_grid_leaves_out_no_combination_and_repeats_none(tmp_path: Path) -> None:
    space: dict[str, Any] = {"alpha": Choice((0.0, 1.0, 2.0)), "depth": Choice((8, 14))}
    grid = sweep(sampler="grid", space={name: {"choices": list(item.values)} for name, item in space.items()})
    seen: list[tuple[float, int]] = []
    for process, count in enumerate((2, 3, 1)):
        study = searching_study(tmp_path, grid, space, 0)
        search = StudySearch(study, {"skipnet": distributions(space)}, TWO)
        for number in range(count):
            name = f"{process}-{number}"
            params = search.suggest(name)["params"]
            seen.append((params["alpha"], params["depth"]))
            search.on_trial_complete(name, result())
    assert sorted(seen) == [(alpha, depth) for alpha in (0.0, 1.0, 2.0) for depth in (8, 14)]


def test_a_trial_whose_process_died_before_it_had_parameters_gets_some(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    study._storage.create_new_trial(study._study_id)
    suggested = search_in(tmp_path).suggest("x")
    assert suggested["number"] == 0
    assert 0 <= suggested["params"]["alpha"] <= 4
    assert study_in(tmp_path).trials[0].params == suggested["params"]


def test_asha_lets_a_good_trial_run_for_more_than_a_hundred_steps() -> None:
    scheduler = _scheduler(sweep(objectives={"val_accuracy": "maximize"}, scheduler="asha"))
    trial = Trial("skipnet", stub=True)
    scheduler.on_trial_add(None, trial)
    decisions = {scheduler.on_trial_result(None, trial, {"step": step, "val_accuracy": 0.5}) for step in range(1, 500)}
    assert decisions == {"CONTINUE"}


def test_trials_end_complete_pruned_or_failed_as_they_ended(tmp_path: Path) -> None:
    objectives = {"val_accuracy": "maximize"}
    search = search_in(tmp_path, objectives)
    for name in "abcd":
        search.suggest(name)
    search.on_trial_result("a", result(10, val_accuracy=0.25))
    search.on_trial_complete("a", result(20, val_accuracy=0.75))
    search.on_trial_complete("b", result(5))
    search.on_trial_complete("c", error=True)
    search.on_trial_complete("d", {"step": 20, "total_steps": 20})
    trials = study_in(tmp_path, objectives).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    assert trials[0].value == 0.75
    assert trials[0].intermediate_values == {10: 0.25, 20: 0.75}


def test_several_families_are_searched_each_by_its_own_settings(tmp_path: Path) -> None:
    spaces = {"a": dict(SPACE), "b": {"lr": FloatDistribution(0.1, 0.2)}}

    def search() -> StudySearch:
        return StudySearch(study_in(tmp_path), spaces, TWO)

    first = search()
    suggested = [first.suggest(str(number)) for number in range(12)]
    assert [options["family"] for options in suggested[:2]] == ["a", "b"], "each family comes first, once"
    assert {(options["family"], *options["params"]) for options in suggested} == {("a", "alpha"), ("b", "lr")}
    assert search().suggest("again") == suggested[0]


def test_a_resumed_sweep_does_not_draw_again_what_it_has_drawn(tmp_path: Path) -> None:
    first = search_in(tmp_path)
    before = [first.suggest(str(number))["params"]["alpha"] for number in range(3)]
    for number in range(3):
        first.on_trial_complete(str(number), {"val_accuracy": 0.5, "val_macs": 1.0, "step": 1, "total_steps": 1})
    after = search_in(tmp_path)
    assert not set(before) & {after.suggest(str(number))["params"]["alpha"] for number in range(3)}


def test_a_choice_among_lists_survives_the_storage(tmp_path: Path) -> None:
    space = distributions({"widths": Choice(([4, 8], [8, 16]))})
    suggested = StudySearch(study_in(tmp_path), {"skipnet": space}, TWO).suggest("a")
    assert suggested["params"]["widths"] in ([4, 8], [8, 16])
    assert StudySearch(study_in(tmp_path), {"skipnet": space}, TWO).suggest("b") == suggested


def test_a_sweep_of_several_families_keeps_their_settings_in_the_families(tmp_path: Path) -> None:
    families = {"skipnet": {"method": "skipnet", "space": {"alpha": {"low": 0, "high": 4}}}}
    file = tmp_path / "sweep.yaml"
    file.write_text(
        yaml.safe_dump({"objectives": TWO, "families": families, "space": {"alpha": {"low": 0, "high": 1}}})
    )
    with pytest.raises(ValueError, match="belong into each of the families"):
        read_sweep(str(file), None)
    file.write_text(yaml.safe_dump({"objectives": TWO, "families": families}))
    assert list(read_sweep(str(file), None).members) == ["skipnet"]
    with pytest.raises(ValueError, match=r"several families \(skipnet\), not 'skipnet'"):
        read_sweep(str(file), "skipnet")


def test_what_the_user_sets_wins_over_the_sweep(tmp_path: Path) -> None:
    def settings(file: str, *words: str) -> dict[str, dict[str, Any]]:
        arguments = parse_arguments(["--sweep", file, "--data", "digits", "--out", "out", *words])
        return _settings(read_sweep(file, None), arguments)

    own = {"depth": 14, "gate": "rnn"}
    alone = sweep_file(tmp_path / "alone.yaml", set=own)
    found = settings(alone, "--set", "depth=8")["skipnet"]
    assert (found["depth"], found["gate"]) == (8, "rnn")
    families = {"a": {"method": "skipnet", "space": {}, "set": own}}
    several = tmp_path / "several.yaml"
    several.write_text(yaml.safe_dump({"objectives": TWO, "families": families}))
    found = settings(str(several), "--set", "a.depth=8")["a"]
    assert (found["depth"], found["gate"]) == (8, "rnn")


# --- the front ------------------------------------------------------------------------------------------------------


def trials_of(*values: tuple[float, float]) -> list[FrozenTrial]:
    return [
        create_trial(values=list(pair), params={"alpha": float(i)}, distributions={"alpha": FloatDistribution(0, 9)})
        for i, pair in enumerate(values)
    ]


def test_the_cheapest_trial_within_the_tolerance_of_the_reference_is_chosen() -> None:
    trials = trials_of((0.95, 900), (0.946, 500), (0.944, 100), (0.97, 990))
    reference = {"val_accuracy": 0.95, "val_macs": 1000.0}
    assert choose(sweep(), trials, {"base": reference}) is trials[1]
    assert choose(sweep(accuracy_tolerance=0.01), trials, {"base": reference}) is trials[2]


def test_the_best_trial_is_chosen_without_a_reference_or_when_none_is_good_enough() -> None:
    trials = trials_of((0.80, 10), (0.90, 900), (0.85, 20))
    assert choose(sweep(), trials, {}) is trials[1]
    assert choose(sweep(), trials, {"base": {"val_accuracy": 0.99, "val_macs": 1000.0}}) is trials[1]
    assert choose(sweep(), [], {}) is None


def test_a_single_objective_is_chosen_in_its_direction() -> None:
    trials = [create_trial(value=value) for value in (3.0, 1.0, 2.0)]
    assert choose(sweep(objectives={"val_loss": "minimize"}), trials, {}) is trials[1]


def test_the_front_lists_every_trial_and_marks_the_pareto_set(tmp_path: Path) -> None:
    search = search_in(tmp_path)
    for name, accuracy, macs in (("a", 0.9, 500.0), ("b", 0.8, 600.0), ("c", 0.7, 100.0)):
        search.suggest(name)
        search.on_trial_complete(name, result(val_accuracy=accuracy, val_macs=macs))
    search.suggest("d")
    front = write_front(sweep(), tmp_path, {"base": {"val_accuracy": 0.9, "val_macs": 1000.0, "step": 20}})
    assert front == json.loads((tmp_path / "front.json").read_text())
    assert [trial["pareto"] for trial in front["trials"]] == [True, False, True, False]
    assert [trial["state"] for trial in front["trials"]] == ["complete"] * 3 + ["running"]
    assert front["trials"][0]["values"] == {"val_accuracy": 0.9, "val_macs": 500.0}
    assert front["references"] == {"base": {"val_accuracy": 0.9, "val_macs": 1000.0}}
    assert (front["chosen"], front["artifact"]) == (0, "trials/0000/artifact")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


# --- whole sweeps ---------------------------------------------------------------------------------------------------


def tune_arguments(file: str, out: Path, *more: str) -> list[str]:
    return ["-m", "ray_jobs.tune", "skipnet", "--sweep", file, "--data", "digits", "--out", str(out), *more]


def finished_trials(out: Path) -> dict[str, int]:
    """Trial -> when its summary was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (out / "trials").glob("*/summary.json")}


def load_study(out: Path) -> optuna.Study:
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.db'}")


@pytest.mark.parametrize("given", [False, True])
def test_a_sweep_trains_its_own_references_unless_one_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    trained: list[str] = []
    for name in ("connect", "require", "_search"):
        monkeypatch.setattr(tune, name, lambda *arguments: None)
    monkeypatch.setattr(tune, "_train_once", lambda *arguments: trained.append(arguments[-1].name))
    monkeypatch.setattr(tune, "_last_row", lambda folder: {"val_accuracy": 0.9, "val_macs": 1000.0})
    file = sweep_file(tmp_path / "s.yaml", references={"base": {"arm": "base", "gate": "none"}})
    more = ["--reference", str(tmp_path)] if given else []
    front = tune.main(tune_arguments(file, tmp_path / "out", *more)[2:])
    assert (trained, list(front["references"])) == (([], ["reference"]) if given else (["base"], ["base"]))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray in this process."""
    with local_ray():
        yield


@pytest.mark.ray
def test_a_killed_sweep_resumes_without_losing_or_repeating_a_trial(cluster: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = sweep_file(
        tmp_path / "sweep.yaml",
        sampler="nsga2",
        shared={"start_from": {"arm": "sp"}},
        references={"base": {"arm": "base", "gate": "none"}},
        set=TINY_TRIAL,
        trials=4,
    )
    with running(tune_arguments(file, out)) as command:
        wait_until(lambda: finished_trials(out), command)
        running_now = load_study(out)
        assert running_now.trials, "Optuna opens the study while the sweep runs"
        left = command.kill()
    for process in left:
        if process.is_running():
            process.kill()
    before = finished_trials(out)
    params = {trial.number: trial.params for trial in load_study(out).trials}
    shared = (out / "shared" / "start_from" / "summary.json").stat().st_mtime_ns
    assert before and len(before) < 4

    tune.main(tune_arguments(file, out, "--resume")[2:])
    after = finished_trials(out)
    assert sorted(after) == ["0000", "0001", "0002", "0003"]
    assert {name: after[name] for name in before} == before, "a finished trial was trained again"
    assert (out / "shared" / "start_from" / "summary.json").stat().st_mtime_ns == shared
    trials = load_study(out).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    # A trial that was killed while it was made has parameters only now.
    assert all(not before or trials[number].params == before for number, before in params.items())
    front = json.loads((out / "front.json").read_text())
    assert front["references"]["base"].keys() == TWO.keys()
    assert (out / front["artifact"] / "model.safetensors").is_file()


@pytest.mark.ray
def test_asha_stops_poor_trials_of_a_single_objective(cluster: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = sweep_file(
        tmp_path / "sweep.yaml",
        objectives={"val_accuracy": "maximize"},
        scheduler="asha",
        sampler="random",
        set=TINY | {"arm": "sp"},
        space={"stage1.lr": {"low": 0.0001, "high": 0.2, "log": True}},
        trials=4,
    )
    tune.main(tune_arguments(file, out)[2:])
    front = json.loads((out / "front.json").read_text())
    states = [trial["state"] for trial in front["trials"]]
    assert len(states) == 4 and set(states) <= {"complete", "pruned"} and "complete" in states
    assert all(trial.intermediate_values for trial in load_study(out).trials)
    assert front["trials"][front["chosen"]]["state"] == "complete"


@pytest.mark.ray
def test_a_trial_can_be_a_ray_train_run_of_its_own(cluster: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = sweep_file(tmp_path / "sweep.yaml", trial="ray_train", sampler="random", set=TINY_TRIAL, trials=1)
    tune.main(tune_arguments(file, out)[2:])
    front = json.loads((out / "front.json").read_text())
    assert [trial["state"] for trial in front["trials"]] == ["complete"]
    assert sorted(finished_trials(out)) == ["0000"]


def test_a_wrong_space_ends_in_one_line_before_a_cluster_is_asked(tmp_path: Path) -> None:
    file = sweep_file(tmp_path / "sweep.yaml", space={"alpha": {"low": 0, "high": 1000}})
    command = run(tune_arguments(file, tmp_path / "out"))
    lines = command.stderr.splitlines()
    assert (command.process.returncode, len(lines)) == (2, 1), command.stderr
    assert "alpha = 1000" in lines[0] and "<= 100" in lines[0]
    assert not (tmp_path / "out").exists()
