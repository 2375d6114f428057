"""Published claims as experiments that can fail: what a claim is, which runs it needs, and how it is judged.

A method's claims live in the module of its name here, as a function `claims(scale, data) -> list[Claim]`; those that
compare methods of a family in one of the family's name.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from dataeff.core.config import merge, nearest, read_yaml
from dataeff.core.run import METRICS, SUMMARY, read_rows
from ray_jobs.cli import CONFIGS

CLAIMS = {
    "active": "ray_jobs.claims.active",
    "adaskips": "ray_jobs.claims.adaskips",
    "adaskips_zsda": "ray_jobs.claims.adaskips_zsda",
    "deepmoe": "ray_jobs.claims.deepmoe",
    "dynamic": "ray_jobs.claims.dynamic",
    "hydranet": "ray_jobs.claims.hydranet",
    "idk": "ray_jobs.claims.idk",
    "nas_search": "ray_jobs.claims.nas",
    "pruning": "ray_jobs.claims.pruning",
    "robustness": "ray_jobs.claims.robustness",
    "skipnet": "ray_jobs.claims.skipnet",
}
HOLDS, FAILS, UNTESTABLE, UNMEASURED = "holds", "does not hold", "not testable at this scale", "not measured"


@dataclass(frozen=True)
class Result:
    """What a finished run left in its folder."""

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        return loaded

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics on the test split, named test_*."""
        metrics: dict[str, float] = self.summary["metrics"]
        return metrics

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder / METRICS)

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    @property
    def log(self) -> str:
        """Progress and warnings of the run, those before a resume included."""
        return log_file(self.folder).read_text(encoding="utf-8")


Results = Mapping[str, Result]


def data_at(scale: str, data: str | None, default: str, large: str = "CIFAR10") -> str:
    """The data that a method's claims are measured on: what the user gave, or `default` at scale "cpu".

    Raises:
        ValueError: scale "gpu" without data; `large` is torchvision's name of what it needs.
    """
    if scale == "gpu" and data is None:
        raise ValueError(f"--scale gpu needs {large}: give --data parquet:DIR or --data torchvision:{large}?root=DIR")
    return data or default


def preset_at(method: str, scale: str) -> dict[str, Any]:
    """Settings that a method's claims at a scale begin with; at scale "cpu" the smallest preset that it has.

    Raises:
        ValueError: it has none at this scale.
    """
    names = ("claims_cpu", "digits", "cpu") if scale == "cpu" else (scale,)
    files = [file for name in names if (file := CONFIGS / method / f"{name}.yaml").is_file()]
    if not files:
        raise ValueError(f"{method} has no preset at scale {scale!r}")
    return read_yaml(files[0])


def log_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".log")


@dataclass(frozen=True, eq=False)
class Run:
    """One training run, once a seed, shared by all claims that name it.

    Args:
        name: of its folder, unique among a method's claims.
        data: the data set's name.
        settings: what differs from the method's defaults, without the seed.
        after: runs of the same seed that must have ended before.
        fill: further settings, from the results of the runs in `after`.
        method: that is trained; empty for the one whose claims name the run.
    """

    name: str
    data: str
    settings: Mapping[str, Any]
    after: tuple["Run", ...] = ()
    fill: Callable[[Results], Mapping[str, Any]] = lambda results: {}
    method: str = ""


class Arms:
    """Runs of one preset on one data set; each is made once, so that claims share it."""

    def __init__(self, preset: Mapping[str, Any], data: str) -> None:
        self.preset, self.data = preset, data
        self.made: dict[str, Run] = {}

    def run(self, name: str, **changes: Any) -> Run:
        return self.made.setdefault(name, Run(name, self.data, merge(self.preset, changes)))


