"""python -m ray_jobs.tune [METHOD] --sweep NAME --data DATA --out DIR: a search on Ray Tune, remembered by Optuna."""

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

from dataeff.core.config import (
    Choice,
    Range,
    merge,
    nearest,
    parse_config,
    parse_overrides,
    parse_space,
    unflatten,
)
from dataeff.core.plots import plot_scatter
from dataeff.core.registry import METHODS, get_method
from dataeff.core.run import METRICS, Row, RunDirectory, finished_runs, read_rows, replace_text, train
from dataeff.core.runtime import Runtime, RuntimeConfig
from dataeff.data import absolute_spec
from ray_jobs.cli import UserError, add_config_arguments, add_folder_arguments, check_data, read_settings, run_command
from ray_jobs.cluster import connect, require
from ray_jobs.sweep import StudySearch, Sweep, distributions, ended, open_study, read_sweep, searching_study
from ray_jobs.training import Job, root_cause, run_training

FRONT = "front.json"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.tune", description=__doc__)
    parser.add_argument(
        "method", nargs="?", help=f"one of {', '.join(sorted(METHODS))}; left out for a sweep of several families"
    )
    parser.add_argument("--sweep", required=True, help="a shipped sweep's name, or a YAML file")
    parser.add_argument("--data", required=True)
    parser.add_argument("--trials", type=int, help="trials in all, those before a --resume included")
    parser.add_argument("--reference", type=Path, help="a finished run to compare with, instead of the sweep's own")
    add_folder_arguments(parser, "sweep")
    add_config_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Search, and return the front: trials, Pareto set, reference and the chosen trial."""
    args = parse_arguments(arguments)
    sweep = read_sweep(args.sweep, args.method)
    settings = _settings(sweep, args)
    spaces = _spaces(sweep, settings, args)
    trials = args.trials or sweep.trials
    if trials < 1:
        raise ValueError(f"--trials {trials}: must be at least 1")
    data = absolute_spec(args.data)
    check_data((member.method for member in sweep.members.values()), data)
    identity = {"sweep": sweep.model_dump(mode="json"), "settings": settings}
    name = f"tune:{sweep.method or args.sweep}"
    folder = RunDirectory(args.out, name, data, identity, args.resume, args.overwrite)
    out = folder.path.absolute()

    connect()
    require(sweep.cpus * sweep.workers, sweep.gpus * sweep.workers)
    if args.reference is not None:
        references = {"reference": _last_row(args.reference)}
    else:
        references = _train_references(sweep, settings, data, out)
    for family, member in sweep.members.items():
        for name, changes in member.shared.items():
            if name not in settings[family]:
                where = out / "shared" / _shared_name(sweep, family, name)
                own = {key: value for key, value in merge(settings[family], changes).items() if key != name}
                _train_once(sweep, member.method, own, data, where)
                settings[family] = merge(settings[family], {name: str(where / "artifact")})
    _search(sweep, spaces, settings, data, out, trials)
    front = write_front(sweep, out, references)
    for method in dict.fromkeys(member.method for member in sweep.members.values()):
        get_method(method).compare(finished_runs(method, [out]), out)
    _print_front(front, out)
    return front


def _settings(sweep: Sweep, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Family -> settings that all its trials have: preset or file, the sweep's own over it, `--set` over both."""
    preset = "gpu" if sweep.gpus else "cpu"
    changes = parse_overrides(args.set)
    if not sweep.families:
        assert sweep.method is not None
        own = read_settings(sweep.method, args.config, [], preset)
        return {sweep.method: merge(merge(own, sweep.set), changes)}
    if args.config:
        raise ValueError("--config is for a sweep of one method; use --set FAMILY.KEY=VALUE")
    unknown = [name for name in changes if name not in sweep.families]
    if unknown:
        raise ValueError(f"--set {unknown[0]}: begins with no family ({nearest(unknown[0], sweep.families)})")
    return {
        family: merge(merge(read_settings(member.method, None, [], preset), member.set), changes.get(family, {}))
        for family, member in sweep.families.items()
    }


