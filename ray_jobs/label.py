"""python -m ray_jobs.label --data DATA --out DIR --budget N: spend N labels a cycle where they help most.

With --classes, people label images of folder:DIR or parquet:DIR. The first call writes to_label.csv and to_label.html
into the folder; fill in the labels and run the same command again: it takes them, trains, says how good the network is
and asks for the next images. Without --classes DATA has labels, which simulate the people: all cycles run at once.
"""

import argparse
import contextlib
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dataeff.core.config import merge, parse_config, parse_overrides
from dataeff.core.experiment import Experiment, LabelsNeeded
from dataeff.core.registry import get_method
from dataeff.core.run import (
    METRICS,
    Row,
    RunDirectory,
    RunState,
    newest_checkpoint,
    read_rows,
    replace_text,
    save_step,
    train,
)
from dataeff.core.runtime import Runtime
from dataeff.data import BadImageError, Splits, absolute_spec, open_splits
from dataeff.data.label_file import REQUEST, STATE, Request, held, read_request, write_csv
from dataeff.data.labelling import (
    ANSWERS,
    MANIFEST,
    Manifest,
    find_images,
    missing_files,
    open_records,
    read_answers,
    read_manifest,
)
from dataeff.data.sources import EncodedRecords
from dataeff.data.spec import DataSpec, parse_spec
from ray_jobs.cli import UserError, add_config_arguments, read_settings, run_command
from ray_jobs.label_files import contact_sheet, read_labels

