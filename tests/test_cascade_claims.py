"""The claims of IDK cascades: a plan that holds together, and the cheapest of them for real."""

from pathlib import Path
from typing import Any

import pytest

from dataeff.cascades.idk.experiment import IdkConfig
from dataeff.core.config import merge, parse_config
from dataeff.core.registry import get_method
from ray_jobs.claims import HOLDS, Claim, load_claims, plan
from ray_jobs.claims.__main__ import Job, judge, train_job
from ray_jobs.sweep import read_sweep
from ray_jobs.tune import parse_space


def claim(id: str) -> Claim:
    return next(found for found in load_claims("idk", "cpu", None) if found.id == id)


def test_every_ordering_of_the_spec_is_in_the_table_with_its_published_figure() -> None:
    for scale, data in (("cpu", None), ("gpu", "digits")):
        found = load_claims("idk", scale, data)
        assert {f"I{number}" for number in range(1, 13)} <= {one.id for one in found}
        assert all(one.published and (one.checks or one.untestable) for one in found)
    with pytest.raises(ValueError, match="--data parquet:DIR"):
        load_claims("idk", "gpu", None)


def test_every_run_of_the_claims_has_valid_settings_and_comes_after_its_networks() -> None:
    runs = plan(load_claims("idk", "cpu", None))
    for run in runs:
        schema = get_method(run.method or "idk").config_schema
        stages = {} if run.method else {"stages": ["fast", "mid", "accurate"]}
        parse_config(schema, merge(run.settings, stages), run.name)
    assert [run.name for run in runs[:3]] == ["fast", "mid", "accurate"]


def test_the_shipped_sweep_searches_settings_that_exist() -> None:
    sweep = read_sweep("idk_lambda", "idk")
    base: dict[str, Any] = {"stages": ["a", "b", "c"]}
    space = parse_space(IdkConfig, sweep.space, base, "idk_lambda")
    assert space.keys() == {"order", "kind", "cost_weight", "eps"}
    for changes in sweep.references.values():
        parse_config(IdkConfig, base | changes)
    with pytest.raises(ValueError, match="order = '1-3'"):
        parse_space(IdkConfig, sweep.space, {"stages": ["a", "b"]}, "idk_lambda")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cascade_is_as_accurate_as_the_accurate_model_at_lower_cost(tmp_path: Path) -> None:
    """I1 in this process, one seed; test_cascade_digits.py has the orderings over several."""
    chosen = claim("I1")
    for run in plan([chosen]):
        job = Job("idk", run, 0, tmp_path / "idk" / f"{run.name}-seed0")
        train_job(job.trains, run.data, job.folder, job.settings(), "cpu")
    verdict = judge(chosen, tmp_path / "idk", 1, {})
    assert verdict.status == HOLDS, verdict.reasons
