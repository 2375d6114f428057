"""Contestants in turns on one machine, and their ratios: what the speed benchmarks share."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Contestant = Callable[[], object]


@torch.inference_mode()
def measure(runs: Mapping[str, Contestant], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, in turns; an alternating direction removes the advantage of a place in the order."""
    names = list(runs)
    for name in names:
        runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names if repeat % 2 else reversed(names):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, list[float]], name: str, baseline: str) -> list[float]:
    """Ratio to the baseline within each repeat, ascending."""
    return sorted(a / b for a, b in zip(times[name], times[baseline], strict=True))


def show(title: str, times: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Print a table; the median ratio to the baseline of each contestant."""
    print(f"\n{title:40}{'median ms':>12}{'min ms':>10}{'ratio':>8}   quartiles of the ratio")
    found = {}
    for name, seconds in times.items():
        sorted_ratios = ratios(times, name, baseline)
        found[name] = statistics.median(sorted_ratios)
        low, high = sorted_ratios[len(sorted_ratios) // 4], sorted_ratios[len(sorted_ratios) * 3 // 4]
        median, least = statistics.median(seconds) * 1e3, min(seconds) * 1e3
        print(f"{name:40}{median:12.2f}{least:10.2f}{found[name]:8.3f}   {low:.3f} to {high:.3f}")
    return found