@dataclass(frozen=True)
class Check:
    """A bound that a measured figure must keep over seeds; NaN keeps none."""

    figure: str
    at_least: float = -math.inf
    at_most: float = math.inf

    def margin(self, value: float) -> float:
        """How far inside the bounds `value` is; negative outside."""
        return min(value - self.at_least, self.at_most - value)

    def keeps(self, value: float) -> bool:
        return self.margin(value) >= 0

    def sentence(self, value: float, over_seeds: str) -> str:
        bounds = [
            f"{words} {bound:g}"
            for words, bound in (("at least", self.at_least), ("at most", self.at_most))
            if math.isfinite(bound)
        ]
        required = " and ".join(bounds)
        return f"{self.figure}: {over_seeds} {value:.4g}, required {required}, margin {self.margin(value):.3g}"


@dataclass(frozen=True)
class Claim:
    """A published statement and the measurement that decides whether it holds here.

    Args:
        id: as in the method's spec.
        text: the statement.
        published: the figure that its source gives.
        runs: what `measure` needs, besides the runs those come after.
        measure: figures of one seed, from the results of its runs by name.
        checks: all must be kept for the claim to hold; figures without a check are reported only.
        untestable: why this scale cannot decide the claim; its figures are reported all the same.
        over_seeds: which figure over seeds is judged, as the method's spec says.
    """

    id: str
    text: str
    published: str
    runs: tuple[Run, ...] = ()
    measure: Callable[[Results], Mapping[str, float]] = lambda results: {}
    checks: tuple[Check, ...] = ()
    untestable: str = ""
    over_seeds: Literal["median", "mean"] = "median"


@dataclass
class Verdict:
    """A claim's outcome over seeds; `figures` has one value a measured seed."""

    claim: Claim
    figures: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""

    @property
    def judged(self) -> dict[str, float]:
        """The figures over seeds that the checks are about."""
        average = statistics.fmean if self.claim.over_seeds == "mean" else statistics.median
        return {name: float(average(values)) for name, values in self.figures.items()}

    @property
    def status(self) -> str:
        if self.claim.untestable:
            return UNTESTABLE
        if self.error:
            return UNMEASURED
        return HOLDS if all(check.keeps(self.judged[check.figure]) for check in self.claim.checks) else FAILS

    @property
    def reasons(self) -> list[str]:
        """Why: one sentence a check, or what stood in the way."""
        if self.claim.untestable:
            return [self.claim.untestable]
        if self.error:
            return [self.error]
        return [check.sentence(self.judged[check.figure], self.claim.over_seeds) for check in self.claim.checks]

    def to_dict(self, method: str) -> dict[str, Any]:
        return {
            "method": method,
            "id": self.claim.id,
            "claim": self.claim.text,
            "published": self.claim.published,
            "verdict": self.status,
            "reasons": self.reasons,
            "measured": {name: spread(values) for name, values in self.figures.items()},
            "runs": [run.name for run in self.claim.runs],
        }


def by_mean(claims: Iterable[Claim]) -> list[Claim]:
    """The claims of a spec that judges means over seeds."""
    return [replace(claim, over_seeds="mean") for claim in claims]


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value), median and the values; None where not a number."""
    listed = [_finite(value) for value in values]
    if None in listed:  # such as the correlation with a quantity that does not vary
        return {"mean": None, "sd": None, "median": None, "values": listed}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "median": statistics.median(values), "values": listed}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def load_claims(method: str, scale: str, data: str | None) -> list[Claim]:
    """The claims of a method at a scale.

    Raises:
        ValueError: the method has no claims, or the scale needs data that is not given.
    """
    if method not in CLAIMS:
        raise ValueError(f"no claims for {method!r} ({nearest(method, CLAIMS)})")
    found: list[Claim] = import_module(CLAIMS[method]).claims(scale, data)
    return found


def plan(claims: Iterable[Claim]) -> list[Run]:
    """Every run that the claims need, once, each behind those it comes after.

    Raises:
        ValueError: two different runs have one name.
    """
    ordered: dict[str, Run] = {}

    def add(run: Run) -> None:
        for earlier in run.after:
            add(earlier)
        if ordered.setdefault(run.name, run) is not run:
            raise ValueError(f"two different runs are named {run.name!r}")

    for claim in claims:
        for run in claim.runs:
            add(run)
    return list(ordered.values())
