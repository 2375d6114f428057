"""Attacks: formulas, equality with torchattacks, the ball, randomness, the guard, bad input (spec 2.1, 8, 10)."""

import warnings
from copy import deepcopy
from statistics import mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from dataeff.nas.attacks import ATTACKS, AttackConfig, attack, eps_sweep, scaled, standard_attacks
from dataeff.nas.threat import (
    AdversarialTrainingError,
    GradientMaskingError,
    NormalizedModel,
    respond,
    uniform_noise,
)
from tests.robustness_helpers import accuracy, digits, images_and_labels, trained

X, Y = images_and_labels(digits()[1])
NETWORKS = ("vgg", "resnet")
RANDOM = ("ffgsm", "pgd", "apgd", "noise")
GRADIENT = ("fgsm", "ffgsm", "pgd", "bim", "apgd")


def config(name: str, eps: float = 16 / 255, **changes: Any) -> AttackConfig:
    step = {"alpha": eps / 4, "ffgsm_alpha": 1.25 * eps} if eps else {}
    return AttackConfig(name=name, eps=eps, **{**step, **changes})


class Linear(nn.Module):
    """Logits of a fixed matrix."""

    def __init__(self, weights: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_fgsm_on_a_linear_network_moves_every_pixel_by_eps_towards_the_other_class() -> None:
    # The loss of class 0 rises along w_1 - w_0 = (3, -3, 0): up, down, not at all; the second pixel meets the edge.
    model = Linear([[-1.0, 1.0, 2.0], [2.0, -2.0, 2.0]]).eval()
    x = torch.tensor([0.5, 0.05, 0.7]).view(1, 1, 1, 3)
    moved = attack(model, x, torch.tensor([0]), AttackConfig(name="fgsm", eps=0.1))
    assert torch.allclose(moved.flatten(), torch.tensor([0.6, 0.0, 0.7]))


def test_pgd_walks_to_the_corner_of_the_ball_and_no_further() -> None:
    model = Linear([[-1.0, 1.0], [2.0, -2.0]]).eval()
    x = torch.full((1, 1, 1, 2), 0.5)
    moved = attack(model, x, torch.tensor([0]), AttackConfig(name="pgd", eps=0.1, alpha=0.04, steps=6))
    assert torch.allclose(moved.flatten(), torch.tensor([0.6, 0.4]))


def test_ffgsm_with_a_small_step_stays_near_its_random_start() -> None:
    model = Linear([[-1.0, 1.0], [2.0, -2.0]]).eval()
    x, indices = torch.full((1, 1, 1, 2), 0.5), torch.tensor([7])
    cfg = AttackConfig(name="ffgsm", eps=0.1, ffgsm_alpha=0.01)
    moved = attack(model, x, torch.tensor([0]), cfg, indices)
    start = x + 0.1 * uniform_noise(cfg, "ffgsm", indices, 0, x)
    step = torch.tensor([0.01, -0.01]).view_as(x)
    assert torch.allclose(moved, x + (start + step - x).clamp(-0.1, 0.1))


def test_bim_is_pgd_from_the_image_itself() -> None:
    model = trained("vgg")
    x, y = X[:50], Y[:50]
    assert torch.equal(attack(model, x, y, config("bim")), attack(model, x, y, config("pgd", random_start=False)))


@pytest.mark.parametrize("name", GRADIENT)
def test_every_attack_can_follow_the_ratio_of_logits(name: str) -> None:
    model = trained("vgg")
    moved = attack(model, X[:200], Y[:200], config(name, 32 / 255, loss="dlr"))
    assert accuracy(model, moved, Y[:200]) < accuracy(model, X[:200], Y[:200]) - 20


# --- equality with an independent library -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("eps", [2 / 255, 8 / 255, 32 / 255])
def test_fgsm_images_are_identical_to_those_of_torchattacks(kind: str, eps: float) -> None:
    model = trained(kind)
    theirs = torchattacks.FGSM(model, eps=eps)(X, Y)
    assert torch.equal(attack(model, X, Y, config("fgsm", eps)), theirs)


@pytest.mark.parametrize("kind", NETWORKS)
def test_bim_images_are_those_of_torchattacks(kind: str) -> None:
    model = trained(kind)
    theirs = torchattacks.BIM(model, eps=16 / 255, alpha=4 / 255, steps=10)(X, Y)
    ours = attack(model, X, Y, config("bim"))
    assert image_share(ours, theirs) >= 0.99  # the rest: a gradient so near zero that rounding decides its sign


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", ["ffgsm", "pgd"])
def test_images_are_those_of_torchattacks_from_the_same_start(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cfg = trained(kind), config(name)
    noise = uniform_noise(cfg, cfg.name, torch.arange(len(X)), 0, X)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, low, high: tensor.copy_(high * noise))
    if name == "pgd":
        theirs = torchattacks.PGD(model, eps=cfg.eps, alpha=cfg.alpha, steps=cfg.steps)(X, Y)
    else:
        theirs = torchattacks.FFGSM(model, eps=cfg.eps, alpha=cfg.ffgsm_alpha)(X, Y)
    monkeypatch.undo()
    assert image_share(attack(model, X, Y, cfg), theirs) >= 0.99


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("eps", [8 / 255, 16 / 255])
def test_pgd_accuracy_is_that_of_torchattacks_within_half_a_point(kind: str, eps: float) -> None:
    """The mean over random starts: those alone scatter by a point."""
    model = trained(kind)
    theirs, ours = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        theirs.append(accuracy(model, torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=10)(X, Y), Y))
        ours.append(accuracy(model, attack(model, X, Y, config("pgd", eps, seed=seed)), Y))
    assert mean(ours) == pytest.approx(mean(theirs), abs=0.5)


