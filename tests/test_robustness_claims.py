"""The claims about attacks: which runs they put together, and what a hidden gradient would look like in them."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from dataeff.core.config import merge
from dataeff.nas.experiment_robustness import RobustnessConfig
from ray_jobs.claims import Claim, Result, Run, load_claims, plan

CLAIMS = {claim.id: claim for claim in load_claims("robustness", "cpu", "digits")}


def result(pgd: float, folder: str = "") -> Result:
    return cast(Result, SimpleNamespace(metrics={"test_pgd": pgd}, artifact=Path("/runs") / folder / "artifact"))


def transfers(claim: Claim) -> list[Run]:
    return [run for run in claim.runs if run.after]


def test_each_network_is_attacked_through_the_other() -> None:
    settings = []
    for run in transfers(CLAIMS["A4"]):
        filled = run.fill({earlier.name: result(50.0, earlier.name) for earlier in run.after})
        config = RobustnessConfig(**merge(run.settings, filled))
        assert list(config.attack_list()) == ["pgd"], "nothing else is attacked again"
        settings.append((config.trained, config.surrogate))
    (attacked, other), swapped = settings
    assert attacked != other and swapped == (other, attacked)


def test_the_attacked_networks_are_trained_first() -> None:
    names = [run.name for run in plan([CLAIMS["A4"]])]
    for run in transfers(CLAIMS["A4"]):
        assert all(names.index(earlier.name) < names.index(run.name) for earlier in run.after)


@pytest.mark.parametrize(("through_the_other", "holds"), [(60.0, True), (49.5, True), (45.0, False)])
def test_a_network_fooled_more_often_through_another_hides_its_gradient(through_the_other: float, holds: bool) -> None:
    claim = CLAIMS["A4"]
    results = {run.name: result(60.0 if run.after else 50.0) for run in claim.runs}
    results[transfers(claim)[1].name] = result(through_the_other)
    figures = claim.measure(results)
    assert all(check.keeps(figures[check.figure]) for check in claim.checks) is holds
