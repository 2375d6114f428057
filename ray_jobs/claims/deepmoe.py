"""DeepMoE's claims D1 to D14 (spec deepmoe section 6) and the requirements of section 8.1."""

from typing import Any

import numpy as np
import torch

from dataeff.core.artifact import read_artifact
from dataeff.core.config import merge, parse_config, read_yaml
from dataeff.data import Preprocess, open_splits
from dataeff.dynamic.deepmoe.analysis import CIFAR100_GROUPS, shuffle_embeddings, swap_summary
from dataeff.dynamic.deepmoe.experiment import DeepMoEConfig, build_model
from dataeff.dynamic.deepmoe.model import DeepMoE, build_deepmoe
from dataeff.dynamic.deepmoe.network import WIDENING, build_network, solve_widening
from ray_jobs.claims import Arms, Check, Claim, Result, Results, Run, data_at
from ray_jobs.cli import CONFIGS

PRESETS = {"cpu": "claims_cpu", "gpu": "gpu"}
WIDE_LAMBDAS, NARROW_LAMBDAS = (0.0, 3.0, 6.0, 10.0), (0.0, 3.0, 6.0)

NO_GAIN = "did not appear in any CPU trial and must not be asserted there (spec 8.1)"
NEEDS_GPU = "needs networks and training of scale gpu (spec 8.2)"
NEEDS_CITYSCAPES = "needs CityScapes and the published schedule"


def claims(scale: str, data: str | None) -> list[Claim]:
    """The table's rows at a scale.

    Args:
        data: data set in place of "digits"; at scale "gpu" CIFAR, such as "parquet:DIR?cache=DIR".

    Raises:
        ValueError: scale "gpu" without data.
    """
    data = data_at(scale, data, "digits")
    preset = read_yaml(CONFIGS / "deepmoe" / f"{PRESETS[scale]}.yaml")
    return (_cpu_claims if scale == "cpu" else _gpu_claims)(MoEArms(preset, data))


class MoEArms(Arms):
    """Arms of DeepMoE."""

    def static(self, name: str, **changes: Any) -> Run:
        """A static network that sees the mini-batches of both stages."""
        both = self.preset["joint"]["iterations"] + self.preset["finetune"]["iterations"]
        return self.run(name, arm="static", joint={"iterations": both}, **changes)


