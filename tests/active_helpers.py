"""Small active-learning runs for the tests."""

from pathlib import Path
from typing import Any

from dataeff.active.experiment import ActiveExperiment
from dataeff.active.settings import ActiveConfig
from dataeff.core.config import merge, parse_config
from dataeff.core.runtime import Runtime

DATA = "digits?labels=150&size=8"
TINY: dict[str, Any] = {
    "budget": 20,
    "cycles": 2,
    "test_images": 100,
    "classifier": {"encoder": {"width": 8, "proj_dim": 8}, "epochs": 4, "min_steps": 0, "augment": "shift"},
    "dbal": {"passes": 3},
    "vaal": {"epochs": 1, "batch": 32, "widths": [4, 4, 8, 8], "hidden": 8, "latent": 4},
    "simclr": {"epochs": 1, "batch": 64, "encoder": {"width": 4}},
    "vae": {"epochs": 1, "widths": [4, 4, 8, 8], "latent": 4},
    "rotation": {"epochs": 1, "encoder": {"width": 4}},
    "inpainting": {"epochs": 1, "widths": [4, 4, 8, 8], "latent": 4},
    "deepcluster": {"epochs": 1, "encoder": {"width": 4}},
    "scan": {
        "simclr": {"epochs": 1, "batch": 64, "encoder": {"width": 4}},
        "cluster": {"epochs": 1, "neighbours": 5},
        "selflabel": {"epochs": 0},
    },
}


def config(**changes: Any) -> ActiveConfig:
    return parse_config(ActiveConfig, merge(TINY, changes))


def experiment(data: str = DATA, **changes: Any) -> ActiveExperiment:
    return ActiveExperiment(config(**changes), data, Runtime("cpu"))


def run(data: str = DATA, **changes: Any) -> ActiveExperiment:
    """A finished run."""
    found = experiment(data, **changes)
    finish(found)
    return found


def finish(found: ActiveExperiment) -> list[dict[str, float]]:
    rows = []
    while found.steps_done < found.total_steps:
        rows.append(found.step())
    return rows


def asked(found: ActiveExperiment) -> list[list[int]]:
    return [batch.tolist() for batch in found.batches]


def answer_csv(path: Path, labels: dict[str, str]) -> None:
    """Fill in the column `label` of a request."""
    header, *rows = path.read_text().splitlines()
    names = [row.rsplit(",", 1)[0] for row in rows]
    path.write_text("\n".join([header, *(f"{name},{labels[name]}" for name in names)]) + "\n")
