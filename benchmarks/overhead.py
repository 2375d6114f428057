"""What Ray Train and encoded images cost: training throughput against the same Experiment without them.

    python -m benchmarks.overhead                 # about ten minutes on an idle machine
    python -m benchmarks.overhead --quick         # one short repeat, to see that it works

`ratio_ray_train`: samples per second of a Ray Train job with one worker / the same run through `dataeff.train`, from
the seconds of each step after the first. `ratio_ray_train_wall`: the same from the clock between the first and the last
step's line, so with checkpoints and reports. `ratio_parquet_cache` and `ratio_parquet_workers2`: training from Parquet
with the decoded cache, or with two loader processes that decode / training from uint8 tensors in memory. Each repeat
measures all variants in turn; a ratio is the median over repeats. The last line is JSON.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from dataeff.core.config import parse_config
from dataeff.core.run import METRICS, read_rows
from dataeff.core.runtime import Runtime, RuntimeConfig
from dataeff.data.sources import ArrayStore, ImageSource
from dataeff.dynamic.skipnet.experiment import SkipNetConfig, SkipNetExperiment

ROOT = Path(__file__).resolve().parents[1]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"
BATCH = 128
NETWORK = {"arm": "sp", "depth": 20, "widths": [8, 16, 32], "gate_bias_init": 0.5}
LOCAL = """
import json, sys, dataeff
dataeff.train("skipnet", "digits", sys.argv[1], json.loads(sys.argv[2]))
"""


# --- Ray Train ------------------------------------------------------------------------------------------------------


def timed_run(arguments: list[str], out: Path, threads: int, step_images: int) -> tuple[float, float]:
    """Samples per second by the steps' own seconds, and by the clock from the first step's line to the last one's."""
    variables = {"OMP_NUM_THREADS": str(threads), "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    ends, lines = [], []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step "):
            ends.append(time.perf_counter())
    if process.wait():
        raise SystemExit("".join(lines[-5:]))
    seconds = [row["seconds"] for row in read_rows(out / METRICS)][1:]
    return step_images * len(seconds) / sum(seconds), step_images * (len(ends) - 1) / (ends[-1] - ends[0])


def measure_ray_train(repeats: int, steps: int, iterations: int, threads: int) -> dict[str, list[tuple[float, float]]]:
    """(by seconds, by clock) samples per second, a pair a repeat, of each variant."""
    stage = {"iterations": steps * iterations, "batch": BATCH}
    config = NETWORK | {"augment": "shift", "report_every": iterations, "stage1": stage}
    found: dict[str, list[tuple[float, float]]] = {"local": [], "ray train": []}
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "config.yaml"
        settings.write_text(json.dumps(config))  # JSON is YAML
        for repeat in range(repeats):
            for name in found:
                out = Path(folder) / f"{name}-{repeat}"
                ray = ["-m", "ray_jobs.train", "skipnet", "--data", "digits", "--out", str(out), "--workers", "1"]
                arguments = {
                    "local": ["-c", LOCAL, str(out), json.dumps(config)],
                    "ray train": [*ray, "--cpus-per-worker", str(threads), "--config", str(settings)],
                }[name]
                found[name].append(timed_run(arguments, out, threads, iterations * BATCH))
                print(f"  {name:18} {found[name][-1][0]:10.0f} /s", file=sys.stderr, flush=True)
    return found


# --- Parquet --------------------------------------------------------------------------------------------------------


def make_parquet(folder: Path, images: int) -> Path:
    """Random smooth 32x32 PNGs in the Hugging Face convention, for machines without CIFAR-10."""
    generator = np.random.default_rng(0)
    for split, count in (("train", images), ("test", 500)):
        blobs = []
        for _ in range(count):
            coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
            blobs.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": pa.array(blobs), "label": pa.array(np.arange(count) % 10, pa.int64())})
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=1000)
    return folder


def in_memory(source: ImageSource) -> ImageSource:
    """The same split with its pixels in memory."""
    return ImageSource(ArrayStore(source.images(range(len(source))), "memory"), source.labels)


