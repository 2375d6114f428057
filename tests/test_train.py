"""Training jobs on Ray: the number of workers, what a run leaves, and mistakes that end in one line."""

import json
import resource
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import dataeff
from dataeff.core.run import RunDirectory
from ray_jobs.cli import run_command
from ray_jobs.train import main
from tests.ray_helpers import TINY, local_ray, run, sets, train_arguments, without_seconds

pytestmark = pytest.mark.ray

# One step a mini-batch; without batch statistics, which would depend on how a batch is split.
CURVE = TINY | {
    "norm": "group",
    "reward_baseline": "batch_mean",
    "report_every": 1,
    "stage1": {"iterations": 10, "batch": 16},
    "stage2": {"iterations": 10, "batch": 16, "lr": 0.01},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Ray in this process; the value is its address."""
    with local_ray() as address:
        yield address


@pytest.fixture(scope="module")
def runs(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Finished runs on one worker and on two."""
    outs = {workers: tmp_path_factory.mktemp("runs") / str(workers) for workers in (1, 2)}
    for workers, out in outs.items():
        main(train_arguments(out, workers, settings=CURVE)[2:])
    return outs


@pytest.fixture
def two_workers(runs: dict[int, Path]) -> Path:
    return runs[2]


def test_one_worker_and_two_have_the_same_loss_curve(runs: dict[int, Path]) -> None:
    one, two = without_seconds(runs[1]), without_seconds(runs[2])
    assert len(one) == len(two) == 20
    for key in ("train_loss", "val_loss", "train_executed_share"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-4), key
    assert len({row["train_loss"] for row in one}) == 20


def test_a_run_leaves_its_summary_metrics_artifact_curves_and_events(two_workers: Path) -> None:
    summary = json.loads((two_workers / "summary.json").read_text())
    assert summary.keys() >= {"method", "data", "config", "metrics", "cost", "seconds", "versions"}
    assert (summary["method"], summary["data"], summary["config"]["depth"]) == ("skipnet", "digits", 8)
    assert 0 < summary["cost"]["macs"] <= summary["cost"]["full_macs"]
    assert summary["seconds"] > 0
    assert (two_workers / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((two_workers / "tensorboard").glob("events.out.tfevents.*"))
    predictor = dataeff.load(two_workers / "artifact")
    assert predictor.card.metrics["test_accuracy"] == summary["metrics"]["test_accuracy"]
    assert len(predictor.card.classes) == 10


def test_a_finished_run_is_not_trained_again(two_workers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (two_workers / "summary.json").stat().st_mtime_ns
    main(train_arguments(two_workers, 2, "--resume", settings=CURVE)[2:])
    assert "complete" in capsys.readouterr().out
    assert (two_workers / "summary.json").stat().st_mtime_ns == before


def skipnet(out: Path, *more: str, data: str = "digits", method: str = "skipnet") -> list[str]:
    return [method, "--data", data, "--out", str(out), *sets(TINY), *more]


def check_one_line(status: object, errors: str, parts: Sequence[str]) -> None:
    """Exit status 2, and one line on stderr that has all `parts`."""
    lines = errors.splitlines()
    assert status == 2, (status, errors[-2000:])
    assert len(lines) == 1 and lines[0].startswith("error: "), errors[-2000:]
    assert [part for part in parts if part not in lines[0]] == [], lines[0]


def check_mistake(arguments: list[str], parts: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        run_command(lambda: main(arguments))
    check_one_line(status.value.code, capsys.readouterr().err, parts)


def test_mistakes_that_need_no_cluster_end_in_one_line_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_jobs.train.connect", lambda: pytest.fail("a cluster is asked"))
    out = tmp_path / "run"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("{method: skipnet, data: digits, config: {}}\n")
    (other / "checkpoints").mkdir()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear aunt")
    file = tmp_path / "file"
    file.write_text("")
    mistakes: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "method": (skipnet(out, method="skipnett"), ("skipnett", "did you mean 'skipnet'")),
        "data": (skipnet(out, data="parquett:nowhere"), ("parquett",)),
        "no such data": (skipnet(out, data=f"parquet:{tmp_path / 'nowhere'}"), ("nowhere",)),
        "another run": (skipnet(other), ("already holds a run", "--resume", "--overwrite")),
        "other settings": (skipnet(other, "--resume"), ("other settings", "depth")),
        "foreign folder": (skipnet(foreign), ("not a run's folder",)),
        "preset": (skipnet(out, "--config", "cpuu"), ("cpuu", "did you mean 'cpu'")),
        "key": (skipnet(out, "--set", "stage1.iteration=5"), ("stage1.iteration", "did you mean 'stage1.iterations'")),
        "range": (skipnet(out, "--set", "stage1.lr=-1"), ("stage1.lr", "-1", "> 0")),
        "workers": (skipnet(out, "--workers", "0"), ("--workers",)),
        "out below a file": (skipnet(file / "run"), (str(file),)),
        "storage below a file": (skipnet(out, "--storage", str(file / "store")), (str(file), "cannot be written")),
    }
    for arguments, parts in mistakes.values():
        check_mistake(arguments, parts, capsys)
    assert not out.exists(), "a mistake leaves no run behind"


def test_a_file_size_limit_ends_in_one_line(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))  # the settings do not fit, the line on stderr does

    command = run(["-m", "ray_jobs.train", *skipnet(tmp_path / "run")], preexec_fn=limit)
    check_one_line(command.process.returncode, command.stderr, ("config.yaml", "choose another --out"))
    assert RunDirectory(tmp_path / "run", "skipnet", "digits", {}), "the folder can be used once there is room"


def test_resources_that_the_cluster_lacks_end_in_one_line(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("64 CPUs asked for", "64 GPUs asked for", "--workers")
    check_mistake(skipnet(tmp_path / "run", "--workers", "64", "--gpus", "64"), parts, capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up_with_checkpoints_ends_in_one_line(cluster: str, small_disk: Path, tmp_path: Path) -> None:
    arguments = train_arguments(tmp_path / "run", 1, "--storage", str(small_disk), "--max-failures", "0")
    command = run(arguments, {"RAY_ADDRESS": cluster})
    assert command.process.returncode == 2, command.stderr[-2000:]
    assert "Traceback" not in command.stderr
    last = command.stderr.splitlines()[-1]
    assert last.startswith("error: training failed:") and "No space left on device" in last, last