def _cpu_claims(arms: MoEArms) -> list[Claim]:
    base = arms.static("base", width=1)
    wide_base = arms.static("wide_base", width=2)
    thin = {width: arms.static(f"thin_{width:g}", width=width) for width in (0.25, 0.5)}
    wide = {lam: arms.run(f"wide_lambda{lam:g}", lam=lam) for lam in WIDE_LAMBDAS}
    narrow = {lam: arms.run(f"narrow_lambda{lam:g}", width=1, lam=lam) for lam in NARROW_LAMBDAS}
    without_mu = arms.run("narrow_lambda3_mu0", width=1, lam=3.0, mu=0.0)
    latent32 = arms.run("wide_latent32_lambda10", latent=32, lam=10.0)
    tails = arms.run("hard_moe", arm="hard_moe", width=1)
    rnp = arms.run("rnp", arm="rnp", width=1)

    def cheaper(results: Results) -> dict[str, float]:
        found = {
            f"{name}_largest_rise_of_cost": largest_rise([figure(results, run, "base_macs") for run in runs.values()])
            for name, runs in (("wide", wide), ("narrow", narrow))
        }
        strongest = narrow[6.0]
        return found | {
            "narrow_6_less_accurate_than_base": accuracy(results, base) - accuracy(results, strongest),
            "narrow_6_base_cost_removed": 1
            - figure(results, strongest, "base_macs") / results[base.name].metrics["test_macs"],
            **{f"accuracy_{run.name}": accuracy(results, run) for run in (*wide.values(), *narrow.values())},
        }

    def beats_thin(results: Results) -> dict[str, float]:
        dynamic, static = narrow[6.0], thin[0.25]
        return {
            "more_accurate_than_thin": accuracy(results, dynamic) - accuracy(results, static),
            "more_accurate_than_thin_half": accuracy(results, dynamic) - accuracy(results, thin[0.5]),
            "base_macs": figure(results, dynamic, "base_macs"),
            "macs_with_embedding": figure(results, dynamic, "macs"),
            "thin_macs": figure(results, static, "macs"),
            "thin_half_macs": figure(results, thin[0.5], "macs"),
            "accuracy_of_the_embedding_alone": figure(results, dynamic, "embedding_accuracy"),
        }

    return [
        _wide_beats_base(base, wide[10.0], NO_GAIN),
        _hard_moe_does_not_help(base, tails, wide[10.0], NO_GAIN),
        Claim(
            "D3",
            "narrow-DeepMoE at a budget beats the static thin net of about equal base multiply-adds (here; against "
            "pruned networks see the claims of the method pruning)",
            "26.2 % top-1 error at 1.6e9 against 29.0 % at 1.7e9 (ThiNet)",
            (narrow[6.0], *thin.values()),
            beats_thin,
            (Check("more_accurate_than_thin", at_least=0.01),),
        ),
        _flatter_than_rnp(narrow[6.0], rnp, NEEDS_GPU),
        Claim(
            "D5",
            "Fine-tuning with fixed gates helps after aggressive sparsification, and never hurts (validation split)",
            "+4 points after 10 epochs (VGG-16, CIFAR-100)",
            (latent32, wide[10.0]),
            lambda results: {
                "gain_of_latent_32": finetune_gain(results[latent32.name]),
                "gain_of_latent_k": finetune_gain(results[wide[10.0].name]),
            },
            (Check("gain_of_latent_32", at_least=0.0), Check("gain_of_latent_k", at_least=-0.005)),
        ),
        _swaps(wide[10.0], at_least=0.3),
        *_table_3_4((), untestable=NEEDS_GPU),
        _gap_grows((), untestable=NEEDS_GPU),
        *_segmentation(),
        Claim(
            "D13",
            "Cost falls strictly in lambda; accuracy is flat, then falls",
            "direction",
            (base, *wide.values(), *narrow.values()),
            cheaper,
            (
                Check("wide_largest_rise_of_cost", at_most=-1e-9),
                Check("narrow_largest_rise_of_cost", at_most=-1e-9),
                Check("narrow_6_less_accurate_than_base", at_most=0.02),
                Check("narrow_6_base_cost_removed", at_least=0.5),
            ),
        ),
        _embedding_cost(),
        Claim(
            "8.1-3",
            "The embedding's loss (mu = 1) prevents collapse: far more accurate than mu = 0 at the same lambda",
            "none (requirement of the small-scale validation: 8 points)",
            (narrow[3.0], without_mu),
            lambda results: {
                "gain_of_mu_1": accuracy(results, narrow[3.0]) - accuracy(results, without_mu),
                "accuracy_mu_0": accuracy(results, without_mu),
            },
            (Check("gain_of_mu_1", at_least=0.08),),
        ),
        Claim(
            "8.1-6",
            "Gates depend on the image at the target lambda (latent size K); with latent 32 they turn static",
            "none (requirement of the small-scale validation: 0.3)",
            (wide[10.0], latent32, wide_base),
            lambda results: {
                "input_dependent_share": figure(results, wide[10.0], "input_dependent_share"),
                "latent_32_input_dependent_share": figure(results, latent32, "input_dependent_share"),
                "latent_32_warned": float("static gating" in results[latent32.name].log),
                "wide_base_accuracy": accuracy(results, wide_base),
                "wide_lambda10_accuracy": accuracy(results, wide[10.0]),
            },
            (Check("input_dependent_share", at_least=0.3),),
        ),
    ]


