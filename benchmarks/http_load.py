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
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import httptools
import numpy as np
import PIL.Image

from benchmarks.local_serve import local_serve

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
    from ray import serve

    from dataeff.core.artifact import load
    from serve.app import build, parse_options
    from tests.serve_fakes import load_fake

    with local_serve() as port:
        options = parse_options({"artifact": artifact or "fake"})
        serve.run(build(options, load if artifact else load_fake), route_prefix="/")
        yield f"http://127.0.0.1:{port}"


class _Client(asyncio.Protocol):
    """One client: a connection that sends the next picture as soon as the last one is answered, until `end`.

    Bytes to sockets and callbacks, without a client library: on a machine that the server shares, a library's time
    (aiohttp: 0.5 ms a request) would count as the server's.
    """

    def __init__(self, number: int, step: int, requests: list[bytes], end: float, result: "LoadResult") -> None:
        self._requests, self._next, self._step, self._end, self._result = requests, number, step, end, result
        self._started = 0.0
        self.waiting = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._parser = transport, httptools.HttpResponseParser(self)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        self.waiting = False
        if status == 200:
            self._result.latencies.append(time.perf_counter() - self._started)
        else:
            self._result.failures[f"status {status}"] += 1
        if time.perf_counter() >= self._end or not self._parser.should_keep_alive():
            self._transport.close()
        else:
            self._parser = httptools.HttpResponseParser(self)
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if self.waiting:
            self._result.failures["connection lost"] += 1
        self.closed.set_result(None)

    def _send(self) -> None:
        self._started, self.waiting = time.perf_counter(), True
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += self._step


@dataclass
class LoadResult:
    """Seconds of each request that was answered with 200, and how often each failure happened."""

    latencies: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


async def load_test(url: str, bodies: list[bytes], clients: int, seconds: float) -> LoadResult:
    """Load by `clients` connections that each send one picture after another."""
    address, result = urlsplit(url), LoadResult()
    target = address.path + (f"?{address.query}" if address.query else "")
    requests = [
        f"POST {target} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: {content_type(body)}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
        for body in bodies
    ]
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        while time.perf_counter() < end:
            try:
                _, protocol = await asyncio.get_running_loop().create_connection(
                    lambda: _Client(number, clients, requests, end, result), address.hostname, address.port
                )
            except OSError as error:
                result.failures[type(error).__name__] += 1
                await asyncio.sleep(0.1)
            else:
                await protocol.closed

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    _, late = await asyncio.wait(tasks, timeout=seconds + TIMEOUT_S)
    for task in late:
        task.cancel()
    result.failures["no answer"] += len(late)
    result.failures = +result.failures
    return result


def content_type(body: bytes) -> str:
    return "application/json" if body.startswith(b"{") else "application/octet-stream"


def measure(url: str, bodies: list[bytes], clients: int, seconds: float, budget: float | None) -> None:
    target = url.rstrip("/") + "/predict" + (f"?budget={budget:g}" if budget is not None else "")
    started = time.perf_counter()
    result = asyncio.run(load_test(target, bodies, clients, seconds))
    elapsed = time.perf_counter() - started
    latencies, failures = result.latencies, result.failures
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
