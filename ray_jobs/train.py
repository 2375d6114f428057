"""python -m ray_jobs.train METHOD --data DATA --out DIR: distributed training of any method on Ray Train."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from dataeff.core.config import parse_config
from dataeff.core.registry import METHODS, get_method
from dataeff.core.run import RunDirectory
from dataeff.core.runtime import RuntimeConfig
from dataeff.data import absolute_spec
from ray_jobs.cli import add_config_arguments, add_folder_arguments, check_data, read_settings, run_command
from ray_jobs.cluster import connect, cpus_per_worker, require
from ray_jobs.training import Job, Storage, elapsed, run_training


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.train", description=__doc__)
    parser.add_argument("method", help=f"one of {', '.join(sorted(METHODS))}")
    parser.add_argument("--data", required=True, help="digits, parquet:DIR, folder:DIR, torchvision:NAME?root=DIR, ...")
    parser.add_argument("--workers", type=int, help="training processes (default: one a GPU, or 1)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs in total (default: 0, train on CPUs)")
    parser.add_argument("--cpus-per-worker", type=int, help="default: an equal share of the machine; 1 on a cluster")
    parser.add_argument(
        "--storage", help="folder or URI for checkpoints that all nodes reach (default: OUT/checkpoints)"
    )
    parser.add_argument("--max-failures", type=int, default=3, help="restarts after a lost worker or node")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="wait so long for nodes to join")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--loader-workers", type=int, default=0, help="decoding processes per training worker")
    add_folder_arguments(parser, "run")
    add_config_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, and return the run's summary."""
    args = parse_arguments(arguments)
    workers = args.workers if args.workers is not None else max(1, args.gpus)
    if workers < 1 or args.gpus < 0 or args.max_failures < 0:
        raise ValueError("--workers must be at least 1, --gpus and --max-failures at least 0")
    settings = read_settings(args.method, args.config, args.set, "gpu" if args.gpus else "cpu")
    method = get_method(args.method)
    config = parse_config(method.config_schema, settings).model_dump(mode="json")
    runtime = parse_config(
        RuntimeConfig,
        {"precision": args.precision, "compile": args.compile, "loader_workers": args.loader_workers},
    )
    data = absolute_spec(args.data)
    check_data([args.method], data)
    if args.storage:
        Storage(args.storage)  # and a storage that cannot be written
    folder = RunDirectory(args.out, args.method, data, config, args.resume, args.overwrite)
    if folder.finished:
        print(f"{folder.path} is complete; nothing to resume")
        return folder.summary()

    started = time.perf_counter()
    connect()
    cpus = args.cpus_per_worker or cpus_per_worker(workers, args.gpus)
    require(workers * cpus, args.gpus, args.wait)
    job = Job(
        method=args.method,
        data=data,
        config=config,
        runtime=runtime.model_dump(),
        storage=args.storage or str(folder.checkpoints.absolute()),
        workers=workers,
        gpus=args.gpus,
        cpus_per_worker=cpus,
        max_failures=args.max_failures,
    )
    print(f"{args.method} on {args.data}: {workers} worker(s), {cpus} CPU(s) each, {args.gpus} GPU(s)", flush=True)
    summary = run_training(job, folder)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in (summary["metrics"] | summary["cost"]).items())
    print(f"done in {elapsed(started)}  {shown}\nartifact: {folder.artifact}")
    return summary


if __name__ == "__main__":
    run_command(main)