def _gpu_claims(arms: MoEArms) -> list[Claim]:
    both = {"joint": merge(arms.preset["joint"], {"iterations": 15600})}
    base = arms.static("base", width=1)
    wide_base = arms.static("wide_base", width=2)
    wide = arms.run("wide")
    narrow = arms.run("narrow", width=1)
    free = {"target_share": None}
    lambdas = {lam: arms.run(f"wide_lambda{lam:g}", lam=lam, **free) for lam in (0.5, 2.0, 4.0, 8.0)}
    frozen_never = arms.run("wide_without_finetune", finetune={"iterations": 0}, **both)
    tails = arms.run("hard_moe", arm="hard_moe", width=1)
    vgg = {"arch": "vgg16", "width": 1}
    vgg_lr = {"joint": {"lr": 0.01}}
    narrow_vgg = arms.run("narrow_vgg16", **vgg, **vgg_lr)
    rnp = arms.run("rnp", arm="rnp", **vgg, **vgg_lr)
    widened = tuple(arms.run(strategy, widening=strategy, **vgg, **vgg_lr) for strategy in WIDENING)
    regularised = tuple(
        (
            arms.static(f"static_r18_x{width}", arch="resnet18_cifar", width=width),
            arms.run(f"moe_r18_x{width}", arch="resnet18_cifar", width=width, lam=2.0, **free),
        )
        for width in (2, 4)
    )
    return [
        _wide_beats_base(base, wide),
        _hard_moe_does_not_help(base, tails, wide),
        Claim(
            "D3",
            "narrow-DeepMoE dominates static pruning: lowest error and lowest multiply-adds",
            "26.2 % top-1 error at 1.6e9, 56.8 % fewer multiply-adds (ResNet-50, ImageNet)",
            (base, narrow),
            lambda results: {
                "less_accurate_than_base": accuracy(results, base) - accuracy(results, narrow),
                "reduction": figure(results, narrow, "reduction"),
            },
            (),
            "the pruned networks are runs of the method pruning; compare in its table",
        ),
        _flatter_than_rnp(narrow_vgg, rnp),
        Claim(
            "D5",
            "Fine-tuning with fixed gates helps (validation split)",
            "+4 points after 10 epochs (VGG-16, CIFAR-100)",
            (narrow_vgg, wide, frozen_never),
            lambda results: {
                "gain_of_vgg": finetune_gain(results[narrow_vgg.name]),
                "gain_of_wide": finetune_gain(results[wide.name]),
                "better_than_joint_throughout": accuracy(results, wide) - accuracy(results, frozen_never),
            },
            (Check("gain_of_vgg", at_least=0.0),),
        ),
        _swaps(wide, at_least=0.2),
        *_table_3_4(widened),
        _gap_grows(regularised),
        *_segmentation(),
        Claim(
            "D13",
            "Cost falls in lambda; accuracy is flat, then falls",
            "direction",
            (wide_base, *lambdas.values()),
            lambda results: {
                "largest_rise_of_cost": largest_rise([figure(results, run, "macs") for run in lambdas.values()]),
                **{f"accuracy_{run.name}": accuracy(results, run) for run in (wide_base, *lambdas.values())},
            },
            (Check("largest_rise_of_cost", at_most=0.0),),
        ),
        _embedding_cost(),
    ]


# --- figures ----------------------------------------------------------------------------------------------------------


def figure(results: Results, run: Run, name: str) -> float:
    return results[run.name].metrics[f"test_{name}"]


def accuracy(results: Results, run: Run) -> float:
    return figure(results, run, "accuracy")


def largest_rise(values: list[float]) -> float:
    """Relative to the first value."""
    return float(np.diff(values).max() / values[0])


def finetune_gain(result: Result) -> float:
    """Validation accuracy at the end of stage 2 minus that at the end of stage 1."""
    last = {row["stage"]: row["val_accuracy"] for row in result.rows}
    return float(last[2.0] - last[1.0])


