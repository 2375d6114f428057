"""People who label: from a folder of images to a network over three cycles, and all that a request can hold wrong."""

import csv
import html
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dataeff
from dataeff.active.experiment import ActiveExperiment
from dataeff.core.run import read_rows
from ray_jobs import label
from ray_jobs.cli import UserError
from ray_jobs.label import main, wilson
from ray_jobs.label_files import contact_sheet, read_labels
from tests.active_helpers import TINY, answer_csv
from tests.ray_helpers import ROOT, sets

SMALL = ["--set", "cache=null", *sets({"classifier": TINY["classifier"] | {"min_steps": 30}})]
Command = Callable[..., Path]


def photo(number: int) -> tuple[Image.Image, str]:
    """A 14 x 12 picture, dark or bright with noise."""
    rng = np.random.default_rng(number)
    bright = bool(number % 2)
    pixels = rng.integers(120, 255, (12, 14, 3)) if bright else rng.integers(0, 135, (12, 14, 3))
    return Image.fromarray(pixels.astype(np.uint8)), "bright" if bright else "dark"


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else in these tests; a run's curves have tests of their own."""
    monkeypatch.setattr("dataeff.core.run.plot_curves", lambda rows, path: None)


@pytest.fixture
def truth(tmp_path: Path) -> dict[str, str]:
    """60 photos in two folders below `photos`; name -> class."""
    found = {}
    for number in range(60):
        name = f"roll {number // 30}/img {number:02d}.png"
        picture, found[name] = photo(number)
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return found


@pytest.fixture
def command(tmp_path: Path, truth: dict[str, str]) -> Command:
    """Runs the same command again; `more` arguments for one call only."""

    def run(*more: str) -> Path:
        fixed = ["--data", f"folder:{tmp_path / 'photos'}", "--classes", "dark, bright", "--out", str(tmp_path / "out")]
        return main([*fixed, "--budget", "8", "--check", "6", "--query", "mm", *SMALL, *more])

    return run


def requested(out: Path) -> list[str]:
    with (out / "to_label.csv").open() as file:
        return [row["image"] for row in csv.DictReader(file)]


