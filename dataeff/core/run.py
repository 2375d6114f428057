"""A run from beginning to end: the loop that every driver uses, the run directory, and `dataeff.train`."""

import fcntl
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dataeff.core.artifact import CARD, versions
from dataeff.core.checkpoint import is_complete, load_checkpoint, save_checkpoint
from dataeff.core.config import parse_config
from dataeff.core.experiment import Experiment
from dataeff.core.plots import plot_curves
from dataeff.core.registry import get_method
from dataeff.core.runtime import Runtime

Row = dict[str, float]

SETTINGS, SUMMARY, METRICS, LOCK = "config.yaml", "summary.json", "metrics.parquet", ".lock"
PATIENCE = 10.0  # seconds for what a killed job left behind to end


class RunState:
    """An experiment and the rows it has reported so far: what a checkpoint holds."""

    def __init__(self, experiment: Experiment, checkpoint: str | Path | None = None) -> None:
        self.experiment = experiment
        self.rows: list[Row] = []
        self._warnings: list[str] = []
        if checkpoint is not None:
            state = load_checkpoint(checkpoint)
            if state["data"] != experiment.data_fingerprint:
                raise ValueError(
                    f"{experiment.data} holds other images or labels than when the run was begun: put those back, or "
                    "begin anew"
                )
            experiment.load_state_dict(state["experiment"])
            self.rows = list(state["rows"])

    @property
    def finished(self) -> bool:
        return self.experiment.steps_done >= self.experiment.total_steps

    def advance(self) -> Iterator[Row]:
        """Take the remaining steps; a row of metrics after each."""
        while not self.finished:
            started = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", category=UserWarning)
                try:
                    metrics = self.experiment.step()
                finally:
                    self._warnings += [str(warning.message) for warning in caught if warning.category is UserWarning]
            row = {"step": self.experiment.steps_done, **metrics, "seconds": time.perf_counter() - started}
            self.rows.append(row)
            yield row

    def take_warnings(self) -> list[str]:
        """What the method has warned of since the last call, each once."""
        taken, self._warnings = list(dict.fromkeys(self._warnings)), []
        return taken

    def save(self, directory: str | Path) -> None:
        state = {"experiment": self.experiment.state_dict(), "rows": self.rows}
        save_checkpoint(directory, state | {"data": self.experiment.data_fingerprint})


