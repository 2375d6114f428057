"""A cascade over HTTP against its accurate network alone, in our server, in LitServe and in plain FastAPI + uvicorn.

    python -m benchmarks.cascade_serving
    python -m benchmarks.cascade_serving --network resnet18 --size 64    # hardly dearer than a request's own cost
    python -m benchmarks.cascade_serving --stages runs/small/artifact,runs/large/artifact --thresholds 0.2

Without `--stages` both networks have random weights, and the threshold passes on the share of images in `--idk`: the
speed does not depend on what the networks know. Every server may run `--workers` networks at once, each with one torch
thread: replicas here, worker processes in LitServe, threads in FastAPI. Clients and servers share this machine. Rounds
go through all servers in turn; medians are shown. The gain that the cascade promises is measured without a server, in
batches of one network's share of the clients, as no more can wait for it. The other two servers are stopped while they
are not asked, because LitServe's idle processes took a seventh of two cores (Ray's go on). The last line is JSON.
"""

import argparse
import asyncio
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from benchmarks.http_load import load_test
from benchmarks.local_serve import ROOT, local_serve
from dataeff.core.artifact import Card, Prediction, Predictor, load
from dataeff.data import Preprocess
from ray_jobs.cluster import free_port
from serve.cascade import Cascade, StagedCascade
from serve.limits import Limits, decode_image
from serve.loading import Loader
from serve.versions import Version

CLASSES = 10
CLIENTS = (1, 16, 64)
LIMITS = Limits()


@dataclass
class RandomNetwork:
    """A network with random weights: "small", or one of torchvision's, for images of `size` pixels."""

    name: str
    size: int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.network = (_small() if self.name == "small" else get_model(self.name, num_classes=CLASSES)).eval()
        self.network = self.network.to(memory_format=torch.channels_last)
        self.input_shape, self.path_names = (3, self.size, self.size), list[str]()
        self.macs = float(_multiply_adds(self.network, self.size))
        values = {"channels": 3, "size": (self.size, self.size), "mean": (0.5,) * 3, "std": (0.25,) * 3}
        self._preprocess = Preprocess.from_dict(values)
        self.card = Card(
            method=self.name,
            classes=[str(number) for number in range(CLASSES)],
            input_shape=self.input_shape,
            preprocess=self._preprocess.to_dict(),
            metrics={},
            cost={"macs": self.macs, "full_macs": self.macs, "params": 0.0},
            data={},
            versions={},
        )

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        return self._preprocess.from_pil(images)

    def predict(self, inputs: Tensor, budget: Tensor | None = None) -> Prediction:
        with torch.inference_mode():
            logits = self.network(inputs.to(memory_format=torch.channels_last))
        macs = torch.full((len(inputs),), self.macs, dtype=torch.float64)
        return Prediction(logits.softmax(1), macs, torch.empty(len(inputs), 0, dtype=torch.bool))


