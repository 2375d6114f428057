"""The claims command: its bookkeeping with a method that trains in no time, and SkipNet's cheapest claims for real."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ray_jobs.claims.__main__ as command
from dataeff.core.artifact import Card, save_artifact, versions
from dataeff.core.config import ExperimentConfig, merge
from dataeff.core.experiment import Experiment
from dataeff.core.registry import METHODS
from ray_jobs.claims import CLAIMS, Check, Claim, Run, Verdict, by_mean, load_claims, plan, preset_at, spread
from ray_jobs.claims import skipnet as skipnet_claims
from ray_jobs.claims.skipnet_figures import spearman
from ray_jobs.cli import UserError
from tests.ray_helpers import local_ray

TRAINED: list[str] = []


class FakeConfig(ExperimentConfig):
    score: float = 0.0
    steps: int = 2
    fails: bool = False


class FakeExperiment(Experiment):
    """Reports `score` plus a hundredth of the seed."""

    config_schema = FakeConfig

    def __init__(self, config: FakeConfig, data: str, runtime: Any) -> None:
        super().__init__(config, data, runtime)
        self.config = config
        TRAINED.append(f"{config.score:g}")

    @property
    def total_steps(self) -> int:
        return self.config.steps

    def train_step(self, step: int) -> dict[str, float]:
        if self.config.fails:
            raise ValueError("the loss was not finite")
        return {"loss": 0.0}

    def evaluate(self, split: str) -> dict[str, float]:
        return {"score": self.config.score + self.seed / 100}

    def export(self, directory: str | Path) -> None:
        card = Card(
            method="fake",
            classes=["0"],
            input_shape=(1, 8, 8),
            preprocess={},
            metrics={f"test_{name}": value for name, value in self.evaluate("test").items()},
            cost={"macs": 1.0, "full_macs": 1.0, "params": 1.0},
            data={"name": self.data, "fingerprint": ""},
            versions=versions(),
        )
        save_artifact(directory, card, self.config, {"weight": torch.zeros(1)})

    @classmethod
    def load_predictor(cls, artifact: Any, device: str) -> Any:
        raise AssertionError("claims read summaries and never load this stand-in")


class InProcess:
    """Stands for RayTasks: one run at a time, in this process."""

    def __init__(self, scale: str) -> None:
        self.queue: list[tuple[Any, dict[str, Any]]] = []

    def slots(self) -> int:
        return 2

    def submit(self, job: Any, settings: dict[str, Any]) -> None:
        self.queue.append((job, settings))

    def wait(self) -> tuple[Any, bool | str]:
        job, settings = self.queue.pop()
        try:
            return job, command.train_job(job.method, job.run.data, job.folder, settings, "cpu")
        except ValueError as error:
            return job, str(error)


def fake_run(name: str, **settings: Any) -> Run:
    return Run(name, "digits", settings)


def better(id: str, first: Run, second: Run, margin: float, **options: Any) -> Claim:
    """Claims that `second` scores `margin` more than `first`."""

    def measure(results: Any) -> dict[str, float]:
        score = {name: result.metrics["test_score"] for name, result in results.items()}
        return {"gain": score[second.name] - score[first.name], "second": score[second.name]}

    checks = (Check("gain", at_least=margin),)
    return Claim(id, "second <beats> first", "by 1", (first, second), measure, checks, **options)


@pytest.fixture
def run_claims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Judges the given claims of the fake method; the rows of claims.json by claim."""
    monkeypatch.setitem(METHODS, "fake", f"{__name__}:FakeExperiment")
    monkeypatch.setitem(CLAIMS, "fake", "")
    monkeypatch.setattr(command, "RayTasks", InProcess)
    TRAINED.clear()

    def run(claims: list[Claim], *arguments: str) -> dict[str, dict[str, Any]]:
        monkeypatch.setattr(command, "load_claims", lambda method, scale, data: claims)
        command.main(["fake", "--seeds", "3", "--out", str(tmp_path / "out"), *arguments])
        return {row["id"]: row for row in json.loads((tmp_path / "out" / "claims.json").read_text())["claims"]}

    return run


