"""Schemathesis with pictures for bodies: `SCHEMATHESIS_HOOKS=tests.serve_fuzz schemathesis run URL/openapi.json`"""

import os
import re
import subprocess
import sys
from pathlib import Path

import schemathesis
from hypothesis import strategies as st

from tests.serve_fakes import encoded, picture


def pictures(kind: str) -> st.SearchStrategy[bytes]:
    sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
    return st.builds(lambda seed, size: encoded(picture(seed, size), kind), st.integers(0, 50), sizes)


for name in ("PNG", "JPEG", "WEBP"):
    schemathesis.openapi.media_type(f"image/{name.lower()}", pictures(name))


def run(url: str, examples: int, *options: str) -> tuple[int, int, str]:
    """Run all checks against a server; exit status, cases and the output.

    In one thread: Hypothesis parses source, and `ast.parse` of CPython 3.11 may fail when two threads are in it.
    """
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", f"{url}/openapi.json", "--checks", "all", "--max-examples", str(examples)),
        *("--seed", "1", "--no-color", "--generation-database", "none", "--suppress-health-check", "all"),
        *("--workers", "1", *options),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.serve_fuzz", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    found = re.search(r"([\d,]+) generated", done.stdout)
    return done.returncode, int(found[1].replace(",", "")) if found else 0, done.stdout + done.stderr
