"""python -m ray_jobs.report DIR...: one HTML page of runs, sweeps and claims: tables, curves, fronts, pictures."""

import argparse
import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataeff.core.config import nearest
from dataeff.core.plots import plot_scatter
from dataeff.core.registry import METHODS, get_method
from dataeff.core.run import SUMMARY, finished_runs, replace_text
from ray_jobs.cli import run_command
from ray_jobs.tune import FRONT

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:14px}
td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}tr.chosen{background:#eef6e8}img{max-width:100%;margin:.5em 0}
h2{margin-top:2em;border-bottom:2px solid #ddd}pre{background:#f6f6f6;padding:.8em;overflow-x:auto;font-size:12px}
"""
CAPTIONS = {
    "curves": "Metrics over the run's steps",
    "easy_hard": "Test images on which the fewest and the most blocks run (class: executed blocks)",
    "skip_ratios": "Share of test images that skip each block",
    "class_medians": "Median of skipped blocks by class",
    "input_scales": "Executed blocks by the scale of the input",
    "robustness_clean_pgd": "Accuracy on clean images against that under PGD; bubbles by parameters",
    "robustness_by_data": "Accuracy on clean images and under each attack; diamonds: the best",
    "robustness_params": "Accuracy under PGD against parameters, by family",
    "front": "Accuracy against multiply-adds of the trials",
}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Write the page and return its path."""
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run, a sweep, or a folder of them")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first folder)")
    parser.add_argument("--title", default="dataeff report")
    args = parser.parse_args(arguments)
    runs, sweeps, claims = find(args.folders)
    if not runs and not sweeps and not claims:
        raise ValueError(
            f"nothing to report in {', '.join(map(str, args.folders))}: no finished run, sweep or claims there"
        )
    out: Path = args.out or args.folders[0] / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    comparisons = compare(args.folders, out.parent)
    replace_text(out, page(args.title, runs, sweeps, claims, out.parent, comparisons))
    print(f"report: {out}")
    return out


def find(folders: Sequence[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """Folders of finished runs, of sweeps and of claims at or below `folders`; a sweep's trials are part of the sweep.

    Raises:
        FileNotFoundError: a folder is not there.
    """
    for folder in folders:
        if not folder.is_dir():
            siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise FileNotFoundError(
                f"{folder}: no such folder" + (f" ({nearest(folder.name, siblings)})" if siblings else "")
            )

    def having(name: str) -> list[Path]:
        return sorted({path.parent for folder in folders for path in folder.rglob(name)})

    sweeps, claims = having(FRONT), having("claims.json")
    inside = {*sweeps, *claims}
    runs = [run for run in having(SUMMARY) if not inside.intersection(run.parents)]
    return runs, sweeps, claims


def compare(folders: Sequence[Path], target: Path) -> list[Path]:
    """Let each method draw all its finished runs at or below `folders`, those of sweeps and claims included, together.

    Returns:
        Folders `comparison-METHOD` in `target`, of the methods that have something to draw.
    """
    methods = {_summary(path.parent)["method"] for folder in folders for path in folder.rglob(SUMMARY)}
    for method in sorted(methods & METHODS.keys()):
        get_method(method).compare(finished_runs(method, folders), target / f"comparison-{method}")
    return [path for path in sorted(target.glob("comparison-*")) if path.is_dir()]


def page(
    title: str,
    runs: Sequence[Path],
    sweeps: Sequence[Path],
    claims: Sequence[Path],
    folder: Path,
    comparisons: Sequence[Path] = (),
) -> str:
    """The whole page; pictures are part of it, so it can be sent as one file."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if runs:
        parts.append(_runs_section(runs, folder))
    parts += [_comparison_section(comparison) for comparison in comparisons]
    parts += [_sweep_section(sweep) for sweep in sweeps]
    parts += [_claims_section(claim) for claim in claims]
    parts += [_run_section(run) for run in runs]
    body = "\n".join(parts)
    return f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>\n{body}\n'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], chosen: int | None = None) -> str:
    """An HTML table; numbers are rounded, the row number `chosen` is marked."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    for number, row in enumerate(rows):
        mark = ' class="chosen"' if number == chosen else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(_cell(cell))}</td>" for cell in row) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def _summary(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    return loaded


def _runs_section(runs: Sequence[Path], folder: Path) -> str:
    summaries = [_summary(run) for run in runs]
    names = list(dict.fromkeys(key for summary in summaries for key in summary["metrics"]))
    rows = [
        [
            run.name,
            summary["method"],
            *(summary["metrics"].get(name) for name in names),
            summary["cost"]["params"],
            summary["seconds"],
        ]
        for run, summary in zip(runs, summaries, strict=True)
    ]
    found = "<h2>Runs</h2>" + table(
        ["run", "method", *(name.replace("_", " ") for name in names), "parameters", "seconds"], rows
    )
    points = {
        run.name: [(summary["cost"]["macs"], summary["metrics"]["test_accuracy"])]
        for run, summary in zip(runs, summaries, strict=True)
        if "test_accuracy" in summary["metrics"]
    }
    if len(points) > 1:
        picture = folder / "accuracy_cost.png"
        plot_scatter(points, picture, "multiply-adds an image", "test accuracy")
        found += _picture(picture, "Test accuracy against multiply-adds")
    return found


def _run_section(run: Path) -> str:
    summary = _summary(run)
    pictures = "".join(_picture(path, CAPTIONS.get(path.stem, path.stem)) for path in sorted(run.glob("*.png")))
    settings = html.escape(json.dumps(summary["config"], indent=1))
    return (
        f"<h2>Run {html.escape(run.name)}</h2><p>{html.escape(summary['method'])} on {html.escape(summary['data'])}</p>"
        f"{pictures}<details><summary>settings</summary><pre>{settings}</pre></details>"
    )


def _comparison_section(folder: Path) -> str:
    pictures = "".join(_picture(path, CAPTIONS.get(path.stem, path.stem)) for path in sorted(folder.glob("*.png")))
    return f"<h2>All runs of {html.escape(folder.name.removeprefix('comparison-'))}</h2>{pictures}"


def _sweep_section(sweep: Path) -> str:
    front = json.loads((sweep / FRONT).read_text(encoding="utf-8"))
    objectives = list(front["objectives"])
    params = list(dict.fromkeys(key for trial in front["trials"] for key in trial["params"]))
    rows: list[list[Any]] = [
        [
            f"trial {trial['number']}" + (" (Pareto)" if trial["pareto"] else ""),
            trial["state"],
            *(trial["params"].get(name) for name in params),
            *(trial["values"].get(name) for name in objectives),
        ]
        for trial in front["trials"]
    ]
    for reference, row in front["references"].items():
        rows.append([reference, "", *("" for _ in params), *(row.get(name) for name in objectives)])
    chosen = next((n for n, trial in enumerate(front["trials"]) if trial["number"] == front["chosen"]), None)
    picture = sweep / "front.png"
    return (
        f"<h2>Sweep {html.escape(sweep.name)}</h2>"
        + (_picture(picture, CAPTIONS["front"]) if picture.is_file() else "")
        + table(["", "state", *params, *objectives], rows, chosen)
        + "<p>The marked trial is the cheapest within the tolerance of the best reference.</p>"
    )


def _claims_section(folder: Path) -> str:
    claims = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
    rows = [
        [claim["id"], claim["claim"], claim["published"], _measured(claim["measured"]), claim["verdict"]]
        for claim in claims["claims"]
    ]
    return "<h2>Claims</h2>" + table(["", "claim", "published", "measured", "verdict"], rows)


def _measured(figures: dict[str, dict[str, Any]]) -> str:
    return "; ".join(
        f"{name} {_cell(figure['mean'])}" + (f" ± {_cell(figure['sd'])}" if figure["sd"] is not None else "")
        for name, figure in figures.items()
    )


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = html.escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


if __name__ == "__main__":
    run_command(main)
