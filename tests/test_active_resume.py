"""A run that is killed in the middle of a cycle asks for the same images as an undisturbed one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataeff.active.experiment import ActiveExperiment
from dataeff.active.initial import _once
from dataeff.active.settings import ActiveConfig
from dataeff.active.vaal import VaalTraining
from dataeff.core.config import merge, parse_config
from dataeff.core.run import RunState, newest_checkpoint, save_step
from dataeff.core.runtime import Runtime
from dataeff.pretraining.training import PretextTrainer
from tests.active_helpers import DATA, TINY, asked, experiment, finish, run
from tests.worker_helpers import on_two_workers, training

CPU = Runtime("cpu")


class Killed(BaseException):
    """Ends a run as a kill does: nothing after it happens."""


def dies_after(owner: type, name: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the method `name` of `owner` kill the process in its call number `calls`."""
    real, count = getattr(owner, name), [0]

    def counting(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)


def drive(folder: Path, **changes: Any) -> ActiveExperiment:
    """What every driver does: go on from the newest checkpoint, save after each step."""
    config = parse_config(ActiveConfig, merge(TINY, changes))
    state = RunState(ActiveExperiment(config, DATA, CPU), newest_checkpoint(folder))
    for _ in state.advance():
        save_step(state, folder)
    found = state.experiment
    assert isinstance(found, ActiveExperiment)
    return found


def test_a_kill_while_vaal_trains_asks_for_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = run(query="vaal")
    with monkeypatch.context() as patch:
        dies_after(VaalTraining, "step", 6, patch)  # 4 mini-batches in a cycle: the second of the second cycle
        with pytest.raises(Killed):
            drive(tmp_path, query="vaal")
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000001"
    resumed = drive(tmp_path, query="vaal")
    assert asked(resumed) == asked(undisturbed)
    assert resumed.records == undisturbed.records and resumed.oracle.n_calls == 60
    ours, theirs = resumed.committee.state_dict(), undisturbed.committee.state_dict()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_kill_while_scan_trains_goes_on_within_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"pool": "scan", "cycles": 0, "scan": {"cluster": {"epochs": 3}}}
    undisturbed = run(**settings)
    cached = settings | {"cache": str(tmp_path / "cache")}
    with monkeypatch.context() as patch:
        dies_after(PretextTrainer, "step", 3, patch)  # SimCLR has 1 epoch: the second of clustering
        with pytest.raises(Killed):
            drive(tmp_path / "run", **cached)
    (part,) = (tmp_path / "cache").glob("scan-*.part")
    assert newest_checkpoint(part) == part / "step-000002"
    epochs: list[int] = []
    real = PretextTrainer.step
    with monkeypatch.context() as patch:
        patch.setattr(PretextTrainer, "step", lambda self: (epochs.append(self.steps_done), real(self))[1])
        resumed = drive(tmp_path / "run", **cached)
    assert epochs == [2, 3], "finished epochs are not repeated"
    assert asked(resumed) == asked(undisturbed)
    assert not part.exists()


def test_trials_of_a_seed_train_a_task_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = {"cache": str(tmp_path)}
    first = experiment(pool="vae", **cache)
    first.step()
    monkeypatch.setattr(PretextTrainer, "step", lambda self: pytest.fail("trained again"))
    second = experiment(pool="vae", query="coreset", **cache)
    second.step()
    assert asked(first) == asked(second)
    assert first.pool_scores is not None and second.pool_scores is not None
    assert first.pool_scores.key == second.pool_scores.key
    with pytest.raises(pytest.fail.Exception):  # other settings, or another seed, are another task
        experiment(pool="vae", vae={"lr": 0.5}, **cache).step()
    with pytest.raises(pytest.fail.Exception):
        experiment(pool="vae", seed=1, **cache).step()


def test_simclr_and_kmeans_share_one_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment(pool="simclr", cache=str(tmp_path)).step()
    monkeypatch.setattr(PretextTrainer, "step", lambda self: pytest.fail("trained again"))
    chosen = experiment(pool="kmeans", cache=str(tmp_path))._choose_pool()
    assert chosen.tolist() == experiment(pool="kmeans", cache=str(tmp_path))._choose_pool().tolist()


def test_a_result_that_was_cut_short_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half_written)
        with pytest.raises(Killed):
            _once(str(tmp_path), "vae", "k", lambda checkpoint: {"losses": np.arange(3.0)}, CPU)
    assert not list(tmp_path.glob("*.npz"))
    found = _once(str(tmp_path), "vae", "k", lambda checkpoint: {"losses": np.arange(4.0)}, CPU)
    again = _once(str(tmp_path), "vae", "k", lambda checkpoint: pytest.fail("computed again"), CPU)
    assert found["losses"].tolist() == again["losses"].tolist() == [0, 1, 2, 3]


def test_what_is_pending_survives_a_checkpoint_before_the_first_cycle() -> None:
    before = experiment(pool="random")
    before.pending = before._choose_pool()
    after = experiment(pool="random")
    after.load_state_dict(before.state_dict())
    assert after.pending is not None and after.pending.tolist() == before.pending.tolist()
    finish(after)
    assert asked(after) == asked(run(pool="random"))


# --- processes of their own -----------------------------------------------------------------------------------------

VAAL = merge(TINY, {"query": "vaal", "vaal": {"epochs": 15}})


@pytest.mark.slow
def test_a_process_killed_while_vaal_trains_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    with training("active", DATA, tmp_path / "killed", VAAL) as killed:
        killed.wait_for_step(1)
        killed.kill()  # the first cycle is saved; the second trains VAAL for most of its time
    with (
        training("active", DATA, tmp_path / "killed", VAAL) as resumed,
        training("active", DATA, tmp_path / "undisturbed", VAAL) as undisturbed,
    ):
        resumed.finish()
        undisturbed.finish()
    records = [json.loads((tmp_path / name / "active.json").read_text()) for name in ("killed", "undisturbed")]
    assert records[0] == records[1]


def asked_and_accuracy() -> tuple[list[list[int]], float]:
    found = run(pool="vae", cycles=0)
    return asked(found), found.records[-1]["test_accuracy"]


@pytest.mark.slow
def test_two_workers_train_what_one_trains() -> None:
    both = on_two_workers(asked_and_accuracy)
    images, accuracy = asked_and_accuracy()
    assert both[0] == both[1] and both[0][0] == images
    assert both[0][1] == pytest.approx(accuracy, abs=0.05)
