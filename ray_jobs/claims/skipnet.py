"""SkipNet's claims S1 to S9 and S12 to S15 (spec skipnet section 6); bounds: sections 8.1 (cpu) and 8.2 (gpu)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dataeff.core.config import merge
from ray_jobs.claims import Arms, Check, Claim, Results, Run, data_at, preset_at
from ray_jobs.claims.skipnet_figures import (
    accuracy,
    analyses,
    class_skips,
    correct_images,
    easy_and_hard,
    executed_share,
    largest_rise,
    measure_gate_costs,
    reduction,
    seconds_per_iteration,
    spearman,
    trained,
)

SKIP_ALL = "skipping every block is the optimum"
PUBLISHED_ITERATIONS = (64_000, 10_000)

ONE_DEPTH = "needs two depths trained to a comparable accuracy; the scale's network is ResNet-20 only (spec 8.1)"
STATIC = "policies become nearly static per block on 12x12 digits (spec 8.1, item 6), so that inputs hardly differ"
FEW_GATES = "ResNet-20 has 2, 3 and 3 gates in its groups; the statement is about depth 74 on CIFAR-10"


def claims(scale: str, data: str | None) -> list[Claim]:
    """The table's rows at a scale.

    Args:
        data: data set in place of "digits-easy-hard"; at scale "gpu" CIFAR-10, such as "parquet:DIR?cache=DIR".

    Raises:
        ValueError: scale "gpu" without data.
    """
    data = data_at(scale, data, "digits-easy-hard")
    return (_cpu_claims if scale == "cpu" else _gpu_claims)(SkipNetArms(preset_at("skipnet", scale), data))


class SkipNetArms(Arms):
    """Arms of SkipNet."""

    def hrl(self, name: str, start: Run, changes: Mapping[str, Any]) -> Run:
        """Stage 2 from the stage 1 of `start`, an SP run."""

        def fill(results: Results) -> dict[str, Any]:
            return {"start_from": str(results[start.name].artifact)}

        settings = merge(start.settings, {"arm": "hrl_sp", **changes})
        return self.made.setdefault(name, Run(name, self.data, settings, (start,), fill))

    def random_skipping(self, name: str, like: Run, changes: Mapping[str, Any]) -> Run:
        """SDV that executes the share of blocks that `like` executes."""

        def fill(results: Results) -> dict[str, Any]:
            return {"keep": round(results[like.name].metrics["test_executed_share"], 4)}

        settings = merge(self.preset, {"arm": "sdv", "gate": "none", **changes})
        return self.made.setdefault(name, Run(name, self.data, settings, (like,), fill))


def _cpu_claims(arms: SkipNetArms) -> list[Claim]:
    """Section 8.1. Runs that are compared see the same number of mini-batches: 400 in stage 1 (all from-scratch arms
    that are set against HRL+SP: 800 = 400 + 400), 400 (FFGate-II) or 1200 (RNNGate) in stage 2."""
    both_stages = {"stage1": {"iterations": 800}}
    base = arms.run("base", arm="base", gate="none")
    sp = arms.run("sp_ff", arm="sp")
    # As published. The preset's bias, which keeps small networks from skipping everything, leaves few skips here.
    unbiased = arms.run("sp_ff_unbiased", arm="sp", gate_bias_init=0.0)
    sp_rnn = arms.run("sp_rnn", arm="sp", gate="rnn", reward_baseline="batch_mean")
    hrl = arms.hrl("hrl_ff", sp, {"alpha": 1.5})
    alphas = {
        alpha: arms.hrl(f"hrl_rnn_alpha{alpha:g}", sp_rnn, {"alpha": alpha, "stage2": _stage2(arms, iterations=1200)})
        for alpha in (0.0, 0.7, 1.5)
    }
    gentle = {"alpha": 4.0, "rl_weight": 0.3, "stage2": _stage2(arms, iterations=200, lr=0.01)}
    collapsing = arms.hrl("hrl_rnn_alpha4", sp_rnn, gentle)
    sdv = arms.random_skipping("sdv", hrl, both_stages)
    scratch = arms.run("hrl_scratch", arm="hrl_scratch", **_stage1(arms, 800))
    rl = arms.run("rl", arm="rl", **_stage1(arms, 800))
    soft = arms.run("soft", arm="soft")
    strong = alphas[1.5]
    return [
        Claim(
            "S1",
            "At equal accuracy HRL+SP skips strictly more than SP alone",
            "50 / 37 / 86 / 30 % of multiply-adds removed on CIFAR-10 / CIFAR-100 / SVHN / ImageNet within 0.5 points",
            (base, sp, hrl, sp_rnn, alphas[0.0], strong),
            lambda results: {
                "skips_more_than_alpha_0": executed_share(results, alphas[0.0]) - executed_share(results, strong),
                "less_accurate_than_alpha_0": accuracy(results, alphas[0.0]) - accuracy(results, strong),
                "ff_hrl_executes_more_than_sp": executed_share(results, hrl) - executed_share(results, sp),
                "less_accurate_than_base": accuracy(results, base) - accuracy(results, strong),
                "skips_more_than_sp": executed_share(results, sp_rnn) - executed_share(results, strong),
                "reduction": reduction(results, strong),
            },
            (
                Check("skips_more_than_alpha_0", at_least=0.15),
                Check("less_accurate_than_alpha_0", at_most=0.01),
                Check("ff_hrl_executes_more_than_sp", at_most=0.0),
            ),
        ),
        Claim(
            "S2",
            "SP alone, without a cost term, already costs less than the full network",
            "direction only (a figure)",
            (base, unbiased, sp, sp_rnn),
            lambda results: {
                "ff_skipped_share": 1 - executed_share(results, unbiased),
                "ff_reduction": reduction(results, unbiased),
                "ff_less_accurate_than_base": accuracy(results, base) - accuracy(results, unbiased),
                "ff_skipped_share_bias": 1 - executed_share(results, sp),
                "ff_less_accurate_than_base_bias": accuracy(results, base) - accuracy(results, sp),
                "rnn_skipped_share_bias": 1 - executed_share(results, sp_rnn),
                "rnn_reduction_bias": reduction(results, sp_rnn),
            },
            (Check("ff_skipped_share", at_least=0.3), Check("ff_reduction", at_least=0.0)),
        ),
        _deeper_saves_more(untestable=ONE_DEPTH),
        _gate_costs(),
        Claim(
            "S5",
            "Skipping grows with alpha; beyond alpha = 1 accuracy falls, above ln K everything is skipped",
            "accuracy flat for alpha <= 1 and falling beyond, alpha 0 to 4",
            (*alphas.values(), collapsing),
            lambda results: {
                "largest_rise_of_executed_share": largest_rise(results, list(alphas.values())),
                "executed_share_at_alpha_4": executed_share(results, collapsing),
                "warned_at_alpha_4": float(SKIP_ALL in results[collapsing.name].log),
                **{f"executed_share_at_alpha_{alpha:g}": executed_share(results, run) for alpha, run in alphas.items()},
                **{f"accuracy_at_alpha_{alpha:g}": accuracy(results, run) for alpha, run in alphas.items()},
                "accuracy_at_alpha_4": accuracy(results, collapsing),
            },
            (
                Check("largest_rise_of_executed_share", at_most=0.05),
                Check("executed_share_at_alpha_4", at_most=0.02),
                Check("warned_at_alpha_4", at_least=1.0),
            ),
        ),
        _hard_beats_soft(sp, soft, better_by=0.0),
        _pure_rl_fails(rl),
        Claim(
            "S8",
            "HRL+SP beats HRL from scratch, which stays below the base network (here at alpha 1.5 only)",
            "ordering at every alpha",
            (base, hrl, scratch),
            lambda results: {
                "below_hrl_sp": accuracy(results, hrl) - accuracy(results, scratch),
                "below_base": accuracy(results, base) - accuracy(results, scratch),
                "executed_share": executed_share(results, scratch),
            },
            (Check("below_hrl_sp", at_least=0.05), Check("below_base", at_least=0.0)),
        ),
        _beats_random(hrl, sdv, better_by=0.03),
        _every_class_skips_more(sp_rnn, strong),
        _easy_classes_skip_more(strong, untestable=STATIC),
        _smaller_inputs_skip_more(strong, untestable=STATIC),
        _middle_group_skipped_less(strong, untestable=FEW_GATES),
        _training_overhead(sp_rnn, strong),
        Claim(
            "8.1-6",
            "Images known to be easy are classified better than hard ones, and hard ones execute more (reported only)",
            "none (requirement of the small-scale validation)",
            (strong, hrl),
            lambda results: easy_and_hard(results[hrl.name], "ff") | easy_and_hard(results[strong.name], "rnn"),
            (Check("ff_easy_more_accurate", at_least=0.0), Check("rnn_easy_more_accurate", at_least=0.0)),
        ),
    ]


def _gpu_claims(arms: SkipNetArms) -> list[Claim]:
    """Section 8.2: depths 38 and 74 on CIFAR-10, gates rnn and ffgate1. From-scratch arms get both stages'
    mini-batches."""
    total = arms.preset["stage1"]["iterations"] + arms.preset["stage2"]["iterations"]
    base = arms.run("base", arm="base", gate="none")
    sp = arms.run("sp_rnn", arm="sp")
    sp_ff = arms.run("sp_ff", arm="sp", gate="ffgate1")
    alphas = {alpha: arms.hrl(f"hrl_rnn_alpha{alpha:g}", sp, {"alpha": alpha}) for alpha in (0.0, 0.5, 1.0, 2.0, 4.0)}
    relaxed = arms.hrl("hrl_rnn_relaxed", sp, {"alpha": 1.0, "beta": "alpha_over_n"})
    hrl = alphas[1.0]
    deep_base = arms.run("base_depth74", arm="base", gate="none", depth=74)
    deep_sp = arms.run("sp_rnn_depth74", arm="sp", depth=74)
    deep = arms.hrl("hrl_rnn_depth74", deep_sp, {"alpha": 1.0})
    sdv = arms.random_skipping("sdv", hrl, _stage1(arms, total))
    scratch = {
        alpha: arms.run(f"hrl_scratch_alpha{alpha:g}", arm="hrl_scratch", alpha=alpha, **_stage1(arms, total))
        for alpha in (0.5, 1.0, 2.0)
    }
    rl = arms.run("rl", arm="rl", **_stage1(arms, total))
    soft = arms.run("soft", arm="soft")

    def at_equal_accuracy(results: Results) -> dict[str, float]:
        floor = accuracy(results, base) - 0.01
        good = [run for run in [*alphas.values(), relaxed] if accuracy(results, run) >= floor]
        best = max((reduction(results, run) for run in good), default=float("nan"))
        return {
            "reduction_within_1_point": best,
            "reduction_above_sp": best - reduction(results, sp),
            "reduction_with_beta_alpha_over_n": reduction(results, relaxed),
            "base_accuracy": accuracy(results, base),
        }

    def over_scratch(results: Results) -> dict[str, float]:
        gains = [accuracy(results, alphas[alpha]) - accuracy(results, run) for alpha, run in scratch.items()]
        return {
            "smallest_gain_over_alphas": min(gains),
            "scratch_below_base": accuracy(results, base) - accuracy(results, scratch[0.5]),
        }

    return [
        Claim(
            "S1",
            "At equal accuracy HRL+SP skips strictly more than SP alone",
            "50 % of multiply-adds removed on CIFAR-10 (depth 110) within 0.5 points",
            (base, sp, *alphas.values(), relaxed),
            at_equal_accuracy,
            (Check("reduction_within_1_point", at_least=0.2), Check("reduction_above_sp", at_least=0.0)),
        ),
        Claim(
            "S2",
            "SP alone, without a cost term, already costs less than the full network",
            "direction only (a figure)",
            (sp, sp_ff),
            lambda results: {"rnn_reduction": reduction(results, sp), "ff_reduction": reduction(results, sp_ff)},
            (Check("rnn_reduction", at_least=0.0), Check("ff_reduction", at_least=0.0)),
        ),
        _deeper_saves_more((hrl, deep, base, deep_base)),
        _gate_costs(),
        Claim(
            "S5",
            "Skipping grows with alpha; beyond alpha = 1 accuracy falls",
            "accuracy flat for alpha <= 1 and falling beyond, alpha 0 to 4",
            tuple(alphas.values()),
            lambda results: {
                "largest_rise_of_executed_share": largest_rise(results, list(alphas.values())),
                "accuracy_lost_up_to_alpha_1": accuracy(results, alphas[0.0]) - accuracy(results, alphas[1.0]),
                "accuracy_lost_up_to_alpha_4": accuracy(results, alphas[0.0]) - accuracy(results, alphas[4.0]),
                "warned_at_alpha_4": float(SKIP_ALL in results[alphas[4.0].name].log),
            },
            (
                Check("largest_rise_of_executed_share", at_most=0.05),
                Check("accuracy_lost_up_to_alpha_1", at_most=0.01),
                Check("warned_at_alpha_4", at_least=1.0),
            ),
        ),
        _hard_beats_soft(sp, soft, better_by=0.1),
        _pure_rl_fails(rl),
        Claim(
            "S8",
            "HRL+SP beats HRL from scratch at every alpha, which stays below the base network even at small alpha",
            "ordering at every alpha",
            (base, *(alphas[alpha] for alpha in scratch), *scratch.values()),
            over_scratch,
            (Check("smallest_gain_over_alphas", at_least=0.0), Check("scratch_below_base", at_least=0.0)),
        ),
        _beats_random(hrl, sdv, better_by=0.0),
        _every_class_skips_more(sp, hrl),
        _easy_classes_skip_more(hrl),
        _smaller_inputs_skip_more(hrl),
        _middle_group_skipped_less(deep),
        _training_overhead(sp, hrl),
    ]


def _stage1(arms: SkipNetArms, iterations: int) -> dict[str, Any]:
    return {"stage1": {**arms.preset["stage1"], "iterations": iterations}}


def _stage2(arms: SkipNetArms, **changes: Any) -> dict[str, Any]:
    return {**arms.preset["stage2"], **changes}


# --- claims that both scales measure in the same way ------------------------------------------------------------------


def _deeper_saves_more(runs: tuple[Run, ...] = (), untestable: str = "") -> Claim:
    def measure(results: Results) -> dict[str, float]:
        shallow, deep, base, deep_base = runs
        return {
            "deeper_reduces_more_by": reduction(results, deep) - reduction(results, shallow),
            "less_accurate_than_base": accuracy(results, base) - accuracy(results, shallow),
            "deep_less_accurate_than_base": accuracy(results, deep_base) - accuracy(results, deep),
        }

    return Claim(
        "S3",
        "The deeper the base network, the larger the relative reduction",
        "depth 110 on CIFAR and 152 on SVHN give the largest",
        runs,
        measure if runs else lambda results: {},
        (Check("deeper_reduces_more_by", at_least=0.0),) if runs else (),
        untestable,
    )


def _gate_costs() -> Claim:
    return Claim(
        "S4",
        "A recurrent gate costs next to nothing, a feed-forward gate an eighth of a block or more; so at an equal skip "
        "share the RNN gate's network is cheaper (counted on the published network: depth 38, 32x32; no training)",
        "0.04 % of a block against 12.5 % (FFGate-II) and ~19 % (FFGate-I, counted: 15.6 %)",
        measure=lambda results: measure_gate_costs(),
        checks=(
            Check("ffgate2_share_of_block", at_least=0.125 - 1e-9, at_most=0.125 + 1e-9),
            Check("ffgate1_share_of_block", at_least=0.15625 - 1e-9, at_most=0.15625 + 1e-9),
            Check("rnn_share_of_block", at_most=0.002),
            Check("ffgate2_over_rnn_total", at_least=1.0),
            Check("ffgate1_over_rnn_total", at_least=1.0),
            Check("full_count_error", at_most=0.001),
        ),
    )


def _hard_beats_soft(hard: Run, soft: Run, better_by: float) -> Claim:
    def measure(results: Results) -> dict[str, float]:
        metrics = results[soft.name].metrics
        model, source, preprocess = trained(results[hard.name])
        training_mode = correct_images(model, source, preprocess, "straight_through").mean()
        return {
            "soft_loses_when_hardened": metrics["test_accuracy_soft"] - metrics["test_accuracy"],
            "hard_loses_when_hardened": float(training_mode) - accuracy(results, hard),
            "hard_better_by": accuracy(results, hard) - accuracy(results, soft),
            "soft_executed_share": executed_share(results, soft),
            "hard_executed_share": executed_share(results, hard),
        }

    return Claim(
        "S6",
        "Gates that are hard in training (Hd) beat soft gates hardened at inference (St)",
        "by 24 to 65 points on CIFAR-10, 42 to 54 on CIFAR-100, at similar cost",
        (hard, soft),
        measure,
        (
            Check("soft_loses_when_hardened", at_least=0.1),
            Check("hard_loses_when_hardened", at_most=0.001),
            Check("hard_better_by", at_least=better_by),
        ),
    )


def _pure_rl_fails(rl: Run) -> Claim:
    def measure(results: Results) -> dict[str, float]:
        found = accuracy(results, rl)
        return {"accuracy_above_chance": found - 0.1, "accuracy": found, "executed_share": executed_share(results, rl)}

    return Claim(
        "S7",
        "Reinforcement learning alone fails: its accuracy stays within 10 points of chance",
        "about 10 % on CIFAR-10, which is chance",
        (rl,),
        measure,
        (Check("accuracy_above_chance", at_least=-0.1, at_most=0.1),),
    )


def _beats_random(hrl: Run, sdv: Run, better_by: float) -> Claim:
    return Claim(
        "S9",
        "SkipNet beats random skipping (SDV) at an equal executed share (here at one depth)",
        "by a large margin at every depth, CIFAR-10 and CIFAR-100",
        (hrl, sdv),
        lambda results: {
            "more_accurate_by": accuracy(results, hrl) - accuracy(results, sdv),
            "hrl_executed_share": executed_share(results, hrl),
            "sdv_executed_share": executed_share(results, sdv),
        },
        (Check("more_accurate_by", at_least=better_by),),
    )


def _every_class_skips_more(sp: Run, hrl: Run) -> Claim:
    def measure(results: Results) -> dict[str, float]:
        before, after = class_skips(results[sp.name], np.median), class_skips(results[hrl.name], np.median)
        return {"classes_that_skip_more": float((after > before).mean()), "blocks_more": float((after - before).mean())}

    return Claim(
        "S12a",
        "After HRL every class skips more blocks than before (medians)",
        "median ordering, all classes of CIFAR-10",
        (sp, hrl),
        measure,
        (Check("classes_that_skip_more", at_least=1.0),),
    )


def _easy_classes_skip_more(hrl: Run, untestable: str = "") -> Claim:
    def measure(results: Results) -> dict[str, float]:
        model, source, preprocess = trained(results[hrl.name])
        correct = correct_images(model, source, preprocess, "hard")
        by_class = np.array([correct[source.labels == k].mean() for k in np.unique(source.labels)])
        # The mean, as medians of a few blocks tie.
        return {"rank_correlation": spearman(by_class, class_skips(results[hrl.name], np.mean))}

    return Claim(
        "S12b",
        "Easy classes skip more than hard ones: skipped blocks rank-correlate with class accuracy",
        "truck skips more than cat and dog",
        (hrl,),
        measure,
        (Check("rank_correlation", at_least=0.3),),
        untestable,
    )


def _smaller_inputs_skip_more(hrl: Run, untestable: str = "") -> Claim:
    def measure(results: Results) -> dict[str, float]:
        means = analyses(results[hrl.name])["mean_executed_by_scale"]
        return {
            "smallest_executes_fewer_by": means["1.0"] - means[min(means, key=float)],
            "largest_executes_more_by": means[max(means, key=float)] - means["1.0"],
        }

    return Claim(
        "S13",
        "Smaller inputs execute fewer blocks, larger ones more",
        "direction, ImageNet and SVHN",
        (hrl,),
        measure,
        (Check("smallest_executes_fewer_by", at_least=0.0),),
        untestable,
    )


def _middle_group_skipped_less(hrl: Run, untestable: str = "") -> Claim:
    def measure(results: Results) -> dict[str, float]:
        found = analyses(results[hrl.name])
        ratios, groups = np.array(found["skip_ratio_by_block"]), np.array(found["group_of_block"])
        first, middle, last = (ratios[groups == group].mean() for group in range(3))
        opening = np.append(False, groups[1:] != groups[:-1])  # group 1 opens with the block that always runs
        return {
            "group_2_skipped_less_than_group_1_by": first - middle,
            "group_2_skipped_less_than_group_3_by": last - middle,
            "opening_blocks_skipped_less_by": ratios[~opening].mean() - ratios[opening].mean(),
        }

    return Claim(
        "S14",
        "Group 2 is skipped less than groups 1 and 3, and the first blocks of a group less than the others",
        "CIFAR-10, depth 74, ordering",
        (hrl,),
        measure,
        tuple(
            Check(figure, at_least=0.0)
            for figure in (
                "group_2_skipped_less_than_group_1_by",
                "group_2_skipped_less_than_group_3_by",
                "opening_blocks_skipped_less_by",
            )
        ),
        untestable,
    )


def _training_overhead(sp: Run, hrl: Run) -> Claim:
    def measure(results: Results) -> dict[str, float]:
        first, second = seconds_per_iteration(results[sp.name], results[hrl.name])
        one, two = PUBLISHED_ITERATIONS
        return {"overhead": second * two / (first * one), "stage_2_over_stage_1_per_iteration": second / first}

    return Claim(
        "S15",
        "HRL adds at most 40 % to the training time (seconds of a stage-2 mini-batch against one of stage 1, at the "
        "published 10k against 64k)",
        "+30 to 40 % in total",
        (sp, hrl),
        measure,
        (Check("overhead", at_most=0.4),),
    )
