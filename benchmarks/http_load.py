"""Load on `POST /predict`: many clients that each send one picture after another.

    python -m benchmarks.http_load --url http://127.0.0.1:8000          # a server that runs already
    python -m benchmarks.http_load --artifact runs/digits/artifact      # starts one, and stops it afterwards
    python -m benchmarks.http_load                                      # the same with the tests' tiny fake network

The clients run in this process, the server in Ray's. Pictures: scikit-learn's digits as PNG, or files in `--images`.
A failure is any answer other than 200, or none. The last line is JSON.
"""

import argparse
import asyncio
import json
import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import aiohttp
import numpy as np
import PIL.Image

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 60


def digits() -> list[bytes]:
    """scikit-learn's handwritten digits, 8 x 8 grey pixels, as PNG."""
    from sklearn.datasets import load_digits

    bodies = []
    for pixels in load_digits().images:
        buffer = BytesIO()
        PIL.Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(buffer, "PNG")
        bodies.append(buffer.getvalue())
    return bodies


def files(folder: Path) -> list[bytes]:
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    if not found:
        raise SystemExit(f"--images {folder}: no PNG, JPEG or WebP file there")
    return [path.read_bytes() for path in found]


@contextmanager
def local_server(artifact: str | None) -> Iterator[str]:
    """Ray Serve on this machine with one replica of the artifact's network, or of a fake one."""
    import ray
    from ray import serve

    from dataeff.core.artifact import load
    from serve.app import build, parse_options
    from tests.serve_fakes import load_fake

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = parse_options({"artifact": artifact or "fake"})
        serve.run(build(options, load if artifact else load_fake), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


async def load_test(url: str, bodies: list[bytes], clients: int, seconds: float) -> tuple[list[float], Counter[str]]:
    """Seconds of each answered request, and how often each failure happened."""
    latencies: list[float] = []
    failures: Counter[str] = Counter()
    headers = {"Content-Type": "application/octet-stream"}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=clients), timeout=aiohttp.ClientTimeout(TIMEOUT_S), headers=headers
    ) as session:

        async def client(number: int) -> None:
            sent = number
            while time.perf_counter() < end:
                started = time.perf_counter()
                try:
                    async with session.post(url, data=bodies[sent % len(bodies)]) as response:
                        await response.read()
                except (aiohttp.ClientError, TimeoutError) as error:
                    failures[type(error).__name__] += 1
                    await asyncio.sleep(0.1)
                else:
                    if response.status == 200:
                        latencies.append(time.perf_counter() - started)
                    else:
                        failures[f"status {response.status}"] += 1
                sent += clients

        end = time.perf_counter() + seconds
        await asyncio.gather(*(client(number) for number in range(clients)))
    return latencies, failures


def measure(url: str, bodies: list[bytes], clients: int, seconds: float, budget: float | None) -> None:
    target = url.rstrip("/") + "/predict" + (f"?budget={budget:g}" if budget is not None else "")
    started = time.perf_counter()
    latencies, failures = asyncio.run(load_test(target, bodies, clients, seconds))
    elapsed = time.perf_counter() - started
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000 if latencies else (None, None)
    failed = sum(failures.values())
    print(f"{clients} clients for {elapsed:.1f} s at {target}")
    print(f"answered {len(latencies)}, {len(latencies) / elapsed:.1f} requests/s")
    if latencies:
        print(f"latency p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print(f"failed {failed} {dict(failures) if failures else ''}".rstrip())
    figures = {
        "failed": failed,
        "p50_ms": p50,
        "p99_ms": p99,
        "requests": len(latencies) + failed,
        "requests_per_s": len(latencies) / elapsed,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description="Load on POST /predict of a server of dataeff")
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", help="base URL of a server that runs already")
    server.add_argument("--artifact", help="folder of an exported network to serve here; default: a tiny fake network")
    parser.add_argument("--images", type=Path, help="folder of pictures to send; default: scikit-learn's digits")
    parser.add_argument("--clients", type=int, default=64, help="clients at once (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default %(default)s)")
    parser.add_argument("--budget", type=float, help="fraction (0, 1] of the full network's multiply-adds allowed")
    arguments = parser.parse_args()
    bodies = files(arguments.images) if arguments.images else digits()
    settings = (bodies, arguments.clients, arguments.seconds, arguments.budget)
    if arguments.url:
        measure(arguments.url, *settings)
    else:
        with local_server(arguments.artifact) as url:
            measure(url, *settings)


if __name__ == "__main__":
    main()
