"""The library works where Ray is not installed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import importlib, importlib.abc, pkgutil, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ImportError(f"{name} is hidden")
        return None

sys.meta_path.insert(0, Hidden())
try:
    import ray
except ImportError:
    pass
else:
    sys.exit("ray was not hidden")

import dataeff
names = [module.name for module in pkgutil.walk_packages(dataeff.__path__, "dataeff.")]
assert len(names) > 20, names
for name in names:
    importlib.import_module(name)

import PIL.Image
import torch

stage = {"iterations": 4, "batch": 16}
config = {
    "depth": 8, "widths": [4, 8, 16], "report_every": 2, "augment": "none", "stage1": stage, "stage2": stage,
}
summary = dataeff.train("skipnet", "digits", sys.argv[1], config)
assert "ray" not in sys.modules
predictor = dataeff.load(sys.argv[1] + "/artifact")
prediction = predictor.predict(predictor.preprocess([PIL.Image.new("L", (8, 8), shade) for shade in (0, 128)]))
assert prediction.probabilities.shape == (2, len(predictor.card.classes))
assert torch.allclose(prediction.probabilities.sum(1), torch.ones(2))
assert (prediction.macs > 0).all() and (prediction.macs <= predictor.card.cost["full_macs"]).all()
print("modules", len(names), "accuracy", summary["metrics"])
"""


def test_every_module_imports_and_a_network_trains_and_answers_without_ray(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("modules ")
