"""Processes that train together, and processes to kill: forks of one server, which imports everything once."""

import contextlib
import multiprocessing.process
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dataeff

T = TypeVar("T")

mp.set_forkserver_preload(
    [
        "torch.distributed",
        "torch._dynamo",  # the first optimizer imports it
        "torchvision",
        "sklearn.datasets",
        "sklearn.cluster",
        "matplotlib.pyplot",
        "pytest",
        "dataeff.active.experiment",
        "dataeff.nas.experiment_robustness",
    ]
)


def on_two_workers(work: Callable[..., T], *args: Any) -> list[T]:
    """What `work(*args)` returns on each of two gloo workers with one thread each, by rank.

    `work` is a module's function; it returns tensors, numbers, text, or containers of these. The error of a worker
    ends the other one and is raised here, with its traceback. Workers have the environment of the first call.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (folder, work, args), nprocs=2, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}") for rank in range(2)]


def _worker(rank: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(*args), f"{folder}/{rank}")
    dist.barrier()  # a worker that leaves early takes its connections from the other one
    dist.destroy_process_group()


class Training:
    """`dataeff.train`, going on with what its folder holds, in a process of its own with one thread."""

    def __init__(self, method: str, data: str, out: Path, settings: dict[str, Any]) -> None:
        self.out = out
        context = mp.get_context("forkserver")
        self.process: multiprocessing.process.BaseProcess = context.Process(
            target=_train, args=(method, data, out, settings)
        )
        self.process.start()

    def wait_for_step(self, step: int) -> None:
        """Wait for the checkpoint of this or a later step."""
        deadline = time.monotonic() + 300
        while self.newest_step() < step:
            assert self.process.is_alive(), "the training ended early"
            assert time.monotonic() < deadline, "waited 300 s in vain"
            time.sleep(0.01)

    def newest_step(self) -> int:
        folders = (self.out / "checkpoints").glob("step-*")
        return max((int(path.name.split("-")[1]) for path in folders), default=0)

    def kill(self) -> None:
        """kill -9."""
        assert self.process.is_alive(), "it ended before it could be killed"
        self.process.kill()
        self.process.join()

    def finish(self) -> None:
        """Wait for a training that must succeed."""
        self.process.join(300)
        assert self.process.exitcode == 0, "the training failed; its error is on stderr"


@contextlib.contextmanager
def training(method: str, data: str, out: Path, settings: dict[str, Any]) -> Iterator[Training]:
    started = Training(method, data, out, settings)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.join()


def _train(method: str, data: str, out: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dataeff.train(method, data, out, settings, resume=True, report=lambda row, total: None)