def test_model_input_space_is_what_torchattacks_does_to_a_network_of_normalised_images() -> None:
    model = trained("vgg")
    z = model.normalize(X)
    theirs = torchattacks.FGSM(model.model, eps=8 / 255)(z, Y)
    assert torch.equal(attack(model.model, z, Y, config("fgsm", 8 / 255, space="model_input")), theirs)


def image_share(ours: Tensor, theirs: Tensor) -> float:
    """Of images that agree to rounding."""
    return float(((ours - theirs).abs().flatten(1).amax(1) < 1e-5).double().mean())


# --- the ball ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("eps", [0.0, 1 / 255, 8 / 255, 0.5, 1.5])
def test_every_perturbation_is_in_its_ball_and_in_the_pixel_range(name: str, eps: float) -> None:
    x = torch.cat([X[:30], torch.zeros_like(X[:2]), torch.ones_like(X[:2])])
    y = torch.cat([Y[:30], torch.tensor([0, 1, 0, 1])])
    for kind in NETWORKS:
        moved = attack(trained(kind), x, y, config(name, eps))
        assert float((moved - x).abs().max()) <= eps + 1e-6
        assert float(moved.min()) >= 0 and float(moved.max()) <= 1


@pytest.mark.parametrize("name", list(ATTACKS))
def test_in_model_input_space_the_ball_lies_around_the_clamped_input(name: str) -> None:
    model = trained("vgg")
    z = model.normalize(X[:60])
    moved = attack(model.model, z, Y[:60], config(name, 8 / 255, space="model_input"))
    touched = (moved != z).flatten(1).any(1)  # apgd returns an image that it does not fool as it came
    assert touched.any() and (name == "apgd" or touched.all())
    assert float((moved - z.clamp(0, 1))[touched].abs().max()) <= 8 / 255 + 1e-6
    assert float(moved[touched].min()) >= 0 and float(moved[touched].max()) <= 1


