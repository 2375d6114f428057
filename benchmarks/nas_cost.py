"""What partial channels save, and what stacking the operations of many edges saves, in a search step.

A search step is an architecture step and a weight step on one mini-batch each. The baseline does what the released
DARTS and PC-DARTS code does: every operation of every edge one after another, contiguous memory, and a backward pass
to all parameters in both steps. It has the same weights, so that its results must be equal. Contestants take turns;
ratios are medians of the ratios within a repeat. Peak memory is the growth of a process's resident set (on a GPU: of
the allocator) over two steps, in a process of its own.

    python -m benchmarks.nas_cost [--quick]

Prints a table; the last line is one JSON object. Targets: parameters_k4_to_k1 < 0.2, step_k4_to_k1 <= 0.55,
memory_k4_to_k1 <= 0.5, baseline_to_ours_k4 >= 1.3, max_difference <= 1e-9.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.core.config import parse_config
from dataeff.core.runtime import Runtime
from dataeff.data import Batch, Preprocess, open_splits
from dataeff.nas.differentiable import DifferentiableSearch
from dataeff.nas.edges import StackedReduce, StackedSeparable
from dataeff.nas.genotype import PRIMITIVES
from dataeff.nas.operations import make_operation
from dataeff.nas.search import Moment, SearchTask
from dataeff.nas.settings import SearchSettings
from dataeff.nas.supernet import EDGES, SearchCell, SuperNetwork

BATCH = 32


class BaselineEdge(nn.Module):
    """PC-DARTS' MixedOp: all operations of one edge on its first C/K channels, then a shuffle."""

    def __init__(self, names: list[str], channels: int, partial_k: int, stride: int) -> None:
        super().__init__()
        self.names, self.partial_k, self.stride, self.width = names, partial_k, stride, channels // partial_k
        self.ops = nn.ModuleDict()
        for name in names:
            if name == "none":
                continue
            module = make_operation(name, self.width, stride, affine=False)
            if "pool" in name:
                module = nn.Sequential(module, nn.BatchNorm2d(self.width, affine=False))
            self.ops[name] = module

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        chosen, rest = x[:, : self.width], x[:, self.width :]
        parts = []
        for name in self.names:
            weight = weights[PRIMITIVES.index(name)]
            parts.append(
                weight
                * (chosen[:, :, :: self.stride, :: self.stride] * 0 if name == "none" else self.ops[name](chosen))
            )
        mixed = sum(parts)
        if self.partial_k == 1:
            return mixed
        rest = F.max_pool2d(rest, 2, 2) if self.stride == 2 else rest
        out = torch.cat([mixed, rest], 1)
        batch, channels, height, width = out.shape
        out = out.view(batch, self.partial_k, self.width, height, width).transpose(1, 2)
        return out.reshape(batch, channels, height, width)