def _small() -> nn.Module:
    layers: list[nn.Module] = []
    for inside, outside in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def _multiply_adds(network: nn.Module, size: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


@cache
def network_of(folder: str) -> Predictor:
    """An artifact's network, or the one that a name as `random:resnet18:224` describes."""
    kind, *rest = Path(folder).name.split(":")
    if kind != "random":
        return load(folder)
    return RandomNetwork(rest[0], int(rest[1]))


def cascade_of(version: Version, networks: bool = True) -> Cascade:
    stages = [network_of(folder) for folder in version.stages]
    cascade: Cascade = StagedCascade([stage.card for stage in stages], version.thresholds, stages)
    return cascade


def stage_of(version: Version, number: int) -> Predictor:
    return network_of(version.stages[number])


def pictures(size: int, count: int = 64) -> list[bytes]:
    """Smooth random pictures as PNG."""
    generator = np.random.default_rng(0)
    bodies = []
    for _ in range(count):
        coarse = PIL.Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        buffer = BytesIO()
        coarse.resize((size, size), PIL.Image.Resampling.BICUBIC).save(buffer, "PNG")
        bodies.append(buffer.getvalue())
    return bodies


# The four servers.


@contextmanager
def ours(stages: list[str], thresholds: str, workers: int) -> Iterator[dict[str, str]]:
    """Ray Serve with both applications; only one of them is asked at a time."""
    from ray import serve

    # By its name: what `__main__` defines cannot be loaded by the replicas.
    from benchmarks import cascade_serving as here
    from serve.app import build, build_cascade, parse_cascade_options, parse_options

    # As the other servers; Ray gives its workers 15, behind everything else.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own name
    common = {"num_cpus": 1, "replicas": workers}
    own = Loader(here.cascade_of, here.stage_of)
    options = parse_cascade_options(common | {"stages": ",".join(stages), "thresholds": thresholds})
    with local_serve(num_cpus=2 * workers) as port:
        serve.run(build_cascade(options, own), name="cascade", route_prefix="/cascade")
        alone = build(parse_options(common | {"artifact": stages[-1]}), here.network_of)
        serve.run(alone, name="accurate", route_prefix="/accurate")
        yield {name: f"http://127.0.0.1:{port}/{name}/predict" for name in ("cascade", "accurate")}


def fastapi_server(folder: str, port: int, workers: int) -> None:
    """Plain FastAPI: the body as bytes, the blocking work in the thread pool (of its own size), one uvicorn process."""
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool

    torch.set_num_threads(1)
    network, app = network_of(folder), FastAPI()

    def classify(body: bytes) -> dict[str, Any]:
        with torch.inference_mode():
            prediction = network.predict(network.preprocess([decode_image(body, LIMITS)]))
        probability, label = prediction.probabilities[0].max(0)
        return {"label": int(label), "probability": float(probability)}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        return await run_in_threadpool(classify, await request.body())

    @app.get("/health")
    def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    """The accurate network as LitServe's documentation writes it: dynamic batches, images in base64."""

    folder = ""

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.network = network_of(self.folder)

    def decode_request(self, request) -> Tensor:  # type: ignore[no-untyped-def]  # its annotation would be parsed
        return self.network.preprocess([decode_image(base64.b64decode(request["image"]), LIMITS)])[0]

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    def predict(self, inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.network.predict(inputs).probabilities

    def unbatch(self, output: Tensor) -> list[Tensor]:
        return list(output)

    def encode_response(self, output: Tensor) -> dict[str, Any]:
        probability, label = output.max(0)
        return {"label": int(label), "probability": float(probability)}


def litserve_server(folder: str, port: int, workers: int) -> None:
    """LitServe: worker processes for the network."""
    api = Classifier(max_batch_size=64, batch_timeout=0.003)
    api.folder = folder
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)


@contextmanager
def process(kind: str, accurate: str, workers: int) -> Iterator[tuple[str, int]]:
    """One of the two other servers in a process group of its own, stopped; its URL and the group."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.cascade_serving", "--server", kind, "--accurate", accurate]
    command += ["--workers", str(workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [*command, "--port", str(port)], cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{kind} did not start") from None
                time.sleep(0.2)
        os.killpg(server.pid, signal.SIGSTOP)
        yield f"http://127.0.0.1:{port}/predict", server.pid
    finally:
        os.killpg(server.pid, signal.SIGCONT)
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


# Measuring.


def measure(url: str, bodies: list[bytes], clients: int, seconds: float) -> tuple[float, float, int]:
    """Requests per second, p99 in milliseconds, failures."""
    started = time.perf_counter()
    result = asyncio.run(load_test(url, bodies, clients, seconds))
    elapsed = time.perf_counter() - started
    p99 = float(np.percentile(result.latencies, 99)) * 1000
    return len(result.latencies) / elapsed, p99, sum(result.failures.values())


def measure_stopped(
    server: tuple[str, int], bodies: list[bytes], clients: int, seconds: float
) -> tuple[float, float, int]:
    """As `measure`, of a server that runs for this time only."""
    url, group = server
    os.killpg(group, signal.SIGCONT)
    try:
        return measure(url, bodies, clients, seconds)
    finally:
        os.killpg(group, signal.SIGSTOP)


def offline(cascade: Cascade, accurate: Predictor, inputs: Tensor, batch: int) -> float:
    """Time of the accurate network over that of the cascade, without a server: the gain that is promised.

    Args:
        batch: images at a time.
    """

    def seconds(predictor: Predictor) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            for part in inputs.split(batch):
                predictor.predict(part)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    seconds(accurate)
    return seconds(accurate) / seconds(cascade)


def main() -> None:
    parser = argparse.ArgumentParser(description="A cascade over HTTP against its accurate network in other servers")
    parser.add_argument("--stages", help="two or more artifact folders, cheapest first, with commas; default: random")
    parser.add_argument("--network", default="resnet18", help="torchvision's, of random weights (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="its images' pixels, squared (default %(default)s)")
    parser.add_argument("--thresholds", help="of all stages but the last, with commas; needed with --stages")
    parser.add_argument("--idk", type=float, default=0.3, help="random weights: share of images passed on")
    parser.add_argument("--seconds", type=float, default=4, help="each measurement (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="networks at once in every server (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind (default %(default)s)")
    parser.add_argument("--images", type=Path, help="folder of pictures; default: random ones")
    parser.add_argument("--server", choices=("fastapi", "litserve"), help=argparse.SUPPRESS)
    parser.add_argument("--accurate", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.server:
        serve_with = {"fastapi": fastapi_server, "litserve": litserve_server}[arguments.server]
        serve_with(arguments.accurate, arguments.port, arguments.workers)
        return
    torch.set_num_threads(1)
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    from benchmarks.http_load import files

    bodies = files(arguments.images) if arguments.images else pictures(arguments.size)
    if arguments.stages:
        stages, thresholds = (
            [str(Path(folder).resolve()) for folder in arguments.stages.split(",")],
            arguments.thresholds,
        )
    else:
        stages, thresholds = [f"random:{name}:{arguments.size}" for name in ("small", arguments.network)], None
    network = network_of(stages[-1])
    inputs = network.preprocess([decode_image(body, LIMITS) for body in bodies])
    if thresholds is None:
        unsure = 1 - network_of(stages[0]).predict(inputs).probabilities.double().amax(1)
        thresholds = str(float(unsure.quantile(1 - arguments.idk)))
    cascade = cascade_of(Version(stages=tuple(stages), thresholds=tuple(float(part) for part in thresholds.split(","))))
    ratio = float(cascade.predict(inputs).macs.mean()) / network.card.cost["full_macs"]
    promised = {clients: offline(cascade, network, inputs, -(-clients // arguments.workers)) for clients in CLIENTS}
    shares = ", ".join(f"{1 / gain:.3f} at {clients} clients" for clients, gain in promised.items())
    print(f"cascade: {ratio:.3f} of the accurate network's multiply-adds; of its time {shares}")
    found = run_all(arguments, bodies, stages, thresholds)
    report(found, promised, ratio)


def run_all(
    arguments: argparse.Namespace, bodies: list[bytes], stages: list[str], thresholds: str
) -> dict[tuple[str, int], list[tuple[float, float, int]]]:
    found: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    as_json = [json.dumps({"image": base64.b64encode(body).decode()}).encode() for body in bodies]
    with (
        ours(stages, thresholds, arguments.workers) as urls,
        process("fastapi", stages[-1], arguments.workers) as fastapi,
        process("litserve", stages[-1], arguments.workers) as litserve,
    ):
        servers = [
            ("cascade", partial(measure, urls["cascade"], bodies)),
            ("accurate", partial(measure, urls["accurate"], bodies)),
            ("litserve", partial(measure_stopped, litserve, as_json)),
            ("fastapi", partial(measure_stopped, fastapi, bodies)),
        ]
        for _, run in servers:
            run(16, 1.0)
        for _ in range(arguments.rounds):
            for clients in CLIENTS:
                for name, run in servers:
                    found.setdefault((name, clients), []).append(run(clients, arguments.seconds))
    return found


def report(
    found: dict[tuple[str, int], list[tuple[float, float, int]]], promised: dict[int, float], ratio: float
) -> None:
    figures: dict[str, Any] = {"macs_ratio": ratio}
    print(f"{'server':<10}{'clients':>8}{'requests/s':>12}{'spread':>16}{'p99 ms':>9}{'failed':>8}")
    for (name, clients), runs in found.items():
        rates, p99 = [run[0] for run in runs], statistics.median(run[1] for run in runs)
        rate, failed = statistics.median(rates), sum(run[2] for run in runs)
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        print(f"{name:<10}{clients:>8}{rate:>12.1f}{spread:>16}{p99:>9.0f}{failed:>8}")
        figures |= {f"{name}_{clients}_rps": rate, f"{name}_{clients}_p99_ms": p99, f"{name}_{clients}_failed": failed}
    for clients in CLIENTS:
        gain = figures[f"cascade_{clients}_rps"] / figures[f"accurate_{clients}_rps"]
        figures |= {f"gain_{clients}": gain, f"promised_gain_{clients}": promised[clients]}
        print(f"{clients} clients: gain {gain:.2f} of {promised[clients]:.2f} promised: {gain / promised[clients]:.2f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