# --- what the attacks do to networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_accuracy_falls_with_eps_and_stronger_attacks_are_stronger(kind: str) -> None:
    """Spec section 8, item 1."""
    model, x, y = trained(kind), X[:200], Y[:200]
    found: dict[str, list[float]] = {name: [] for name in standard_attacks()}
    for eps in (2 / 255, 4 / 255, 8 / 255, 16 / 255):
        for name, cfg in standard_attacks(eps, restarts=2).items():
            found[name].append(accuracy(model, attack(model, x, y, cfg), y))
    for name, values in found.items():
        assert values == sorted(values, reverse=True), name
    assert all(pgd <= fgsm + 1 for pgd, fgsm in zip(found["pgd"][1:], found["fgsm"][1:], strict=True))
    assert all(apgd <= pgd + 1 for apgd, pgd in zip(found["apgd"], found["pgd"], strict=True))
    assert accuracy(model, attack(model, x, y, config("pgd", 0.5)), y) <= 12


def test_more_steps_and_more_restarts_never_help_the_defender() -> None:
    model, x, y = trained("resnet"), X[:120], Y[:120]
    few, many = (accuracy(model, attack(model, x, y, config("pgd", 16 / 255, steps=n)), y) for n in (10, 30))
    assert many <= few + 0.5
    restarted = [accuracy(model, attack(model, x, y, config("pgd", 16 / 255, restarts=n)), y) for n in (1, 3)]
    assert restarted == sorted(restarted, reverse=True)


def test_noise_hurts_less_than_the_gradient_and_an_attack_made_on_another_network_less_than_ones_own() -> None:
    model, x, y = trained("resnet"), X[:120], Y[:120]
    own = accuracy(model, attack(model, x, y, config("pgd")), y)
    assert accuracy(model, attack(model, x, y, config("noise")), y) > own + 10
    assert accuracy(model, attack(trained("vgg"), x, y, config("pgd")), y) > own + 1


def test_a_sweep_scales_every_step_with_eps() -> None:
    sweep = eps_sweep([AttackConfig(name="pgd"), AttackConfig(name="ffgsm")], [1 / 255, 4 / 255])
    assert list(sweep) == ["pgd@1/255", "pgd@4/255", "ffgsm@1/255", "ffgsm@4/255"]
    assert sweep["pgd@4/255"].alpha == pytest.approx(1 / 255)
    assert sweep["ffgsm@1/255"].ffgsm_alpha == pytest.approx(1.25 / 255)
    with pytest.raises(ValueError, match="above 0"):
        scaled(AttackConfig(name="pgd"), 0.0)


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ATTACKS))
def test_neither_the_batch_nor_its_order_changes_an_image(name: str) -> None:
    model = deepcopy(trained("vgg")).double()  # in double precision no rounding of a batched convolution shows
    x, y, indices = X[:12].double(), Y[:12], torch.arange(100, 112)
    cfg = config(name, 24 / 255, **({"restarts": 3} if name in RANDOM else {}))
    whole = attack(model, x, y, cfg, indices)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(attack(model, x[order], y[order], cfg, indices[order]), whole[order], atol=1e-9)
    ones = [attack(model, x[i : i + 1], y[i : i + 1], cfg, indices[i : i + 1]) for i in range(12)]
    assert torch.allclose(torch.cat(ones), whole, atol=1e-9)


def test_an_images_gradient_is_that_of_its_own_loss_whatever_the_batch() -> None:
    model = deepcopy(trained("vgg")).double()
    x, y = X[:6].double(), Y[:6]
    whole = respond(model, x, y, "ce").gradient
    ones = [respond(model, x[i : i + 1], y[i : i + 1], "ce").gradient for i in range(6)]
    assert torch.allclose(torch.cat(ones), whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["ffgsm", "pgd", "noise"])
