"""The report page."""

import json
from pathlib import Path

import pytest

import dataeff
from ray_jobs import report

TINY = {
    "depth": 8, "widths": [4, 8, 16], "augment": "none", "report_every": 2,
    "stage1": {"iterations": 2, "batch": 16}, "stage2": {"iterations": 2, "batch": 16},
}  # fmt: skip


def test_the_page_shows_runs_sweeps_and_claims_and_needs_no_other_file(tmp_path: Path) -> None:
    for name, arm in (("first <run>", "sp"), ("second", "hrl_sp")):
        dataeff.train("skipnet", "digits", tmp_path / name, {**TINY, "arm": arm}, report=lambda row, total: None)
    front = {
        "objectives": {"val_accuracy": "maximize", "val_macs": "minimize"},
        "references": {"base": {"val_accuracy": 0.9, "val_macs": 123456.0}},
        "trials": [
            {"number": 0, "state": "complete", "params": {"alpha": 0.5}, "values": {"val_accuracy": 0.876}}
            | {"pareto": True}
        ],
        "chosen": 0,
        "artifact": None,
    }
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "front.json").write_text(json.dumps(front))
    measured = {"skipped": {"mean": 0.0671, "sd": 0.01, "median": 0.07, "values": [0.07]}}
    claim = {"id": "S2", "claim": "costs less", "published": "less", "measured": measured, "verdict": "does not hold"}
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "claims.json").write_text(json.dumps({"claims": [claim]}))
    page = report.main([str(tmp_path)]).read_text()
    expected_texts = (
        "first &lt;run&gt;", "second", "0.876", "123,456", "does not hold", "skipped 0.0671 ± 0.01",
        "data:image/png;base64,",
    )  # fmt: skip
    for expected in expected_texts:
        assert expected in page
    assert "<run>" not in page and "http" not in page


def test_trials_are_not_listed_as_runs_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "sweep" / "trials" / "0000").mkdir(parents=True)
    (tmp_path / "sweep" / "front.json").write_text("{}")
    (tmp_path / "sweep" / "trials" / "0000" / "summary.json").write_text("{}")
    assert report.find([tmp_path]) == ([], [tmp_path / "sweep"], [])


def test_a_missing_folder_and_an_empty_one_are_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="did you mean 'runs'"):
        report.main([str(tmp_path / "rums")])
    with pytest.raises(ValueError, match="nothing to report"):
        report.main([str(tmp_path / "runs")])
