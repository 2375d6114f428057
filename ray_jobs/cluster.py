"""Joining a Ray cluster, or starting one on this machine, with what a job needs."""

import logging
import os
import socket
import time

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # a sweep prints its own progress
# A method may report an objective in its last step only; the study fails a trial whose last step lacks one.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same in a worker and in the driver
# A worker waits at a report until Ray Train's controller has asked for the one before: by default it asks every 2 s.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
# The preemption watcher costs every run a process, and only announces that a node will go: nothing here listens.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

import ray
from ray.exceptions import RayError

from ray_jobs.cli import UserError


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or one that runs on this machine, or start one that ends with this process.

    The latter has no dashboard, which would take several processes; `ray start --head` has one.

    Raises:
        UserError: the cluster does not answer or refuses the token.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "local")
        detail = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot reach the Ray cluster ({address}): {detail}; check RAY_ADDRESS and the token"
        ) from None


def require(cpus: float, gpus: float, wait_seconds: float = 0) -> None:
    """Make sure that the cluster has these CPUs and GPUs in total, rather than hang in its queue.

    Args:
        wait_seconds: how long to wait for nodes that an autoscaler may add; they are requested.

    Raises:
        UserError: it has not.
    """
    deadline = time.monotonic() + wait_seconds
    if wait_seconds:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[{"CPU": 1}] * int(cpus) + [{"GPU": 1}] * int(gpus))
    while True:
        have = ray.cluster_resources()
        short = [
            f"{need:g} {kind}s asked for, {have.get(kind, 0):g} in the cluster"
            for kind, need in (("GPU", gpus), ("CPU", cpus))
            if have.get(kind, 0) < need
        ]
        if not short:
            return
        if time.monotonic() >= deadline:
            raise UserError(
                f"too few resources: {'; '.join(short)}; ask for fewer (--workers, --gpus), add nodes, "
                "or let the job wait for them with --wait SECONDS"
            )
        time.sleep(1)


def cpus_per_worker(workers: int, gpus: float) -> int:
    """CPUs for each of `workers`: an equal share of a single machine, one on a cluster of several."""
    if gpus or len([node for node in ray.nodes() if node["Alive"]]) > 1:
        return 1
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)