def test_a_restart_begins_elsewhere_and_leaves_fooled_images_alone(name: str) -> None:
    model, x, y = trained("vgg"), X[:100], Y[:100]
    first, second = (attack(model, x, y, config(name, restarts=restarts)) for restarts in (1, 2))
    with torch.no_grad():
        right = model(first).argmax(1) == y
    changed = (first != second).flatten(1).any(1)
    assert torch.equal(changed, right)


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_start_belongs_to_seed_attack_image_and_restart(name: str) -> None:
    indices, x = torch.tensor([3, 4]), torch.zeros(2, 1, 8, 8)
    draw = uniform_noise(config(name), name, indices, 0, x)
    assert torch.equal(draw, uniform_noise(config(name), name, indices, 0, x))
    others = [
        uniform_noise(config(name, seed=1), name, indices, 0, x),
        uniform_noise(config(name), name, indices, 1, x),
        uniform_noise(config(name), name, indices + 1, 0, x),
        *(uniform_noise(config(name), other, indices, 0, x) for other in RANDOM if other != name),
    ]
    assert all(not bool((draw == other).any()) for other in others)
    assert float(draw.min()) < -0.9 and float(draw.max()) > 0.9 and abs(float(draw.mean())) < 0.15


# --- evaluation mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_network_in_training_mode_is_attacked_in_evaluation_mode_and_put_back(name: str) -> None:
    model = deepcopy(trained("vgg"))
    expected = attack(model, X[:20], Y[:20], config(name))
    model.train()
    model.model[1].eval()  # frozen statistics within a network that trains
    model.model[0].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="training mode"):
        moved = attack(model, X[:20], Y[:20], config(name))
    assert torch.equal(moved, expected)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_network_is_put_back_after_an_attack_that_fails() -> None:
    model = deepcopy(trained("vgg")).train()
    with pytest.raises(ValueError, match="labels"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack(model, X[:2], torch.tensor([0, 10]), config("pgd"))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- adversarial images never train -----------------------------------------------------------------------------------


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_training_step_on_adversarial_images_fails(name: str) -> None:
    model = deepcopy(trained("vgg")).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved = attack(model, X[:8], Y[:8], config(name))
    with pytest.raises(AdversarialTrainingError, match="clean images only"):
        step(model, moved, Y[:8])
    step(model, X[:8], Y[:8])


@pytest.mark.parametrize(
    "change",
    [
        lambda moved: torch.cat([X[:8], moved]),
        lambda moved: torch.stack(list(moved)),
        lambda moved: moved.clone()[:4].flip(3),
        lambda moved: F.pad(moved, (1, 1, 1, 1))[..., 1:9, 1:9],
        lambda moved: 0.5 * X[:8] + 0.5 * moved,
        lambda moved: (moved * 255).round().to(torch.uint8).float() / 255,
    ],
    ids=["mixed batch", "stacked", "cut and mirrored", "shifted", "mixup", "rounded"],
)
def test_adversarial_images_are_recognised_after_what_loaders_do_to_them(change: Any) -> None:
    model = deepcopy(trained("vgg")).train()
    moved = change(attack(trained("vgg"), X[:8], Y[:8], config("fgsm")))
    with pytest.raises(AdversarialTrainingError):
        step(model, moved, torch.zeros(len(moved), dtype=torch.int64))


def test_adversarial_images_may_be_evaluated_and_attacked_again() -> None:
    model = deepcopy(trained("vgg"))
    moved = attack(model, X[:50], Y[:50], config("pgd"))
    with torch.no_grad():
        model(moved)
    again = attack(model, moved, Y[:50], config("pgd"))
    assert accuracy(model, again, Y[:50]) <= accuracy(model, moved, Y[:50])


# --- gradient masking and bad input -----------------------------------------------------------------------------------


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10].detach()