def swaps(result: Result) -> dict[str, float]:
    """Accuracy with the embedding of another image, by the class (and the coarse group) of that image."""
    artifact = read_artifact(result.artifact)
    config = parse_config(DeepMoEConfig, artifact.config)
    model = build_model(config, len(artifact.card.classes), artifact.card.input_shape[0])
    assert isinstance(model, DeepMoE)
    model.load_state_dict(artifact.state)
    source = open_splits(result.summary["data"]).test
    matrix = shuffle_embeddings(model.eval(), source, Preprocess.from_dict(artifact.card.preprocess))
    return swap_summary(matrix, CIFAR100_GROUPS if len(matrix) == 100 else None)


# --- claims that both scales measure in the same way ------------------------------------------------------------------


def _wide_beats_base(base: Run, wide: Run, untestable: str = "") -> Claim:
    return Claim(
        "D1",
        "wide-DeepMoE at about 50 % active channels beats the unwidened base at about equal multiply-adds",
        "0.8 to 1.2 points on ImageNet, 1.7 / 3.3 on CIFAR-100, 0.5 on CIFAR-10",
        (base, wide),
        lambda results: {
            "more_accurate_by": accuracy(results, wide) - accuracy(results, base),
            "cost_over_base": figure(results, wide, "macs") / figure(results, base, "macs"),
            "active_share": figure(results, wide, "active_share"),
            "input_dependent_share": figure(results, wide, "input_dependent_share"),
        },
        (
            Check("more_accurate_by", at_least=0.0),
            Check("cost_over_base", at_most=1.1),
            Check("input_dependent_share", at_least=0.05),
        ),
        untestable,
    )


def _hard_moe_does_not_help(base: Run, tails: Run, wide: Run, untestable: str = "") -> Claim:
    return Claim(
        "D2",
        "Hard MoE does not help where wide-DeepMoE does",
        "30.43 % error against 30.24 % of the base and 29.05 % of wide-DeepMoE (ResNet-18, ImageNet)",
        (base, tails, wide),
        lambda results: {
            "hard_moe_more_accurate_than_base": accuracy(results, tails) - accuracy(results, base),
            "wide_more_accurate_than_hard_moe": accuracy(results, wide) - accuracy(results, tails),
        },
        (Check("wide_more_accurate_than_hard_moe", at_least=0.0),),
        untestable,
    )


def _flatter_than_rnp(narrow: Run, rnp: Run, untestable: str = "") -> Claim:
    return Claim(
        "D4",
        "narrow-DeepMoE is more accurate than RNP (here: one point of the error-cost curve)",
        "flatter curve without fine-tuning (VGG-16, CIFAR-100)",
        (narrow, rnp),
        lambda results: {
            "more_accurate_by": accuracy(results, narrow) - accuracy(results, rnp),
            "narrow_reduction": 1 - figure(results, narrow, "base_macs") / _full(results, narrow),
            "rnp_reduction": figure(results, rnp, "reduction"),
        },
        (Check("more_accurate_by", at_least=0.0),),
        untestable,
    )


def _full(results: Results, run: Run) -> float:
    return read_artifact(results[run.name].artifact).card.cost["full_macs"]


def _swaps(run: Run, at_least: float) -> Claim:
    def measure(results: Results) -> dict[str, float]:
        found = swaps(results[run.name])
        near, far = ("in_group", "out_of_group") if "in_group" in found else ("same_class", "other_class")
        return {"own_gates_better_by": found[near] - found[far], **found}

    return Claim(
        "D7",
        "An embedding of the same coarse group hurts far less than one of another (without coarse groups: same class)",
        "20 to 60 points; a dolphin with a tulip's gates: about 1 %",
        (run,),
        measure,
        (Check("own_gates_better_by", at_least=at_least),),
    )


