"""Claims of the robustness study (spec nas_adversarial_robustness section 6, numbers 1 to 13), and of its attacks
(sections 4 and 8); T0 to T13 recompute the published tables. Repeats are the seeds. All figures are percentages or
their differences, in points."""

from collections.abc import Callable, Sequence
from typing import Any

from dataeff.core.config import merge
from ray_jobs.claims import Arms, Check, Claim, Result, Results, Run, by_mean, data_at, preset_at
from ray_jobs.claims.robustness_published import table_claims

HANDCRAFTED = ("resnet18", "resnet50", "densenet121", "densenet169", "vgg16_bn")
NAS = ("darts", "p_darts", "pc_darts", "nsga_net")
EFFICIENT = ("efficientnet_b0", "efficientnet_b2", "efficientnet_b4")
ATTACKS = ("fgsm", "ffgsm", "pgd", "apgd")
# Random cells and their ensemble, beside each other. At cpu scale trained as in the spec's trial (section 8, item 5:
# 2,000 images of clothes at 14 pixels, six epochs, 8/255), and attacked on more images than the other networks.
CELLS: dict[str, dict[str, Any]] = {
    "cpu": {"augment": "none", "stage": {"iterations": 375, "batch": 32}, "images": 1000, "sweep_eps": [16, 24]},
    "gpu": {},
}
# Under which attacks the ensemble must be before, and by how many points (spec section 8).
LEAD = {"cpu": (("pgd",), 3.0), "gpu": (("pgd@4/255", "pgd"), 0.0)}
ORDER = "networks trained this briefly do not rank as published ones (spec section 8, item 6): reported, not judged"


