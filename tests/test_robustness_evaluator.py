"""The evaluator: its numbers, resume, both spaces, top-k, gradient-masking checks (spec 2.2, 2.3, 4, 8, 9, 10)."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dataeff.data import ImageSource
from dataeff.data.embedded import array_store
from dataeff.metrics.robustness import harmonic_robustness_score, topk_accuracy
from dataeff.nas.attacks import AttackConfig, attack, standard_attacks
from dataeff.nas.robustness import (
    NormalizedModel,
    RobustnessEvaluator,
    RobustnessReport,
    masking_flags,
    masking_probes,
    merge_reports,
    million_parameters,
)
from tests.robustness_helpers import accuracy, digits, images_and_labels, trained

SOURCE = digits()[1]
SMALL = SOURCE.subset(range(90))
EPS = 24 / 255


def evaluator(
    attacks: Sequence[AttackConfig] | Mapping[str, AttackConfig] | None = None,
    model: NormalizedModel | None = None,
    topk: int = 1,
    **changes: Any,
) -> RobustnessEvaluator:
    attacks = standard_attacks(EPS, restarts=2) if attacks is None else attacks
    return RobustnessEvaluator(model or trained("vgg"), attacks, topk, **{"images": SMALL, "batch_size": 40, **changes})


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_report_holds_the_accuracies_of_the_attacks_and_their_score() -> None:
    report = evaluator().evaluate()
    x, y = images_and_labels(SMALL)
    model = trained("vgg")
    expected = {
        name: accuracy(model, attack(model, x, y, cfg), y) for name, cfg in standard_attacks(EPS, restarts=2).items()
    }
    assert report.per_attack == pytest.approx(expected)
    assert report.clean == pytest.approx(accuracy(model, x, y))
    assert report.hrs == pytest.approx(harmonic_robustness_score(report.clean, expected["pgd"]))
    assert report.top1 == {"clean": report.clean, **report.per_attack}
    assert (report.n, report.topk, report.space, report.clamp_only) == (90, 1, "pixel", None)
    assert report.flags == {"degenerate": False, "autopgd_topk_incomparable": False}
    assert report.settings["ffgsm"]["ffgsm_alpha"] == pytest.approx(1.25 * EPS)
    assert report.params_m == sum(p.numel() for p in model.parameters()) / 1e6


def test_without_an_attack_called_pgd_there_is_no_score() -> None:
    assert evaluator([AttackConfig(name="fgsm")]).evaluate().hrs is None


def test_a_report_survives_json() -> None:
    report = evaluator([AttackConfig(name="pgd"), AttackConfig(name="apgd", restarts=2)]).evaluate()
    assert RobustnessReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_reports_of_parallel_tasks_merge_into_that_of_one_evaluation() -> None:
    attacks = standard_attacks(EPS, restarts=2)
    parts = [evaluator({name: cfg}).evaluate() for name, cfg in attacks.items()]
    assert merge_reports(parts) == evaluator().evaluate()


def test_reports_of_different_networks_do_not_merge() -> None:
    parts = [evaluator([AttackConfig(name="fgsm")], trained(kind)).evaluate() for kind in ("vgg", "resnet")]
    with pytest.raises(ValueError, match="the reports differ in"):
        merge_reports(parts)
    with pytest.raises(ValueError, match="no reports"):
        merge_reports([])


def test_images_that_are_all_wrong_give_a_degenerate_score_of_zero() -> None:
    x, y = images_and_labels(SMALL)
    with torch.no_grad():
        wrong = (trained("vgg")(x).argmax(1) + 1) % 10
    store = array_store((x[:, 0] * 255).round().byte().numpy(), "wrong")
    report = evaluator(images=ImageSource(store, wrong.numpy()), attacks=standard_attacks(2 / 255)).evaluate()
    assert report.clean == 0 and set(report.per_attack.values()) == {0.0}
    assert report.hrs == 0 and report.flags["degenerate"]


def test_images_are_cut_to_the_networks_input_size() -> None:
    report = evaluator([AttackConfig(name="fgsm")], size=(6, 4)).evaluate()
    x, y = images_and_labels(SMALL)
    assert report.clean == pytest.approx(accuracy(trained("vgg"), x[..., 1:7, 2:6], y))


def test_an_auxiliary_head_does_not_count_and_frozen_weights_do() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.auxiliary = nn.Linear(3, 2), nn.Linear(100, 100)

    network = Network().requires_grad_(False)
    assert million_parameters(network) == 8e-6


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(1, 10))
def test_an_evaluation_that_was_cut_off_anywhere_ends_with_the_same_numbers(stop: int) -> None:
    attacks = {name: standard_attacks(EPS, restarts=2)[name] for name in ("ffgsm", "apgd")}
    whole = evaluator(attacks)
    assert whole.total_steps == 9
    expected = whole.evaluate()
    first = evaluator(attacks)
    for _ in range(stop):
        first.step()
    state = json.loads(json.dumps(first.state_dict()))  # plain values only
    torch.rand(7)  # the global generator has no part in it
    second = evaluator(attacks)
    second.load_state_dict(state)
    assert second.done == (stop == 9)
    assert second.evaluate() == expected


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_another_batch_size_even_from_the_middle_on_changes_nothing(batch_size: int) -> None:
    attacks = {name: standard_attacks(EPS, restarts=2)[name] for name in ("ffgsm", "apgd")}
    expected = evaluator(attacks).evaluate()
    assert evaluator(attacks, batch_size=batch_size).evaluate() == expected
    first = evaluator(attacks)
    for _ in range(5):
        first.step()
    second = evaluator(attacks, batch_size=batch_size)
    second.load_state_dict(first.state_dict())
    assert second.evaluate() == expected


@pytest.mark.parametrize(
    "other",
    [
        lambda: {"model": trained("resnet")},
        lambda: {"images": SOURCE.subset(range(1, 91))},
        lambda: {"topk": 2},
        lambda: {"attacks": standard_attacks(EPS, restarts=2, seed=1)},
        lambda: {"attacks": {"pgd": AttackConfig(name="pgd")}},
        lambda: {"surrogate": trained("resnet")},
    ],
    ids=["network", "images", "k", "seed", "attacks", "surrogate"],
)
def test_a_state_of_another_evaluation_is_refused(other: Callable[[], dict[str, Any]]) -> None:
    state = evaluator().state_dict()
    with pytest.raises(ValueError, match="state is of another evaluation"):
        evaluator(**other()).load_state_dict(state)


def test_steps_go_attack_by_attack_and_end() -> None:
    run = evaluator([AttackConfig(name="fgsm")])
    with pytest.raises(RuntimeError, match="at 'clean'"):
        run.report()
    assert [run.step() for _ in range(run.total_steps)] == ["clean"] * 3 + ["fgsm"] * 3
    assert run.done
    with pytest.raises(RuntimeError, match="done"):
        run.step()


def test_a_network_in_training_mode_is_evaluated_in_evaluation_mode_and_put_back() -> None:
    expected = evaluator([AttackConfig(name="pgd")]).evaluate()
    model = deepcopy(trained("vgg")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="training mode"):
        assert evaluator([AttackConfig(name="pgd")], model).evaluate() == expected
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- attack spaces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vgg", "resnet"])
def test_in_model_input_space_the_clamp_alone_does_nearly_all_the_damage(kind: str) -> None:
    """Spec section 8, item 2."""
    images, model = SOURCE.subset(range(300)), trained(kind)
    compatible, pixel = (
        evaluator(
            [AttackConfig(name="fgsm", space=space), AttackConfig(name="pgd", space=space)], model, images=images
        ).evaluate()
        for space in ("model_input", "pixel")
    )
    assert compatible.space == "model_input" and compatible.clamp_only is not None
    assert compatible.clean == pixel.clean
    assert compatible.clamp_only < 45 < 85 < pixel.per_attack["pgd"]
    assert compatible.clamp_only == pytest.approx(compatible.per_attack["fgsm"], abs=3)


# --- top-k ------------------------------------------------------------------------------------------------------------


def test_top_5_accuracy_under_autopgd_is_flagged_and_top_1_given_beside_it() -> None:
    attacks = {name: standard_attacks(48 / 255, restarts=2)[name] for name in ("pgd", "apgd")}
    report = evaluator(attacks, trained("resnet", epochs=1), topk=5, images=SOURCE.subset(range(200))).evaluate()
    x, y = images_and_labels(SOURCE.subset(range(200)))
    with torch.no_grad():
        assert report.clean == pytest.approx(topk_accuracy(trained("resnet", epochs=1)(x), y, 5))
    assert report.flags["autopgd_topk_incomparable"]
    # Images that are wrong at top-1 but right at top-5 are never attacked.
    untouched = report.clean - report.top1["clean"]
    assert untouched > 10 and report.per_attack["apgd"] >= untouched - 1e-9
    assert report.top1["apgd"] <= report.top1["pgd"] + 1


def test_without_autopgd_top_5_has_no_flag() -> None:
    assert not evaluator([AttackConfig(name="pgd")], topk=5).evaluate().flags["autopgd_topk_incomparable"]


# --- gradient masking -------------------------------------------------------------------------------------------------


def masking(model: NormalizedModel) -> dict[str, bool]:
    pgd, images = AttackConfig(name="pgd", eps=EPS, alpha=EPS / 4, steps=6), SOURCE.subset(range(120))
    report = evaluator(masking_probes(pgd), model, images=images).evaluate()
    transfer = evaluator([pgd], model, images=images, surrogate=trained("resnet", seed=1)).evaluate()
    return masking_flags(report, 10, transfer)


def test_a_plain_network_shows_no_sign_of_gradient_masking() -> None:
    assert masking(trained("resnet")) == {
        "large_eps_above_chance": False,
        "noise_stronger": False,
        "more_steps_weaker": False,
        "more_restarts_weaker": False,
        "transfer_stronger": False,
    }


class Misleading(nn.Module):
    """Hides the way: the gradient that it shows points to where it is even more certain."""

    def __init__(self, model: NormalizedModel) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.model(z)
        return 2 * logits.detach() - logits


def test_a_network_that_shows_a_false_gradient_is_found_out() -> None:
    sound = trained("resnet")
    hiding = NormalizedModel(Misleading(sound), sound.mean.flatten().tolist(), sound.std.flatten().tolist()).eval()
    flags = masking(hiding)
    assert flags["large_eps_above_chance"] and flags["transfer_stronger"]


SOUND = {"pgd": 40.0, "noise": 90.0, "pgd_large_eps": 0.0, "pgd_more_steps": 39.5, "pgd_more_restarts": 38.0}


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({}, None),
        ({"noise": 38.0}, "noise_stronger"),
        ({"pgd_large_eps": 13.0}, "large_eps_above_chance"),
        ({"pgd_more_steps": 42.0}, "more_steps_weaker"),
        ({"pgd_more_restarts": 42.0}, "more_restarts_weaker"),
        ({"transfer": 38.0}, "transfer_stronger"),
    ],
)
def test_each_sign_of_gradient_masking_is_told_from_the_accuracies(changed: dict[str, float], flag: str | None) -> None:
    found = {"transfer": 60.0, **SOUND, **changed}
    bare = RobustnessReport(95.0, {}, None, 0.1, 1, "pixel", None, 100, {}, {})
    transfer = replace(bare, per_attack={"pgd": found.pop("transfer")})
    flags = masking_flags(replace(bare, per_attack=found), 10, transfer)
    assert [name for name, raised in flags.items() if raised] == ([flag] if flag else [])


def test_an_attack_made_on_a_surrogate_does_not_read_the_networks_gradient() -> None:
    cfg, (x, y) = AttackConfig(name="pgd", eps=EPS, alpha=EPS / 4), images_and_labels(SMALL)
    report = evaluator([cfg], surrogate=trained("resnet")).evaluate()
    moved = attack(trained("resnet"), x, y, cfg)
    assert report.per_attack["pgd"] == pytest.approx(accuracy(trained("vgg"), moved, y))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": []}, "at least one"),
        ({"attacks": {"clean": AttackConfig(name="fgsm")}}, "none called clean"),
        ({"attacks": [AttackConfig(name="pgd"), AttackConfig(name="pgd", eps=4 / 255)]}, "two attacks of one name"),
        (
            {"attacks": [AttackConfig(name="pgd"), AttackConfig(name="fgsm", space="model_input")]},
            "one space",
        ),
        ({"topk": 0}, "topk = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"images": SMALL.subset([])}, "no images"),
    ],
)
def test_an_impossible_evaluation_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluator(**changes)


def test_a_transfer_attack_in_normalised_units_is_refused() -> None:
    with pytest.raises(ValueError, match="transfer attack needs space pixel"):
        evaluator([AttackConfig(name="pgd", space="model_input")], surrogate=trained("resnet"))


def test_k_above_the_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="k = 11 must be from 1 to 10"):
        evaluator(topk=11).step()


def test_labels_that_the_network_does_not_know_are_refused() -> None:
    store = array_store(np.zeros((2, 8, 8), np.uint8), "unknown")
    with pytest.raises(ValueError, match="labels must be 0 to 9"):
        evaluator(images=ImageSource(store, np.array([0, 10]))).step()