def test_a_claim_that_does_not_hold_stays_in_the_table_and_says_so(run_claims: Any, tmp_path: Path) -> None:
    low, high = fake_run("low", score=0.1), fake_run("high", score=0.6)
    rows = run_claims([better("A", low, high, 0.4), better("B", high, low, 0.4)])
    assert rows["A"]["verdict"] == "holds"
    assert rows["B"]["verdict"] == "does not hold"
    assert rows["B"]["reasons"] == ["gain: median -0.5, required at least 0.4, margin -0.9"]
    page = (tmp_path / "out" / "claims.html").read_text()
    assert "<b>does not hold</b>" in page and "second &lt;beats&gt; first" in page


def test_figures_are_given_with_mean_and_spread_over_seeds(run_claims: Any) -> None:
    measured = run_claims([better("A", fake_run("low", score=0.1), fake_run("high", score=0.6), 0.4)])["A"]["measured"]
    assert measured["second"]["values"] == pytest.approx([0.6, 0.61, 0.62])
    assert measured["second"]["mean"] == pytest.approx(0.61)
    assert measured["second"]["sd"] == pytest.approx(0.01)


def test_claims_that_name_the_same_run_train_it_once_a_seed(run_claims: Any) -> None:
    low, middle, high = fake_run("low", score=0.1), fake_run("middle", score=0.3), fake_run("high", score=0.6)
    run_claims([better("A", low, high, 0.4), better("B", middle, high, 0.1)])
    assert sorted(TRAINED) == ["0.1"] * 3 + ["0.3"] * 3 + ["0.6"] * 3


def test_only_the_claims_asked_for_are_measured(run_claims: Any) -> None:
    low, middle, high = fake_run("low", score=0.1), fake_run("middle", score=0.3), fake_run("high", score=0.6)
    claims = [better("A", low, high, 0.4), better("B", middle, high, 0.1)]
    assert list(run_claims(claims, "--only", "B")) == ["B"]
    assert sorted(TRAINED) == ["0.3"] * 3 + ["0.6"] * 3
    with pytest.raises(ValueError, match="--only: no claim 'C'.*known: A, B"):
        run_claims(claims, "--only", "C", "--overwrite")


def test_a_resumed_table_repeats_no_finished_run_and_takes_more_seeds(run_claims: Any) -> None:
    claims = [better("A", fake_run("low", score=0.1), fake_run("high", score=0.6), 0.4)]
    run_claims(claims, "--seeds", "1")
    assert len(TRAINED) == 2
    rows = run_claims(claims, "--seeds", "2", "--resume")
    assert len(TRAINED) == 4
    assert len(rows["A"]["measured"]["gain"]["values"]) == 2


def test_a_table_is_not_replaced_unless_asked(run_claims: Any) -> None:
    claims = [better("A", fake_run("low", score=0.1), fake_run("high", score=0.6), 0.4)]
    run_claims(claims)
    with pytest.raises(FileExistsError, match="--resume"):
        run_claims(claims)
    run_claims(claims, "--overwrite")
    assert len(TRAINED) == 12


def test_a_run_may_take_its_settings_from_an_earlier_one_of_its_seed(run_claims: Any) -> None:
    first = fake_run("first", score=0.3)
    second = Run("second", "digits", {}, (first,), lambda runs: {"score": 2 * runs["first"].metrics["test_score"]})
    rows = run_claims([better("A", first, second, 0.1)])
    assert rows["A"]["measured"]["second"]["values"] == pytest.approx([0.6, 0.63, 0.66])


def test_a_failed_run_leaves_its_claims_unmeasured_and_the_others_judged(run_claims: Any, tmp_path: Path) -> None:
    low, high, broken = fake_run("low", score=0.1), fake_run("high", score=0.6), fake_run("broken", fails=True)
    after = Run("after", "digits", {}, (broken,))
    claims = [better("A", low, high, 0.4), better("B", low, broken, 0.0), better("C", low, after, 0.0)]
    with pytest.raises(UserError, match="the loss was not finite; repeat them with --resume"):
        run_claims(claims)
    rows = {row["id"]: row for row in json.loads((tmp_path / "out" / "claims.json").read_text())["claims"]}
    assert [rows[id]["verdict"] for id in "ABC"] == ["holds", "not measured", "not measured"]


