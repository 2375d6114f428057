"""Ray Serve on this machine alone, for measurements and tests."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_jobs.cluster import free_port

ROOT = Path(__file__).resolve().parents[1]
START_S = 300  # every replica imports PyTorch first: a slow or busy machine takes minutes


@contextmanager
def local_serve(num_cpus: int | None = None) -> Iterator[int]:
    """Ray with `num_cpus` CPUs (None: all) and Serve, both until the block ends; the value is the proxy's port."""
    import ray
    from ray import serve

    port = free_port()
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(port: int, applications: list[dict[str, Any]]) -> None:
    """As `serve deploy` does: applications from their configs, only what changed is touched; waits for all of them.

    Raises:
        TimeoutError: one does not run after `START_S`.
    """
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    http = {"host": "127.0.0.1", "port": port}
    _get_global_client().deploy_apps(
        ServeDeploySchema.model_validate({"http_options": http, "applications": applications})
    )
    names = [application["name"] for application in applications]
    deadline = time.monotonic() + START_S
    while True:
        found = serve.status().applications
        states = {name: found[name].status.value if name in found else "unknown" for name in names}
        if set(states.values()) == {"RUNNING"}:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {START_S} s: {states}")
        time.sleep(0.1)
