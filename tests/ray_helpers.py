"""Commands in processes of their own, killed at random moments, and small Ray clusters for the tests of ray_jobs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import ray
from safetensors.torch import load_file

from dataeff.core.run import METRICS, read_rows
from ray_jobs.training import EVENTS

ROOT = Path(__file__).parents[1]

# 10 steps in each of the two stages, on the digits that scikit-learn has.
TINY: dict[str, Any] = {
    "depth": 8,
    "widths": [4, 8, 16],
    "augment": "shift",
    "gate_bias_init": 0.5,
    "report_every": 2,
    "stage1": {"iterations": 20, "batch": 16},
    "stage2": {"iterations": 20, "batch": 16, "lr": 0.01},
}
STAGE_STEPS = 10


def sets(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """`settings` as --set arguments."""
    arguments: list[str] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            arguments += sets(value, f"{prefix}{key}.")
        else:
            arguments += ["--set", f"{prefix}{key}={json.dumps(value)}"]
    return arguments


def train_arguments(out: Path, workers: int, *more: str, settings: dict[str, Any] = TINY) -> list[str]:
    """A training job whose numbers do not depend on the machine's number of cores."""
    fixed = ["--data", "digits", "--out", str(out), "--workers", str(workers), "--cpus-per-worker", "1"]
    return ["-m", "ray_jobs.train", "skipnet", *fixed, *sets(settings), *more]


@contextlib.contextmanager
def local_ray() -> Iterator[str]:
    """Ray with two CPUs in this process, until the block ends; the value is its address."""
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        yield ray.init(address="local", num_cpus=2, **options).address_info["gcs_address"]
    finally:
        ray.shutdown()


class Command:
    """A Python command in a process of its own, and every process that it starts.

    Args:
        arguments: after `python`.
        variables: environment variables; without RAY_ADDRESS the command has a Ray of its own.
    """

    def __init__(self, arguments: Sequence[str], variables: dict[str, str] | None = None, **options: Any) -> None:
        environment = {
            "RAY_ADDRESS": "local",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        } | (variables or {})
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the command
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | environment,
            cwd=ROOT,
            stdout=self.log,
            stderr=self.errors,
            **options,
        )

    @property
    def stderr(self) -> str:
        return _written_so_far(self.errors)

    @property
    def stdout(self) -> str:
        return _written_so_far(self.log)

    def family(self) -> list[psutil.Process]:
        """The command's process and all that descend from it now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def wait(self, timeout: float = 400) -> int:
        return self.process.wait(timeout)

    def finish(self, timeout: float = 400) -> None:
        """Wait for a command that must succeed."""
        assert self.wait(timeout) == 0, self.stderr[-3000:]

    def kill(self) -> list[psutil.Process]:
        """kill -9 the command alone; the processes that it had started."""
        assert self.process.poll() is None, f"it ended before it could be killed: {self.stderr[-3000:]}"
        family = self.family()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return family[1:]

    def clean_up(self) -> None:
        """kill -9 whatever is left; for a test that failed half-way."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def _written_so_far(file: IO[bytes]) -> str:
    """The text of `file`. Its position is the writing command's too, and must not move."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


@contextlib.contextmanager
def running(arguments: Sequence[str], variables: dict[str, str] | None = None, **options: Any) -> Iterator[Command]:
    command = Command(arguments, variables, **options)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.clean_up()


def run(arguments: Sequence[str], variables: dict[str, str] | None = None, **options: Any) -> Command:
    """Run a command to its end."""
    with running(arguments, variables, **options) as command:
        command.wait()
    return command


def wait_until(condition: Any, command: Command, timeout: float = 300) -> None:
    """Wait for `condition()` while `command` runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert command.process.poll() is None, f"the command ended early: {command.stderr[-3000:]}"
        assert time.monotonic() < deadline, f"waited {timeout} s in vain: {command.stderr[-3000:]}"
        time.sleep(0.01)


def wait_for_end(processes: Sequence[psutil.Process], timeout: float) -> list[psutil.Process]:
    """The processes that still run after `timeout` seconds; zombies have ended."""
    deadline = time.monotonic() + timeout

    def alive(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    while any(alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [process for process in processes if alive(process)]


def steps_reported(out: Path) -> int:
    """The newest step in the events of a training job."""
    path = out / EVENTS
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["row"]["step"] for line in lines if line.endswith("}") and '"row"' in line]
    return int(rows[-1]) if rows else 0


def seeded(name: str) -> random.Random:
    """A generator whose seed is printed, so that a failure can be repeated with DATAEFF_TEST_SEED."""
    seed = os.environ.get("DATAEFF_TEST_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"{name}: DATAEFF_TEST_SEED={seed}")
    return random.Random(f"{name} {seed}")


def assert_same_run(found: Path, expected: Path) -> None:
    """Both runs ended with the same weights and the same rows, bit for bit."""
    ours, theirs = (load_file(folder / "artifact" / "model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not ours[name].equal(theirs[name])]
    assert not different, f"weights differ: {different}"
    assert without_seconds(found) == without_seconds(expected)


def without_seconds(run_folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(run_folder / METRICS)]


@dataclass
class NodeCluster:
    """A head without CPUs and worker nodes with one each, all on this machine.

    Attributes:
        variables: what a driver's environment needs to join.
        raylets: the process of each worker node.
    """

    variables: dict[str, str]
    raylets: list[psutil.Process]

    def training_workers(self) -> list[psutil.Process]:
        return [process for raylet in self.raylets for process in training_workers(raylet)]

    def kill_node_of_a_worker(self) -> None:
        """kill -9 a worker node that takes part in a training, with everything that runs on it."""
        raylet = next(raylet for raylet in self.raylets if training_workers(raylet))
        self.raylets.remove(raylet)
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def training_workers(ancestor: psutil.Process) -> list[psutil.Process]:
    """Ray Train's worker processes below `ancestor`."""
    found = []
    for process in ancestor.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("TrainWorker" in part for part in process.cmdline()[:1]):
                found.append(process)
    return found


@contextlib.contextmanager
def node_cluster(nodes: int) -> Iterator[NodeCluster]:
    """Start a cluster with a token of its own, outside this process, whose Ray stays untouched."""
    folder = tempfile.mkdtemp(prefix="ray")  # short: Unix sockets lie below it
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
        "RAY_health_check_period_ms": "1000",  # a lost node is noticed in seconds
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_timeout_ms": "3000",
    }
    with running(["-m", "tests.ray_helpers", str(nodes)], variables | {"RAY_ADDRESS": ""}) as command:
        wait_until(lambda: "\n" in command.stdout, command)
        started = json.loads(command.stdout.splitlines()[-1])
        raylets = [psutil.Process(pid) for pid in started["raylets"]]
        yield NodeCluster(variables | {"RAY_ADDRESS": started["address"]}, raylets)
        command.clean_up()
    shutil.rmtree(folder, ignore_errors=True)


def _serve_cluster(nodes: int) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    started = [cluster.add_node(num_cpus=1, wait=False) for _ in range(nodes)]
    cluster.wait_for_nodes()
    raylets = [node.all_processes["raylet"][0].process.pid for node in started]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
    time.sleep(3600)


if __name__ == "__main__":
    _serve_cluster(int(sys.argv[1]))
