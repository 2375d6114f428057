"""The comparison of dynamic networks with ACT, SACT, LCCL and static pruning: what it trains, and how it judges."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dataeff.core.config import merge, parse_config
from dataeff.core.registry import get_method
from dataeff.core.run import SUMMARY
from ray_jobs.claims import HOLDS, UNTESTABLE, Claim, Result, Verdict, load_claims, plan
from ray_jobs.claims.__main__ import Job


def result(folder: Path, accuracy: float, macs: float) -> Result:
    folder.mkdir()
    metrics = {"test_accuracy": accuracy, "test_macs": macs, "test_reduction": 1 - macs / 100}
    (folder / SUMMARY).write_text(json.dumps({"metrics": metrics}), encoding="utf-8")
    return Result(folder)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_every_run_is_a_valid_run_of_its_method(scale: str, tmp_path: Path) -> None:
    for run in plan(load_claims("pruning", scale, "digits")):
        filled: dict[str, Any] = {}
        if run.after:
            filled = dict(run.fill({run.after[0].name: result(tmp_path / run.name, 0.9, 10.0)}))
            assert filled == {"reduction": 0.75}  # 0.9 is beyond what inner channels can give
        job = Job("pruning", run, 0, tmp_path / "x")
        assert job.trains == run.method and job.label.startswith("pruning ")
        parse_config(get_method(run.method).config_schema, merge(run.settings, filled), run.name)


def claim(scale: str, identifier: str) -> Claim:
    return next(claim for claim in load_claims("pruning", scale, "digits") if claim.id == identifier)


def test_only_runs_of_a_like_cost_are_compared_and_the_best_of_them_counts(tmp_path: Path) -> None:
    s10 = claim("gpu", "S10")
    found = {run.name: result(tmp_path / run.name, 0.95, 90.0) for run in s10.runs}  # accurate, but expensive
    found["skipnet"] = result(tmp_path / "mine", 0.90, 50.0)
    found["act_tau0.1"] = result(tmp_path / "a", 0.88, 54.0)
    found["act_tau0.5"] = result(tmp_path / "b", 0.80, 30.0)
    figures = dict(s10.measure(found))
    assert figures["better_than_act_by"] == pytest.approx(0.02) and figures["act_reduction"] == pytest.approx(0.46)
    assert math.isnan(figures["better_than_sact_by"])
    verdict = Verdict(s10, {name: [value] for name, value in figures.items()})
    assert verdict.status != HOLDS  # no run of SACT is as cheap
    found["sact_tau0.5"] = result(tmp_path / "c", 0.89, 20.0)
    verdict = Verdict(s10, {name: [value] for name, value in s10.measure(found).items()})
    assert verdict.status == HOLDS


def test_at_cpu_scale_the_orders_are_reported_and_not_judged() -> None:
    assert {Verdict(claim).status for claim in load_claims("pruning", "cpu", None)} == {UNTESTABLE}
    with pytest.raises(ValueError, match="needs CIFAR10"):
        load_claims("pruning", "gpu", None)
