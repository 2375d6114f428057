"""Is choosing images to label fast? Greedy k-centre and MC-dropout scoring against the plain ways, with equal results.

k-centre: 1,000 of 50,000 x 128 features. "textbook": the distance of every point to the newest centre in numpy float64,
one centre at a time, minimum recomputed. "sklearn": scikit-learn's `pairwise_distances_argmin_min` to the newest
centre and a running minimum, which is the inner loop of the core-set query of scikit-activeml 1.0 without its
checks. Both cost the same for every centre, so with --baseline-centres they are timed on the first few and scaled up
(--full measures all). The selections must be equal, row for row. Features are mixtures, as a trained network gives, and
one structureless Gaussian.

MC dropout: T = 25 predictions of a ResNet-18 with dropout after the pooled features, against 25 forward passes.

    python -m benchmarks.al_speed [--full]

Prints a table; the last line is one JSON object. Targets: kcentre_textbook_to_ours and kcentre_sklearn_to_ours >= 10,
same_selection = 1, mc_to_25_passes <= 0.1, mc_max_difference <= 1e-5.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.metrics import pairwise_distances_argmin_min
from torch import Tensor, nn

from benchmarks.timing import measure, show
from dataeff.active.coreset import KCentre, greedy_k_centre, textbook_k_centre
from dataeff.active.mc_dropout import mc_dropout
from dataeff.pretraining.networks import EncoderClassifier, EncoderConfig, build_classifier

POINTS, DIMENSIONS, CHOSEN, PASSES = 50_000, 128, 1_000, 25


def pools() -> dict[str, np.ndarray]:
    """Features float32 [POINTS, DIMENSIONS] by kind."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(POINTS, DIMENSIONS))
    centres = rng.normal(size=(10, DIMENSIONS))
    spread = rng.uniform(0.2, 1, size=(POINTS, 1))
    mixture = centres[rng.integers(10, size=POINTS)] + spread * noise
    low = rng.normal(size=(POINTS, 8)) @ rng.normal(size=(8, DIMENSIONS))
    every = {"mixture": mixture, "low rank": low, "gaussian": noise}
    return {name: features.astype(np.float32) for name, features in every.items()}


def sklearn_k_centre(features: np.ndarray, k: int, priority: np.ndarray) -> np.ndarray:
    """Chosen rows, int64 [k]."""
    points = features.astype(np.float64)
    chosen = [int(np.argmin(priority))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < k:
        nearest = np.minimum(nearest, pairwise_distances_argmin_min(points, points[chosen[-1:]])[1])
        nearest[chosen[-1]] = -np.inf
        farthest = np.flatnonzero(nearest == nearest.max())
        chosen.append(int(farthest[np.argmin(priority[farthest])]))
    return np.array(chosen)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def k_centre(name: str, features: np.ndarray, baseline: int, repeats: int) -> dict[str, float]:
    """Contestants in turn; medians over the repeats of the ratios within a repeat."""
    priority = np.random.default_rng(1).permutation(len(features))
    plain: dict[str, Callable[[], object]] = {
        "textbook": lambda: textbook_k_centre(features, baseline, priority),
        "sklearn": lambda: sklearn_k_centre(features, baseline, priority),
    }
    results: dict[str, KCentre] = {}

    def ours() -> None:
        results["ours"] = greedy_k_centre(features, CHOSEN, priority)

    scale = CHOSEN / baseline
    times: dict[str, list[float]] = {"ours": [], "textbook": [], "sklearn": []}
    ours()
    for _ in range(repeats):
        times["ours"].append(seconds(ours))
        for kind, run in plain.items():
            times[kind].append(scale * seconds(run))
    expected = textbook_k_centre(features, baseline, priority)
    same = np.array_equal(results["ours"].indices[:baseline], expected.indices)
    kernel = sklearn_k_centre(features, baseline, priority)
    key = name.replace(" ", "_")
    found: dict[str, float] = {f"kcentre_{key}_same_selection": float(same), f"kcentre_{key}_compared": baseline}
    for kind in plain:
        found[f"kcentre_{key}_{kind}_to_ours"] = round(
            statistics.median(a / b for a, b in zip(times[kind], times["ours"], strict=True)), 2
        )
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    found |= {f"kcentre_{key}_{kind}_s": round(value, 3) for kind, value in medians.items()}
    agreed = float((kernel == expected.indices).mean())
    print(
        f"{name:12}{medians['ours']:9.3f}{medians['textbook']:11.2f}{medians['sklearn']:10.2f}"
        f"{found[f'kcentre_{key}_textbook_to_ours']:12.1f}{found[f'kcentre_{key}_sklearn_to_ours']:11.1f}"
        f"   {'same' if same else 'DIFFERENT'} ({baseline}), sklearn {agreed:.0%}"
    )
    return found


def after_trunk(model: EncoderClassifier) -> nn.Sequential:
    return nn.Sequential(model.encoder.project, model.linear)


def plain_passes(model: EncoderClassifier, batches: list[Tensor]) -> np.ndarray:
    """Softmax of PASSES whole forward passes, float32 [T, N, C]."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.train()
    return np.stack([torch.cat([model(x).softmax(1) for x in batches]).numpy() for _ in range(PASSES)])


def mc(images: int, repeats: int) -> dict[str, float]:
    """Ours against whole passes on a ResNet-18 of width 16 (a quarter of the paper's channels, to fit a CPU)."""
    torch.manual_seed(0)
    model = build_classifier(EncoderConfig(kind="resnet18", width=16, dropout_p=0.5), 10, 3).eval()
    batches = list(torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(100))

    times = measure(
        {
            "25 forward passes": lambda: plain_passes(model, batches),
            "ours": lambda: mc_dropout(model.encoder.trunk, after_trunk(model), batches, PASSES, seed=3),
            "one forward pass": lambda: [model(x) for x in batches],
        },
        repeats,
    )
    ratios = show(f"MC dropout, {images} images", times, "25 forward passes")
    # The same masks through the whole network, pass by pass.
    few, after = [batches[0][:16]], after_trunk(model)
    whole = mc_dropout(nn.Identity(), nn.Sequential(model.encoder.trunk, after), few, PASSES, seed=3)
    difference = float(np.abs(whole.mean - mc_dropout(model.encoder.trunk, after, few, PASSES, seed=3).mean).max())
    return {
        "mc_to_25_passes": round(ratios["ours"], 4),
        "mc_one_pass_to_25_passes": round(ratios["one forward pass"], 4),
        "mc_max_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="run the baselines over all 1,000 centres (minutes)")
    parser.add_argument("--baseline-centres", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=100, help="for MC dropout")
    arguments = parser.parse_args()
    baseline = CHOSEN if arguments.full else arguments.baseline_centres
    repeats = 1 if arguments.full else arguments.repeats
    results: dict[str, float | str] = {"processor": platform.processor() or platform.machine()}
    print(f"k-centre, {CHOSEN} of {POINTS} x {DIMENSIONS}; seconds")
    print(f"{'features':12}{'ours':>9}{'textbook':>11}{'sklearn':>10}{'textbook/':>12}{'sklearn/':>11}   selection")
    for name, features in pools().items():
        results |= k_centre(name, features, baseline, repeats)
    worst = {
        kind: min(v for k, v in results.items() if k.endswith(f"_{kind}_to_ours")) for kind in ("textbook", "sklearn")
    }
    results |= {f"kcentre_{kind}_to_ours": value for kind, value in worst.items()}
    results["same_selection"] = min(v for k, v in results.items() if k.endswith("_same_selection"))
    results |= mc(arguments.images, arguments.repeats)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