class BaselineCell(nn.Module):
    """A search cell, edge by edge."""

    def __init__(self, ours: SearchCell, sets: list[list[str]]) -> None:
        super().__init__()
        self.reduction = ours.reduction
        self.preprocess = ours.preprocess
        channels = ours.width * ours.partial_k
        self.edges = nn.ModuleList(
            BaselineEdge(sets[edge.index], channels, ours.partial_k, 2 if ours.reduction and edge.source < 2 else 1)
            for edge in EDGES
        )

    def forward(self, s0: Tensor, s1: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        states = [self.preprocess[0](s0), self.preprocess[1](s1)]
        for node in range(2, 6):
            edges = [edge for edge in EDGES if edge.target == node]
            states.append(sum(beta[e.index] * self.edges[e.index](states[e.source], alpha[e.index]) for e in edges))
        return torch.cat(states[2:], 1)


class BaselineNetwork(nn.Module):
    """The super-network of the released code, with the weights of one of ours (stem, preprocessing and head are its
    own modules)."""

    def __init__(self, ours: SuperNetwork, sets: dict[str, list[list[str]]]) -> None:
        super().__init__()
        self.ours = ours
        self.cells = nn.ModuleList()
        for cell in ours.cells:
            baseline = BaselineCell(cell, sets["reduce" if cell.reduction else "normal"])
            copy_weights(cell, baseline)
            self.cells.append(baseline)

    def forward(self, x: Tensor) -> Tensor:
        weights = {kind: self.ours.cell_weights(kind) for kind in ("normal", "reduce")}
        s0 = s1 = self.ours.stem(x)
        for cell in self.cells:
            alpha, beta = weights["reduce" if cell.reduction else "normal"]
            s0, s1 = (
                s1,
                cell(s0, s1, alpha, torch.ones(len(EDGES), dtype=x.dtype, device=x.device) if beta is None else beta),
            )
        return self.ours.classifier(s1.mean((2, 3)))


@torch.no_grad()
def copy_weights(ours: SearchCell, baseline: BaselineCell) -> None:
    """Give every operation of the baseline its slice of our stacked weights."""
    width = ours.width
    for group in ours.groups:
        for name, stacked in group.stacked.items():
            for position, edge in enumerate(group.having[name]):
                operation = baseline.edges[edge.index].ops[name]
                rows = slice(position * width, (position + 1) * width)
                if isinstance(stacked, StackedReduce):
                    operation.first.weight.copy_(stacked.first[position][..., None, None])
                    operation.second.weight.copy_(stacked.second[position][..., None, None])
                    continue
                assert isinstance(stacked, StackedSeparable)
                convs = [layer for layer in operation if isinstance(layer, nn.Conv2d)]
                pairs = zip(stacked.depthwise, stacked.pointwise, strict=True)
                for conv, source in zip(convs, [layer for pair in pairs for layer in pair], strict=True):
                    conv.weight.copy_(source.weight[rows])


def make_search(partial_k: int, layers: int, side: int = 16, **changes: Any) -> DifferentiableSearch:
    """A search on digits of `side` pixels, C = 16."""
    splits = open_splits(f"digits?size={side}")
    values = {
        "arm": "pc_darts" if partial_k > 1 else "darts", "partial_k": partial_k, "layers": layers, "epochs": 1,
        "arch_start": 0, "batch": BATCH, "augment": "none", **changes,
    }  # fmt: skip
    task = SearchTask(splits.train, splits, Preprocess.fit(splits.train), Runtime(), 0)
    return DifferentiableSearch(task, parse_config(SearchSettings, values))


def fixed_batch(search: DifferentiableSearch, size: int = BATCH) -> Batch:
    source = search.task.splits.train
    indices = list(range(size))
    images = search.task.preprocess(source.images(indices))
    return search.runtime.to_device(Batch(images, torch.from_numpy(source.labels[indices]), torch.tensor(indices)))


def our_step(search: DifferentiableSearch) -> Callable[[], object]:
    batch = fixed_batch(search)
    search.model.train()
    moment = Moment(search.phase, 0, 0)

    def run() -> None:
        search._arch_step(batch, batch, moment)
        search._weight_step(batch, moment)

    return run


def baseline_step(search: DifferentiableSearch) -> Callable[[], object]:
    """The baseline's step, on a copy of the search's weights."""
    batch = fixed_batch(search)
    images = batch.images.contiguous()
    network = BaselineNetwork(search.model, search.sets).train().to(search.runtime.device)
    arch = search.arch_parameters
    chosen = {id(parameter) for parameter in arch}
    weights = [parameter for parameter in network.parameters() if id(parameter) not in chosen]
    settings = search.settings
    weight_optimizer = torch.optim.SGD(weights, settings.w_lr, settings.w_momentum, weight_decay=settings.w_decay)
    arch_optimizer = torch.optim.Adam(arch, settings.arch_lr, settings.arch_betas, weight_decay=settings.arch_decay)
    for parameter in network.parameters():
        parameter.requires_grad_(True)

    def run() -> None:
        arch_optimizer.zero_grad()
        F.cross_entropy(network(images), batch.labels).backward()
        arch_optimizer.step()
        weight_optimizer.zero_grad()
        F.cross_entropy(network(images), batch.labels).backward()
        nn.utils.clip_grad_norm_(weights, settings.grad_clip)
        weight_optimizer.step()

    return run


def largest_difference(partial_k: int, layers: int = 3) -> float:
    """Between our logits and gradients of alpha and the baseline's in double precision, as a share of the largest."""
    search = make_search(partial_k, layers)
    search.model.double()
    batch = fixed_batch(search)
    batch = batch._replace(images=batch.images.double())
    baseline = BaselineNetwork(search.model, search.sets).double().train()
    search.model.train()
    found = []
    for network, images in ((search.model, batch.images), (baseline, batch.images.contiguous())):
        logits = network(images)
        gradients = torch.autograd.grad(F.cross_entropy(logits, batch.labels), search.arch_parameters)
        found.append([logits.detach(), *gradients])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, in turns."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs) if repeat % 2 else reversed(list(runs)):
            started = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return times


def ratio(times: dict[str, list[float]], first: str, second: str) -> float:
    return statistics.median(a / b for a, b in zip(times[first], times[second], strict=True))


def peak_memory(partial_k: int, layers: int) -> float:
    """MiB that two search steps add, in this process. The mini-batch is larger than in the timings, so that features
    decide, not weights."""
    search = make_search(partial_k, layers, batch=4 * BATCH)
    batch = fixed_batch(search, 4 * BATCH)
    search.model.train()

    def steps() -> None:
        for _ in range(2):
            search._arch_step(batch, batch, Moment(0, 0, 0))
            search._weight_step(batch, Moment(0, 0, 0))

    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        steps()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    search._weight_step(fixed_batch(search, 4), Moment(0, 0, 0))  # what libraries keep is no part of a step
    gc.collect()
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    steps()
    done.set()
    watcher.join()
    return (peak - before) / 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    return psutil.Process().memory_info().rss


def memory_of(partial_k: int, layers: int) -> float:
    """`peak_memory` in a process of its own, whose allocator gives tensors back at once."""
    command = [sys.executable, "-m", "benchmarks.nas_cost", "--memory-of", str(partial_k), "--layers", str(layers)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def phase_search(partial_k: int, layers: int, operations: int) -> DifferentiableSearch:
    """A phase's network: every edge keeps the last `operations` of the list, convolutions first."""
    search = make_search(partial_k, layers)
    kept = [*PRIMITIVES[-operations:]] if operations < 8 else list(PRIMITIVES)
    search.sets = {kind: [kept] * len(EDGES) for kind in ("normal", "reduce")}
    search.begin(0)
    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5, help="cells")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="3 cells, 1 repeat, to see that it runs")
    parser.add_argument("--memory-of", type=int, metavar="K", help="print the peak memory of one K and end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(peak_memory(arguments.memory_of, arguments.layers))
        return
    if arguments.quick:
        arguments.layers, arguments.repeats = 3, 1
    searches = {k: make_search(k, arguments.layers) for k in (1, 2, 4)}
    counts = {k: sum(p.numel() for p in search.model.parameters()) for k, search in searches.items()}
    runs = {f"K={k}": our_step(search) for k, search in searches.items()}
    runs |= {f"baseline K={k}": baseline_step(make_search(k, arguments.layers)) for k in (1, 4)}
    times = measure(runs, arguments.repeats)
    results: dict[str, float | str | int] = {"layers": arguments.layers, "batch": BATCH, "torch": torch.__version__}
    print(f"{'':14} parameters   median s per search step")
    for name, seconds in times.items():
        k = int(name.split("=")[1])
        print(f"{name:14} {counts[k]:10,}   {statistics.median(seconds):.3f}")
        results[f"seconds_{name.replace(' ', '_').replace('=', '').lower()}"] = round(statistics.median(seconds), 4)
    results["parameters_k4_to_k1"] = round(counts[4] / counts[1], 4)
    results["step_k4_to_k1"] = round(ratio(times, "K=4", "K=1"), 4)
    results["step_k2_to_k1"] = round(ratio(times, "K=2", "K=1"), 4)
    for k in (1, 4):
        results[f"baseline_to_ours_k{k}"] = round(ratio(times, f"baseline K={k}", f"K={k}"), 4)
    results["max_difference"] = max(largest_difference(k) for k in (1, 4))
    memory = {k: memory_of(k, arguments.layers) for k in (1, 4)}
    results["memory_k4_to_k1"] = round(memory[4] / memory[1], 4)
    print(f"peak memory of a step, MiB: K=1 {memory[1]:.0f}, K=4 {memory[4]:.0f}")
    phases = ((3, 8), (4, 5), (5, 3)) if arguments.quick else ((5, 8), (11, 5), (17, 3))
    for number, (cells, operations) in enumerate(phases, start=1):
        taken = measure(
            {f"K={k}": our_step(phase_search(k, cells, operations)) for k in (1, 4)}, max(1, arguments.repeats // 2)
        )
        for k in (1, 4):
            results[f"seconds_phase{number}_k{k}"] = round(statistics.median(taken[f"K={k}"]), 4)
        print(f"phase {number} ({cells} cells, {operations} operations): " + ", ".join(
            f"{name} {statistics.median(seconds):.3f} s" for name, seconds in taken.items()
        ))  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
