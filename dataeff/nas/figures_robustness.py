"""The robustness study over many networks: its table, and figures 4.1, 4.3 and 4.4 as pictures beside their data.

Source: spec nas_adversarial_robustness sections 2.3, 2.6 and 8.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataeff.core.plots import new_figure
from dataeff.core.run import replace_text
from dataeff.metrics.robustness import Member, family_scores, harmonic_robustness_score
from dataeff.nas.zoo import FAMILIES

STUDY = "robustness.json"
COLOURS = {"hand-crafted": "tab:blue", "NAS": "tab:red", "scaled": "tab:green", "random cells": "tab:orange"}
SHOWN = ("clean", "fgsm", "ffgsm", "pgd", "apgd")
RESAMPLES = 2000

Row = dict[str, Any]


def write_study(reports: Sequence[Path], directory: Path) -> None:
    """`robustness.json` (rows, PP-HRS of families, the best of each data set) and three pictures; nothing without
    reports that hold PGD.

    Args:
        reports: `report.json` of finished runs; those of one network, data set and budget are repeats.
    """
    loaded = [json.loads(path.read_text(encoding="utf-8")) for path in reports]
    rows = table([values for values in loaded if values["report"]["hrs"] is not None])
    if not rows:
        return
    directory.mkdir(parents=True, exist_ok=True)
    found = {"rows": rows, "families": families(rows), "best": best(rows)}
    replace_text(directory / STUDY, json.dumps(found, indent=2) + "\n")
    plot_bubbles(rows, directory / "robustness_clean_pgd.png")
    plot_panels(rows, directory / "robustness_by_data.png")
    plot_families(rows, directory / "robustness_params.png")


def table(reports: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for each data set and network, best HRS first: means and standard deviations over repeats, percent.

    `hrs_interval` is the middle 95 % of a bootstrap over images, of all repeats together.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for values in reports:
        groups.setdefault((values["data"], values["network"]), []).append(values)
    rows = [_row(data, network, repeats) for (data, network), repeats in groups.items()]
    return sorted(rows, key=lambda row: (row["data"], -row["hrs"]))


def _row(data: str, network: str, repeats: Sequence[Mapping[str, Any]]) -> Row:
    reports = [values["report"] for values in repeats]
    columns: dict[str, list[float]] = {
        "clean": [report["clean"] for report in reports],
        **{name: [report["per_attack"][name] for report in reports] for name in reports[0]["per_attack"]},
        "params_m": [report["params_m"] for report in reports],
        "hrs": [report["hrs"] for report in reports],
    }
    if reports[0]["topk"] > 1 and "apgd" in columns:  # its top-k accuracy is not on the scale of the others
        columns["apgd_top1"] = [report["top1"]["apgd"] for report in reports]
    images = sum(report["n"] for report in reports)
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    return {
        "data": data,
        "network": network,
        "group": repeats[0]["group"],
        **means,
        "sd": {name: float(np.std(values, ddof=1)) if len(values) > 1 else None for name, values in columns.items()},
        "hrs_interval": bootstrap_hrs(means["clean"], means["pgd"], images),
        "repeats": len(repeats),
        "n": images,
        "topk": reports[0]["topk"],
        "space": reports[0]["space"],
        "clamp_only": reports[0]["clamp_only"],
        "flags": sorted(
            {
                name
                for values in repeats
                for name, is_set in (values["report"]["flags"] | (values["masking"] or {})).items()
                if is_set
            }
        ),
    }


def bootstrap_hrs(clean: float, pgd: float, images: int) -> tuple[float, float]:
    """Middle 95 % of HRS when the images are drawn anew.

    Args:
        clean, pgd: percent. Images that are right under PGD are taken to be right without it.
    """
    shares = np.array([min(clean, pgd), max(clean - pgd, 0.0), 100 - max(clean, pgd)]) / 100
    draws = np.random.default_rng(0).multinomial(images, shares, RESAMPLES) * (100 / images)
    scores = [harmonic_robustness_score(right + fooled, right) for right, fooled, _ in draws]
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def families(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """PP-HRS of the families that have members in `rows`, for each data set. The baseline is the family's smallest
    network; where the rows lack it there is no score, and a note says so."""
    found = []
    for data in dict.fromkeys(row["data"] for row in rows):
        for family, names in FAMILIES.items():
            members = {row["network"]: row for row in rows if row["data"] == data and row["network"] in names}
            if not members:
                continue
            if len(members) > 1 and names[0] not in members:
                scores, note = {}, f"no PP-HRS: the baseline {names[0]} is not among the networks"
            else:
                scored = family_scores({name: Member(row["params_m"], row["hrs"]) for name, row in members.items()})
                scores, note = scored.pp_hrs, scored.note
            found.append({"data": data, "family": family, "pp_hrs": scores, "note": note})
    return found


def best(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The best network of each group on each data set, by clean accuracy and by HRS, which need not agree."""
    found = []
    for data, group in dict.fromkeys((row["data"], row["group"]) for row in rows):
        members = [row for row in rows if (row["data"], row["group"]) == (data, group)]
        leaders = {name: max(members, key=lambda row: row[name])["network"] for name in ("clean", "hrs")}
        found.append({"data": data, "group": group, **leaders})
    return found


