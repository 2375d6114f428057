"""How do the parts of pool-based selection grow with the pool? k-means, greedy k-centre and nearest neighbours.

Synthetic embeddings of 128 dimensions, a mixture of 10 Gaussians, from 10 thousand to 1 million. k-means looks for 10
clusters (one restart), k-centre chooses 1,000 points, and neighbours are the 20 nearest in the whole pool of 1,000
queries; SCAN asks for those of every point, N / 1,000 times the time. Every measurement runs in a process of its own;
memory is the growth of its peak resident set beyond the embeddings, under a bound of 256 MiB on work space (k-centre
holds a float32 copy of the embeddings besides). Slopes are exponents of N by least squares in logarithms over the three
largest sizes, and what lies beyond 1 million is extrapolated from it by them.

    python -m benchmarks.al_scale [--quick]

Prints a table; the last line is one JSON object. Targets: every slope of time and of memory <= 1.2.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil

from dataeff.active.coreset import greedy_k_centre
from dataeff.metrics.kmeans import kmeans
from dataeff.metrics.neighbours import nearest_neighbours

DIMENSIONS, CLUSTERS, CHOSEN, QUERIES, NEIGHBOURS = 128, 10, 1_000, 1_000, 20
MEMORY_MB = 256.0
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
QUICK = (10_000, 30_000, 60_000)
BEYOND = 10_000_000

JOBS: dict[str, Callable[[np.ndarray], object]] = {
    "kmeans": lambda points: kmeans(points, CLUSTERS, seed=0, restarts=1, memory_mib=MEMORY_MB),
    "coreset": lambda points: greedy_k_centre(
        points, CHOSEN, np.random.default_rng(1).permutation(len(points)), memory_mb=MEMORY_MB
    ),
    "neighbours": lambda points: nearest_neighbours(points, NEIGHBOURS, points[:QUERIES]),
}


def embeddings(size: int) -> np.ndarray:
    """float32 [size, DIMENSIONS]; no more memory than they take."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, DIMENSIONS)).astype(np.float32)
    points = np.empty((size, DIMENSIONS), np.float32)
    for start in range(0, size, 10_000):
        block = points[start : start + 10_000]
        rng.standard_normal(dtype=np.float32, out=block)
        block *= 0.5
        block += centres[rng.integers(CLUSTERS, size=len(block))]
    return points


def one(job: str, size: int) -> dict[str, float]:
    """Seconds, and growth of the peak resident set in MiB, of one job in this process."""
    JOBS[job](embeddings(2_000))  # libraries load and start their threads
    points = embeddings(size)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    JOBS[job](points)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "mib": max(0.0, (peak - before) / 2**20)}


def slope(sizes: list[int], values: list[float]) -> float:
    """Exponent of the size by least squares; what is below 1 (s, MiB) counts as 1."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1)), 1)[0])


def measured(job: str, size: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.al_scale", "--one", job, "--size", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"up to {QUICK[-1]:,} embeddings")
    parser.add_argument("--one", choices=list(JOBS), help="measure one job in this process and end")
    parser.add_argument("--size", type=int, default=QUICK[0], help="embeddings, with --one")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.size)))
        return
    sizes = list(QUICK if arguments.quick else SIZES)
    results: dict[str, float | str] = {"processor": platform.processor() or platform.machine()}
    print(f"{'job':12}{'embeddings':>12}{'seconds':>10}{'MiB':>9}   (embeddings themselves, MiB)")
    for job in JOBS:
        rows = []
        for size in sizes:
            rows.append(measured(job, size))
            own = size * DIMENSIONS * 4 / 2**20
            print(f"{job:12}{size:12,}{rows[-1]['seconds']:10.2f}{rows[-1]['mib']:9.0f}   ({own:.0f})", flush=True)
            results |= {f"{job}_{size}_{name}": round(value, 3) for name, value in rows[-1].items()}
        for name, unit in (("seconds", "s"), ("mib", "MiB")):
            exponent = slope(sizes[-3:], [row[name] for row in rows[-3:]])
            results[f"{job}_{name}_slope"] = round(exponent, 3)
            text = f"{'':12}{name} grows as N^{exponent:.2f}"
            if not arguments.quick:
                beyond = rows[-1][name] * (BEYOND / sizes[-1]) ** exponent
                results[f"{job}_{BEYOND}_{name}_extrapolated"] = round(beyond, 1)
                text += f"; {BEYOND:,} embeddings: about {beyond:,.0f} {unit}"
            print(text)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