METHOD = "active"
SHEET = "to_label.html"
FOREVER = 1000  # cycles, where people decide when to stop
LARGEST = 64  # pixels: the side that larger images are brought to, unless the data string has size=
PEOPLE_OPTIONS = {"size", "channels", "on_bad_image"}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.label", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder:DIR or parquet:DIR; any data set for a simulation")
    parser.add_argument("--out", required=True, type=Path, help="the folder of the requests, labels and networks")
    parser.add_argument("--classes", help="names, separated by commas; left out for a simulation with known labels")
    parser.add_argument("--budget", type=int, help="images to label in a cycle (default: the preset's)")
    parser.add_argument("--pool", help="how the first images are chosen: random, kmeans, simclr, vae, scan, ...")
    parser.add_argument("--query", help="how the next ones are chosen: mm, me, lc, coreset, vaal, dbal, random, ...")
    parser.add_argument("--cycles", type=int, help="after the first (default: until all is labelled; simulated: 4)")
    parser.add_argument(
        "--check", type=int, help="random images, labelled in the first cycle, to measure on (default: the budget)"
    )
    parser.add_argument("--labels", type=Path, help=f"the filled-in CSV (default: OUT/{REQUEST})")
    parser.add_argument("--gpus", type=int, default=0, choices=(0, 1), help="train on a GPU")
    add_config_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Take a labelling one cycle further, or simulate all of it; returns the folder."""
    args = parse_arguments(arguments)
    given = {"pool": args.pool, "query": args.query, "budget": args.budget, "cycles": args.cycles}
    settings = merge(
        read_settings(METHOD, args.config, args.set, "gpu" if args.gpus else "cpu"),
        {name: value for name, value in given.items() if value is not None},
    )
    settings.setdefault("cache", str(args.out / "cache"))
    if args.classes is None:
        _simulate(args, settings)
    else:
        _Labelling(args, settings).go_on()
    return Path(args.out)


def _simulate(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    if args.check is not None or args.labels is not None:
        raise ValueError("--check and --labels are for people who label; give --classes too")
    data = absolute_spec(args.data)
    try:
        open_splits(data)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; to label images without labels yourself, give --classes NAME,NAME,...") from None
    runtime = Runtime("cuda" if args.gpus else "cpu")
    summary = train(METHOD, data, args.out, settings, runtime, resume=True)
    for row in read_rows(args.out / "metrics.parquet"):
        print(f"{row['n_labelled']:6.0f} labelled  test accuracy {row['test_accuracy']:.4f}")
    print(f"test accuracy {summary['metrics']['test_accuracy']:.4f}; artifact: {args.out / 'artifact'}")


class _Labelling:
    """A labelling by people, on disk in one folder.

    `request.json` says what is asked for now, `answers.csv` has every label given, `requests/` the files they came in,
    `checkpoints/` the network and what has been asked for so far.
    """

    def __init__(self, args: argparse.Namespace, settings: dict[str, Any]) -> None:
        self.out: Path = args.out
        self.labels: Path = args.labels or self.out / REQUEST
        self.classes = _class_names(args.classes)
        if args.cycles is None and "cycles" not in parse_overrides(args.set):  # a preset's number is for simulations
            settings["cycles"] = FOREVER
        self.method = get_method(METHOD)
        self.config = parse_config(self.method.config_schema, settings)
        budget = int(self.config.model_dump()["budget"])
        self.check: int = budget if args.check is None else args.check
        if self.check < 1:
            raise ValueError(f"--check {self.check}: must be at least 1, so that the network can be measured")
        self.runtime = Runtime("cuda" if args.gpus else "cpu")
        source, _, options = absolute_spec(args.data).partition("?")
        spec = parse_spec(args.data)
        self._check_options(spec)
        begun = any((self.out / name).exists() for name in (STATE, ANSWERS))
        # What was said, not the defaults: a labelling lasts for weeks and must survive an upgrade that adds settings.
        said = {name: value for name, value in settings.items() if name != "cache"}
        identity = {**said, "classes": self.classes, "check": self.check}
        data = f"{source}?{options}" if options else source
        # Until something has been asked for there is nothing to lose, and other settings may begin anew.
        anew = not begun and (self.out / MANIFEST).is_file()
        self.folder = RunDirectory(self.out, "label", data, identity, resume=not anew, overwrite=anew)
        self.manifest = read_manifest(self.out) if begun else self._begin(source, budget, spec.size)
        # Decoded images are kept, so that a file that is deleted later costs nothing.
        given = [option for option in options.split("&") if option and not option.startswith("size=")]
        given += [f"size={self.manifest.size}", f"cache={self.out.absolute() / 'cache'}"]
        self.data = f"labelling:{self.out.absolute()}?{'&'.join(given)}"

    def _check_options(self, spec: DataSpec) -> None:
        refused = sorted(spec.given - PEOPLE_OPTIONS)
        if refused:
            raise ValueError(
                f"{spec.text}: {', '.join(refused)} cannot be used where people label; known: "
                f"{', '.join(sorted(PEOPLE_OPTIONS))}"
            )

    def _begin(self, source: str, budget: int, size: int | None) -> Manifest:
        files = find_images(source)
        records = open_records(source, files)
        count = len(records)
        if budget + self.check > count:
            raise ValueError(
                f"--budget {budget} and --check {self.check} with {count} images: together they must be at most {count}"
            )
        rng = np.random.default_rng([self.config.seed, count])
        check = sorted(rng.permutation(count)[: self.check].tolist())
        if size is None:
            size = min(LARGEST, *_first_size(records))
        manifest = Manifest(source=source, files=files, count=count, check=check, classes=self.classes, size=size)
        replace_text(self.out / MANIFEST, manifest.model_dump_json())
        return manifest

    def go_on(self) -> None:
        """Take the labels that wait, train, and ask for the next ones."""
        request = read_request(self.out)
        self._name_missing(request)
        if request is not None and not self._take(request):
            print(self._waiting(request))
            return
        run = RunState(self._experiment(), newest_checkpoint(self.folder.checkpoints))
        reported = len(read_rows(self.out / METRICS)) if (self.out / METRICS).is_file() else 0
        if len(run.rows) > reported:  # killed between a cycle and its report
            self._report(run, run.rows[-1])
        try:
            for row in run.advance():
                save_step(run, self.folder.checkpoints)
                self._report(run, row)
        except LabelsNeeded as needed:
            if not run.experiment.steps_done:  # later ones are part of the cycle's own checkpoint
                save_step(run, self.folder.checkpoints)
            _warn(run)
            print(self._waiting(self._ask(run.experiment.steps_done, needed.indices)))
        else:
            print(f"finished: no more labels are needed; artifact: {self.folder.artifact}")

    def _experiment(self) -> Experiment:
        try:
            return self.method(self.config, self.data, self.runtime)
        except BadImageError as error:
            raise UserError(f"{error}; delete the file, or add ?on_bad_image=skip to --data") from None

    def _name_missing(self, request: Request | None) -> None:
        """Say which images are gone from disk; their decoded copies stay in use."""
        gone = missing_files(self.manifest)
        rows = {name: number + 2 for number, name in enumerate(request.images)} if request else {}
        for name in gone[:10]:
            where = f"row {rows[name]} of {self.out / REQUEST}" if name in rows else "not asked for now"
            print(f"warning: {name} ({where}) is gone from disk; its copy in {self.out} is used", file=sys.stderr)
        if len(gone) > 10:
            print(f"warning: {len(gone) - 10} more files are gone", file=sys.stderr)

    def _take(self, request: Request) -> bool:
        """Move the request's labels to the answers; whether there were any.

        The answers are complete before the request goes, so a kill in between loses nothing and takes nothing twice.
        """
        with held(self.out):  # against labels that come over HTTP meanwhile
            return self._take_alone(request)

    def _take_alone(self, request: Request) -> bool:
        answers = read_answers(self.out)
        if any(image not in answers for image in request.images):
            labels = read_labels(self.labels, request.images, self.classes, answers)
            if labels is None:
                return False
            rows = [*answers.items(), *((image, labels[image]) for image in request.images)]
            write_csv(self.out / ANSWERS, rows)
        archive = self.out / "requests" / f"cycle-{request.cycle:03d}.csv"
        archive.parent.mkdir(exist_ok=True)
        if self.labels.is_file():
            shutil.copyfile(self.labels, archive)
        (self.out / STATE).unlink()
        for name in (REQUEST, SHEET):
            (self.out / name).unlink(missing_ok=True)
        return True

    def _ask(self, cycle: int, indices: Sequence[int]) -> Request:
        """Write the request for `indices` of the pool and, in the first cycle, for the check images."""
        splits = open_splits(self.data)
        names = [splits.train.describe(index) for index in indices]
        if cycle == 0:
            names += [splits.val.describe(index) for index in range(len(splits.val))]
        request = Request(cycle=cycle, images=sorted(names))
        pictures = self._pictures(request.images, splits)
        title = f"{len(names)} images to label (cycle {cycle})"
        replace_text(self.out / SHEET, contact_sheet(title, request.images, pictures, self.classes, REQUEST))
        write_csv(self.out / REQUEST, [(image, "") for image in request.images])
        replace_text(self.out / STATE, request.model_dump_json())
        return request

    def _pictures(self, names: Sequence[str], splits: Splits) -> list[PIL.Image.Image]:
        """The images as they are on disk, or, where a file is gone, as the network sees them."""
        records = open_records(self.manifest.source, self.manifest.files)
        rows = {records.describe(row): row for row in range(len(records))}
        kept = {
            source.describe(row): (source, row) for source in (splits.train, splits.val) for row in range(len(source))
        }

        def picture(name: str) -> PIL.Image.Image:
            try:
                return records.open_named(rows[name])
            except FileNotFoundError:
                source, row = kept[name]
                pixels = source.images([row])[0].permute(1, 2, 0).numpy().squeeze()
                return PIL.Image.fromarray(np.ascontiguousarray(pixels))

        return [picture(name) for name in names]

    def _waiting(self, request: Request) -> str:
        return (
            f"cycle {request.cycle}: {len(request.images)} images wait for their labels ({', '.join(self.classes)}).\n"
            f"Open {self.out / SHEET} to look at them and choose, or fill in the column `label` of "
            f"{self.out / REQUEST}.\nThen run the same command again."
        )

    def _report(self, run: RunState, row: Row) -> None:
        """Write the network and the figures of the cycle, and say how good it is."""
        _warn(run)
        run.experiment.export(self.folder.artifact)
        run.experiment.plots(self.folder.path)
        self.folder.finish(run.rows)
        count = len(self.manifest.check)
        low, high = wilson(row["test_accuracy"], count)
        print(
            f"cycle {int(row['step']) - 1}: trained on {row['n_labelled']:.0f} labels; right on "
            f"{row['test_accuracy']:.1%} of {count} check images (95 % interval {low:.0%} to {high:.0%}); "
            f"artifact: {self.folder.artifact}"
        )


def _first_size(records: EncodedRecords) -> tuple[int, int]:
    """Width and height of the first image that can be read; the others are looked at later."""
    for row in range(len(records)):
        with contextlib.suppress(BadImageError):
            return records.open_named(row).size
    raise UserError(f"none of the {len(records)} images can be read")


def _class_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    folded = [name.casefold() for name in names]
    if len(names) < 2 or len(set(folded)) < len(names):
        raise ValueError(f"--classes {text!r}: give at least 2 different names, separated by commas")
    return names


def _warn(run: RunState) -> None:
    for warning in run.take_warnings():
        print(f"warning: {warning}", file=sys.stderr)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that a share of `count` independent trials leaves plausible (Wilson 1927)."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


if __name__ == "__main__":
    run_command(main)
