"""HRS, PP-HRS and top-k accuracy: hand cases, properties, published values, bad input (spec 2.3, 6, 10)."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.metrics.robustness import (
    Member,
    family_scores,
    harmonic_robustness_score,
    per_parameter_hrs,
    topk_accuracy,
)
from ray_jobs.claims import HOLDS, Claim, Verdict
from ray_jobs.claims.robustness_published import table_claims
from ray_jobs.claims.robustness_tables import DATASETS, EFFICIENTNET, FAMILIES

CLAIMS = table_claims()
ROWS = [
    (data, name, row)
    for data, table in {"EfficientNet": EFFICIENTNET, **DATASETS}.items()
    for name, row in table.items()
]
SIZED = [(family, name) for family, members in FAMILIES.items() for name in members]
percent = st.floats(0, 100).filter(lambda value: value == 0 or value > 1)


def test_the_score_is_the_harmonic_mean() -> None:
    assert harmonic_robustness_score(90, 30) == pytest.approx(45)
    assert harmonic_robustness_score(80, 80) == pytest.approx(80)
    assert harmonic_robustness_score(90, 0) == 0
    assert harmonic_robustness_score(0, 0) == 0


@settings(deadline=None)
@given(percent, percent)
def test_the_score_is_symmetric_and_between_once_and_twice_the_smaller_accuracy(clean: float, pgd: float) -> None:
    score = harmonic_robustness_score(clean, pgd)
    assert score == pytest.approx(harmonic_robustness_score(pgd, clean))
    assert min(clean, pgd) - 1e-9 <= score <= 2 * min(clean, pgd) + 1e-9


def test_there_are_42_published_scores_and_19_per_parameter() -> None:
    assert len(ROWS) == 42 and len(SIZED) == 19 and len(FAMILIES) == 5


@pytest.mark.parametrize(("data", "name", "row"), ROWS, ids=[f"{data}-{name}" for data, name, _ in ROWS])
def test_a_published_score_follows_from_its_row(data: str, name: str, row: object) -> None:
    assert harmonic_robustness_score(row.clean, row.pgd) == pytest.approx(row.hrs, abs=0.012)


@pytest.mark.parametrize(("family", "name"), SIZED)
def test_a_published_score_per_parameter_follows_from_its_family(family: str, name: str) -> None:
    rows = FAMILIES[family]
    members = {key: Member(row.params_m, harmonic_robustness_score(row.clean, row.pgd)) for key, row in rows.items()}
    scores = family_scores(members)
    assert scores.baseline == next(iter(rows))  # the smallest
    assert scores.pp_hrs[name] == pytest.approx(rows[name].pp_hrs, abs=0.012)


def test_the_baseline_keeps_its_score_and_others_fall_as_one_over_their_size() -> None:
    family = {"large": Member(20.0, 30.0), "small": Member(5.0, 30.0), "medium": Member(10.0, 30.0)}
    scores = family_scores(family)
    assert scores.baseline == "small" and scores.note == ""
    assert scores.pp_hrs == {"large": 7.5, "small": 30.0, "medium": 15.0}
    assert family_scores(family, "medium").pp_hrs == {"large": 15.0, "small": 60.0, "medium": 30.0}


def test_a_family_of_one_keeps_its_score_and_says_so() -> None:
    scores = family_scores({"only": Member(5.0, 30.0)})
    assert scores.pp_hrs == {"only": 30.0} and "single member" in scores.note


@pytest.mark.parametrize(("clean", "pgd"), [(-1, 50), (50, 101), (float("nan"), 50)])
def test_accuracies_that_are_no_percentages_are_refused(clean: float, pgd: float) -> None:
    with pytest.raises(ValueError, match="percentage from 0 to 100"):
        harmonic_robustness_score(clean, pgd)


def test_accuracies_that_look_like_fractions_give_a_warning() -> None:
    with pytest.warns(UserWarning, match="percentages"):
        harmonic_robustness_score(0.9, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        harmonic_robustness_score(90.0, 0.3)
        harmonic_robustness_score(0.0, 0.0)


@pytest.mark.parametrize(("params", "baseline"), [(0.0, 5.0), (-1.0, 5.0), (5.0, 0.0), (float("nan"), 5.0)])
def test_parameters_that_are_not_positive_are_refused(params: float, baseline: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        per_parameter_hrs(30.0, params, baseline)


def test_a_family_without_its_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="'B0' is not in the family: B1, B2"):
        family_scores({"B1": Member(7.8, 10.0), "B2": Member(9.1, 20.0)}, "B0")
    with pytest.raises(ValueError, match="at least one member"):
        family_scores({})


def test_top_k_accuracy_counts_the_k_largest_logits() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [1.0, 3.0, 2.0]])
    y = torch.tensor([0, 0, 0, 0])
    assert [topk_accuracy(logits, y, k) for k in (1, 2, 3)] == [25.0, 50.0, 100.0]


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_classes_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 3"):
        topk_accuracy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), k)


def test_the_accuracy_of_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 image"):
        topk_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 1)


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.id for claim in CLAIMS])
def test_the_published_tables_bear_a_claim_out(claim: Claim) -> None:
    """Claims 1 to 13 of spec section 6; T0 is section 8, item 3."""
    figures = {name: [value] for name, value in claim.measure({}).items()}
    assert Verdict(claim, figures).status == HOLDS


def test_densenet169_is_below_the_best_searched_network_under_pgd_on_flowers() -> None:
    """The source's text says the opposite (spec section 6, claim 5)."""
    claim = next(claim for claim in CLAIMS if claim.id == "T5")
    assert claim.measure({})["densenet169_pgd_lead"] == pytest.approx(18.56 - 19.29)
