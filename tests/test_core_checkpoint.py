"""A checkpoint counts only when it is whole; a run's folder never mixes two runs."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor

import dataeff
from dataeff.core import run as core_run
from dataeff.core.artifact import Artifact, Card, Predictor, save_artifact
from dataeff.core.checkpoint import SEAL, STATE, is_complete, load_checkpoint, save_checkpoint
from dataeff.core.config import Config, ExperimentConfig
from dataeff.core.experiment import Experiment
from dataeff.core.run import RunDirectory, RunState, newest_checkpoint, read_rows, save_step, write_rows
from dataeff.core.runtime import Runtime
from tests.test_data_sources import encoded, picture, write_parquet
from tests.test_skipnet_experiment import TINY


class StageConfig(Config):
    steps: int = 3


class WalkConfig(ExperimentConfig):
    stage: StageConfig = StageConfig()


class Walk(Experiment):
    """A random walk: each step draws one number, so a resumed run that drew others would show it."""

    config_schema: ClassVar[type[ExperimentConfig]] = WalkConfig

    def __init__(self, config: ExperimentConfig, data: str, runtime: Runtime) -> None:
        super().__init__(config, data, runtime)
        assert isinstance(config, WalkConfig)
        self.config = config
        self.position: Tensor = torch.zeros(1)

    @property
    def total_steps(self) -> int:
        return self.config.stage.steps

    def train_step(self, step: int) -> Mapping[str, float]:
        self.position += torch.randn(1)
        return {"position": float(self.position)}

    def evaluate(self, split: str) -> dict[str, float]:
        return {"position": float(self.position)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.position = state["position"]

    def export(self, directory: str | Path) -> None:
        card = Card(
            method="walk",
            classes=["any"],
            input_shape=(1, 1, 1),
            preprocess={},
            metrics=self.evaluate("test"),
            cost={"macs": 1.0},
            data={},
            versions={},
        )
        save_artifact(directory, card, self.config, {"position": self.position})

    @classmethod
    def load_predictor(cls, artifact: Artifact, device: str) -> Predictor:
        raise AssertionError("these tests never load this stand-in")


def walk(steps: int = 3, seed: int = 0) -> Walk:
    return Walk(WalkConfig(seed=seed, stage=StageConfig(steps=steps)), "digits", Runtime("cpu"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, {"experiment": {"steps_done": 2, "w": torch.tensor([1.5, 2.5])}, "rows": [{"loss": 0.5}]})
    return tmp_path


def test_a_checkpoint_comes_back_as_it_was_saved(checkpoint: Path) -> None:
    state = load_checkpoint(checkpoint)
    assert is_complete(checkpoint)
    assert state["experiment"]["steps_done"] == 2 and state["rows"] == [{"loss": 0.5}]
    assert torch.equal(state["experiment"]["w"], torch.tensor([1.5, 2.5]))
    assert sorted(path.name for path in checkpoint.iterdir()) == [SEAL, STATE]


@pytest.mark.parametrize("name", [SEAL, STATE])
def test_a_checkpoint_with_a_missing_file_is_incomplete(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert not is_complete(checkpoint)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("seal", [b"", b'{"sha256": "', b"{}", b"[]", b"null", b'{"sha256": "00"}', b"\xff\xfe"])
def test_a_torn_or_foreign_seal_makes_a_checkpoint_incomplete(checkpoint: Path, seal: bytes) -> None:
    (checkpoint / SEAL).write_bytes(seal)
    assert not is_complete(checkpoint)
    with pytest.raises(ValueError, match="incomplete or edited; delete it"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_torn_state_is_refused(checkpoint: Path, kept: float) -> None:
    content = (checkpoint / STATE).read_bytes()
    (checkpoint / STATE).write_bytes(content[: int(kept * len(content))])
    assert not is_complete(checkpoint)
    with pytest.raises(ValueError, match="incomplete or edited"):
        load_checkpoint(checkpoint)


def test_a_kill_between_state_and_seal_never_passes_for_the_old_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, *args: Any, **kwargs: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(checkpoint, {"experiment": {"steps_done": 3}, "rows": []})
    assert not is_complete(checkpoint)


def test_an_object_with_code_is_not_loaded_from_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"experiment": {"steps_done": 1, "w": walk}, "rows": []})
    with pytest.raises(Exception, match="Weights only load failed|weights_only"):
        load_checkpoint(tmp_path)


def test_the_newest_complete_checkpoint_is_found_past_a_torn_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        save_checkpoint(folder, {"experiment": {"steps_done": step}, "rows": []})
    (tmp_path / "step-000003" / SEAL).unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000002"
    assert newest_checkpoint(tmp_path / "none") is None


def test_saving_a_step_leaves_only_the_newest_checkpoint(tmp_path: Path) -> None:
    run = RunState(walk())
    for _ in run.advance():
        save_step(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_resumed_run_ends_at_the_numbers_of_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = RunState(walk(5))
    whole = [row["position"] for row in undisturbed.advance()]
    broken = RunState(walk(5))
    steps = broken.advance()
    next(steps), next(steps)
    broken.save(tmp_path)
    resumed = RunState(walk(5), tmp_path)
    list(resumed.advance())
    assert [row["position"] for row in resumed.rows] == whole
    assert [row["step"] for row in resumed.rows] == [1, 2, 3, 4, 5]


def write_images(folder: Path, first: int) -> None:
    for name, numbers in (("train", range(first, first + 60)), ("test", range(200, 220))):
        images = [encoded(picture(number)) for number in numbers]
        write_parquet(folder / f"{name}.parquet", images, [number % 2 for number in numbers])


def test_a_run_is_not_continued_on_other_images(tmp_path: Path) -> None:
    def interrupt(row: dict[str, float], total: int) -> None:
        raise KeyboardInterrupt

    write_images(tmp_path / "set", 0)
    given = ("skipnet", f"parquet:{tmp_path / 'set'}", tmp_path / "run", TINY)
    with pytest.raises(KeyboardInterrupt):
        dataeff.train(*given, report=interrupt)
    write_images(tmp_path / "set", 1)
    with pytest.raises(ValueError, match=r"parquet:.*set holds other images or labels than when the run was begun"):
        dataeff.train(*given, resume=True)
    write_images(tmp_path / "set", 0)
    assert dataeff.train(*given, resume=True, report=lambda row, total: None)["metrics"]


# the run's folder

CONFIG = {"seed": 0, "stage": {"lr": 0.1}}


def begin(path: Path, config: dict[str, Any] = CONFIG, **options: bool) -> RunDirectory:
    return RunDirectory(path, "walk", "digits", config, **options)


def test_a_new_run_writes_what_it_is(tmp_path: Path) -> None:
    begin(tmp_path / "deep" / "run")
    written = yaml.safe_load((tmp_path / "deep" / "run" / "config.yaml").read_text())
    assert written == {"method": "walk", "data": "digits", "config": CONFIG}


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    assert not begin(tmp_path).finished


def test_settings_without_a_step_do_not_stand_in_the_way_of_other_settings(tmp_path: Path) -> None:
    begin(tmp_path / "run")  # a job that was refused, for want of CPUs say
    begin(tmp_path / "run", {"seed": 1})


def test_a_folder_with_a_run_is_refused_and_the_ways_out_are_named(tmp_path: Path) -> None:
    begin(tmp_path / "run").checkpoints.mkdir()
    with pytest.raises(FileExistsError, match="already holds a run.*--resume.*--overwrite.*--out"):
        begin(tmp_path / "run")


def test_the_same_run_is_resumed_with_its_files(tmp_path: Path) -> None:
    begin(tmp_path / "run").checkpoints.mkdir()
    assert begin(tmp_path / "run", resume=True).checkpoints.is_dir()


def test_resuming_where_nothing_was_begun_begins(tmp_path: Path) -> None:
    assert (begin(tmp_path / "run", resume=True).path / "config.yaml").is_file()


def test_a_tuple_in_the_settings_is_the_list_that_was_written(tmp_path: Path) -> None:
    begin(tmp_path / "run", {"widths": (4, 8)})
    begin(tmp_path / "run", {"widths": [4, 8]}, resume=True)


def test_resuming_with_other_settings_names_those_that_differ(tmp_path: Path) -> None:
    begin(tmp_path / "run").checkpoints.mkdir()
    with pytest.raises(ValueError) as caught:
        begin(tmp_path / "run", {"seed": 0, "stage": {"lr": 0.2}, "new": 1}, resume=True)
    text = str(caught.value)
    assert "config.stage.lr: 0.1 before, 0.2 now" in text and "config.new: None before, 1 now" in text
    assert "seed" not in text
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["config"] == CONFIG


def test_resuming_another_method_or_other_data_is_refused(tmp_path: Path) -> None:
    begin(tmp_path / "run").checkpoints.mkdir()
    with pytest.raises(ValueError, match="data: 'digits' before, 'shapes' now; method: 'walk' before, 'run' now"):
        RunDirectory(tmp_path / "run", "run", "shapes", CONFIG, resume=True)


def test_overwriting_deletes_the_old_run(tmp_path: Path) -> None:
    begin(tmp_path / "run").checkpoints.mkdir()
    assert not begin(tmp_path / "run", {"seed": 1}, overwrite=True).checkpoints.exists()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_other_files_is_never_touched(tmp_path: Path, options: dict[str, bool]) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(FileExistsError, match="is not a run's folder"):
        begin(tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("text")
    with pytest.raises(FileExistsError, match="is not a run's folder"):
        begin(tmp_path / "run")


HOLD = """
import sys, time
from dataeff.core.run import RunDirectory
folder = RunDirectory(sys.argv[1], "walk", "digits", {"seed": 0, "stage": {"lr": 0.1}})
folder.checkpoints.mkdir()
print("at work", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_job_is_kept_out_of_a_folder_until_the_first_has_ended(
    tmp_path: Path, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_run, "PATIENCE", 0.3)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None and first.stdout.readline() == b"at work\n"
            with pytest.raises(BlockingIOError, match="another job is at work in this folder.*stop it"):
                begin(tmp_path / "run", **options)
            assert (tmp_path / "run" / "checkpoints").is_dir(), "nothing of the first job is touched"
        finally:
            first.kill()
    if options:
        begin(tmp_path / "run", **options)


def test_rows_with_different_keys_come_back_without_the_missing_ones(tmp_path: Path) -> None:
    rows = [{"step": 1.0, "loss": 2.0}, {"step": 2.0, "accuracy": 0.5}]
    write_rows(tmp_path / "metrics.parquet", rows)
    assert read_rows(tmp_path / "metrics.parquet") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.parquet"]


def test_training_a_killed_run_again_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_run, "get_method", {"walk": Walk}.__getitem__)
    runtime = Runtime("cpu")
    whole = dataeff.train("walk", "digits", tmp_path / "whole", runtime=runtime)

    def kill_after_two(row: dict[str, float], total: int) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataeff.train("walk", "digits", tmp_path / "killed", runtime=runtime, report=kill_after_two)
    seen: list[float] = []

    def note(row: dict[str, float], total: int) -> None:
        seen.append(row["step"])

    resumed = dataeff.train("walk", "digits", tmp_path / "killed", runtime=runtime, resume=True, report=note)
    assert seen == [3]
    assert resumed["metrics"] == whole["metrics"]
    assert [row["step"] for row in read_rows(tmp_path / "killed" / "metrics.parquet")] == [1, 2, 3]
    again = dataeff.train("walk", "digits", tmp_path / "killed", runtime=runtime, resume=True)
    assert again == json.loads((tmp_path / "killed" / "summary.json").read_text())
