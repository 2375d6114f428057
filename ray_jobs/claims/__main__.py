"""python -m ray_jobs.claims [METHOD ...] --scale cpu|gpu --seeds N --out DIR: do the published claims hold here?"""

import argparse
import contextlib
import html
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataeff.core.artifact import versions
from dataeff.core.config import merge, nearest, parse_config
from dataeff.core.registry import get_method
from dataeff.core.run import SUMMARY, RunDirectory, replace_text, train
from dataeff.core.runtime import Runtime
from dataeff.data import absolute_spec
from ray_jobs.claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    UNMEASURED,
    UNTESTABLE,
    Claim,
    Result,
    Run,
    Verdict,
    load_claims,
    log_file,
    plan,
)
from ray_jobs.cli import UserError, add_folder_arguments, check_data, one_line, run_command

# What one run takes of the cluster: (CPUs, GPUs). The networks are small, so several runs share a large GPU.
RESOURCES: dict[str, tuple[float, float]] = {"cpu": (1, 0), "gpu": (2, 0.25)}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.claims", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"default: all of {', '.join(sorted(CLAIMS))}")
    parser.add_argument("--scale", choices=sorted(RESOURCES), default="cpu")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--data", help="the data to measure on (default at scale cpu: the embedded digits)")
    parser.add_argument("--only", nargs="+", metavar="ID", help="measure these claims only, such as S1 S13")
    parser.add_argument("--parallel", type=int, help="runs at a time (default: as many as the cluster holds)")
    add_folder_arguments(parser, "table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run what the claims need, judge them, write `claims.json` and `claims.html`, and return the verdicts."""
    args = parse_arguments(arguments)
    if args.seeds < 1 or (args.parallel is not None and args.parallel < 1):
        raise ValueError("--seeds and --parallel must be at least 1")
    data = absolute_spec(args.data) if args.data else None
    claims = {method: load_claims(method, args.scale, data) for method in args.methods or sorted(CLAIMS)}
    if args.only:
        claims = choose(claims, args.only)
    runs = {method: plan(found) for method, found in claims.items()}
    for trained, name in dict.fromkeys((run.method or method, run.data) for method in runs for run in runs[method]):
        check_data([trained], name)
    folder = RunDirectory(args.out, "claims", data or "default", {"scale": args.scale}, args.resume, args.overwrite)
    out = folder.path.absolute()
    jobs = [
        Job(method, run, seed, out / "runs" / method / f"{run.name}-seed{seed}")
        for seed in range(args.seeds)
        for method, found in runs.items()
        for run in found
    ]
    failures = run_jobs(jobs, RayTasks(args.scale), args.parallel) if jobs else {}
    verdicts = [
        judge(claim, out / "runs" / method, args.seeds, failures).to_dict(method)
        for method, found in claims.items()
        for claim in found
    ]
    write_table(out, verdicts, args.scale, args.seeds)
    for verdict in verdicts:
        print(f"{verdict['method']} {verdict['id']:4s} {verdict['verdict']:26s} {'; '.join(verdict['reasons'])}")
    print(f"table: {out / 'claims.html'}, {out / 'claims.json'}")
    if failures:
        job, message = next(iter(failures.items()))
        raise UserError(f"{len(failures)} of {len(jobs)} runs failed; {job}: {message}; repeat them with --resume")
    return verdicts


def choose(claims: dict[str, list[Claim]], ids: list[str]) -> dict[str, list[Claim]]:
    """Of each method the claims with one of these ids, without methods that have none.

    Raises:
        ValueError: no method has a claim of some id.
    """
    known = {claim.id for found in claims.values() for claim in found}
    for id in ids:
        if id not in known:
            raise ValueError(f"--only: no claim {id!r} ({nearest(id, known)})")
    chosen = {method: [claim for claim in found if claim.id in ids] for method, found in claims.items()}
    return {method: found for method, found in chosen.items() if found}


@dataclass(frozen=True)
class Job:
    """A run with one seed."""

    method: str
    run: Run
    seed: int
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.method} {self.folder.name}"

    @property
    def trains(self) -> str:
        """The method that the run trains; `method` is the one whose claims it is for."""
        return self.run.method or self.method

    def earlier(self) -> list[Path]:
        """Folders of the runs that this one comes after."""
        return [_folder(self.folder.parent, run, self.seed) for run in self.run.after]

    def settings(self) -> dict[str, Any]:
        results = {run.name: Result(path) for run, path in zip(self.run.after, self.earlier(), strict=True)}
        settings = merge(merge(self.run.settings, self.run.fill(results)), {"seed": self.seed})
        parse_config(get_method(self.trains).config_schema, settings, self.label)
        return settings


