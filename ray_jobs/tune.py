"""python -m ray_jobs.tune METHOD --sweep NAME --data DATA --out DIR: a search on Ray Tune, remembered by Optuna."""

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

from dataeff.core.config import Choice, Range, merge, parse_config, parse_space, unflatten
from dataeff.core.plots import plot_scatter
from dataeff.core.registry import METHODS, get_method
from dataeff.core.run import METRICS, Row, RunDirectory, read_rows, replace_text, train
from dataeff.core.runtime import Runtime, RuntimeConfig
from dataeff.data import absolute_spec, open_splits
from ray_jobs.cli import UserError, add_config_arguments, read_settings, run_command
from ray_jobs.cluster import connect, require
from ray_jobs.sweep import StudySearch, Sweep, distributions, ended, make_sampler, open_study, read_sweep
from ray_jobs.training import Job, root_cause, run_training

FRONT = "front.json"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.tune", description=__doc__)
    parser.add_argument("method", help=f"one of {', '.join(sorted(METHODS))}")
    parser.add_argument("--sweep", required=True, help="a shipped sweep's name, or a YAML file")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--trials", type=int, help="trials in all, those before a --resume included")
    parser.add_argument("--reference", type=Path, help="a finished run to compare with, instead of the sweep's own")
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the sweep in --out")
    add_config_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Search, and return the front: trials, Pareto set, reference and the chosen trial."""
    args = parse_arguments(arguments)
    method = get_method(args.method)
    sweep = read_sweep(args.sweep, args.method)
    settings = merge(read_settings(args.method, args.config, args.set, "gpu" if sweep.gpus else "cpu"), sweep.set)
    # While a shared run's path is not known yet, the settings are checked as those of that run's own kind.
    checkable = merge({name: str(args.out) for name in sweep.shared}, settings)
    parse_config(method.config_schema, checkable, f"sweep {args.sweep}")
    space = parse_space(method.config_schema, sweep.space, checkable, f"sweep {args.sweep}")
    trials = args.trials or sweep.trials
    if trials < 1:
        raise ValueError(f"--trials {trials}: must be at least 1")
    data = absolute_spec(args.data)
    open_splits(data)
    identity = {"sweep": sweep.model_dump(mode="json"), "settings": settings}
    folder = RunDirectory(args.out, f"tune:{args.method}", data, identity, args.resume, args.overwrite)
    out = folder.path.absolute()

    connect()
    require(sweep.cpus * sweep.workers, sweep.gpus * sweep.workers)
    for name, changes in sweep.shared.items():
        if name not in settings:
            settings = merge(settings, {name: _train_once(sweep, name, merge(settings, changes), data, out)})
    reference = None
    if args.reference is not None:
        reference = _last_row(args.reference)
    elif sweep.reference is not None:
        own = {key: value for key, value in settings.items() if key not in sweep.shared}
        _train_once(sweep, "reference", merge(own, sweep.reference), data, out)
        reference = _last_row(out / "shared" / "reference")
    _search(sweep, space, settings, data, out, trials)
    front = write_front(sweep, out, reference)
    _print_front(front, out)
    return front


def _train_once(sweep: Sweep, name: str, settings: dict[str, Any], data: str, out: Path) -> str:
    """Train a run that the trials share, on the cluster; the path of its artifact."""
    settings = {key: value for key, value in settings.items() if key != name}
    folder = out / "shared" / name
    print(f"training {name} ...", file=sys.stderr, flush=True)
    cpus = int(ray.cluster_resources().get("CPU", 1)) if len(ray.nodes()) == 1 else sweep.cpus
    task = ray.remote(num_cpus=cpus, num_gpus=sweep.gpus)(_run_silently)
    try:
        ray.get(task.remote(sweep.method, data, str(folder), settings))
    except ray.exceptions.RayTaskError as error:
        raise UserError(f"{name}: {error.cause}") from None
    return str(folder / "artifact")


def _run_silently(method: str, data: str, out: str, settings: dict[str, Any]) -> None:
    train(method, data, out, settings, resume=True, report=lambda row, total: None)


def run_trial(options: dict[str, Any], setup: dict[str, Any]) -> None:
    """One trial, in a Tune worker; it goes on where an interrupted one stopped."""
    sweep = Sweep(**setup["sweep"])
    settings = merge(setup["settings"], unflatten(options["params"]))
    out = Path(setup["out"]) / "trials" / f"{options['number']:04d}"
    if sweep.trial == "ray_train":
        _run_trial_on_ray_train(sweep, settings, setup["data"], out)
        return

    def report(row: Row, total: int) -> None:
        tune.report({**row, "total_steps": total})

    runtime = Runtime("cuda" if sweep.gpus else "cpu")
    if (out / "summary.json").is_file():  # it had ended when the sweep was killed, but was not told to the study yet
        row = _last_row(out)
        report(row, int(row["step"]))
        return
    train(sweep.method, setup["data"], out, settings, runtime, resume=True, report=report)


def _run_trial_on_ray_train(sweep: Sweep, settings: dict[str, Any], data: str, out: Path) -> None:
    config = parse_config(get_method(sweep.method).config_schema, settings).model_dump(mode="json")
    folder = RunDirectory(out, sweep.method, data, config, resume=True)
    if folder.finished:
        row = _last_row(out)
        tune.report({**row, "total_steps": row["step"]})
        return
    job = Job(
        method=sweep.method,
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
    sweep: Sweep, space: dict[str, Range | Choice], settings: dict[str, Any], data: str, out: Path, trials: int
) -> None:
    study = open_study(out, sweep, make_sampler(sweep.sampler, space, int(settings.get("seed", 0))))
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
    search = StudySearch(study, distributions(space), dict(sweep.objectives))
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, setup=setup), own),
        tune_config=tune.TuneConfig(
            search_alg=search,
            num_samples=remaining,
            max_concurrent_trials=concurrent,
            scheduler=_scheduler(sweep),
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
        left = (time.perf_counter() - self.started) / max(1, done - self.done_before) * max(0, self.total - done)
        clock = f"{int(left) // 60}:{int(left) % 60:02d} left"
        print(f"trial {done}/{self.total}  {params}  ->  {values}  {clock}", file=sys.stderr, flush=True)


def _last_row(folder: Path) -> Row:
    return read_rows(folder / METRICS)[-1]


def write_front(sweep: Sweep, out: Path, reference: Row | None) -> dict[str, Any]:
    """Write `front.json` and `front.png`, and return what they show.

    The chosen trial is the cheapest whose first objective (an accuracy) is at most `accuracy_tolerance` below the
    reference (spec skipnet section 5); without a reference, or when none is that good, the best in
    the first objective.
    """
    study = open_study(out, sweep, make_sampler("random", {}, 0))
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    best = {trial.number for trial in study.best_trials} if complete else set()
    names = list(sweep.objectives)
    chosen = choose(sweep, complete, reference)
    front = {
        "objectives": dict(sweep.objectives),
        "reference": {name: reference[name] for name in names if name in reference} if reference else None,
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
        points = {trial.number: (trial.values[1], trial.values[0]) for trial in complete}
        series = {
            "trials": [point for number, point in points.items() if number not in best],
            "Pareto front": [points[number] for number in sorted(best)],
        }
        if front["reference"]:
            series["reference"] = [(reference[names[1]], reference[names[0]])] if reference else []
        if chosen is not None:
            series["chosen"] = [points[chosen.number]]
        plot_scatter({k: v for k, v in series.items() if v}, out / "front.png", names[1], names[0], ["Pareto front"])
    return front


def choose(sweep: Sweep, complete: list[FrozenTrial], reference: Row | None) -> FrozenTrial | None:
    """The trial that the rule of `write_front` picks."""
    if not complete:
        return None
    signs = [1 if direction == "maximize" else -1 for direction in sweep.objectives.values()]

    def gain(trial: FrozenTrial, objective: int) -> float:
        return signs[objective] * float(trial.values[objective])

    if reference is not None and len(signs) > 1:
        floor = signs[0] * reference[next(iter(sweep.objectives))] - sweep.accuracy_tolerance
        good = [trial for trial in complete if gain(trial, 0) >= floor]
        if good:
            return max(good, key=lambda trial: gain(trial, 1))
    return max(complete, key=lambda trial: gain(trial, 0))


def _print_front(front: dict[str, Any], out: Path) -> None:
    if front["reference"]:
        print("reference  " + "  ".join(f"{key} {value:.4g}" for key, value in front["reference"].items()))
    for trial in front["trials"]:
        marks = ("*" if trial["pareto"] else " ") + (" chosen" if trial["number"] == front["chosen"] else "")
        values = "  ".join(f"{key} {value:.4g}" for key, value in trial["values"].items())
        print(f"trial {trial['number']:3d}  {trial['state']:9s} {values} {marks}")
    print(f"front: {out / FRONT}, {out / 'front.png'}; study: optuna-dashboard sqlite:///{out / 'study.db'}")


if __name__ == "__main__":
    run_command(main)