class RunDirectory:
    """The folder that a job writes: settings, metrics, summary, figures, artifact and, when local, checkpoints.

    One process at a time: it holds a lock as long as this object lives.

    Args:
        path: the folder; made when missing.
        method, data, config: what the run is; a folder that holds another run is never mixed with this one.
        resume: go on with the same run if it was begun there.
        overwrite: delete the run that is there.

    Raises:
        FileExistsError: the folder holds a run, or files that are not a run's.
        ValueError: `resume` with other settings than the run was begun with.
        BlockingIOError: another process is at work in the folder.
    """

    def __init__(
        self,
        path: str | Path,
        method: str,
        data: str,
        config: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.identity = {"method": method, "data": data, "config": json.loads(json.dumps(dict(config)))}
        settings = self.path / SETTINGS
        if self.path.exists() and not self._is_unused() and not settings.is_file():
            raise FileExistsError(f"{self.path} exists and is not a run's folder; choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        used = not self._is_unused()  # asked with the lock held: another job may just have ended here
        if used and not (overwrite or resume):
            raise FileExistsError(
                f"{self.path} already holds a run; continue it with --resume, replace it with --overwrite, "
                "or choose another --out"
            )
        if used and overwrite:
            self._clear()
        elif used:
            self._check_same(yaml.safe_load(settings.read_text(encoding="utf-8")))
        replace_text(settings, yaml.safe_dump(self.identity, sort_keys=False))

    def _take_lock(self) -> IO[str]:
        """The open file that holds the lock; the system releases it however this process ends."""
        lock = (self.path / LOCK).open("a")
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.close()
                    raise BlockingIOError(
                        f"{self.path}: another job is at work in this folder; wait for its end, stop it, "
                        "or choose another --out"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return lock
            else:
                return lock

    def _clear(self) -> None:
        for item in self.path.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item.name != LOCK:
                item.unlink()

    def _is_unused(self) -> bool:
        """Whether the folder holds nothing but settings: a job that was refused, or killed, before its first step."""
        before = {LOCK, SETTINGS, f"{SETTINGS}.part"}
        return self.path.is_dir() and {item.name for item in self.path.iterdir()} <= before

    def _check_same(self, found: Mapping[str, Any]) -> None:
        before, now = _flat(found), _flat(self.identity)
        differing = [
            f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise ValueError(f"--resume: {self.path} was begun with other settings ({'; '.join(differing)})")

    @property
    def artifact(self) -> Path:
        return self.path / "artifact"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.path / SUMMARY).is_file()

    def finish(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Write metrics, curves and summary beside the artifact that is already there."""
        write_rows(self.path / METRICS, rows)
        plot_curves(rows, self.path / "curves.png")
        card = json.loads((self.artifact / CARD).read_text(encoding="utf-8"))
        summary = {
            **self.identity,
            "metrics": card["metrics"],
            "cost": card["cost"],
            "seconds": sum(row["seconds"] for row in rows),
            "versions": versions(),
        }
        replace_text(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary

    def summary(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
        return loaded


def train(
    method: str,
    data: str,
    out: str | Path,
    config: Mapping[str, Any] | None = None,
    runtime: Runtime | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[Row, int], None] | None = None,
) -> dict[str, Any]:
    """Run `method` on `data` in this process, without Ray, and return the run's summary.

    Args:
        config: nested settings that differ from the method's defaults.
        report: called with each row and the total number of steps; None prints progress to stderr.

    Raises:
        FileExistsError, ValueError: see `RunDirectory` and the method's config.

    Example:
        >>> dataeff.train("skipnet", "digits", "runs/digits", {"depth": 20, "stage1": {"iterations": 200}})
    """
    cls = get_method(method)
    settings = parse_config(cls.config_schema, config or {})
    folder = RunDirectory(out, method, data, settings.model_dump(mode="json"), resume, overwrite)
    if folder.finished:
        return folder.summary()
    run = RunState(cls(settings, data, runtime or Runtime()), newest_checkpoint(folder.checkpoints))
    progress = report or Progress()
    if run.finished:  # killed between the last checkpoint and the end
        progress(run.rows[-1], run.experiment.total_steps)
    for row in run.advance():
        save_step(run, folder.checkpoints)
        for warning in run.take_warnings():
            print(f"warning: {warning}", file=sys.stderr)
        progress(row, run.experiment.total_steps)
    run.experiment.export(folder.artifact)
    run.experiment.plots(folder.path)
    return folder.finish(run.rows)


def save_step(run: RunState, checkpoints: Path) -> None:
    """Save the run's state and drop older ones only when the new one is complete."""
    target = checkpoints / f"step-{run.experiment.steps_done:06d}"
    target.mkdir(parents=True, exist_ok=True)
    run.save(target)
    for old in checkpoints.iterdir():
        if old != target:
            shutil.rmtree(old)


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The last complete checkpoint in a folder of them."""
    found = sorted(checkpoints.iterdir(), reverse=True) if checkpoints.is_dir() else []
    return next((path for path in found if is_complete(path)), None)


class Progress:
    """Prints one line a step: where the run is, its metrics, and the time left."""

    def __init__(self, name: str = "") -> None:
        self.prefix = f"{name} " if name else ""
        self.started = time.perf_counter()
        self.first: int | None = None

    def __call__(self, row: Row, total: int) -> None:
        step = int(row["step"])
        self.first = step - 1 if self.first is None else self.first
        elapsed = time.perf_counter() - self.started
        left = elapsed / (step - self.first) * (total - step)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in ("step", "seconds"))
        clock = f"{int(left) // 60}:{int(left) % 60:02d} left" if step < total else "done"
        print(f"{self.prefix}step {step}/{total}  {shown}  {clock}", file=sys.stderr, flush=True)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with possibly different keys as one Parquet table, in place of an older one."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = pa.table({key: [row.get(key) for row in rows] for key in keys})
    part = path.with_name(path.name + ".part")
    pq.write_table(table, part)
    os.replace(part, path)


def finished_runs(method: str, folders: Sequence[Path]) -> list[Path]:
    """Folders of a method's finished runs at or below `folders`."""
    found = sorted({path.parent for folder in folders for path in folder.rglob(SUMMARY)})
    return [run for run in found if json.loads((run / SUMMARY).read_text(encoding="utf-8"))["method"] == method]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.parquet`, without the keys that a row does not have."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def replace_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a file completely or not at all; `durable`: it is on disk, whatever happens to the machine afterwards."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        if durable:
            _to_disk(part)
        os.replace(part, path)
        if durable:
            _to_disk(path.parent)  # its new name too
    except OSError as error:  # a failed write, such as on a full disk, does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from None


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = value
    return flat
