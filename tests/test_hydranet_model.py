"""HydraNet's network: masked training, real conditional execution, gate, strategies, partition and losses."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataeff.dynamic.hydranet.inference import HydraInference
from dataeff.dynamic.hydranet.losses import (
    HydraLoss,
    collapse_warning,
    gate_metrics,
    idle_warning,
    utilisation,
    utilisation_entropy,
)
from dataeff.dynamic.hydranet.model import HydraConfig, HydraNet, branch_scores, selection_mask, top_k
from dataeff.dynamic.hydranet.partition import (
    BalancedClusterPartition,
    assign_in_rounds,
    class_mean_features,
    random_partition,
)
from dataeff.metrics.cost import count_macs

CLASSES = 10
SMALL: dict[str, Any] = {"base": "resnet", "depth": 1, "n_branches": 5, "k": 2, "w_stem": 0.5, "w_branch": 0.25}
SETTINGS: dict[str, dict[str, Any]] = {
    "resnet": SMALL,
    "classes head": {**SMALL, "gate_head": "classes"},
    "concat": {**SMALL, "combine": "concat"},
    "learn": {**SMALL, "strategy": "learn"},
    "learn concat": {**SMALL, "strategy": "learn_balance", "combine": "concat"},
    "no gating": {**SMALL, "strategy": "no_gating"},
    "branch point": {**SMALL, "branch_point": "block1", "depth": 2},
    "densenet": {"base": "densenet", "depth": 2, "n_branches": 5, "k": 2, "w_branch": 0.5},
    "ressep": {"base": "ressep", "depth": 2, "n_branches": 5, "k": 2, "w_stem": 0.125, "w_branch": 0.0625},
    "ressep block2": {
        **{"base": "ressep", "depth": 2, "n_branches": 5, "k": 2, "w_stem": 0.125, "w_branch": 0.0625},
        "branch_point": "block2",
        "combine": "concat",
    },
    "mini": {"base": "mini", "depth": 2, "n_branches": 5, "k": 2, "w_gate": 0.5},
}


def size(name: str) -> tuple[int, int]:
    return {"ressep": (64, 64), "mini": (8, 16)}.get(name.split()[0], (16, 16))


def images(count: int, name: str = "resnet", seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *size(name), generator=torch.Generator().manual_seed(seed))


def make(name: str = "resnet", used: bool = True, **changes: Any) -> HydraNet:
    """A network with a partition; `used`: with the statistics of BatchNorms that have seen images."""
    torch.manual_seed(0)
    model = HydraNet(HydraConfig(**{**SETTINGS[name], **changes}), CLASSES)
    model.set_partition(random_partition(CLASSES, model.config.n_branches, seed=0))
    if used:
        for seed in range(3):
            model(images(16, name, seed))
    return model.eval()


# --- conditional execution --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_conditional_execution_gives_what_masking_gives(name: str) -> None:
    model = make(name)
    for count in (1, 7):
        x = images(count, name)
        masked = model(x, conditional=False)
        for other in (model(x), HydraInference(model)(x), HydraInference(model, dense=True)(x)):
            assert torch.equal(other.selected, masked.selected)
            torch.testing.assert_close(other.logits, masked.logits, rtol=1e-5, atol=1e-5 * float(masked.logits.std()))
            torch.testing.assert_close(other.gate_probs, masked.gate_probs, rtol=1e-4, atol=1e-5)
            assert torch.equal(other.macs, masked.macs)


@pytest.mark.parametrize("name", ["resnet", "concat", "learn", "densenet", "ressep", "mini"])
@torch.no_grad()
def test_unselected_branches_may_hold_nan(name: str) -> None:
    model = make(name)
    x = images(6, name)
    expected = model(x).logits
    executed = selection_mask(model(x).selected, model.config.n_branches)
    executed[:] = executed[0]  # all images run the branches of the first
    wanted = model(x, executed=executed).logits
    for parameter in model.branch_parameters():
        parameter.unflatten(0, (model.config.n_branches, -1))[~executed[0]] = math.nan
    for answer in (model(x, executed=executed), model(x, executed=executed, conditional=False)):
        torch.testing.assert_close(answer.logits, wanted, rtol=1e-4, atol=1e-4)
    fast = HydraInference(model)
    torch.testing.assert_close(fast(x, executed=executed).logits, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(x[:1]).logits, expected[:1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_unselected_branch_is_never_called_and_the_others_get_their_images_only() -> None:
    model = make()
    x = images(7)
    fast = HydraInference(model)
    calls: list[tuple[int, int]] = []

    def watch(branch: int) -> Any:
        run = fast.branches[branch]
        return lambda features: (calls.append((branch, len(features))), run(features))[1]

    fast.branches = [watch(branch) for branch in range(5)]
    executed = selection_mask(fast(x).selected, 5)
    assert calls == [(b, n) for b, n in enumerate(executed.sum(0).tolist()) if n]
    calls.clear()
    only = torch.zeros(7, 5, dtype=torch.bool)
    only[2, 3] = True
    fast(x, executed=only)
    assert calls == [(3, 1)]


@pytest.mark.parametrize("name", ["resnet", "ressep", "densenet", "mini"])
@torch.no_grad()
def test_reported_multiply_adds_are_those_of_the_layers_that_run(name: str) -> None:
    model = make(name)
    for k in (1, 3):
        counted = count_macs(model, (3, *size(name)), conditional=True, k=k).total
        zeros = torch.zeros(1, 3, *size(name))
        assert float(model(zeros, k=k).macs[0]) == counted == model.costs(*size(name)).conditional(k)
        assert float(HydraInference(model)(zeros, k=k).macs[0]) == counted
    assert count_macs(model, (3, *size(name)), conditional=False).total == model.costs(*size(name)).total


@torch.no_grad()
def test_a_budget_picks_how_many_branches_an_image_executes() -> None:
    model = make(k=4)
    fast, costs, x = HydraInference(model), model.costs(16, 16), images(6)
    budget = torch.tensor([costs.conditional(k) for k in (0, 1, 2, 3, 4, 5)], dtype=torch.float64)
    budget[5] = math.inf
    output = fast(x, budget)
    assert (output.selected >= 0).sum(1).tolist() == [1, 1, 2, 3, 4, 4]
    assert output.macs.tolist() == [costs.conditional(k) for k in (1, 1, 2, 3, 4, 4)]
    for i, k in enumerate((1, 1, 2, 3, 4, 4)):
        alone = model(x[i : i + 1], k=k)
        torch.testing.assert_close(output.logits[i : i + 1], alone.logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="budget"):
        fast(x, budget[:2])


@torch.no_grad()
def test_rescaling_brings_a_smaller_sum_to_the_trained_scale() -> None:
    model = make(k=4)
    model.combiner = nn.Identity()  # type: ignore[assignment]
    model.combiner.fold = lambda fold: lambda x: x  # type: ignore[assignment]
    model.classifier = nn.Identity()  # type: ignore[assignment]
    model.classifier.weight = torch.zeros(1)
    fast, x = HydraInference(model), images(4)
    torch.testing.assert_close(fast(x, k=2, rescale=True).logits, 2 * fast(x, k=2).logits)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "concat", "learn", "densenet", "ressep", "mini"])
def test_a_branch_that_no_image_selects_gets_a_gradient_of_exactly_zero(name: str) -> None:
    model = make(name).train()
    executed = torch.zeros(6, 5, dtype=torch.bool)
    executed[:, [1, 3]] = True
    output = model(images(6, name), conditional=False, executed=executed)
    F.cross_entropy(output.logits, torch.arange(6)).backward()
    for parameter in model.branch_parameters():
        assert parameter.grad is not None
        rows = parameter.grad.unflatten(0, (5, -1))
        assert not rows[[0, 2, 4]].any()
    assert all(parameter.grad is not None for parameter in model.stem.parameters())


def test_masking_leaves_the_gradient_of_an_images_unselected_outputs_at_zero() -> None:
    model = make()
    outputs = torch.randn(4, 5, model.features, requires_grad=True)
    executed = selection_mask(torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2]]), 5)
    model.combine_masked(outputs, executed, None).square().sum().backward()
    assert outputs.grad is not None
    assert not outputs.grad[~executed].any() and bool((outputs.grad[executed] != 0).all())


def test_the_sum_is_plain_with_a_partition_and_weighted_when_learned() -> None:
    model = make()
    outputs, executed = torch.randn(2, 5, 3), selection_mask(torch.tensor([[0, 4], [1, 2]]), 5)
    torch.testing.assert_close(model.combine_masked(outputs, executed, None)[0], outputs[0, 0] + outputs[0, 4])
    weights = torch.rand(2, 5)
    wanted = weights[1, 1] * outputs[1, 1] + weights[1, 2] * outputs[1, 2]
    torch.testing.assert_close(model.combine_masked(outputs, executed, weights)[1], wanted)


@pytest.mark.parametrize(("name", "reached"), [("resnet", False), ("learn", True)])
def test_the_class_loss_reaches_the_gate_only_where_it_is_learned(name: str, reached: bool) -> None:
    model = make(name).train()
    F.cross_entropy(model(images(6)).logits, torch.arange(6)).backward()
    assert model.gate is not None
    gradient = model.gate.output.weight.grad
    assert (gradient is not None and bool(gradient.any())) is reached


def test_the_gates_loss_reaches_the_stem() -> None:
    model = make().train()
    F.cross_entropy(model(images(6)).gate_logits, torch.arange(6) % 5).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.stem.parameters())


def test_a_bank_of_branches_trains_as_separate_branches_would() -> None:
    model = make("resnet").train()
    h = torch.randn(4, model.stem.out_channels, 8, 8)
    together = model.projection(model.branches(h)).unflatten(1, (5, -1))
    model.eval()
    with torch.no_grad():
        bank = model.projection(model.branches(h)).unflatten(1, (5, -1))
        for branch in range(5):
            alone = model.projection(model.branches(h, branch), branch)
            torch.testing.assert_close(bank[:, branch], alone, rtol=1e-4, atol=1e-5)
    assert together.shape == bank.shape


# --- gate -------------------------------------------------------------------------------------------------------------


def test_equal_scores_select_the_lowest_indices() -> None:
    assert top_k(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), 4).tolist() == [[1, 2, 4, 0]]


def test_the_class_head_sums_probabilities_without_underflow() -> None:
    logits, part = torch.randn(3, 10), torch.arange(10) % 4
    scores = branch_scores(logits, part, 4)
    sums = torch.stack([logits.softmax(1)[:, part == b].sum(1) for b in range(4)], 1)
    torch.testing.assert_close(scores.exp(), sums)
    extreme = torch.zeros(1, 10)
    extreme[0, 0] = 200.0  # all other groups' probabilities are 0 in float32
    scores = branch_scores(extreme, part, 4)
    assert bool(torch.isfinite(scores).all()) and float(scores[0, 1]) == pytest.approx(-200 + math.log(3))


@torch.no_grad()
def test_gate_scores_that_are_nan_are_an_error_and_select_nothing() -> None:
    model = make()
    assert model.gate is not None
    model.gate.output.bias[2] = math.nan
    for forward in (model, HydraInference(model)):
        with pytest.raises(ValueError, match="scores are NaN"):
            forward(images(2))


def test_gate_metrics_on_a_case_by_hand() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2]])
    found = gate_metrics(probs, torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]), top_k(probs, 2))
    assert found["gate_top1"].tolist() == [1, 0, 0] and found["gate_recall"].tolist() == [1, 1, 0]
    shares = utilisation(top_k(probs, 2), 3)
    assert shares.tolist() == pytest.approx([2 / 3, 1, 1 / 3])
    p = np.array([2, 3, 1]) / 6
    assert utilisation_entropy(shares) == pytest.approx(-(p * np.log(p)).sum() / np.log(3))


def test_collapse_and_idle_branches_are_named() -> None:
    collapsed = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert "1.00, 0.00" in str(collapse_warning(collapsed, "cluster")) and collapse_warning(collapsed, "learn") is None
    assert collapse_warning(torch.full((4,), 0.5), "cluster") is None
    assert "epoch: 1, 3" in str(idle_warning(torch.tensor([2, 0, 1, 0]), "learn"))
    assert idle_warning(torch.tensor([1, 1]), "cluster") is None


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_two_cross_entropies() -> None:
    model = make().train()
    labels = torch.tensor([0, 3, 9, 9, 1, 4])
    output = model(images(6))
    found = HydraLoss(model.config, model.part, lambda_gate=0.5)(output, labels)
    gate = -output.gate_probs[torch.arange(6), model.part[labels]].log().mean()
    torch.testing.assert_close(found["gate"], gate)
    torch.testing.assert_close(found["total"], F.cross_entropy(output.logits, labels) + 0.5 * gate)


def test_the_balance_term_runs_from_its_weight_to_n_times_it() -> None:
    model = make("learn concat")
    loss = HydraLoss(model.config, model.part)
    even, collapsed = torch.full((8, 5), 0.2), F.one_hot(torch.zeros(8, dtype=torch.int64), 5).float()
    assert float(loss._balance(even)) == pytest.approx(0.01) and float(loss._balance(collapsed)) == pytest.approx(0.05)
    probs = torch.rand(8, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(loss._balance(probs), probs)
    (wanted,) = torch.autograd.grad(0.01 * 5 / 64 * probs.sum(0).square().sum(), probs)
    torch.testing.assert_close(gradient, wanted)


# --- partition --------------------------------------------------------------------------------------------------------


def test_centres_pick_classes_in_rounds() -> None:
    # Nearest-centre assignment would give centre 0 the classes 0, 1 and 2.
    distances = np.array([[1.0, 9.0], [2.0, 5.0], [3.0, 4.0], [8.0, 7.0]])
    assert assign_in_rounds(distances).tolist() == [0, 0, 1, 1]
    # In order of distance the pair (class 0, centre 1) of the first round comes before centre 0's choice.
    distances = np.array([[1.0, 0.5], [2.0, 6.0], [3.0, 4.0], [9.0, 7.0]])
    assert assign_in_rounds(distances, "index").tolist() == [0, 0, 1, 1]
    assert assign_in_rounds(distances, "distance").tolist() == [1, 0, 0, 1]


def test_groups_are_equal_complete_reproducible_and_follow_the_clusters() -> None:
    generator = np.random.default_rng(0)
    true = np.repeat(np.arange(5), 4)
    features = torch.from_numpy(np.eye(5)[true] * 10 + generator.normal(size=(20, 5)))
    partition = BalancedClusterPartition()
    part = partition.fit(features, 5, seed=0)
    assert torch.bincount(part).tolist() == [4] * 5 and partition.centres_.shape == (5, 5)
    assert all(len(part[true == group].unique()) == 1 for group in range(5))
    assert torch.equal(part, BalancedClusterPartition().fit(features, 5, seed=0))


def test_a_number_of_classes_that_does_not_divide_warns_or_is_refused() -> None:
    features = torch.randn(11, 4)
    with pytest.warns(UserWarning, match="sizes of groups differ"):
        part = BalancedClusterPartition().fit(features, 3, seed=0)
    assert sorted(torch.bincount(part).tolist()) == [3, 4, 4]
    with pytest.raises(ValueError, match="choose n_branches that divides"):
        BalancedClusterPartition(strict=True).fit(features, 3, seed=0)


def test_features_that_k_means_cannot_use_are_refused_or_dealt_out() -> None:
    with pytest.raises(ValueError, match=r"classes \[1\] are not finite"):
        BalancedClusterPartition().fit(torch.tensor([[1.0], [math.nan]]), 2, seed=0)
    with pytest.warns(UserWarning, match="dealt out in turn"):
        assert BalancedClusterPartition().fit(torch.ones(6, 3), 3, seed=0).tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match="n_branches = 7"):
        BalancedClusterPartition().fit(torch.ones(6, 3), 7, seed=0)


def test_random_groups_are_equal_and_depend_on_the_seed() -> None:
    first = random_partition(20, 5, seed=0)
    assert torch.bincount(first).tolist() == [4] * 5
    assert torch.equal(first, random_partition(20, 5, 0)) and not torch.equal(first, random_partition(20, 5, 1))


def test_class_features_are_means_over_the_first_images_of_each_class() -> None:
    labels = torch.tensor([0, 1, 0, 0, 1])
    values = torch.tensor([1.0, 10.0, 3.0, 100.0, 20.0]).view(5, 1)
    batches = [(values[:2], labels[:2]), (values[2:], labels[2:])]
    means = class_mean_features(lambda x: x, batches, 2, per_class=2)
    assert means[:, 0].tolist() == [2.0, 15.0]
    with pytest.raises(ValueError, match=r"\[2\] \(1 classes\)"):
        class_mean_features(lambda x: x, batches, 3)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k"),
        ({"k": 6}, "k = 6 must be from 1 to n_branches = 5"),
        ({"w_stem": 0}, "w_stem"),
        ({"base": "vgg"}, "base"),
        ({"strategy": "sort"}, "strategy"),
        ({"branch_point": "block3"}, "branch_point 'block3'"),
        ({"strategy": "learn", "gate_head": "classes"}, "gate_head 'classes'"),
    ],
)
def test_impossible_settings_name_their_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HydraConfig(**{**SMALL, **changes})


def test_more_branches_than_classes_and_too_narrow_branches_are_refused() -> None:
    with pytest.raises(ValueError, match="n_branches = 11 must be at most the number of classes, 10"):
        make(used=False, n_branches=11)
    with pytest.raises(ValueError, match="w_branch = 0.01 leaves 1 channels"):
        make(used=False, w_branch=0.01)
    assert make(used=False, w_gate=0.001).gate is not None  # one network alone may have one channel


def test_images_that_the_network_cannot_read_are_refused() -> None:
    model = make("ressep")
    with pytest.raises(ValueError, match="at least 32 x 32"):
        model(torch.zeros(2, 3, 16, 64))
    with pytest.raises(ValueError, match="B x 3 x H x W"):
        HydraInference(model)(torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match="NaN or Inf"):
        model(torch.full((2, 3, 64, 64), math.nan))


def test_training_needs_a_partition_and_two_images() -> None:
    model = make().train()
    with pytest.raises(ValueError, match="at least 2 images"):
        model(images(1))
    bare = HydraNet(model.config, CLASSES).train()
    with pytest.raises(ValueError, match="needs a partition before training"):
        bare(images(2))
    with pytest.raises(ValueError, match="needs a partition before training"):
        HydraLoss(bare.config, bare.part)(model(images(2)), torch.tensor([0, 1]))


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_outside_the_classes_are_named(label: int) -> None:
    model = make().train()
    with pytest.raises(ValueError, match=f"from 0 to 9, got {label}"):
        HydraLoss(model.config, model.part)(model(images(2)), torch.tensor([0, label]))


@pytest.mark.parametrize("name", ["resnet", "concat", "ressep", "no gating"])
@torch.no_grad()
def test_an_empty_batch_gives_empty_answers_and_no_loss(name: str) -> None:
    model = make(name)
    for forward in (model, HydraInference(model)):
        output = forward(images(0, name))
        assert output.logits.shape == (0, CLASSES) and output.selected.shape[0] == 0 and output.macs.shape == (0,)
    with pytest.raises(ValueError, match="empty batch"):
        HydraLoss(model.config, model.part)(output, torch.empty(0, dtype=torch.int64))


def test_a_partition_of_another_shape_or_balance_is_refused() -> None:
    model = make()
    for part, message in (
        (torch.zeros(9, dtype=torch.int64), "each of 10 classes"),
        (torch.full((10,), 5), "from 0 to 4"),
        (torch.zeros(10, dtype=torch.int64), "at most one"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_partition(part)


def test_weights_of_another_partition_are_refused() -> None:
    model, other = make(), make()
    other.set_partition(random_partition(CLASSES, 5, seed=3))
    with pytest.raises(ValueError, match="another partition"):
        model.load_state_dict(other.state_dict())
    HydraNet(model.config, CLASSES).load_state_dict(other.state_dict())


def test_a_model_in_training_mode_has_no_inference_form() -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match="eval"):
        HydraInference(make().train())


def test_first_weights_are_he_s_or_smaller_uniform_ones_in_every_branch() -> None:
    torch.manual_seed(0)
    sizes = {}
    for init in ("he", "uniform"):
        net = HydraNet(HydraConfig(**SETTINGS["resnet"], init=init), CLASSES)
        weight = next(parameter for name, parameter in net.branches.named_parameters() if name.endswith("conv1.weight"))
        rows = weight.unflatten(0, (5, -1))
        sizes[init] = rows.flatten(1).std(1)
        fan_in = rows.shape[2] * 9
        bound = 1 / math.sqrt(fan_in)
        assert (float(weight.detach().abs().max()) <= bound) == (init == "uniform")
        assert float(sizes[init].mean()) == pytest.approx(
            math.sqrt(2) * bound if init == "he" else bound / 3**0.5, rel=0.1
        )
