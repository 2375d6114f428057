"""Scores of the trade-off between clean accuracy and robustness: HRS, and PP-HRS within a family of sizes.

Source: spec nas_adversarial_robustness section 2.3, equations 4.1 and 4.2. All accuracies are percentages.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


def topk_correct(logits: Tensor, y: Tensor, k: int) -> Tensor:
    """Whether the true label is among the k largest logits: (B, K), int64 (B,) -> bool (B,).

    Raises:
        ValueError: k outside 1 to K.
    """
    classes = logits.shape[1]
    if not 1 <= k <= classes:
        raise ValueError(f"k = {k} must be from 1 to {classes}, the number of classes")
    return (logits.topk(k, dim=1).indices == y[:, None]).any(1)


def topk_accuracy(logits: Tensor, y: Tensor, k: int) -> float:
    """Percentage of images whose true label is among the k largest logits.

    Args:
        logits: (B, K).
        y: int64 (B,).

    Raises:
        ValueError: k outside 1 to K, or no images.
    """
    if not len(y):
        raise ValueError("an accuracy needs at least 1 image")
    return 100 * float(topk_correct(logits, y, k).double().mean())


def harmonic_robustness_score(clean_pct: float, pgd_pct: float) -> float:
    """HRS = 2 C P / (C + P), eq. 4.1; 0 where both are 0.

    Args:
        clean_pct, pgd_pct: accuracy on clean and on PGD images, percent.

    Raises:
        ValueError: a value outside 0 to 100.
    """
    for name, value in (("clean", clean_pct), ("PGD", pgd_pct)):
        if not 0 <= value <= 100:
            raise ValueError(f"{name} accuracy = {value} must be a percentage from 0 to 100")
    total = clean_pct + pgd_pct
    if 0 < max(clean_pct, pgd_pct) <= 1:
        warnings.warn(
            f"accuracies {clean_pct:g} and {pgd_pct:g} look like fractions; the score takes percentages", stacklevel=2
        )
    return 2 * clean_pct * pgd_pct / total if total else 0.0


def per_parameter_hrs(hrs: float, params_m: float, baseline_params_m: float) -> float:
    """PP-HRS = HRS p_b / p, eq. 4.2.

    Args:
        hrs: of a member of a family, percent.
        params_m, baseline_params_m: its parameters and the baseline's, both in millions.

    Raises:
        ValueError: a parameter count that is not positive.
    """
    if not params_m > 0 or not baseline_params_m > 0:
        raise ValueError(f"parameters must be above 0 million, got {params_m} with a baseline of {baseline_params_m}")
    return hrs * baseline_params_m / params_m


@dataclass(frozen=True)
class Member:
    """A network of a family: millions of parameters, and HRS in percent."""

    params_m: float
    hrs: float


@dataclass(frozen=True)
class FamilyScores:
    """PP-HRS of a family's members by name, the member that they are relative to, and a remark."""

    baseline: str
    pp_hrs: dict[str, float]
    note: str = ""


def family_scores(family: Mapping[str, Member], baseline: str | None = None) -> FamilyScores:
    """PP-HRS of every member against `baseline`, by default the smallest member.

    Raises:
        ValueError: an empty family, a baseline that is not a member, or a parameter count that is not positive.
    """
    if not family:
        raise ValueError("a family needs at least one member")
    baseline = min(family, key=lambda name: family[name].params_m) if baseline is None else baseline
    if baseline not in family:
        raise ValueError(f"baseline {baseline!r} is not in the family: {', '.join(family)}")
    base = family[baseline].params_m
    scores = {name: per_parameter_hrs(member.hrs, member.params_m, base) for name, member in family.items()}
    return FamilyScores(baseline, scores, "a single member: PP-HRS is HRS" if len(family) == 1 else "")