def plot_bubbles(rows: Sequence[Row], path: Path) -> None:
    """Figure 4.1, a panel for each data set: clean accuracy against PGD, bubbles by parameters, colours by group."""
    data_sets = list(dict.fromkeys(row["data"] for row in rows))
    figure = new_figure(6.5 * len(data_sets), 4.5)
    largest = max(row["params_m"] for row in rows)
    for number, data in enumerate(data_sets):
        axes = figure.add_subplot(1, len(data_sets), number + 1)
        for group, colour in COLOURS.items():
            members = [row for row in rows if (row["data"], row["group"]) == (data, group)]
            places = [(row["clean"], row["pgd"]) for row in members]
            if not places:
                continue
            areas = [30 + 600 * row["params_m"] / largest for row in members]
            x, y = zip(*places, strict=True)
            axes.scatter(x, y, s=areas, c=colour, alpha=0.5, label=group)
        _name_points(axes, [row for row in rows if row["data"] == data])
        axes.set_title(_short(data), fontsize=9)
        axes.set_xlabel("clean accuracy, %")
        axes.set_ylabel("accuracy under PGD, %")
        axes.grid(alpha=0.3)
        legend = axes.legend(fontsize=8)
        for handle in legend.legend_handles:
            handle.set_sizes([40])  # type: ignore[union-attr]
    figure.savefig(path, dpi=120)


def _name_points(axes: Any, rows: Sequence[Row]) -> None:
    """Names in a column beside the panel, with a line to each point: points lie too close for names of their own."""
    ordered = sorted(rows, key=lambda row: -row["pgd"])
    for row, height in zip(ordered, np.linspace(0.97, 0.03, len(ordered)), strict=True):
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "linewidth": 0.6, "color": COLOURS[row["group"]], "alpha": 0.6}
        axes.annotate(
            row["network"],
            (row["clean"], row["pgd"]),
            (1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops=line,
        )


def plot_panels(rows: Sequence[Row], path: Path) -> None:
    """Figure 4.3: a panel for each data set, clean accuracy and that under each attack, the best with a diamond."""
    data_sets = list(dict.fromkeys(row["data"] for row in rows))
    figure = new_figure(9.0, 3.6 * len(data_sets))
    for number, data in enumerate(data_sets):
        axes = figure.add_subplot(len(data_sets), 1, number + 1)
        members = sorted(
            (row for row in rows if row["data"] == data), key=lambda row: list(COLOURS).index(row["group"])
        )
        names = [row["network"] for row in members]
        for attack in SHOWN:
            values = [row.get(attack, np.nan) for row in members]
            if np.isnan(values).all():
                continue
            (line,) = axes.plot(names, values, "o-", label=attack, markersize=4, linewidth=1)
            top = int(np.nanargmax(values))
            axes.plot([names[top]], [values[top]], "D", color=line.get_color(), markersize=9)
        axes.set_title(_short(data), fontsize=9)
        axes.set_ylabel("accuracy, %")
        axes.tick_params(axis="x", labelrotation=30, labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_families(rows: Sequence[Row], path: Path) -> None:
    """Figure 4.4, a panel for each data set: accuracy under PGD against parameters, a line for each family."""
    data_sets = list(dict.fromkeys(row["data"] for row in rows))
    figure = new_figure(6.5 * len(data_sets), 4.5)
    for number, data in enumerate(data_sets):
        axes = figure.add_subplot(1, len(data_sets), number + 1)
        for family, names in FAMILIES.items():
            members = [row for row in rows if row["data"] == data and row["network"] in names]
            points = sorted((row["params_m"], row["pgd"]) for row in members)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=family)
        axes.set_title(_short(data), fontsize=9)
        axes.set_xscale("log")
        axes.set_xlabel("parameters, millions")
        axes.set_ylabel("accuracy under PGD, %")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _short(data: str) -> str:
    """A data set's name without the folders above it."""
    source, _, options = data.partition("?")
    kind, _, place = source.partition(":")
    return f"{kind}{':' if place else ''}{Path(place).name if place else ''}{' ' if options else ''}{options}"
