"""The rules of the house that a program can check: imports run downwards only; style and types are clean."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASES = {"core", "data", "metrics", "nn", "pretraining", "supervised"}
PACKAGES = ("dataeff", "ray_jobs", "serve")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# What a unit of the house may import of it, besides itself. Any other unit is a method, which may import the bases.
MAY: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "metrics": {"core", "data"},
    "nn": {"core", "data", "metrics"},
    "supervised": {"core", "data", "metrics"},
    "pretraining": {"core", "data", "metrics", "nn"},
    "dataeff": {"core"},
    "serve": BASES | {"dataeff"},
    "ray_jobs": BASES | {"dataeff", "serve"},  # the demo serves what it has trained
}


def imports(source: str, module: str) -> Iterator[str]:
    """Absolute names of everything that `source`, the text of `module`, imports, at any depth of it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def unit(module: str) -> str:
    """The part of the house that a module belongs to: a base, a driver, `family.method`, or "dataeff" itself."""
    parts = module.split(".")
    if parts[0] != "dataeff":
        return parts[0]
    if len(parts) > 1 and parts[1] in BASES:
        return parts[1]
    families = {path.name for path in (ROOT / "dataeff").iterdir() if path.is_dir()}
    if len(parts) > 1 and parts[1] in families:
        folder = ROOT / "dataeff" / parts[1]
        # A family without sub-packages is one method.
        return ".".join(parts[1:3]) if any((path / "__init__.py").exists() for path in folder.iterdir()) else parts[1]
    return "dataeff"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def forbidden(source: str, module: str) -> list[str]:
    """What `module` imports against the rules."""
    own = unit(module)
    wrong = []
    for name in imports(source, module):
        root = name.split(".")[0]
        if root == "ray" and module.startswith("dataeff"):
            wrong.append(name)
        if root not in PACKAGES:
            continue
        other = unit(name)
        if module.startswith("ray_jobs.claims.") and other not in PACKAGES:  # a method's claims measure that method
            continue
        if module == "serve.selection" and other == "active":  # which images to label, asked over HTTP
            continue
        allowed = MAY.get(own, BASES)
        below_or_own = other in allowed or other == own or own.startswith(f"{other}.")
        # The name of the package itself comes with `from dataeff import x`, which is judged by x.
        if not below_or_own and name != "dataeff":
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])
def test_a_module_imports_only_from_below(path: Path) -> None:
    assert forbidden(path.read_text(encoding="utf-8"), module_name(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dataeff.core.config", "import ray"),
        ("dataeff.core.config", "def f():\n    from ray.train import report"),
        ("dataeff.core.config", "from dataeff.data import open_splits"),
        ("dataeff.core.config", "import dataeff.nn.gates"),
        ("dataeff.data.spec", "from dataeff.metrics import cost"),
        ("dataeff.nn.gates", "from dataeff.dynamic.skipnet.model import SkipNet"),
        ("dataeff.dynamic.deepmoe.model", "from dataeff.dynamic.skipnet.model import SkipNet"),
        ("dataeff.dynamic.deepmoe.model", "from ..skipnet import model"),
        ("dataeff.dynamic.skipnet.model", "from ray_jobs.cli import UserError"),
        ("ray_jobs.train", "from dataeff.dynamic.skipnet.experiment import SkipNetExperiment"),
        ("serve.app", "import ray_jobs.cli"),
        ("serve.app", "from dataeff.active.queries import QUERIES"),
    ],
)
def test_the_check_sees_an_import_that_runs_upwards_or_sideways(module: str, source: str) -> None:
    assert forbidden(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dataeff.dynamic.skipnet.model", "from dataeff.nn.gates import Gate"),
        ("dataeff.dynamic.skipnet.model", "from . import losses"),
        ("dataeff.nn.resnet", "import torch.nn"),
        ("ray_jobs.train", "import ray\nfrom dataeff.core.run import train"),
        ("serve.app", "from dataeff import load"),
    ],
)
def test_the_check_lets_an_import_from_below_pass(module: str, source: str) -> None:
    assert forbidden(source, module) == []


def test_what_only_some_data_need_does_not_slow_every_start() -> None:
    """Commands, Ray's controllers and Serve's replicas each start in a process of their own."""
    heavy = {"matplotlib", "sklearn", "scipy", "torchvision"}
    program = f"""
import sys
import ray_jobs.train, ray_jobs.tune, serve.app
from dataeff.data import open_splits
open_splits("digits")
print(*sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_sources_are_clean_by_ruff() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_types_are_clean_by_mypy() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
