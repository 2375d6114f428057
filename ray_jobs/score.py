"""python -m ray_jobs.score ARTIFACT --data DATA --out FILE: batch inference over a pool, on Ray Data.

The file is a Parquet table with a row an image: split, index (position in the split), label, probabilities and macs
(the multiply-adds spent), with --embeddings also embedding, where the network has one. Images are read, answered and
written a part at a time, so that their number does not matter.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

from dataeff.core.artifact import Embedder, load, read_artifact
from dataeff.core.run import replace_text
from dataeff.core.runtime import set_up_process
from dataeff.data import Preprocess, Splits, absolute_spec, open_splits
from dataeff.data.scores import Scores, score_schema
from ray_jobs.cli import UserError, run_command
from ray_jobs.cluster import connect, cpus_per_worker, require
from ray_jobs.training import elapsed, root_cause

SPLITS = ("train", "val", "test")
SETTINGS = "settings.json"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="folder of an exported network")
    parser.add_argument("--data", required=True, help="digits, parquet:DIR, folder:DIR, torchvision:NAME?root=DIR, ...")
    parser.add_argument("--out", required=True, type=Path, help="the Parquet file")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="default: all")
    parser.add_argument("--workers", type=int, help="processes that answer (default: one a GPU, or 2)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs in total (default: 0, CPUs)")
    parser.add_argument("--batch", type=int, default=256, help="images that a network answers at once")
    parser.add_argument("--part", type=int, default=8192, help="images in a part, which is kept when the job is killed")
    parser.add_argument("--embeddings", action="store_true", help="add the network's embedding of every image")
    parser.add_argument("--resume", action="store_true", help="keep the parts that a killed job has left")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Job:
    """What every worker needs; `threads` of PyTorch."""

    artifact: str
    data: str
    batch: int
    device: str
    threads: int
    embeddings: bool


def main(arguments: Sequence[str] | None = None) -> Path:
    """Score, and return the file's path."""
    args = parse_arguments(arguments)
    if args.gpus < 0:
        raise ValueError(f"--gpus {args.gpus}: must be at least 0")
    workers = args.workers if args.workers is not None else (args.gpus or 2)
    for name, value in (("workers", workers), ("batch", args.batch), ("part", args.part)):
        if value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    out = Path(args.out).absolute()
    if out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; give a file, such as {args.out / 'scores.parquet'}")
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"{args.out} exists; replace it with --overwrite, or choose another --out")
    artifact = read_artifact(args.artifact)
    data = absolute_spec(args.data)
    splits = open_splits(data)
    if list(splits.classes) != artifact.card.classes:
        raise ValueError(f"{args.data} has classes {list(splits.classes)}, the artifact {artifact.card.classes}")
    about: dict[str, Any] = {
        "artifact": str(args.artifact.absolute()),
        "method": artifact.card.method,
        "weights": artifact.card.files["model.safetensors"],
        "classes": artifact.card.classes,
        "data": data,
        "fingerprint": splits.fingerprint,
        "macs": artifact.card.cost["macs"],
        "full_macs": artifact.card.cost["full_macs"],
    }
    schema = score_schema(len(splits.classes), about)
    if args.embeddings:
        about["embedding"] = embedding_size(args.artifact)
        schema = schema.append(pa.field("embedding", pa.list_(pa.float32(), about["embedding"])))
    plan = plan_parts(splits, args.splits, args.part)
    folder = PartsFolder(out, {**about, "parts": plan}, args.resume)
    started = time.perf_counter()
    left = [number for number in range(len(plan)) if not folder.has(number)]
    if left:
        connect()
        cpus = cpus_per_worker(workers, args.gpus)
        require(workers * cpus, args.gpus)
        job = Job(about["artifact"], data, args.batch, "cuda" if args.gpus else "cpu", cpus, args.embeddings)
        _score(job, plan, left, folder, schema, workers, cpus, args.gpus)
    count = folder.join(out, len(plan))
    print(f"{count} images in {elapsed(started)}: {args.out}")
    return out


def embedding_size(artifact: Path) -> int:
    """Length of the embeddings that a network gives.

    Raises:
        ValueError: it gives none.
    """
    predictor = load(artifact)
    if not isinstance(predictor, Embedder):
        raise ValueError(f"--embeddings: networks of method {predictor.card.method!r} give none; leave the option out")
    return int(predictor.embed(torch.zeros(1, *predictor.input_shape)).shape[1])


def plan_parts(splits: Splits, names: Sequence[str], size: int) -> list[tuple[str, int, int]]:
    """(split, first image, last image + 1) of each part, in the order of the file.

    Raises:
        ValueError: none of the splits has an image.
    """
    counts = {name: len(getattr(splits, name)) for name in SPLITS if name in names}
    plan = [
        (name, start, min(start + size, count)) for name, count in counts.items() for start in range(0, count, size)
    ]
    if not plan:
        raise ValueError(f"{splits.name} has no images in {', '.join(names)}")
    return plan