def _folder(parent: Path, run: Run, seed: int) -> Path:
    return parent / f"{run.name}-seed{seed}"


class RayTasks:
    """Runs as Ray tasks. A lost worker's task starts again, from the run's last checkpoint.

    Args:
        scale: decides what one run takes of the cluster.

    Raises:
        UserError: no cluster, or one that cannot hold a single run.
    """

    def __init__(self, scale: str) -> None:
        import ray

        from ray_jobs.cluster import connect, require

        connect()
        self.scale = scale
        self.cpus, self.gpus = RESOURCES[scale]
        require(self.cpus, self.gpus)
        self.task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=3)(train_job)
        self.running: dict[Any, Job] = {}

    def slots(self) -> int:
        """How many runs the cluster holds at a time."""
        import ray

        have, needs = ray.cluster_resources(), {"CPU": self.cpus, "GPU": self.gpus}
        return max(1, int(min(have.get(kind, 0) / need for kind, need in needs.items() if need)))

    def submit(self, job: Job, settings: dict[str, Any]) -> None:
        self.running[self.task.remote(job.trains, job.run.data, job.folder, settings, self.scale)] = job

    def wait(self) -> tuple[Job, bool | str]:
        """A run that has ended: whether it was trained (not finished before), or its error."""
        import ray

        (done,), _ = ray.wait(list(self.running), num_returns=1)
        job = self.running.pop(done)
        try:
            return job, bool(ray.get(done))
        except ray.exceptions.RayTaskError as error:
            return job, one_line(error.cause)
        except ray.exceptions.RayError as error:
            return job, one_line(error)[:300]


def run_jobs(jobs: list[Job], tasks: RayTasks, parallel: int | None) -> dict[str, str]:
    """Train what is not finished, in the order given as far as the runs' dependences allow.

    Returns:
        The error of each run that failed, or that could not start, by its label.
    """
    waiting, running, failures = list(jobs), 0, dict[str, str]()
    progress = Progress(len(jobs), sum((job.folder / SUMMARY).is_file() for job in jobs))
    ended: set[Path] = set()
    while waiting or running:
        for job in list(waiting):
            broken = [path.name for path in job.earlier() if f"{job.method} {path.name}" in failures]
            if broken:
                waiting.remove(job)
                failures[job.label] = f"needs {broken[0]}, which failed"
            elif running < (parallel or tasks.slots()) and ended.issuperset(job.earlier()):
                waiting.remove(job)
                try:
                    tasks.submit(job, job.settings())
                    running += 1
                except ValueError as error:
                    failures[job.label] = one_line(error)
        if not running:
            continue
        job, outcome = tasks.wait()
        running -= 1
        if isinstance(outcome, str):
            failures[job.label] = outcome
            print(f"{job.label} failed: {outcome}", file=sys.stderr, flush=True)
        else:
            ended.add(job.folder)
            progress.show(job.label, outcome)
    return failures


def train_job(method: str, data: str, folder: Path, settings: dict[str, Any], scale: str) -> bool:
    """Train one run, its progress and warnings in a log beside its folder; False when it was finished before."""
    if (folder / SUMMARY).is_file():
        train(method, data, folder, settings, resume=True)  # refuses a folder of other settings
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with log_file(folder).open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        train(method, data, folder, settings, Runtime("cuda" if scale == "gpu" else "cpu"), resume=True)
    return True


