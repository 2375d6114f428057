"""Does skipping blocks save time? SkipNet with real skipping against dense networks of the same depth, on the CPU.

Two dense networks, both with folded norms and in the same memory format as SkipNet. "dense folded" has PyTorch's public
operators (convolution, addition, ReLU one after the other): what one has without this library, and the baseline of the
first table. "dense fused" has the operators that SkipNet's blocks run with here, so that only skipping and its own
costs (gates, gathering) make the difference: the second table, and `..._to_fused` in the JSON. "skip ... unfused" is
SkipNet with PyTorch's operators: the same comparison in the first table. Decisions are forced, at random per image and
block; the gates run all the same. All contestants take turns in every repeat; ratios are medians of the ratios within a
repeat. `--keep-memory` measures as training and serving run, see `keep_freed_memory`.

    python -m benchmarks.skipnet_speed [--quick] [--keep-memory]

Prints a table; the last line is one JSON object. Targets: ratio_share50_batch64 <= 0.55, ratio_share50_batch1 <= 0.65;
with equal operators ratio_share100_unfused_batch64 and ratio_share100_batch64_to_fused <= 1.06.
"""

import argparse
import json
import platform
import statistics
from unittest import mock

import torch
from torch import Tensor

from benchmarks.timing import Contestant, measure, ratios, show
from dataeff.core.runtime import keep_freed_memory
from dataeff.dynamic.skipnet.inference import SkipNetInference
from dataeff.dynamic.skipnet.model import SkipNet, build_skipnet
from dataeff.nn.fold import FoldedResNet

SHARES = (25, 50, 75, 100)
BATCHES = (1, 64)
BASELINE, FUSED = "dense folded", "dense fused"


def contestants(model: SkipNet, batch: int) -> dict[str, Contestant]:
    """Name -> one run on one batch."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    draws = torch.rand(batch, model.num_gates, generator=generator)
    fused, skipping = FoldedResNet(model.backbone), SkipNetInference(model)
    with mock.patch.object(torch.backends.mkldnn, "is_available", return_value=False):  # read by fold_conv
        folded, unfused = FoldedResNet(model.backbone), SkipNetInference(model)

    def skip(share: int) -> Contestant:
        forced = executed(draws, share)
        return lambda: skipping(x, forced=forced)

    runs: dict[str, Contestant] = {
        BASELINE: lambda: folded(x),
        FUSED: lambda: fused(x),
        "dense plain": lambda: model.backbone(x),
    }
    runs |= {f"skip {share} %": skip(share) for share in SHARES}
    half, all_blocks = executed(draws, 50), executed(draws, 100)
    runs["skip 50 % unfused"] = lambda: unfused(x, forced=half)
    runs["skip 100 % unfused"] = lambda: unfused(x, forced=all_blocks)
    # Masked execution costs the same at every share.
    runs["mask 50 %"] = lambda: model(x, mode="hard")
    return runs


def executed(draws: Tensor, share: int) -> Tensor:
    """Decisions (B, N) of which exactly `share` percent of all are to execute, rounded."""
    count = round(draws.numel() * share / 100)
    chosen = torch.zeros(draws.numel(), dtype=torch.bool)
    chosen[draws.reshape(-1).argsort()[:count]] = True
    return chosen.view_as(draws)


@torch.no_grad()
def calibrated(model: SkipNet) -> SkipNet:
    """An untrained network whose BatchNorms have seen images: without, features grow a thousandfold over the depth."""
    for seed in range(20):
        images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        model.train()(images, mode="full")
    return model.eval()


@torch.inference_mode()
def largest_difference(model: SkipNet) -> float:
    """Between the logits of real skipping and of masked execution with the same decisions."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(16, 3, 32, 32, generator=generator)
    forced = torch.rand(16, model.num_gates, generator=generator) < 0.5
    masked = model(x, mode="random", draws=(~forced).float(), keep=0.5).logits
    return float((SkipNetInference(model)(x, forced=forced).logits - masked).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=110, help="6n+2")
    parser.add_argument("--gate", default="rnn", choices=["rnn", "ffgate1", "ffgate2", "linear"])
    parser.add_argument("--repeats", type=int, default=20, help="with batch 64; four times as many with batch 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="depth 20 and 2 repeats, to see that it runs")
    parser.add_argument("--keep-memory", action="store_true", help="let the C library keep freed memory")
    arguments = parser.parse_args()
    if arguments.keep_memory:
        keep_freed_memory()
    if arguments.quick:
        arguments.depth, arguments.repeats = 20, 2
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = calibrated(build_skipnet(arguments.depth, 10, arguments.gate))
    results: dict[str, float | str | int] = {
        "depth": arguments.depth,
        "gate": arguments.gate,
        "threads": arguments.threads,
        "keep_memory": arguments.keep_memory,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "max_abs_difference": largest_difference(model),
    }
    for batch in BATCHES:
        repeats = arguments.repeats * (4 if batch == 1 else 1)
        times = measure(contestants(model, batch), repeats)
        for name, ratio in show(f"batch {batch}, {repeats} repeats", times, BASELINE).items():
            seconds = times[name]
            results[f"ratio_{_key(name)}_batch{batch}"] = round(ratio, 4)
            results[f"ratio_of_minima_{_key(name)}_batch{batch}"] = round(min(seconds) / min(times[BASELINE]), 4)
            results[f"ms_{_key(name)}_batch{batch}"] = round(statistics.median(seconds) * 1e3, 3)
        print(f"\nthe same against {FUSED!r}")
        for name in (f"skip {share} %" for share in SHARES):
            ratio = statistics.median(ratios(times, name, FUSED))
            print(f"{name:40}{ratio:30.3f}")
            results[f"ratio_{_key(name)}_batch{batch}_to_fused"] = round(ratio, 4)
    print(json.dumps(results))


def _key(name: str) -> str:
    """ "skip 50 % unfused" -> "share50_unfused", "mask 50 %" -> "mask_share50"."""
    kind, share, *rest = name.replace(" %", "").split()
    if kind == "dense":
        return f"dense_{share}"
    return "_".join([*(["mask"] if kind == "mask" else []), f"share{share}", *rest])


if __name__ == "__main__":
    main()
