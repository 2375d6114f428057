"""The comparison at equal multiply-adds: the static networks really cost what the dynamic ones spend."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dataeff.core.config import merge
from dataeff.core.registry import get_method
from dataeff.core.runtime import Runtime
from ray_jobs.claims import Claim, Result, load_claims, plan
from ray_jobs.claims.dynamic import TOLERANCE

CLAIMS = {claim.id: claim for claim in load_claims("dynamic", "cpu", "digits")}


def result(accuracy: float, macs: float) -> Result:
    metrics = {"test_accuracy": accuracy, "test_macs": macs, "test_reduction": 0.5}
    return cast(Result, SimpleNamespace(metrics=metrics))


def experiment(claim: Claim, position: int, changes: dict[str, Any]) -> Any:
    run = claim.runs[position]
    method = get_method(run.method)
    config = method.config_schema(**merge(run.settings, changes))
    return method(config, run.data, Runtime("cpu"))


@pytest.mark.parametrize("key", ["skipnet", "deepmoe_wide", "deepmoe_narrow"])
def test_a_static_network_is_the_narrowest_that_spends_at_least_as_much(key: str) -> None:
    claim = CLAIMS[key]
    full = experiment(claim, 0, {}).full_macs()
    static = claim.runs[1]
    dynamic = claim.runs[0]
    assert static.after == (dynamic,)
    for share in (0.5, 0.8):
        changes = dict(static.fill({dynamic.name: result(0.5, share * full)}))
        spent = experiment(claim, 1, changes).full_macs()
        assert share * full <= spent < 1.25 * share * full, "a step of one channel costs less than a quarter"


def test_the_static_networks_see_as_many_mini_batches() -> None:
    for key in ("skipnet", "deepmoe_wide", "deepmoe_narrow"):
        dynamic, static = CLAIMS[key].runs
        changes = dict(static.fill({dynamic.name: result(0.5, 2e5)}))
        ours, theirs = experiment(CLAIMS[key], 0, {}), experiment(CLAIMS[key], 1, changes)
        assert [sum(stage.iterations for stage in ours.stages)] == [stage.iterations for stage in theirs.stages]


def test_hydranets_static_arm_has_its_conditional_cost() -> None:
    ours, theirs = experiment(CLAIMS["hydranet"], 0, {}), experiment(CLAIMS["hydranet"], 1, {})
    conditional = ours.model.net.costs(8, 8).conditional(ours.config.k)
    assert theirs.model.net.costs(8, 8).total == pytest.approx(conditional, rel=0.05)


def test_a_less_accurate_dynamic_network_fails_its_claim() -> None:
    claim = CLAIMS["skipnet"]
    figures = claim.measure({"skipnet": result(0.70, 1e6), "skipnet_static": result(0.72, 1e6)})
    assert figures["more_accurate"] == pytest.approx(-0.02)
    assert not claim.checks[0].keeps(figures["more_accurate"])
    assert claim.checks[0].keeps(-TOLERANCE / 2)


def test_every_network_is_trained_once() -> None:
    names = [run.name for run in plan(CLAIMS.values())]
    assert sorted(names) == sorted(set(names))
    assert len(names) == 8
