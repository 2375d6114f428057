"""DeepMoE's claims: their bookkeeping, and the cheapest ones for real."""

import pytest

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
    assert verdict("D11").status == UNTESTABLE
    d1 = next(claim for claim in load_claims("deepmoe", "cpu", None) if claim.id == "D1")
    assert "must not be asserted" in d1.untestable


def test_the_gpu_scale_needs_data() -> None:
    with pytest.raises(ValueError, match="needs CIFAR10"):
        load_claims("deepmoe", "gpu", None)
