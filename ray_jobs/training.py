"""One run of one method on Ray Train: the worker's loop, checkpoints on Ray's storage, and the events people see."""

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.callback import UserCallback

from dataeff.core.checkpoint import is_complete, load_checkpoint
from dataeff.core.config import parse_config
from dataeff.core.registry import get_method
from dataeff.core.run import Progress, RunDirectory, RunState
from dataeff.core.runtime import RuntimeConfig
from ray_jobs.cli import UserError, one_line
from ray_jobs.runtime import RayTrainRuntime

EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Job:
    """What to run and on what. `storage` is a folder or URI that every node of the cluster can reach."""

    method: str
    data: str
    config: dict[str, Any]
    runtime: dict[str, Any]
    storage: str
    workers: int = 1
    gpus: int = 0
    cpus_per_worker: int = 1
    max_failures: int = 3


def train_worker(options: dict[str, Any]) -> None:
    """The loop of one Ray Train worker. Nothing of the method is in it."""
    job = Job(**options["job"])
    method = get_method(job.method)
    runtime = RayTrainRuntime(RuntimeConfig(**job.runtime))
    experiment = method(parse_config(method.config_schema, job.config), job.data, runtime)
    checkpoint = ray.train.get_checkpoint() or options["resume_from"]
    if checkpoint is None:
        run = RunState(experiment)
    else:
        with checkpoint.as_directory() as directory:
            run = RunState(experiment, directory)
    if run.finished:  # killed between the last checkpoint and the end
        _report(run, run.rows[-1])
    for row in run.advance():
        _report(run, row)


def _report(run: RunState, row: Mapping[str, float]) -> None:
    experiment = run.experiment
    with tempfile.TemporaryDirectory() as temporary:
        if run.finished:  # evaluates the test split, so every rank takes part
            experiment.export(Path(temporary) / "artifact")
        checkpoint = None
        if experiment.runtime.is_main:
            if run.finished:
                (Path(temporary) / "plots").mkdir()
                experiment.plots(Path(temporary) / "plots")
            run.save(temporary)
            checkpoint = Checkpoint.from_directory(temporary)
        metrics = {**row, "total_steps": experiment.total_steps, "warnings": run.take_warnings()}
        ray.train.report(metrics, checkpoint, checkpoint_dir_name=f"step-{experiment.steps_done:06d}")


class EventLog(UserCallback):
    """Runs in Ray's controller, on the driver's node: every report and failure becomes a line that the driver shows,
    and a point in TensorBoard."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.board: Any = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        row = dict(metrics[0])
        if self.board is None:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"))
        step = int(row["step"])
        for key, value in row.items():
            if isinstance(value, int | float) and key not in ("step", "total_steps"):
                self.board.add_scalar(key, value, step)
        self.board.flush()
        self._write({"row": row})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = sorted(worker_exceptions.items())[0]
        self._write({"failure": f"worker {rank}: {root_cause(error)}"})

    def _write(self, event: dict[str, Any]) -> None:
        with (self.folder / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


class EventTail(threading.Thread):
    """Shows the lines of an EventLog while the driver waits for the run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.path = folder / EVENTS
        self.position = self.path.stat().st_size if self.path.is_file() else 0
        self.progress = Progress()
        self.warned: set[str] = set()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            self.show()

    def stop(self) -> None:
        self.ended.set()
        self.join()
        self.show()

    def show(self) -> None:
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self.position += len(complete)
        for line in complete.splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:  # cut short by a full disk or a kill
                continue
            if "failure" in event:
                print(f"{event['failure']}; restarting from the last checkpoint", file=sys.stderr, flush=True)
                self.progress = Progress()
                continue
            row = event["row"]
            for warning in row.pop("warnings"):
                kind = warning.split(":")[0]
                if kind not in self.warned:
                    self.warned.add(kind)
                    print(f"warning: {warning}", file=sys.stderr, flush=True)
            self.progress(row, int(row.pop("total_steps")))