def measure_parquet(folder: Path, repeats: int, iterations: int) -> dict[str, list[float]]:
    """Samples per second of training (evaluation included, on the same images by the same path), a number a repeat."""
    stage = {"iterations": 10**6, "batch": BATCH}
    settings = NETWORK | {"augment": "shift_flip", "report_every": iterations, "stage1": stage}
    config = parse_config(SkipNetConfig, settings)

    def experiment(options: str, workers: int) -> SkipNetExperiment:
        runtime = Runtime("cpu", RuntimeConfig(loader_workers=workers))
        return SkipNetExperiment(config, f"parquet:{folder}?val=0.02{options}", runtime)

    with tempfile.TemporaryDirectory() as cache:
        memory = experiment("", 0)
        memory.splits = replace(memory.splits, train=in_memory(memory.splits.train), val=in_memory(memory.splits.val))
        variants = {
            "memory": memory,
            "parquet, cache": experiment(f"&cache={cache}", 0),
            "parquet, 2 workers": experiment("", 2),
            "parquet, 0 workers": experiment("", 0),
        }
        found: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(repeats):
            for name, variant in variants.items():
                variant.step()  # starts the loader, and fills its queue as far as it is when training is under way
                started = time.perf_counter()
                variant.step()
                images = iterations * BATCH + len(variant.splits.val)
                found[name].append(images / (time.perf_counter() - started))
                variant._close_stream()  # or its loader works on during the others' turns
                print(f"  {name:18} {found[name][-1]:10.0f} /s", file=sys.stderr, flush=True)
    return found


# --- figures --------------------------------------------------------------------------------------------------------


def table(title: str, found: dict[str, list[float]]) -> None:
    """Medians and spread; ratios are to the first row, repeat by repeat."""
    print(f"\n{title}\n{'':20}{'images/s':>10}{'min':>8}{'max':>8}{'ratio':>9}{'min':>7}{'max':>7}")
    for name, values in found.items():
        ratios = ratios_to_first(found, name)
        speeds = f"{statistics.median(values):10.0f}{min(values):8.0f}{max(values):8.0f}"
        print(f"{name:20}{speeds}{statistics.median(ratios):9.3f}{min(ratios):7.3f}{max(ratios):7.3f}")


def ratios_to_first(found: dict[str, list[float]], name: str) -> list[float]:
    first = next(iter(found.values()))
    return [value / base for value, base in zip(found[name], first, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of the training process, in every variant")
    parser.add_argument("--quick", action="store_true", help="one short repeat")
    args = parser.parse_args()
    # Ray Train's steps are as long as those of the preset cpu; the loaders show within fewer mini-batches.
    repeats, iterations, steps, loaded = (1, 10, 4, 10) if args.quick else (args.repeats, 100, 7, 30)
    torch.set_num_threads(args.threads)

    runs = measure_ray_train(repeats, steps, iterations, args.threads)
    pick: Callable[[int], dict[str, list[float]]] = lambda i: {k: [pair[i] for pair in v] for k, v in runs.items()}  # noqa: E731
    with tempfile.TemporaryDirectory() as generated:
        real = CIFAR10.is_dir()
        folder = CIFAR10 if real else make_parquet(Path(generated), 2000 if args.quick else 10_000)
        parquet = measure_parquet(folder, repeats, loaded)
    table("Ray Train with one worker against one process, by the steps' seconds", pick(0))
    table("the same by the clock, checkpoints and reports included", pick(1))
    table(f"Parquet against memory ({'CIFAR-10' if real else 'generated 32x32 PNGs'})", parquet)
    figures = {
        "ratio_ray_train": ratios_to_first(pick(0), "ray train"),
        "ratio_ray_train_wall": ratios_to_first(pick(1), "ray train"),
        "ratio_parquet_cache": ratios_to_first(parquet, "parquet, cache"),
        "ratio_parquet_workers2": ratios_to_first(parquet, "parquet, 2 workers"),
    }
    print(json.dumps({name: round(statistics.median(values), 4) for name, values in figures.items()}))


if __name__ == "__main__":
    main()