def _spaces(
    sweep: Sweep, settings: dict[str, dict[str, Any]], args: argparse.Namespace
) -> dict[str, dict[str, Range | Choice]]:
    """Family -> its checked search space; every setting of the sweep is checked before anything is trained."""
    spaces = {}
    for family, member in sweep.members.items():
        where = f"sweep {args.sweep}" + (f", family {family}" if sweep.families else "")
        schema = get_method(member.method).config_schema
        # While a shared run's path is not known yet, the settings are checked as those of that run's own kind.
        checkable = merge({name: str(args.out) for name in member.shared}, settings[family])
        parse_config(schema, checkable, where)
        for name, changes in member.references.items():
            own = {key: value for key, value in settings[family].items() if key not in member.shared}
            parse_config(schema, merge(own, changes), f"{where}, reference {name}")
        spaces[family] = parse_space(schema, member.space, checkable, where)
    return spaces


def _train_references(sweep: Sweep, settings: dict[str, dict[str, Any]], data: str, out: Path) -> dict[str, Row]:
    """The last row of each run that the sweep is compared with."""
    rows = {}
    for family, member in sweep.members.items():
        own = {key: value for key, value in settings[family].items() if key not in member.shared}
        for name, changes in member.references.items():
            folder = out / "shared" / _shared_name(sweep, family, name)
            _train_once(sweep, member.method, merge(own, changes), data, folder)
            rows[name] = _last_row(folder)
    return rows


def _shared_name(sweep: Sweep, family: str, name: str) -> str:
    return f"{family}-{name}" if sweep.families else name


def _train_once(sweep: Sweep, method: str, settings: dict[str, Any], data: str, folder: Path) -> None:
    """Train a run that the trials share, on the cluster, unless it is there already."""
    print(f"training {folder.name} ...", file=sys.stderr, flush=True)
    cpus = int(ray.cluster_resources().get("CPU", 1)) if len(ray.nodes()) == 1 else sweep.cpus
    task = ray.remote(num_cpus=cpus, num_gpus=sweep.gpus)(_run_silently)
    try:
        ray.get(task.remote(method, data, str(folder), settings))
    except ray.exceptions.RayTaskError as error:
        raise UserError(f"{folder.name}: {error.cause}") from None


def _run_silently(method: str, data: str, out: str, settings: dict[str, Any]) -> None:
    train(method, data, out, settings, resume=True, report=lambda row, total: None)


def run_trial(options: dict[str, Any], setup: dict[str, Any]) -> None:
    """One trial, in a Tune worker; it goes on where an interrupted one stopped."""
    sweep = Sweep(**setup["sweep"])
    method = sweep.members[options["family"]].method
    settings = merge(setup["settings"][options["family"]], unflatten(options["params"]))
    out = Path(setup["out"]) / "trials" / f"{options['number']:04d}"
    if sweep.trial == "ray_train":
        _run_trial_on_ray_train(sweep, method, settings, setup["data"], out)
        return

    def report(row: Row, total: int) -> None:
        tune.report({**row, "total_steps": total})

    runtime = Runtime("cuda" if sweep.gpus else "cpu")
    if (out / "summary.json").is_file():  # it had ended when the sweep was killed, but was not told to the study yet
        row = _last_row(out)
        report(row, int(row["step"]))
        return
    train(method, setup["data"], out, settings, runtime, resume=True, report=report)