def test_a_claim_that_the_scale_cannot_decide_reports_its_figures_with_the_reason(run_claims: Any) -> None:
    low, high = fake_run("low", score=0.1), fake_run("high", score=0.6)
    row = run_claims([better("A", low, high, 0.4, untestable="too few blocks")])["A"]
    assert (row["verdict"], row["reasons"]) == ("not testable at this scale", ["too few blocks"])
    assert row["measured"]["gain"]["mean"] == pytest.approx(0.5)


def test_a_figure_that_is_not_a_number_keeps_no_bound() -> None:
    claim = Claim("A", "", "", checks=(Check("x", at_least=-1.0),))
    assert Verdict(claim, {"x": [float("nan")]}).status == "does not hold"
    assert Verdict(claim, {"x": [0.0]}).status == "holds"


def test_the_median_over_seeds_is_judged_or_the_mean_where_the_spec_says_so() -> None:
    claim = Claim("A", "", "", checks=(Check("x", at_most=4.0),))
    figures = {"x": [0.0, 4.1, 4.2]}
    assert Verdict(claim, figures).status == "does not hold"
    (averaged,) = by_mean([claim])
    assert Verdict(averaged, figures).status == "holds"
    assert Verdict(averaged, figures).reasons == ["x: mean 2.767, required at most 4, margin 1.23"]


@pytest.mark.parametrize("method", ["active", "adaskips", "idk", "robustness"])
def test_the_specs_of_these_methods_judge_means(method: str) -> None:
    assert {claim.over_seeds for claim in load_claims(method, "cpu", None)} == {"mean"}


def test_two_different_runs_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two different runs are named 'low'"):
        plan([better("A", fake_run("low"), fake_run("high"), 0), better("B", fake_run("low"), fake_run("other"), 0)])


def test_no_two_runs_of_skipnet_have_the_same_settings() -> None:
    for scale in ("cpu", "gpu"):
        runs = plan(load_claims("skipnet", scale, "digits"))
        seen = [(run.data, run.settings, [earlier.name for earlier in run.after]) for run in runs]
        assert all(first not in seen[:position] for position, first in enumerate(seen))


def test_the_gpu_scale_asks_for_its_data() -> None:
    with pytest.raises(ValueError, match="--data parquet:DIR"):
        load_claims("skipnet", "gpu", None)


def test_rank_correlation_shares_ranks_between_ties_and_is_undefined_for_constants() -> None:
    first, second = torch.tensor([1.0, 2.0, 2.0, 5.0]).numpy(), torch.tensor([1.0, 3.0, 4.0, 9.0]).numpy()
    assert spearman(first, second) == pytest.approx(0.9486833)  # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert spearman(first, -second) == pytest.approx(-0.9486833)
    assert spearman(first, 0 * second) != spearman(first, 0 * second)


def test_a_scale_without_a_preset_is_named() -> None:
    with pytest.raises(ValueError, match="skipnet has no preset at scale 'huge'"):
        preset_at("skipnet", "huge")


@pytest.mark.ray
def test_skipnets_cheapest_claims_run_on_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preset_at = skipnet_claims.preset_at
    tiny = {"depth": 8, "report_every": 2, "stage1": {"iterations": 4, "batch": 16}}
    monkeypatch.setattr(skipnet_claims, "preset_at", lambda *names: merge(preset_at(*names), tiny))
    chosen = [claim for claim in load_claims("skipnet", "cpu", None) if claim.id in ("S2", "S4")]
    monkeypatch.setattr(command, "load_claims", lambda method, scale, data: chosen)
    with local_ray():
        rows = {row["id"]: row for row in command.main(["skipnet", "--seeds", "1", "--out", str(tmp_path / "out")])}
    assert rows["S4"]["verdict"] == "holds"
    assert 0 <= rows["S2"]["measured"]["ff_skipped_share"]["mean"] <= 1
    assert rows["S2"]["verdict"] in ("holds", "does not hold")
    assert (tmp_path / "out" / "runs" / "skipnet" / "sp_ff-seed0" / "summary.json").is_file()


def test_a_figure_that_is_undefined_for_a_seed_is_given_as_undefined() -> None:
    assert spread([0.5, math.nan, 0.7]) == {"mean": None, "sd": None, "median": None, "values": [0.5, None, 0.7]}
