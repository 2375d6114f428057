"""DeepMoE's claims: their bookkeeping, and the cheapest ones for real."""

import pytest

from dataeff.core.config import parse_config
from dataeff.core.registry import get_method
from dataeff.data import open_splits
from ray_jobs.claims import HOLDS, UNTESTABLE, Verdict, load_claims, plan


def verdict(id: str) -> Verdict:
    claim = next(claim for claim in load_claims("deepmoe", "cpu", None) if claim.id == id)
    assert not claim.runs
    found = Verdict(claim)
    for name, value in claim.measure({}).items():
        found.figures[name] = [value]
    return found


@pytest.mark.parametrize("id", ["D14", "T3.4"])
def test_the_counted_claims_hold(id: str) -> None:
    assert verdict(id).status == HOLDS


def test_every_ordering_of_the_spec_is_a_claim_at_both_scales() -> None:
    wanted = {f"D{number}" for number in range(1, 15)} - {"D6"}  # D6 on CIFAR is D5
    for scale, data in (("cpu", None), ("gpu", "digits")):
        found = load_claims("deepmoe", scale, data)
        assert wanted <= {claim.id for claim in found}
        assert len(plan(found)) == len({run.name for run in plan(found)})


def test_what_did_not_appear_on_a_cpu_is_not_asserted_there() -> None:
    assert verdict("D8").status == UNTESTABLE
    d1 = next(claim for claim in load_claims("deepmoe", "cpu", None) if claim.id == "D1")
    assert "must not be asserted" in d1.untestable


@pytest.mark.parametrize(("scale", "data"), [("cpu", None), ("gpu", "digits")])
def test_the_settings_of_every_run_are_valid(scale: str, data: str | None) -> None:
    for run in plan(load_claims("deepmoe", scale, data)):
        parse_config(get_method(run.method or "deepmoe").config_schema, dict(run.settings), run.name)


def test_segmentation_is_measured_at_both_points_against_the_static_networks() -> None:
    found = {claim.id: claim for claim in load_claims("deepmoe", "cpu", None)}
    for id, static in (("D11", "segmentation_base"), ("D12", "segmentation_wide_base")):
        claim = found[id]
        assert not claim.untestable and {run.method for run in claim.runs} == {"deepmoe_segmentation"}
        assert static in {run.name for run in claim.runs} and {run.data for run in claim.runs} == {"shapes?size=32"}


def test_the_pilot_s_size_of_the_training_split_is_kept() -> None:
    run = next(run for run in plan(load_claims("deepmoe", "cpu", None)) if run.name == "base")
    splits = open_splits(run.data)
    assert abs(len(splits.train) - 900) < 20 and len(splits.val) > 300


def test_the_gpu_scale_needs_data() -> None:
    with pytest.raises(ValueError, match="needs CIFAR10"):
        load_claims("deepmoe", "gpu", None)
