"""Do DeepMoE and HydraNet save the time of what they leave out? At 50 % of the dense multiply-adds, on the CPU.

Each is timed against its own dense network (all channels, all branches) with the same folded norms, fused operators
and memory format. Patterns and branches are forced, at random; router and gate run all the same. All contestants of a
method take turns in every repeat; ratios are medians of the ratios within a repeat.

    python -m benchmarks.dynamic_speed [--quick]

Prints a table; the last line is one JSON object. Targets: ratio_deepmoe_batch1 <= 0.75, ratio_deepmoe_batch64_8patterns
<= 0.75, ratio_hydranet_batch1 <= 0.75, ratio_hydranet_batch64 <= 0.65. DeepMoE's floor is a network that was cut to one
pattern of channels for good (floor_deepmoe_...): what is above it, the router, its heads and the groups take.
"""

import argparse
import json
import platform

import torch
from torch import Tensor

from benchmarks.timing import Contestant, measure, show
from dataeff.dynamic.deepmoe.inference import DeepMoEInference
from dataeff.dynamic.deepmoe.model import DeepMoE, SparseGatingHeads, build_deepmoe
from dataeff.dynamic.hydranet.inference import HydraInference
from dataeff.dynamic.hydranet.model import HydraConfig, HydraNet
from dataeff.nn.fold import channels_last

SHARE = 0.5
PATTERNS = 8
SIZE = 32
DENSE, SPARSE = "dense", f"{SHARE:.0%} of the multiply-adds"
CUT = "one pattern for all, without a router"


def forced_deepmoe(model: DeepMoE, share: float) -> None:
    """Heads that give the d one-hot embeddings d random patterns, each with this share of a layer's channels."""
    generator = torch.Generator().manual_seed(0)
    assert isinstance(model.heads, SparseGatingHeads)
    rows = []
    for count in model.heads.channels:
        draws = torch.rand(2, count, model.embedding.latent, generator=generator)
        on = draws[0].argsort(0).argsort(0) < round(share * count)
        rows.append(torch.where(on, 1.0 + 0.3 * draws[1], -1.0))
    with torch.no_grad():
        model.heads.weight.copy_(torch.cat(rows))


def deepmoe_runs(arch: str, width: float, batch: int) -> tuple[dict[str, Contestant], dict[str, float]]:
    """Contestants on one batch, and what was checked: executed share of multiply-adds, difference to masking
    in standard deviations of the logits."""
    model = build_deepmoe(arch, 10, 3, width, latent=PATTERNS, class_head="linear").eval()
    full = model.network.full_macs(SIZE, SIZE)
    low, high = 0.0, 1.0
    for _ in range(12):  # the share of channels at which half of the multiply-adds are left, router included
        middle = (low + high) / 2
        counts = torch.tensor([[round(middle * count) for count in model.network.gate_channels]])
        macs = float(model.network.macs(counts, SIZE, SIZE)) + model.router_macs(SIZE, SIZE)
        low, high = (middle, high) if macs < SHARE * full else (low, middle)
    forced_deepmoe(model, (low + high) / 2)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))
    embedding = torch.eye(PATTERNS)[torch.arange(batch) % PATTERNS]
    fast = DeepMoEInference(model)
    with torch.inference_mode():
        output = fast(x, embedding=embedding)
        masked = model(x, embedding=embedding).logits
        difference = float((output.logits - masked).abs().max() / masked.std())
        gates = torch.cat(output.gates, 1)[:1].expand(batch, -1)
        cut = fast.network.pattern((gates[0] > 0).numpy(), (SIZE, SIZE))
    runs: dict[str, Contestant] = {
        DENSE: lambda: fast.network.dense(x),
        SPARSE: lambda: fast(x, embedding=embedding),
        CUT: lambda: cut.run(channels_last(x), gates),
        "masked, PyTorch modules": lambda: model(x, embedding=embedding),
    }
    return runs, {"share": float(output.macs.mean()) / full, "difference": difference}


def hydranet_runs(width: float, depth: int, batch: int) -> tuple[dict[str, Contestant], dict[str, float]]:
    """As `deepmoe_runs`, with random branches; k so that about half of the multiply-adds are left."""
    widths = {"w_stem": width, "w_branch": width, "w_gate": width / 4}
    config = HydraConfig(base="resnet", depth=depth, n_branches=20, k=4, strategy="random", **widths)
    model = HydraNet(config, 100, 3).eval()
    costs = model.costs(SIZE, SIZE)
    k = max(k for k in range(1, 21) if costs.conditional(k) <= SHARE * costs.total)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    executed: Tensor = torch.rand(batch, 20, generator=generator).argsort(1).argsort(1) < k
    fast, dense = HydraInference(model), HydraInference(model, dense=True)
    everything = torch.ones_like(executed)
    with torch.inference_mode():
        output = fast(x, executed=executed)
        masked = dense(x, executed=executed).logits
        difference = float((output.logits - masked).abs().max() / masked.std())
    runs: dict[str, Contestant] = {
        DENSE: lambda: dense(x, executed=everything),
        SPARSE: lambda: fast(x, executed=executed),
    }
    return runs, {"share": float(output.macs.mean()) / costs.total, "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18_cifar", help="base network of DeepMoE")
    parser.add_argument("--width", type=float, default=2, help="its width multiplier")
    parser.add_argument("--hydra-width", type=float, default=4, help="width of HydraNet's stem and branches")
    parser.add_argument("--depth", type=int, default=2, help="units a stage of HydraNet's ResNet")
    parser.add_argument("--repeats", type=int, default=20, help="with batch 64; four times as many with batch 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="2 repeats of small networks, to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.arch, arguments.width = 2, "resnet20", 1
        arguments.hydra_width, arguments.depth = 1, 1
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results: dict[str, float | str | int] = {
        "threads": arguments.threads,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    cases = {
        "deepmoe_batch1": deepmoe_runs(arguments.arch, arguments.width, 1),
        f"deepmoe_batch64_{PATTERNS}patterns": deepmoe_runs(arguments.arch, arguments.width, 64),
        "hydranet_batch1": hydranet_runs(arguments.hydra_width, arguments.depth, 1),
        "hydranet_batch64": hydranet_runs(arguments.hydra_width, arguments.depth, 64),
        # The published widths: convolutions of one branch on one 8x8 map are too short to pay for.
        "hydranet_width1_batch1": hydranet_runs(1, arguments.depth, 1),
    }
    for name, (runs, checked) in cases.items():
        times = measure(runs, arguments.repeats * (4 if "batch1" in name else 1))
        found = show(name, times, DENSE)
        difference = f"{checked['difference']:.1e}"
        print(f"multiply-adds {checked['share']:.3f} of dense; difference to masking {difference} (relative)")
        results[f"ratio_{name}"] = round(found[SPARSE], 4)
        if CUT in found:
            results[f"floor_{name}"] = round(found[CUT], 4)
        results[f"macs_{name}"] = round(checked["share"], 4)
        results[f"relative_difference_{name}"] = checked["difference"]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
