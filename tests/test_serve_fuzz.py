"""Requests that nobody would think of: schemathesis against the OpenAPI page of a server without Ray, all checks."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from ray_jobs.cluster import free_port
from tests.serve_fuzz import run
from tests.test_serve_cascade import app_of, new_cascade, queue


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A cascade with a human stage and two versions, behind a token."""
    port = free_port()
    servers: list[uvicorn.Server] = []

    async def main() -> None:
        cascades = [new_cascade((0.3, 0.3, 0.3)), new_cascade(seed=1)]
        app, _ = await app_of(cascades, weights=(1, 1), queue=queue(tmp_path), token="secret")
        servers.append(uvicorn.Server(uvicorn.Config(app, port=port, log_level="error")))
        await servers[0].serve()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    deadline = time.monotonic() + 30
    while not (servers and servers[0].started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    servers[0].should_exit = True
    thread.join()


def test_hundreds_of_odd_requests_get_the_answers_that_the_page_promises(address: str) -> None:
    status, cases, output = run(address, 5, "-H", "Authorization: Bearer secret")
    assert status == 0, output[-5000:]
    assert cases >= 300
    metrics = httpx.get(f"{address}/metrics", headers={"Authorization": "Bearer secret"}).text
    assert 'status="200"' in metrics and 'status="50' not in metrics