def claims(scale: str, data: str | None) -> list[Claim]:
    """The claims at a scale.

    Args:
        data: data set in place of "digits"; at scale "gpu" images of 32x32.

    Raises:
        ValueError: scale "gpu" without data.
    """
    arms = Arms(preset_at("robustness", scale), data_at(scale, data, "digits"))

    def run(network: str) -> Run:
        return arms.run(network, network=network)

    hand, nas, efficient = ([run(name) for name in names] for names in (HANDCRAFTED, NAS, EFFICIENT))
    random, ensemble = (arms.run(name, network=name, **CELLS[scale]) for name in ("random", "ensemble"))
    led, points = LEAD[scale]
    probed = [
        arms.run(f"{name}_probed", network=name, masking=True, sweep_eps=[1, 2, 4]) for name in ("resnet18", "vgg16_bn")
    ]
    transfers = [_transfer(arms, attacked, other) for attacked, other in (probed, probed[::-1])]
    clamped = [
        arms.run(
            f"{name}_clamped", network=name, attacks=["fgsm", "pgd"], sweep_eps=[], budget={"space": "model_input"}
        )
        for name in ("resnet18", "vgg16_bn")
    ]

    def lead(name: str) -> Callable[[Results], float]:
        """The best hand-crafted network before the best NAS network."""
        return lambda results: _best(results, hand, name) - _best(results, nas, name)

    def leads(*names: str) -> Callable[[Results], dict[str, float]]:
        return lambda results: {f"hand_before_nas_{name}": lead(name)(results) for name in names}

    versus = (*hand, *nas)
    found = [
        Claim(
            "1",
            "The best hand-crafted network has a higher HRS than the best NAS network on CIFAR-10",
            "41.06 against 19.92",
            versus,
            leads("hrs"),
            untestable=ORDER,
        ),
        Claim(
            "2",
            "Under PGD the best hand-crafted network is before the best NAS network, on every data set",
            "26.21 > 11.1; 7.37 > 3.09; 10.46 > 6.48; 27.59 > 19.29",
            versus,
            leads("pgd"),
            untestable=ORDER,
        ),
        Claim(
            "3",
            "Under FGSM and F-FGSM the best NAS network is before the best hand-crafted one on CIFAR",
            "66.08 against 53.53, 58.38 against 49.47",
            versus,
            leads("fgsm", "ffgsm"),
            untestable=ORDER,
        ),
        Claim(
            "4",
            "On ImageNet DenseNet-169 is before every NAS network under all attacks",
            "PGD 10.46 against 6.48",
            untestable="needs ImageNet and the published weights",
        ),
        Claim(
            "5",
            "On Flowers-102 VGG-16-BN is best under all attacks",
            "HRS 42.78 against 32.12",
            untestable="needs Flowers-102 and ImageNet weights to tune from",
        ),
        Claim(
            "6",
            "EfficientNet-B4 has a higher HRS than the best of the other networks",
            "28.71 against 18.80",
            (*efficient, *versus),
            lambda results: {"b4_before_best": _of(results, efficient[-1], "hrs") - _best(results, versus, "hrs")},
            untestable=ORDER,
        ),
        Claim(
            "7",
            "Within a family accuracy under PGD rises with size, up to 20 to 25 million parameters",
            "in 4 of 5 families; EfficientNet's peak is B4",
            (*efficient, *hand[:4]),
            lambda results: {
                "resnet50_before_18": _of(results, hand[1], "pgd") - _of(results, hand[0], "pgd"),
                "densenet169_before_121": _of(results, hand[3], "pgd") - _of(results, hand[2], "pgd"),
                "efficientnet_b4_before_b0": _of(results, efficient[-1], "pgd") - _of(results, efficient[0], "pgd"),
            },
            untestable=f"{ORDER}; all networks are far below 20 million",
        ),
        Claim(
            "8",
            "HRS per parameter falls with size for EfficientNet, ResNet and DenseNet",
            "14.90 to 1.59; 4.69 to 4.08; 12.89 to 10.60",
            (*efficient, *hand[:4]),
            lambda results: {
                "efficientnet_b4_to_b0": _per_parameter(results, efficient[0], efficient[-1]),
                "resnet50_to_18": _per_parameter(results, hand[0], hand[1]),
                "densenet169_to_121": _per_parameter(results, hand[2], hand[3]),
            },
            tuple(
                Check(name, at_most=1.0) for name in ("efficientnet_b4_to_b0", "resnet50_to_18", "densenet169_to_121")
            ),
        ),
        Claim(
            "9",
            "Random cells are before the best searched cells under PGD, and behind them without attack",
            "14.47 against 9.84; 95.57 against 97.12",
            (random, *nas[:3]),
            lambda results: {
                f"random_before_searched_{name}": _of(results, random, name) - _best(results, nas[:3], name)
                for name in ("pgd", "clean")
            },
            untestable=ORDER,
        ),
        Claim(
            "10",
            "The ensemble of small random networks is before one random network of equally many cells under PGD, and "
            "not before it without attack",
            "21.68 against 14.47; 93.77 against 95.57; at small scale 49.7 against 41.5, required 3 points",
            (random, ensemble),
            lambda results: (
                {
                    f"ensemble_before_random_{name}": _of(results, ensemble, name) - _of(results, random, name)
                    for name in ("clean", *ATTACKS, *(f"pgd@{eps}/255" for eps in random.settings["sweep_eps"]))
                }
                | {f"random_{name}": _of(results, random, name) for name in ("clean", *led)}
            ),
            (
                *(Check(f"ensemble_before_random_{name}", at_least=points) for name in led),
                Check("ensemble_before_random_clean", at_most=1.0),
            ),
        ),
        Claim(
            "11",
            "For every network AutoPGD leaves no more than PGD, PGD no more than the one-step attacks, and these no "
            "more than no attack (a point of noise allowed)",
            "one exception in all tables",
            (*versus, *efficient, random, ensemble),
            lambda results: {"worst_disorder": max(_disorder(result) for result in results.values())},
            (Check("worst_disorder", at_most=1.0),),
        ),
        Claim(
            "12",
            "Every NAS network is before every hand-crafted one without attack on CIFAR-10, so that the rankings by "
            "clean accuracy and by HRS disagree",
            "96.94 to 97.92 against 93.48 to 94.76",
            versus,
            leads("clean"),
            untestable=ORDER,
        ),
        Claim(
            "13",
            "EfficientNet-B1 is behind B0 and B2 under PGD",
            "5.47 against 8.11 and 11.40",
            untestable="a property of published weights",
        ),
        Claim(
            "A1",
            "Accuracy under PGD never rises with eps, and is chance at eps = 0.5",
            "VGG 82.8, 72.6, 46.8, 9.8 at 2, 4, 8, 16/255 (spec section 8, item 1); required 12 at 0.5",
            tuple(probed),
            lambda results: {
                "largest_rise": max(_largest_rise(result) for result in results.values()),
                "at_large_eps": max(result.metrics["test_pgd_large_eps"] for result in results.values()),
            },
            (Check("largest_rise", at_most=0.0), Check("at_large_eps", at_most=12.0)),
        ),
        Claim(
            "A2",
            "In normalised units the clamp alone does what FGSM seems to do",
            "18.4 and 10.2 left by the clamp alone (spec section 8, item 2); required within 3 points of FGSM",
            tuple(clamped),
            lambda results: {
                "distance_to_fgsm": max(
                    abs(result.metrics["test_clamp_only"] - result.metrics["test_fgsm"]) for result in results.values()
                ),
                "lost_by_the_clamp": min(
                    result.metrics["test_clean"] - result.metrics["test_clamp_only"] for result in results.values()
                ),
            },
            (Check("distance_to_fgsm", at_most=3.0),),
        ),
        Claim(
            "A3",
            "The reported PGD is no weak attack: five times the steps, or the restarts, take little more, and noise "
            "takes less",
            "PGD-50 <= PGD-10 up to noise (spec section 4)",
            tuple(probed),
            lambda results: {
                "more_steps_take": max(_taken(result, "pgd_more_steps") for result in results.values()),
                "more_restarts_take": max(_taken(result, "pgd_more_restarts") for result in results.values()),
                "noise_takes": max(_taken(result, "noise") for result in results.values()),
            },
            (
                Check("more_steps_take", at_most=2.0),
                Check("more_restarts_take", at_most=2.0),
                Check("noise_takes", at_most=0.0),
            ),
        ),
        Claim(
            "A4",
            "PGD made on another network, which sees no gradient of the attacked one, takes less than PGD on itself",
            "a sign of a hidden gradient otherwise (spec section 4); a point of noise allowed",
            (*probed, *transfers),
            lambda results: {
                "transfer_takes": max(
                    _of(results, attacked, "pgd") - _of(results, transfer, "pgd")
                    for attacked, transfer in zip(probed, transfers, strict=True)
                )
            },
            (Check("transfer_takes", at_most=1.0),),
        ),
        *table_claims(),
    ]
    return by_mean(found)


