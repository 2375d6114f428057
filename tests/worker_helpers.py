"""Two processes that train together, for the tests of what workers share."""

import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

T = TypeVar("T")

# Workers are forks of one server, which imports these once for all tests of this process.
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