def _run_trial_on_ray_train(sweep: Sweep, method: str, settings: dict[str, Any], data: str, out: Path) -> None:
    config = parse_config(get_method(method).config_schema, settings).model_dump(mode="json")
    folder = RunDirectory(out, method, data, config, resume=True)
    if folder.finished:
        row = _last_row(out)
        tune.report({**row, "total_steps": row["step"]})
        return
    job = Job(
        method=method,
        data=data,
        config=config,
        runtime=RuntimeConfig().model_dump(),
        storage=str(folder.checkpoints),
        workers=sweep.workers,
        gpus=int(sweep.gpus * sweep.workers),
        cpus_per_worker=sweep.cpus,
    )
    with contextlib.redirect_stderr(io.StringIO()):  # progress is the sweep's
        run_training(job, folder, [TuneReportCallback()])


def _search(
    sweep: Sweep,
    spaces: dict[str, dict[str, Range | Choice]],
    settings: dict[str, dict[str, Any]],
    data: str,
    out: Path,
    trials: int,
) -> None:
    first = next(iter(spaces))
    study = searching_study(out, sweep, spaces[first], int(settings[first].get("seed", 0)))
    remaining = trials - len(ended(study))
    if remaining <= 0:
        return
    setup = {"sweep": sweep.model_dump(), "settings": settings, "data": data, "out": str(out)}
    # A Ray Train trial only waits for its workers, which take the resources themselves; Tune refuses an empty request.
    ray_train = sweep.trial == "ray_train"
    own: dict[str, float] = {"CPU": 0, "memory": 1} if ray_train else {"CPU": sweep.cpus, "GPU": sweep.gpus}
    share = sweep.cpus * sweep.workers
    concurrent = max(1, int(ray.cluster_resources().get("CPU", 1)) // share)
    if sweep.gpus:
        concurrent = max(1, int(ray.cluster_resources().get("GPU", 0) / (sweep.gpus * sweep.workers)))
    found = {family: distributions(space) for family, space in spaces.items()}
    search = StudySearch(study, found, dict(sweep.objectives))
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, setup=setup), own),
        tune_config=tune.TuneConfig(
            search_alg=search,
            num_samples=remaining,
            max_concurrent_trials=concurrent,
            scheduler=_scheduler(sweep),
            reuse_actors=True,  # a new process takes longer to import PyTorch than many trials here to train
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(out / "tune"),
            verbose=0,
            callbacks=[TrialProgress(search, trials, list(sweep.objectives))],
        ),
    )
    results = tuner.fit()
    failures = [error for error in results.errors if error is not None]
    if failures and len(failures) == remaining:
        raise UserError(f"every trial failed; the first: {root_cause(failures[0])}")


def _scheduler(sweep: Sweep) -> Any:
    if sweep.scheduler is None:
        return None
    metric, direction = next(iter(sweep.objectives.items()))
    mode = "max" if direction == "maximize" else "min"
    if sweep.scheduler == "median":
        return MedianStoppingRule(time_attr="step", metric=metric, mode=mode)
    # A trial ends by itself; by default ASHA would end every one at step 100.
    return ASHAScheduler(time_attr="step", metric=metric, mode=mode, max_t=10**6)


class TrialProgress(tune.Callback):
    """A line for each trial that ends, with the time left."""

    def __init__(self, search: StudySearch, total: int, objectives: Sequence[str]) -> None:
        self.study = search.study
        self.several = len(search.spaces) > 1
        self.total = total
        self.objectives = objectives
        self.started = time.perf_counter()
        self.done_before = len(ended(search.study))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial)

    def _show(self, trial: Any) -> None:
        done = len(ended(self.study))
        result = trial.last_result or {}
        values = "  ".join(f"{name} {result[name]:.4g}" for name in self.objectives if name in result) or "failed"
        params = "  ".join(
            f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in trial.config["params"].items()
        )
        if self.several:
            params = f"{trial.config['family']}  {params}"
        left = (time.perf_counter() - self.started) / max(1, done - self.done_before) * max(0, self.total - done)
        clock = f"{int(left) // 60}:{int(left) % 60:02d} left"
        print(f"trial {done}/{self.total}  {params}  ->  {values}  {clock}", file=sys.stderr, flush=True)


def _last_row(folder: Path) -> Row:
    return read_rows(folder / METRICS)[-1]