class Progress:
    """A line for each run that ends, with the time left; runs that were finished before do not count as work."""

    def __init__(self, total: int, finished: int) -> None:
        self.total, self.ended = total, 0
        self.to_train, self.trained = total - finished, 0
        self.started = time.perf_counter()

    def show(self, label: str, trained: bool) -> None:
        self.ended += 1
        self.trained += trained
        if not trained:
            return
        left = (time.perf_counter() - self.started) / self.trained * (self.to_train - self.trained)
        clock = f"{int(left) // 60}:{int(left) % 60:02d} left" if self.ended < self.total else "done"
        print(f"run {self.ended}/{self.total}  {label}  {clock}", file=sys.stderr, flush=True)


def judge(claim: Claim, folder: Path, seeds: int, failures: dict[str, str]) -> Verdict:
    """Measure a claim on every seed; one whose run failed is not judged on the seeds that are left."""
    verdict = Verdict(claim)
    for seed in range(seeds):
        results = {run.name: Result(_folder(folder, run, seed)) for run in claim.runs}
        labels = [f"{folder.name} {result.folder.name}" for result in results.values()]
        failed = [label for label in labels if label in failures]
        if failed:
            verdict.error = f"{failed[0]} failed: {failures[failed[0]]}"
            continue
        for name, value in claim.measure(results).items():
            verdict.figures.setdefault(name, []).append(float(value))
    return verdict


def write_table(out: Path, verdicts: list[dict[str, Any]], scale: str, seeds: int) -> None:
    table = {"scale": scale, "seeds": seeds, "versions": versions(), "claims": verdicts}
    replace_text(out / "claims.json", json.dumps(table, indent=2, allow_nan=False) + "\n")
    replace_text(out / "claims.html", page(table))


COLOURS = {HOLDS: "#d8f0d8", FAILS: "#f6d5d5", UNTESTABLE: "#eeeeee", UNMEASURED: "#fbeecb"}
STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:2em}table{border-collapse:collapse}
td,th{border:1px solid #bbb;padding:.4em .6em;vertical-align:top;text-align:left}"""


def page(table: dict[str, Any]) -> str:
    """The table as one HTML page that needs no other file."""
    counts = [f"{sum(row['verdict'] == kind for row in table['claims'])} {kind}" for kind in COLOURS]
    rows = "\n".join(_html_row(row) for row in table["claims"])
    heads = "".join(f"<th>{name}</th>" for name in ("claim", "statement", "published", "measured here", "verdict"))
    made = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Published claims</title><style>{STYLE}</style></head><body>
<h1>Published claims, measured here</h1>
<p>Scale {table["scale"]}, {table["seeds"]} seed(s), test split: {", ".join(counts)}. Measured: mean &plusmn; standard
deviation over seeds. A claim holds when every required bound is kept by the median over seeds, or by the mean where the
method's spec says so.</p>
<table><tr>{heads}</tr>
{rows}
</table><p>{html.escape(made)}</p></body></html>
"""


def _html_row(row: dict[str, Any]) -> str:
    measured = "<br>".join(f"{html.escape(name)}: {_shown(values)}" for name, values in row["measured"].items())
    reasons = "<br>".join(map(html.escape, row["reasons"]))
    cells = [f"{row['method']} {row['id']}", row["claim"], row["published"]]
    escaped = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    verdict = f'<td style="background:{COLOURS[row["verdict"]]}"><b>{row["verdict"]}</b><br>{reasons}</td>'
    return f"<tr>{escaped}<td>{measured}</td>{verdict}</tr>"


def _shown(values: dict[str, Any]) -> str:
    if values["mean"] is None:
        return "undefined"
    return f"{values['mean']:.4g}" + (f" &plusmn; {values['sd']:.2g}" if values["sd"] is not None else "")


if __name__ == "__main__":
    run_command(main)