def _table_3_4(runs: tuple[Run, ...], untestable: str = "") -> list[Claim]:
    def counts(results: Results) -> dict[str, float]:
        found = {}
        for strategy in ("W1-High", "W1-Mid"):
            network = build_network("vgg16", 100, widths=solve_widening(strategy, 24.15e6))
            found[f"{strategy}_params"] = float(network.conv_weights())
            found[f"{strategy}_macs"] = network.full_macs(32, 32)
        return found

    def order(results: Results) -> dict[str, float]:
        found = {run.name: accuracy(results, run) for run in runs}
        if not found:
            return {}
        others = [value for name, value in found.items() if name != "W13-All"]
        return {
            **found,
            "all_better_than_the_best_other_by": found["W13-All"] - max(others),
            "middle_below_high_by": found["W1-High"] - found["W1-Mid"],
        }

    checks = (Check("all_better_than_the_best_other_by", at_least=0.0),) if runs else ()
    middle = (Check("middle_below_high_by", at_least=0.0),) if runs else ()
    return [
        Claim(
            "D8",
            "Widening and gating all layers is best at equal parameters",
            "73.91 % against 71.96 to 72.51 %; at equal multiply-adds too 73.39 against 72.68 to 73.33 %",
            runs,
            order,
            checks,
            untestable,
        ),
        Claim(
            "D9",
            "Bottom or top layers profit more from gating than the middle layer",
            "at equal parameters and multiply-adds; at equal parameters the middle is slightly above the top",
            runs,
            order,
            middle,
            untestable,
        ),
        Claim(
            "T3.4",
            "Parameters and multiply-adds of the widened networks as printed (counted, no training)",
            "24.15 M and 3.51e8 (W1-High), 24.16 M and 9.18e8 (W1-Mid)",
            measure=counts,
            checks=(
                Check("W1-High_params", at_least=24.1e6, at_most=24.2e6),
                Check("W1-High_macs", at_least=3.50e8, at_most=3.52e8),
                Check("W1-Mid_params", at_least=24.1e6, at_most=24.2e6),
                Check("W1-Mid_macs", at_least=9.16e8, at_most=9.2e8),
            ),
        ),
    ]


def _gap_grows(pairs: tuple[tuple[Run, Run], ...], untestable: str = "") -> Claim:
    def measure(results: Results) -> dict[str, float]:
        gaps = [accuracy(results, moe) - accuracy(results, static) for static, moe in pairs]
        return {"gap_at_2x": gaps[0], "gap_at_4x": gaps[-1], "grows_by": gaps[-1] - gaps[0]} if gaps else {}

    return Claim(
        "D10",
        "DeepMoE with lambda 2 is cheaper and more accurate than the widened static net, the more the wider",
        "direction, 2x to 8x (modified ResNet-18, CIFAR-100)",
        tuple(run for pair in pairs for run in pair),
        measure,
        (Check("grows_by", at_least=0.0),) if pairs else (),
        untestable,
    )


def _segmentation() -> list[Claim]:
    return [
        Claim(
            "D11",
            "Segmentation point A beats DRN-A-50 at a little more cost",
            "68.8 against 67.3 mIoU for 14 % more multiply-adds",
            untestable=NEEDS_CITYSCAPES,
        ),
        Claim(
            "D12",
            "Segmentation point B beats the static wide net at less cost",
            "71.2 against 69.3 mIoU at 1738e9 against 2173e9",
            untestable=NEEDS_CITYSCAPES,
        ),
    ]


def _embedding_cost() -> Claim:
    def measure(results: Results) -> dict[str, float]:
        with torch.device("meta"):
            cifar = build_deepmoe("resnet56", width=1)
            imagenet = build_deepmoe("resnet50", 1000, width=1, embedding_widths=(16, 32, 64, 128, 128))
        return {
            "resnet56_ratio": cifar.embedding.macs(32, 32) / cifar.network.full_macs(32, 32),
            "resnet50_ratio": imagenet.embedding.macs(224, 224) / imagenet.network.full_macs(224, 224),
        }

    return Claim(
        "D14",
        "The embedding network is about 2 % of the base cost (counted, no training)",
        "about 2 %",
        measure=measure,
        checks=(
            Check("resnet56_ratio", at_least=0.01, at_most=0.03),
            Check("resnet50_ratio", at_least=0.01, at_most=0.03),
        ),
    )
