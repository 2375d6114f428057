"""AdaSkips' claims: the plan of runs, the table that needs no training, and the cheapest trained claim for real."""

from pathlib import Path
from typing import Any

import pytest

from dataeff.core.config import merge, parse_config, read_yaml
from dataeff.core.registry import get_method
from dataeff.core.run import train
from ray_jobs.claims import Result, load_claims, plan
from ray_jobs.claims import adaskips as adaskips_claims
from ray_jobs.cli import CONFIGS
from ray_jobs.sweep import SWEEPS, read_sweep


@pytest.mark.parametrize("method", ["adaskips", "adaskips_zsda"])
@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_no_two_runs_have_the_same_settings_and_every_one_is_valid(method: str, scale: str) -> None:
    runs = plan(load_claims(method, scale, "digits?size=32&channels=3&seed=1" if scale == "gpu" else None))
    seen = [(run.data, run.settings, [earlier.name for earlier in run.after]) for run in runs]
    assert runs and all(first not in seen[:position] for position, first in enumerate(seen))
    for run in runs:
        needs_weights = {"weights": "x"} if run.after else {}
        parse_config(get_method(method).config_schema, {**run.settings, **needs_weights}, run.name)


def test_every_statement_of_section_6_8_is_there() -> None:
    ids = {claim.id for claim in load_claims("adaskips", "cpu", None)}
    assert ids == {f"A{number}" for number in range(1, 13)}
    assert {claim.id for claim in load_claims("adaskips_zsda", "cpu", None)} == {"A4", "8-prior"}


@pytest.mark.parametrize("method", ["adaskips", "adaskips_zsda"])
def test_the_gpu_scale_asks_for_its_data(method: str) -> None:
    with pytest.raises(ValueError, match="give --data"):
        load_claims(method, "gpu", None)


@pytest.mark.parametrize("method", ["adaskips", "adaskips_zsda"])
def test_every_preset_is_valid(method: str) -> None:
    presets = sorted((CONFIGS / method).glob("*.yaml"))
    assert {"cpu", "gpu", "paper"} <= {path.stem for path in presets}
    for path in presets:
        parse_config(get_method(method).config_schema, read_yaml(path), str(path))


def test_the_ablation_sweep_is_valid_and_its_trials_share_the_pretraining() -> None:
    from dataeff.core.config import parse_space

    sweep = read_sweep("adaskips_ablation", "adaskips")
    assert (SWEEPS / "adaskips_ablation.yaml").is_file()
    base = merge(merge(read_yaml(CONFIGS / "adaskips" / "cpu.yaml"), sweep.set), {"weights": "somewhere"})
    schema = get_method("adaskips").config_schema
    assert {"skips", "module_bn", "skip_weights"} <= set(parse_space(schema, sweep.space, base, "sweep"))
    own = {key: value for key, value in base.items() if key != "weights"}
    parse_config(schema, merge(own, sweep.shared["weights"]))
    for settings in sweep.references.values():
        parse_config(schema, merge(own, settings))


@pytest.mark.slow
def test_a_claim_is_measured_from_runs_that_share_their_pretraining(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    preset_at = adaskips_claims.preset_at
    stage = {"iterations": 2, "batch": 16}
    tiny = {"widths": [4, 4, 8, 8], "report_every": 2, "pretraining": stage, "transfer": stage}
    monkeypatch.setattr(adaskips_claims, "preset_at", lambda method, scale: merge(preset_at(method, scale), tiny))
    (claim,) = [claim for claim in load_claims("adaskips", "cpu", None) if claim.id == "A7"]
    results: dict[str, Result] = {}
    for run in plan([claim]):
        settings: dict[str, Any] = merge(merge(run.settings, run.fill(results)), {"seed": 0})
        train("adaskips", run.data, tmp_path / run.name, settings, report=lambda row, total: None)
        results[run.name] = Result(tmp_path / run.name)
    assert set(results) == {"pretrained_shallow", "pretrained_deep", "hyper_shallow", "plain_deep"}
    figures = claim.measure(results)
    assert -1 <= figures["small_with_skips_over_large"] <= 1
    assert [row["stage"] for row in results["hyper_shallow"].rows] == [2.0]