class Stepped(nn.Module):
    """Rounds its input, as a quantised network does: the gradient is zero almost everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).round() @ self.weight.T


class Exploding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10].sqrt()  # an infinite slope at 0


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Detached(), "carry no gradient.*100.0%"),
        (Stepped(), "every gradient is zero.*100.0%"),
        (Exploding(), "not finite for 2 of 2 images"),
    ],
    ids=["detached", "quantised", "infinite"],
)
def test_a_gradient_that_is_missing_zero_or_infinite_is_an_error(name: str, model: nn.Module, message: str) -> None:
    x = torch.zeros(2, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)  # right, so that apgd attacks too
    with pytest.raises(GradientMaskingError, match=message):
        attack(model.eval(), x, y, config(name, 0.0))


def test_a_saturated_softmax_is_an_error_and_says_how_many_images_it_hides() -> None:
    model = nn.Sequential(trained("vgg"), Scale(1e6)).eval()
    with torch.no_grad():
        right = (model(X).argmax(1) == Y).nonzero()[:20, 0]
    with pytest.raises(GradientMaskingError) as caught:
        attack(model, X[right], Y[right], config("fgsm"))
    assert caught.value.zero_fraction == 1.0
    wrong = (Y[right[:1]] + 1) % 10  # one image with a gradient: the attack is possible
    attack(model, X[right], torch.cat([wrong, Y[right[1:]]]), config("fgsm"))


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("count", [1, 5])
def test_images_that_are_all_wrong_already_do_not_crash_an_attack(name: str, count: int) -> None:
    model = trained("vgg")
    with torch.no_grad():
        wrong = (model(X).argmax(1) + 1) % 10
    moved = attack(model, X[:count], wrong[:count], config(name, 4 / 255))
    assert accuracy(model, moved, wrong[:count]) == 0
    assert moved.shape == X[:count].shape


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_batch_without_images_is_returned(name: str) -> None:
    assert len(attack(trained("vgg"), X[:0], Y[:0], config(name))) == 0


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((X[:2] * 255).to(torch.uint8), Y[:2], r"uint8.*from 0 to 255.*space=.model_input"),
        (X[:2] * 255, Y[:2], r"\[0, 1\] in pixel space.*from 0 to 255.*space=.model_input"),
        (X[:2] - 0.5, Y[:2], r"from -0.5 to 0.5"),
        (torch.full_like(X[:2], torch.nan), Y[:2], r"from nan to nan"),
        (X[0], Y[:1], r"\(B, C, H, W\)"),
        (X[:2], Y[:3], r"labels must be int64 \(2,\)"),
        (X[:2], Y[:2].float(), r"labels must be int64.*float32"),
    ],
)
def test_images_and_labels_of_the_wrong_kind_are_refused(name: str, x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack(trained("vgg"), x, y, config(name))


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("label", [-1, 10])
def test_labels_outside_the_classes_are_refused(name: str, label: int) -> None:
    with pytest.raises(ValueError, match="labels must be 0 to 9"):
        attack(trained("vgg"), X[:2], torch.tensor([0, label]), config(name))


def test_indices_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"indices must be int64 \(2,\)"):
        attack(trained("vgg"), X[:2], Y[:2], config("pgd"), torch.arange(3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"eps": -0.1},
        {"eps": float("nan")},
        {"alpha": 0.0},
        {"steps": 0},
        {"restarts": 0},
        {"name": "deepfool"},
        {"name": "fgsm", "restarts": 2},
        {"name": "bim", "restarts": 2},
        {"name": "pgd", "restarts": 2, "random_start": False},
        {"name": "pgd", "dlr_fallback": True},
        {"name": "apgd", "dlr_fallback": True, "loss": "dlr"},
        {"momentum": 0.75},
    ],
)
def test_an_impossible_attack_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        AttackConfig(**{"name": "pgd", **wrong})


@pytest.mark.parametrize("name", ["pgd", "bim"])
def test_steps_that_cannot_reach_the_boundary_give_a_warning(name: str) -> None:
    with pytest.warns(UserWarning, match="cannot reach the boundary"):
        AttackConfig(name=name, eps=0.1, alpha=0.01, steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AttackConfig(name=name, eps=0.1, alpha=0.01, steps=11)


@pytest.mark.parametrize("name", GRADIENT)
def test_the_ratio_of_logits_needs_three_classes(name: str) -> None:
    model = Linear([[1.0] * 64, [0.0] * 64]).eval()
    with pytest.raises(ValueError, match="at least 3 classes"):
        attack(model, X[:2], torch.zeros(2, dtype=torch.int64), config(name, loss="dlr"))


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.0]), ([0.5, 0.5], [0.2]), ([], [])])
def test_a_normalisation_that_cannot_be_is_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ValueError, match="one value a channel"):
        NormalizedModel(nn.Identity(), mean, std)