def _transfer(arms: Arms, attacked: Run, other: Run) -> Run:
    """`attacked` under the PGD that follows the gradients of `other`."""
    return Run(
        f"{attacked.name}_transfer",
        arms.data,
        merge(arms.preset, {"attacks": ["pgd"], "sweep_eps": []}),
        after=(attacked, other),
        fill=lambda results: {
            "trained": str(results[attacked.name].artifact),
            "surrogate": str(results[other.name].artifact),
        },
    )


def _of(results: Results, run: Run, name: str) -> float:
    return results[run.name].metrics[f"test_{name}"]


def _best(results: Results, runs: Sequence[Run], name: str) -> float:
    return max(_of(results, run, name) for run in runs)


def _per_parameter(results: Results, small: Run, large: Run) -> float:
    """PP-HRS of the larger network as a share of the smaller one's."""
    scores: list[Any] = [_of(results, run, "hrs") / _of(results, run, "params") for run in (small, large)]
    return float(scores[1] / scores[0])


def _disorder(result: Result) -> float:
    """The most that a stronger attack leaves above a weaker one."""
    clean, fgsm, ffgsm, pgd, apgd = (result.metrics[f"test_{name}"] for name in ("clean", *ATTACKS))
    return max(apgd - pgd, pgd - fgsm, pgd - ffgsm, fgsm - clean, ffgsm - clean)


def _largest_rise(result: Result) -> float:
    names = ("clean", "pgd@1/255", "pgd@2/255", "pgd@4/255", "pgd", "pgd_large_eps")
    values = [result.metrics[f"test_{name}"] for name in names]
    return max(after - before for before, after in zip(values, values[1:], strict=False))


def _taken(result: Result, name: str) -> float:
    """Points that `name` leaves below PGD."""
    return result.metrics["test_pgd"] - result.metrics[f"test_{name}"]