class PartsFolder:
    """Finished parts beside the output file, each complete or absent, until they are joined.

    Raises:
        FileExistsError: parts of a killed job are there, and `resume` is not asked for.
        ValueError: they are of another job.
    """

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path = out.with_name(out.name + ".parts")
        found = self.path / SETTINGS
        wanted = json.loads(json.dumps(settings))
        if found.is_file() and any(self.path.glob("*.parquet")):
            if not resume:
                raise FileExistsError(f"{self.path} holds parts of a killed job; go on with --resume, or delete it")
            if json.loads(found.read_text(encoding="utf-8")) != wanted:
                raise ValueError(f"--resume: {self.path} is of another artifact, data set or --part; delete it")
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(found, json.dumps(wanted))

    def file(self, number: int) -> Path:
        return self.path / f"{number:06d}.parquet"

    def has(self, number: int) -> bool:
        return self.file(number).is_file()

    def write(self, number: int, table: pa.Table) -> None:
        waiting = self.path / f"{number:06d}.tmp"
        pq.write_table(table, waiting)
        waiting.replace(self.file(number))

    def join(self, out: Path, count: int) -> int:
        """One file out of the parts, in order, a part at a time; the number of its rows."""
        waiting = self.path / "joined.tmp"
        rows = 0
        with pq.ParquetWriter(waiting, pq.read_schema(self.file(0))) as writer:
            for number in range(count):
                table = pq.read_table(self.file(number))
                rows += len(table)
                writer.write_table(table)
        waiting.replace(out)
        shutil.rmtree(self.path)
        return rows


class Scorer:
    """One Ray Data actor: answers the images of a part at a time."""

    def __init__(self, job: Job) -> None:
        set_up_process(job.threads)
        self.job = job
        self.splits = open_splits(job.data)
        self.predictor = load(job.artifact, job.device)
        self.preprocess = Preprocess.from_dict(self.predictor.card.preprocess)

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        columns = (batch[name].tolist() for name in ("number", "split", "first", "last"))
        for number, split, first, last in zip(*columns, strict=True):
            table = self._answer(split, first, last)
            yield table.append_column("part", pa.array(np.full(len(table), number)))

    def _answer(self, split: str, first: int, last: int) -> pa.Table:
        source = getattr(self.splits, split)
        probabilities, macs, embeddings = [], [], []
        for start in range(first, last, self.job.batch):
            rows = np.arange(start, min(start + self.job.batch, last))
            inputs = self.preprocess(source.images(rows))
            prediction = self.predictor.predict(inputs)
            if self.job.embeddings:
                assert isinstance(self.predictor, Embedder)
                embeddings.append(self.predictor.embed(inputs).numpy())
            probabilities.append(prediction.probabilities.numpy())
            macs.append(prediction.macs.numpy())
        rows = np.arange(first, last)
        table = Scores(np.concatenate(probabilities), source.labels[rows], rows, np.concatenate(macs)).table(split)
        if not embeddings:
            return table
        whole = np.concatenate(embeddings).astype(np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(whole.reshape(-1)), whole.shape[1])
        return table.append_column("embedding", column)


def _score(
    job: Job,
    plan: Sequence[tuple[str, int, int]],
    left: Sequence[int],
    folder: PartsFolder,
    schema: pa.Schema,
    workers: int,
    cpus: int,
    gpus: int,
) -> None:
    """Answer the parts that are left, on Ray Data, and write each one as it comes; parts may come in any order."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is shown here, in images
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [
        {"number": number, "split": plan[number][0], "first": plan[number][1], "last": plan[number][2]}
        for number in left
    ]
    answers = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Scorer,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(workers, len(left))),
        num_cpus=cpus,
        num_gpus=gpus / workers if gpus else None,
    )
    started, total = time.perf_counter(), sum(plan[number][2] - plan[number][1] for number in left)
    waiting: dict[int, list[pa.Table]] = {}
    written = 0
    try:
        for block in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(block, pa.Table)
            for number in pa.compute.unique(block["part"]).to_pylist():
                _, first, last = plan[number]
                rows = block.filter(pa.compute.equal(block["part"], number)).drop_columns("part")
                waiting.setdefault(number, []).append(rows)
                if sum(map(len, waiting[number])) == last - first:  # large parts come in several blocks
                    folder.write(number, pa.concat_tables(waiting.pop(number)).select(schema.names).cast(schema))
                    written += last - first
                    _progress(written, total, started)
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise UserError(f"scoring failed: {root_cause(error)}; finished parts are kept for --resume") from None


def _progress(done: int, total: int, started: float) -> None:
    seconds = time.perf_counter() - started
    left = int(seconds / done * (total - done))
    clock = f"{left // 60}:{left % 60:02d} left" if done < total else "done"
    print(f"{done}/{total} images  {done / seconds:.0f} a second  {clock}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