def write_front(sweep: Sweep, out: Path, references: Mapping[str, Row]) -> dict[str, Any]:
    """Write `front.json` and `front.png`, and return what they show.

    The chosen trial is the cheapest whose first objective (an accuracy) is at most `accuracy_tolerance` below the
    best reference (spec skipnet section 5); without a reference, or when none is that good, the best in the first
    objective.
    """
    study = open_study(out, sweep)
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    best = {trial.number for trial in study.best_trials} if complete else set()
    names = list(sweep.objectives)
    chosen = choose(sweep, complete, references)
    front = {
        "objectives": dict(sweep.objectives),
        "references": {
            reference: {name: row[name] for name in names if name in row} for reference, row in references.items()
        },
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "params": trial.params,
                "values": dict(zip(names, trial.values or [], strict=False)),
                "pareto": trial.number in best,
            }
            for trial in study.trials
        ],
        "chosen": None if chosen is None else chosen.number,
        "artifact": None if chosen is None else str(Path("trials") / f"{chosen.number:04d}" / "artifact"),
    }
    replace_text(out / FRONT, json.dumps(front, indent=2) + "\n")
    if len(names) == 2 and complete:
        _plot_front(sweep, complete, best, chosen, references, out / "front.png")
    return front


def _plot_front(
    sweep: Sweep,
    complete: Sequence[FrozenTrial],
    best: set[int],
    chosen: FrozenTrial | None,
    references: Mapping[str, Row],
    path: Path,
) -> None:
    """The second objective across, the first one upwards; with several families, the trials of each in its colour."""
    accuracy, cost = sweep.objectives
    points = {trial.number: (trial.values[1], trial.values[0]) for trial in complete}
    series: dict[str, list[tuple[float, float]]] = {}
    for trial in complete:
        if sweep.families or trial.number not in best:
            series.setdefault(trial.params.get("family", "trials"), []).append(points[trial.number])
    series["Pareto front"] = sorted(points[number] for number in best)
    rows = [row for row in references.values() if accuracy in row and cost in row]
    if rows:
        series["references"] = sorted((row[cost], row[accuracy]) for row in rows)
    if chosen is not None:
        series["chosen"] = [points[chosen.number]]
    plot_scatter(series, path, cost, accuracy, joined=["Pareto front"], marked=["chosen"])


def choose(sweep: Sweep, complete: Sequence[FrozenTrial], references: Mapping[str, Row]) -> FrozenTrial | None:
    """The trial that the rule of `write_front` picks."""
    if not complete:
        return None
    signs = [1 if direction == "maximize" else -1 for direction in sweep.objectives.values()]
    first = next(iter(sweep.objectives))

    def gain(trial: FrozenTrial, objective: int) -> float:
        return signs[objective] * float(trial.values[objective])

    if references and len(signs) > 1:
        floor = max(signs[0] * row[first] for row in references.values()) - sweep.accuracy_tolerance
        good = [trial for trial in complete if gain(trial, 0) >= floor]
        if good:
            return max(good, key=lambda trial: gain(trial, 1))
    return max(complete, key=lambda trial: gain(trial, 0))


def _print_front(front: dict[str, Any], out: Path) -> None:
    for reference, row in front["references"].items():
        print(f"{reference}  " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    for trial in front["trials"]:
        marks = ("*" if trial["pareto"] else " ") + (" chosen" if trial["number"] == front["chosen"] else "")
        values = "  ".join(f"{key} {value:.4g}" for key, value in trial["values"].items())
        family = f"{trial['params']['family']:10s} " if "family" in trial["params"] else ""
        print(f"trial {trial['number']:3d}  {family}{trial['state']:9s} {values} {marks}")
    print(f"front: {out / FRONT}, {out / 'front.png'}; study: optuna-dashboard sqlite:///{out / 'study.db'}")


if __name__ == "__main__":
    run_command(main)
