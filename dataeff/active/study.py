"""What many runs say together: mean and deviation, paired differences, curves with bands (spec section 5)."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataeff.active.diagnostics import (
    area_under_curve,
    mean_and_std,
    paired_difference,
    plot_learning_curves,
    pool_overlap,
)
from dataeff.core.run import METRICS, SUMMARY, read_rows, replace_text

BASELINE = "random"
ARM = ("pool", "query", "budget", "query_budget", "n_bins", "allocation")


@dataclass(frozen=True)
class Trial:
    """A finished run: what it was, and its test accuracy in each cycle."""

    settings: Mapping[str, Any]
    counts: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    pool: NDArray[np.int64]
    pool_size: int

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])


class Arm:
    """The runs of one combination of settings, by seed."""

    def __init__(self, settings: Mapping[str, Any], trials: Sequence[Trial]) -> None:
        self.settings = dict(settings)
        self.trials = {trial.seed: trial for trial in trials}
        first = trials[0]
        self.counts, self.shares = first.counts, first.counts / first.pool_size
        self.accuracy = np.stack([trial.accuracy for trial in self.trials.values()])
        self.areas = area_under_curve(self.counts, self.accuracy)

    def against(self, other: "Arm", cycle: int | None) -> str:
        """The paired difference to `other` over the seeds of both, in one cycle or, for None, of the areas."""
        seeds = sorted(self.trials.keys() & other.trials.keys())
        if not seeds or len(other.counts) != len(self.counts):
            return "no common runs"
        values = [
            [arm.trials[seed].accuracy[cycle] if cycle is not None else arm._area(seed) for seed in seeds]
            for arm in (self, other)
        ]
        return str(paired_difference(np.array(values[0]), np.array(values[1])))

    def _area(self, seed: int) -> float:
        return float(area_under_curve(self.counts, self.trials[seed].accuracy))


def write_study(runs: Sequence[Path], out: Path) -> None:
    """Write `study.json`, `study.csv`, `study.md` and a figure for each query and budget.

    A row is a combination of pool, query and budgets, over its seeds. Every pool is compared with the random pool under
    the same query, and every query with the random query on the same pool, seed by seed. With fewer than 2 seeds there
    is no deviation and no statement.

    Args:
        runs: folders of runs of `active`; unfinished ones are left out.
    """
    arms = _arms([read_trial(run) for run in runs if (run / SUMMARY).is_file()])
    if not arms:
        return
    rows = [_row(arm, arms) for arm in arms]
    overlaps = _overlaps(arms)
    replace_text(out / "study.json", json.dumps({"arms": rows, "pool_overlap": overlaps}, indent=1) + "\n")
    replace_text(out / "study.csv", _csv(rows))
    replace_text(out / "study.md", _markdown(rows, overlaps))
    for group in _groups(arms, "pool"):
        curves = {_pool_name(arm.settings): arm.accuracy for arm in group}
        query, budget = group[0].settings["query"], group[0].settings["budget"]
        plot_learning_curves(curves, group[0].shares, out / f"curves_{query}_{budget}.png", f"query {query}")


def read_trial(run: Path) -> Trial:
    """A finished run from its folder."""
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    record = json.loads((run / "active.json").read_text(encoding="utf-8"))
    rows = read_rows(run / METRICS)
    return Trial(
        summary["config"],
        np.array([row["n_labelled"] for row in rows]),
        np.array([row["test_accuracy"] for row in rows]),
        np.array(record["cycles"][0]["indices"], dtype=np.int64),
        int(record["pool_size"]),
    )


def _arms(trials: Sequence[Trial]) -> list[Arm]:
    """Trials that differ in nothing but the seed together; the longest curves count where lengths differ."""
    grouped: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        grouped.setdefault(tuple(trial.settings[name] for name in ARM), []).append(trial)
    arms = []
    for key, members in grouped.items():
        longest = max(len(trial.counts) for trial in members)
        arms.append(Arm(dict(zip(ARM, key, strict=True)), [t for t in members if len(t.counts) == longest]))
    return sorted(arms, key=lambda arm: [str(arm.settings[name]) for name in ("query", "budget", "pool", "n_bins")])


def _groups(arms: Sequence[Arm], varying: str) -> list[list[Arm]]:
    """Arms that differ in `varying` (and its options) alone, of one length."""
    options = {"pool": ("pool", "n_bins", "allocation"), "query": ("query",)}[varying]
    grouped: dict[tuple[Any, ...], list[Arm]] = {}
    for arm in arms:
        key = (len(arm.counts), *(arm.settings[name] for name in ARM if name not in options))
        grouped.setdefault(key, []).append(arm)
    return list(grouped.values())


def _baseline(arm: Arm, arms: Sequence[Arm], varying: str) -> Arm | None:
    """The arm with the random pool, or query, that `arm` is to be compared with; None for itself or without one."""
    group = next(group for group in _groups(arms, varying) if arm in group)
    found = next((other for other in group if other.settings[varying] == BASELINE), None)
    return None if found is arm else found


def _row(arm: Arm, arms: Sequence[Arm]) -> dict[str, Any]:
    mean, std = mean_and_std(arm.accuracy)
    area, area_std = mean_and_std(arm.areas)
    row: dict[str, Any] = {
        **arm.settings,
        "seeds": sorted(arm.trials),
        "labelled": arm.counts.tolist(),
        "accuracy": mean.tolist(),
        "accuracy_std": [_finite(value) for value in std],
        "area": float(area),
        "area_std": _finite(float(area_std)),
    }
    for varying in ("pool", "query"):
        other = _baseline(arm, arms, varying)
        if other is not None:
            for name, cycle in (("first", 0), ("last", -1), ("area", None)):
                row[f"against_random_{varying}_{name}"] = arm.against(other, cycle)
    return row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _overlaps(arms: Sequence[Arm]) -> dict[str, Any]:
    """Shares of images that initial pools of one size and seed have in common, a mean over seeds, beside chance."""
    found: dict[str, Any] = {}
    for budget in dict.fromkeys(arm.settings["budget"] for arm in arms):
        pools: dict[int, dict[str, NDArray[np.int64]]] = {}
        sizes = {}
        for arm in arms:
            for seed, trial in arm.trials.items():
                if arm.settings["budget"] == budget:
                    pools.setdefault(seed, {})[_pool_name(arm.settings)] = trial.pool
                    sizes[seed] = trial.pool_size
        names = set.intersection(*(set(named) for named in pools.values()))
        if len(names) < 2:
            continue
        ordered = sorted(names)
        each = [pool_overlap({name: pools[seed][name] for name in ordered}, sizes[seed]) for seed in pools]
        found[str(budget)] = {
            "pools": ordered,
            "shares": np.mean([overlap.shares for overlap in each], axis=0).tolist(),
            "chance": float(np.mean([overlap.chance for overlap in each])),
        }
    return found


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each cycle of each row."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*ARM, "seeds", "labelled", "accuracy", "std"])
    for row in rows:
        for count, mean, std in zip(row["labelled"], row["accuracy"], row["accuracy_std"], strict=True):
            table.writerow([*(row[name] for name in ARM), len(row["seeds"]), int(count), mean, std])
    return text.getvalue()


def _markdown(rows: Sequence[Mapping[str, Any]], overlaps: Mapping[str, Any]) -> str:
    """The tables for people. A difference is called significant only where p < 0.05 and it exceeds its deviation."""
    lines = ["# Active learning: pools and queries", ""]
    lines += ["| query | budget | pool | seeds | test accuracy by cycle (± std) | area |", "|---|---|---|---|---|---|"]
    for row in rows:
        pairs = zip(row["accuracy"], row["accuracy_std"], strict=True)
        curve = " ".join(f"{mean:.3f}" + (f"±{std:.3f}" if std is not None else "") for mean, std in pairs)
        area = f"{row['area']:.3f}" + (f"±{row['area_std']:.3f}" if row["area_std"] is not None else "")
        cells = [row["query"], row["budget"], _pool_name(row), len(row["seeds"]), curve, area]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for varying in ("pool", "query"):
        lines += ["", f"## Against the random {varying}, seed by seed", ""]
        lines += ["| query | pool | first cycle | last cycle | area |", "|---|---|---|---|---|"]
        for row in rows:
            if f"against_random_{varying}_area" in row:
                cells = [row[f"against_random_{varying}_{name}"] for name in ("first", "last", "area")]
                lines.append(f"| {row['query']} | {_pool_name(row)} | " + " | ".join(cells) + " |")
    for budget, table in overlaps.items():
        chance = f"{table['chance']:.3f}"
        lines += ["", f"## Overlap of the initial pools of {budget} images (independent random pools: {chance})", ""]
        lines += ["| | " + " | ".join(table["pools"]) + " |", "|---|" + "---|" * len(table["pools"])]
        for name, shares in zip(table["pools"], table["shares"], strict=True):
            lines.append(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    return "\n".join(lines) + "\n"


def _pool_name(row: Mapping[str, Any]) -> str:
    """The pool, with its options where they are not the usual ones."""
    bins = f", {row['n_bins']} bins" if row["n_bins"] > 1 else ""
    return f"{row['pool']}{bins}" + (", proportional" if row["allocation"] == "proportional" else "")