def run_training(job: Job, folder: RunDirectory, callbacks: list[Any] | None = None) -> dict[str, Any]:
    """Train on the connected cluster, going on from the newest complete checkpoint of the run, and fill `folder`.

    Raises:
        UserError: a worker failed more often than the job allows, or the storage cannot be used.
    """
    storage = Storage(job.storage)
    attempt, resume_from = storage.begin_attempt()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": vars(job), "resume_from": resume_from},
        scaling_config=ScalingConfig(
            num_workers=job.workers,
            use_gpu=job.gpus > 0,
            resources_per_worker={"CPU": job.cpus_per_worker} | ({"GPU": job.gpus / job.workers} if job.gpus else {}),
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=job.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="val_accuracy"),
            callbacks=[EventLog(str(folder.path.absolute())), *(callbacks or [])],  # type: ignore[list-item]
        ),
    )
    tail = EventTail(folder.path)
    tail.start()
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise UserError(f"training failed: {root_cause(error)}") from None
    finally:
        tail.stop()
    assert result.checkpoint is not None  # every report carries one
    with result.checkpoint.as_directory() as directory:
        rows = load_checkpoint(directory)["rows"]
        shutil.rmtree(folder.artifact, ignore_errors=True)
        shutil.copytree(Path(directory) / "artifact", folder.artifact)
        shutil.copytree(Path(directory) / "plots", folder.path, dirs_exist_ok=True)
    return folder.finish(rows)


class Storage:
    """Checkpoints of one run on Ray's storage: one folder an attempt (a start of the driver), one below it a step.

    Ray restarts failed workers within an attempt by its own record; across drivers the truth is the checkpoints
    themselves, each sealed, because a record that is being rewritten when the driver is killed may be lost.
    """

    def __init__(self, uri: str) -> None:
        self.filesystem, self.path = resolve_storage(uri)
        try:
            self.filesystem.create_dir(self.path, recursive=True)
            with self.filesystem.open_output_stream(f"{self.path}/.writable") as file:
                file.write(b"ok")
            self.filesystem.delete_file(f"{self.path}/.writable")
        except OSError as error:
            raise UserError(f"storage {uri} cannot be written: {one_line(error)}") from None

    def begin_attempt(self) -> tuple[str, Checkpoint | None]:
        """The name of a new attempt, and the newest complete checkpoint of the earlier ones."""
        attempts = sorted(self._folders(self.path, "attempt-"))
        found = None
        for attempt in reversed(attempts):
            for step in sorted(self._folders(f"{self.path}/{attempt}", "step-"), reverse=True):
                checkpoint = Checkpoint(f"{self.path}/{attempt}/{step}", self.filesystem)
                with checkpoint.as_directory() as directory:
                    complete = is_complete(directory)
                if complete:
                    found = checkpoint
                    break
            if found:
                break
        number = int(attempts[-1].split("-")[1]) + 1 if attempts else 1
        return f"attempt-{number:03d}", found

    def _folders(self, path: str, prefix: str) -> list[str]:
        entries = self.filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
        return [entry.base_name for entry in entries if entry.base_name.startswith(prefix)]


def resolve_storage(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A folder or a URI such as s3://bucket/prefix as a file system and a path in it."""
    if "://" not in uri:
        return pyarrow.fs.LocalFileSystem(), str(Path(uri).absolute())
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"storage {uri}: {one_line(error)}; give a folder, or a URI such as s3://bucket/runs") from None
    return filesystem, path


def root_cause(error: BaseException) -> str:
    """The last line of the deepest message: what went wrong, without the layers around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return f"worker {min(failures)}: {root_cause(failures[min(failures)])}"
    inner = getattr(error, "controller_failure", None) or getattr(error, "cause", None) or error.__cause__
    if inner is not None and inner is not error:
        return root_cause(inner)
    if isinstance(error, OSError):
        return one_line(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def elapsed(since: float) -> str:
    seconds = int(time.perf_counter() - since)
    return f"{seconds // 60}:{seconds % 60:02d}"