def edit(out: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of a request, the header at 0; line n is what a spreadsheet calls row n + 1."""
    path = out / "to_label.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def name_in(row: str) -> str:
    return row.rsplit(",", 1)[0]


def test_three_cycles_from_a_folder_to_a_network(
    command: Command, truth: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = command()
    shown = capsys.readouterr().out
    assert "cycle 0: 14 images wait for their labels (dark, bright)" in shown and "to_label.html" in shown
    asked: list[list[str]] = []
    for cycle in range(3):
        asked.append(requested(out))
        answer_csv(out / "to_label.csv", truth)
        command()
        shown = capsys.readouterr().out
        assert (
            f"cycle {cycle}: trained on {8 * (cycle + 1)} labels; right on " in shown and "of 6 check images" in shown
        )
        assert f"cycle {cycle + 1}: 8 images wait for their labels" in shown
        assert (out / "requests" / f"cycle-{cycle:03d}.csv").is_file()
    asked.append(requested(out))
    everything = [name for batch in asked for name in batch]
    assert [len(batch) for batch in asked] == [14, 8, 8, 8]
    assert len(set(everything)) == len(everything), "an image is never asked for twice"
    with (out / "answers.csv").open() as file:
        answers = {row["image"]: row["label"] for row in csv.DictReader(file)}
    assert answers == {name: truth[name] for batch in asked[:3] for name in batch}
    assert [row["n_labelled"] for row in read_rows(out / "metrics.parquet")] == [8, 16, 24]
    predictor = dataeff.load(out / "artifact")
    assert predictor.card.classes == ["dark", "bright"]
    fresh = [photo(number) for number in range(60, 80)]
    answers_of_network = predictor.predict(
        predictor.preprocess([picture for picture, _ in fresh])
    ).probabilities.argmax(1)
    right = [predictor.card.classes[k] == label for k, (_, label) in zip(answers_of_network, fresh, strict=True)]
    assert sum(right) >= 18, "the network has learned what was labelled"


def test_a_command_that_finds_nothing_filled_in_says_what_to_do_and_changes_nothing(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    out = command()
    before = requested(out)
    command()
    assert capsys.readouterr().out.count("wait for their labels") == 2
    assert requested(out) == before


def test_the_contact_sheet_shows_every_image_once_with_all_classes(command: Command) -> None:
    out = command()
    page = (out / "to_label.html").read_text()
    for name in requested(out):
        assert page.count(f'data-image="{html.escape(name)}"') == 1
    assert page.count("<option>dark</option><option>bright</option>") == page.count("data:image/png;base64,") == 14
    assert "src=" not in page.replace('src="data:', ""), "the page needs nothing but itself"


def test_what_a_contact_sheet_shows_cannot_inject_markup() -> None:
    page = contact_sheet("t", ['<b>"&.png'], [Image.new("L", (4, 4))], ["<i>", "b"], "to_label.csv")
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;&quot;&amp;.png" in page


# --- wrong rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows[:3], name_in(rows[3]) + ",brigt", *rows[4:]], "row 4: unknown class 'brigt' .*'bright'"),
        (lambda rows: rows[:5] + rows[6:], r"no row for 'roll .* \(row 6 of the request\)"),
        (lambda rows: [*rows, rows[2]], r"rows 3 and 16: 'roll .*' twice"),
        (lambda rows: [*rows, "roll 9/other.png,dark"], r"row 16: 'roll 9/other.png' was not asked for"),
        (lambda rows: [*rows[:2], name_in(rows[2]) + ",", *rows[3:]], r"row 3: no label for 'roll"),
        (lambda rows: ["file,class", *rows[1:]], "no column image and label in its first row, which is 'file,class'"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_and_nothing_is_lost(
    command: Command, truth: dict[str, str], change: Callable[[list[str]], list[str]], message: str
) -> None:
    out = command()
    before = requested(out)
    answer_csv(out / "to_label.csv", truth)
    filled = (out / "to_label.csv").read_text()
    edit(out, change)
    wrong = (out / "to_label.csv").read_text()
    with pytest.raises(UserError, match=message) as caught:
        command()
    assert "\n" not in str(caught.value)
    assert (out / "to_label.csv").read_text() == wrong, "the file is the user's"
    assert not (out / "answers.csv").exists() and not (out / "metrics.parquet").exists()
    (out / "to_label.csv").write_text(filled)
    command()
    assert not set(requested(out)) & set(before)


def test_several_wrong_rows_are_named_at_once(command: Command, truth: dict[str, str]) -> None:
    out = command()
    answer_csv(out / "to_label.csv", truth)
    edit(out, lambda rows: [rows[0], rows[1] + "x", rows[2] + "x", *rows[4:]])
    with pytest.raises(UserError, match="row 2: unknown .*; row 3: unknown .*; no row for .* Nothing was taken"):
        command()


def test_a_label_that_comes_again_is_told_from_one_that_nobody_asked_for(
    command: Command, truth: dict[str, str]
) -> None:
    out = command()
    old = requested(out)[0]
    answer_csv(out / "to_label.csv", truth)
    command()
    answer_csv(out / "to_label.csv", truth)
    edit(out, lambda rows: [*rows, f"{old},dark"])
    with pytest.raises(UserError, match=f"row 10: '{old}' was labelled '{truth[old]}' before"):
        command()


def test_a_file_deleted_in_between_is_named_with_its_row_and_its_label_still_counts(
    command: Command, truth: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = command()
    asked, other = requested(out)[2], sorted(set(truth) - set(requested(out)))[0]
    for name in (asked, other):
        (tmp_path / "photos" / name).unlink()
    answer_csv(out / "to_label.csv", truth)
    command()
    shown = capsys.readouterr()
    assert f"warning: {asked} (row 4 of {out / 'to_label.csv'}) is gone from disk" in shown.err
    assert f"warning: {other} (not asked for now) is gone from disk" in shown.err
    assert "trained on 8 labels" in shown.out
    shutil.rmtree(tmp_path / "photos")  # even all of them: decoded copies and pictures remain
    answer_csv(out / "to_label.csv", truth)
    command()
    assert "trained on 16 labels" in capsys.readouterr().out


def test_spreadsheets_of_other_countries_are_read(tmp_path: Path) -> None:
    path = tmp_path / "filled.csv"
    path.write_text("\ufeffImage;Label;remark\nb.png;DOG ;\n\na.png; cat;blurred\n", encoding="utf-8")
    assert read_labels(path, ["a.png", "b.png"], ["cat", "dog"], {}) == {"a.png": "cat", "b.png": "dog"}


def test_another_file_can_be_given_and_a_missing_one_is_named(
    command: Command, truth: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = command()
    with pytest.raises(UserError, match=r"gone\.csv: no such file"):
        command("--labels", str(tmp_path / "gone.csv"))
    shutil.copyfile(out / "to_label.csv", tmp_path / "downloaded.csv")
    answer_csv(tmp_path / "downloaded.csv", truth)
    command("--labels", str(tmp_path / "downloaded.csv"))
    assert "trained on 8 labels" in capsys.readouterr().out


# --- interruptions and other mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize("last_file", ["answers.csv", "requests/cycle-000.csv"])
def test_a_kill_while_labels_are_taken_takes_them_once(
    command: Command, truth: dict[str, str], last_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command()
    answer_csv(out / "to_label.csv", truth)
    path = "write_csv" if last_file == "answers.csv" else "shutil.copyfile"
    target = label if path == "write_csv" else shutil
    real = getattr(target, path.split(".")[-1])

    def write_and_die(*arguments: object) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, path.split(".")[-1], write_and_die)
        with pytest.raises(KeyboardInterrupt):
            command()
    assert (out / last_file).is_file()
    command()
    with (out / "answers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 14
    assert len(requested(out)) == 8


def test_a_kill_between_a_cycle_and_its_report_trains_once_and_reports(
    command: Command, truth: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command()
    answer_csv(out / "to_label.csv", truth)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(label._Labelling, "_report", die)
        with pytest.raises(KeyboardInterrupt):
            command()
    assert not (out / "artifact").exists()
    monkeypatch.setattr(ActiveExperiment, "_train", die)
    command()
    shown = capsys.readouterr().out
    assert "cycle 0: trained on 8 labels" in shown and "cycle 1: 8 images wait for their labels" in shown
    assert (out / "artifact").is_dir()


def test_other_settings_are_refused_once_something_was_asked_for(command: Command) -> None:
    command()
    with pytest.raises(ValueError, match=r"begun with other settings \(config.budget: 8 before, 9 now\)"):
        command("--budget", "9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "dark"], "at least 2 different names"),
        (["--classes", "dark,Dark"], "at least 2 different names"),
        (["--budget", "55"], r"--budget 55 and --check 6 with 60 images: together they must be at most 60"),
        (["--budget", "0"], "budget = 0 is not allowed"),
        (["--check", "0"], "--check 0: must be at least 1"),
        (["--query", "mmm"], "query = 'mmm'"),
        (["--pool", "clever"], "pool = 'clever'"),
        (["--data", "folder:nowhere"], "no such folder"),
        (["--data", "digits"], "people label images of folder:DIR or parquet:DIR"),
        (["--data", "folder:x?labels=5"], "labels cannot be used where people label"),
    ],
)
def test_a_mistake_in_the_command_says_what_is_allowed(command: Command, arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        command(*arguments)


def test_an_unreadable_image_is_named_and_can_be_skipped(
    command: Command, truth: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "broken.png").write_text("no image")
    with pytest.raises(UserError, match=r"broken.png is not a readable image .*or add \?on_bad_image=skip"):
        command()
    command("--data", f"folder:{tmp_path / 'photos'}?on_bad_image=skip")
    assert "wait for their labels" in capsys.readouterr().out


def test_parquet_without_labels_is_labelled_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pool").mkdir()
    blobs = []
    for number in range(40):
        photo(number)[0].save(tmp_path / "image.png")
        blobs.append({"bytes": (tmp_path / "image.png").read_bytes(), "path": None})
    pq.write_table(pa.table({"image": blobs}), tmp_path / "pool" / "part-0.parquet")
    arguments = ["--data", f"parquet:{tmp_path / 'pool'}", "--classes", "dark,bright", "--out", str(tmp_path / "out")]
    arguments += ["--budget", "6", *SMALL]
    out = main(arguments)
    names = requested(out)
    assert len(names) == 12 and all(name.startswith("part-0.parquet row ") for name in names)
    answer_csv(out / "to_label.csv", {name: photo(int(name.split()[-1]))[1] for name in names})
    main(arguments)
    assert "trained on 6 labels" in capsys.readouterr().out


def test_data_with_labels_simulates_the_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = sets({"classifier": TINY["classifier"], "test_images": 100})
    main(
        [
            "--data",
            "digits?labels=150",
            "--out",
            str(tmp_path),
            "--budget",
            "20",
            "--cycles",
            "1",
            "--query",
            "me",
            *tiny,
        ]
    )
    shown = capsys.readouterr().out
    assert "20 labelled  test accuracy" in shown and "40 labelled  test accuracy" in shown
    assert json.loads((tmp_path / "summary.json").read_text())["config"]["query"] == "me"
    with pytest.raises(ValueError, match="for people who label; give --classes too"):
        main(["--data", "digits", "--out", str(tmp_path / "other"), "--check", "3"])


def test_a_folder_without_classes_says_how_to_label_it(truth: dict[str, str], tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    photo(0)[0].save(flat / "a.png")
    with pytest.raises(ValueError, match="no class folders .* give --classes NAME,NAME"):
        main(["--data", f"folder:{flat}", "--out", str(tmp_path / "out")])


def test_the_interval_is_wilsons() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


@pytest.mark.slow
def test_a_users_mistake_ends_in_one_line_and_status_2(tmp_path: Path) -> None:
    arguments = ["--data", "folder:nowhere", "--classes", "a,b", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.label", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: folder:{ROOT / 'nowhere'}: no such folder"]
