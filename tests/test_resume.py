"""A run that is killed anywhere and resumed ends with the numbers of the undisturbed run, bit for bit."""

import random
import time
from pathlib import Path

import pytest
import torch

from dataeff.core.checkpoint import load_checkpoint
from dataeff.core.config import read_yaml
from tests.ray_helpers import (
    STAGE_STEPS,
    TINY,
    assert_same_run,
    node_cluster,
    run,
    running,
    seeded,
    steps_reported,
    train_arguments,
    wait_for_end,
    wait_until,
    without_seconds,
)
from tests.worker_helpers import training

# Two phases of a search, the second long enough to be killed in; then a short training of what was found.
SEARCH = {
    "arm": "pcp_darts", "init_channels": 8, "phases": [[3, 8], [4, 4]], "skip_dropout": [0.0, 0.3], "phase_epochs": 5,
    "phase_arch_start": 1, "layers": 3, "search_images": 64, "batch": 16, "arch_lr": 0.05, "augment": "shift",
    "train": {"cells": 3, "channels": 4, "report_every": 2, "stage": {"iterations": 4, "batch": 16}},
}  # fmt: skip


def moments(generator: random.Random, count: int) -> list[int]:
    """`count` different steps in each stage, ascending; some way before its end, which a quick machine soon reaches."""
    first = sorted(generator.sample(range(1, STAGE_STEPS - 4), count))
    return first + [STAGE_STEPS + step for step in sorted(generator.sample(range(1, STAGE_STEPS - 4), count))]


@pytest.mark.slow
def test_a_local_run_killed_in_both_stages_ends_like_the_undisturbed_one(tmp_path: Path) -> None:
    generator = seeded("local kills")
    killed = ("skipnet", "digits", tmp_path / "killed", TINY)
    with training("skipnet", "digits", tmp_path / "undisturbed", TINY) as undisturbed:
        for step in moments(generator, 2):
            with training(*killed) as run_to_kill:
                run_to_kill.wait_for_step(step)
                run_to_kill.kill()
                assert run_to_kill.newest_step() < 2 * STAGE_STEPS
        with training(*killed) as resumed:
            resumed.finish()
        undisturbed.finish()
    assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_search_killed_in_its_second_phase_finds_the_same_architecture(tmp_path: Path) -> None:
    generator = seeded("search kills")
    killed = ("nas_search", "digits", tmp_path / "killed", SEARCH)
    with training("nas_search", "digits", tmp_path / "undisturbed", SEARCH) as undisturbed:
        with training(*killed) as run_to_kill:
            run_to_kill.wait_for_step(generator.randrange(6, 9))
            run_to_kill.kill()
            assert run_to_kill.newest_step() < 10, "killed after the search had ended"
        with training(*killed) as resumed:
            resumed.finish()
        undisturbed.finish()
    found, expected = (read_yaml(tmp_path / name / "artifact" / "config.yaml") for name in ("killed", "undisturbed"))
    assert found["genotype"] == expected["genotype"]
    states = [load_checkpoint(last_checkpoint(tmp_path / name))["experiment"] for name in ("killed", "undisturbed")]
    alphas = [{k: v for k, v in state["searcher"]["model"].items() if k.startswith("alpha")} for state in states]
    assert alphas[0] and alphas[0].keys() == alphas[1].keys()
    assert all(torch.equal(value, alphas[1][name]) for name, value in alphas[0].items())


def last_checkpoint(out: Path) -> Path:
    return max((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two workers."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(train_arguments(out, 2)).finish()
    assert [row["step"] for row in without_seconds(out)] == list(range(1, 2 * STAGE_STEPS + 1))
    return out


@pytest.mark.ray
def test_a_driver_killed_at_any_moment_resumes_to_the_same_numbers(undisturbed: Path, tmp_path: Path) -> None:
    generator = seeded("driver kills")
    out, left = tmp_path / "run", []
    for step in moments(generator, 1):
        with running(train_arguments(out, 2, "--resume")) as command:
            wait_until(lambda step=step: steps_reported(out) >= step, command)
            time.sleep(generator.uniform(0, 0.2))
            left += command.kill()  # and go on at once
        assert not (out / "summary.json").exists()
    run(train_arguments(out, 2, "--resume")).finish()
    assert_same_run(out, undisturbed)
    outliving = wait_for_end(left, timeout=90)
    for process in outliving:
        process.kill()
    assert not outliving, f"Ray processes outlive their killed driver: {outliving}"


@pytest.mark.ray
def test_a_killed_worker_and_a_lost_node_are_replaced_without_changing_the_numbers(
    undisturbed: Path, tmp_path: Path
) -> None:
    generator = seeded("worker and node kills")
    out = tmp_path / "run"
    first, second = moments(generator, 1)
    with node_cluster(3) as cluster, running(train_arguments(out, 2), cluster.variables) as command:
        wait_until(lambda: steps_reported(out) >= first, command)
        time.sleep(generator.uniform(0, 0.2))
        generator.choice(cluster.training_workers()).kill()
        wait_until(lambda: steps_reported(out) >= second, command)
        time.sleep(generator.uniform(0, 0.2))
        cluster.kill_node_of_a_worker()
        command.finish()
        failures = [line for line in command.stderr.splitlines() if "restarting from the last checkpoint" in line]
    assert len(failures) == 2, failures
    assert_same_run(out, undisturbed)
