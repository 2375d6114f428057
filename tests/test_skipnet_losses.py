import math

import pytest
import torch
import torch.nn.functional as F

from dataeff.dynamic.skipnet.losses import (
    check_targets,
    gate_warnings,
    hybrid_rl_loss,
    pure_rl_loss,
    reward_to_go,
    skip_all_warning,
    straight_through,
)
from dataeff.dynamic.skipnet.model import SkipNetOutput


def output(logits, gate_logits, gates):
    logits, gate_logits, gates = (torch.as_tensor(t, dtype=torch.float32) for t in (logits, gate_logits, gates))
    return SkipNetOutput(logits, gate_logits, gates, torch.zeros(len(logits), dtype=torch.float64))


def test_straight_through_rounds_exactly_and_passes_the_gradient():
    prob = torch.tensor([0.1, 0.4999999, 0.5, 0.7, 0.3333333], requires_grad=True)
    value = straight_through(prob)
    assert value.tolist() == [0, 0, 1, 1, 0]
    value.backward(torch.arange(5.0))
    assert torch.equal(prob.grad, torch.arange(5.0))


def test_reward_to_go_of_a_hand_computed_case():
    gates = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    costs = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert reward_to_go(gates, None, 2.0).tolist() == [[1.0, 1.0, 0.5, 0.0]]
    assert reward_to_go(gates, costs, 4.0).tolist() == [[5.0, 5.0, 3.0, 0.0]]
    assert reward_to_go(gates, costs, 4.0, gamma=0.5).tolist() == [[1.75, 3.5, 3.0, 0.0]]


def test_hybrid_loss_of_a_hand_computed_case():
    out = output([[2.0, 0.0], [0.0, 0.0]], [[0.5, -1.0], [1.5, 0.3]], [[1, 0], [0, 0]])
    targets = torch.tensor([0, 1])
    alpha, beta, weight = 0.8, 0.7, 0.1
    cross_entropy = [math.log(1 + math.exp(-2)), math.log(2)]

    def log_sigmoid(z):
        return -math.log(1 + math.exp(-z))

    log_p = [[log_sigmoid(0.5), log_sigmoid(1.0)], [log_sigmoid(-1.5), log_sigmoid(-0.3)]]
    skips = [[1, 1], [2, 1]]
    policy = 0.0
    for b in range(2):
        for i in range(2):
            policy += log_p[b][i] * -(beta * cross_entropy[b] - alpha / 2 * skips[b][i]) / 2
    loss, parts = hybrid_rl_loss(out, targets, alpha, beta, weight)
    assert loss.item() == pytest.approx(sum(cross_entropy) / 2 - weight * policy, rel=1e-5)
    assert parts["cross_entropy"].item() == pytest.approx(sum(cross_entropy) / 2, rel=1e-5)
    assert parts["policy"].item() == pytest.approx(-weight * policy, rel=1e-4)
    assert parts["executed_share"].item() == 0.25
    assert parts["skip_reward"].item() == pytest.approx(alpha / 2 * 1.5, rel=1e-5)


def test_beta_alpha_over_n_is_that_number():
    torch.manual_seed(0)
    out = output(torch.randn(5, 3), torch.randn(5, 4), torch.rand(5, 4).round())
    targets = torch.tensor([0, 1, 2, 0, 1])
    assert hybrid_rl_loss(out, targets, 1.2)[0] == hybrid_rl_loss(out, targets, 1.2, beta=0.3)[0]
    assert hybrid_rl_loss(out, targets, 1.2)[0] != hybrid_rl_loss(out, targets, 1.2, beta=1.0)[0]


def test_the_gates_gradient_is_an_unbiased_estimate_of_the_objectives():
    """Enumerate all decisions: the mean gradient must be that of E[L - (alpha/N) sum R] (Eq. 2.4, beta = 1)."""
    torch.manual_seed(0)
    gate_logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
    paths = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    path_logits = torch.randn(8, 4, dtype=torch.float64)
    targets = torch.full((8,), 2)
    alpha = 0.6
    log_p = -F.binary_cross_entropy_with_logits(gate_logits.expand(8, 3), paths, reduction="none").sum(1)
    losses = F.cross_entropy(path_logits, targets, reduction="none")
    objective = (log_p.exp() * (losses - alpha / 3 * (1 - paths).sum(1))).sum()
    (expected,) = torch.autograd.grad(objective, gate_logits, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    for k in range(8):
        out = SkipNetOutput(path_logits[k : k + 1], gate_logits[None], paths[k : k + 1], torch.zeros(1))
        loss, _ = hybrid_rl_loss(out, targets[:1], alpha, beta=1.0, rl_weight=1.0)
        (gradient,) = torch.autograd.grad(loss, gate_logits)
        estimate += log_p[k].exp().detach() * gradient
    torch.testing.assert_close(estimate, expected)


def test_the_reward_has_no_gradient_and_class_logits_get_the_supervised_one():
    logits = torch.randn(4, 3, requires_grad=True)
    gate_logits = torch.randn(4, 2, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 0])
    out = SkipNetOutput(logits, gate_logits, torch.ones(4, 2), torch.zeros(4))
    hybrid_rl_loss(out, targets, 1.0, rl_weight=5.0)[0].backward()
    probabilities = F.softmax(logits, 1).detach()
    torch.testing.assert_close(logits.grad, (probabilities - F.one_hot(targets, 3)) / 4)
    assert gate_logits.grad.abs().sum() > 0


def test_the_batch_mean_baseline_removes_a_reward_all_images_share():
    out = output(torch.zeros(3, 4), torch.randn(3, 2), torch.ones(3, 2))
    targets = torch.tensor([0, 1, 2])
    _, parts = hybrid_rl_loss(out, targets, 1.0, beta=1.0, rl_weight=1.0, reward_baseline="batch_mean")
    assert parts["policy"].abs().item() < 1e-6
    assert hybrid_rl_loss(out, targets, 1.0, beta=1.0, rl_weight=1.0)[1]["policy"].abs() > 0.1


@pytest.mark.parametrize("size", [100.0, -100.0])
def test_losses_stay_finite_for_logits_of_plus_and_minus_100(size):
    logits = torch.tensor([[size, -size], [size, -size]], requires_grad=True)
    gate_logits = torch.full((2, 3), size, requires_grad=True)
    out = SkipNetOutput(logits, gate_logits, torch.tensor([[0.0, 1, 0], [1.0, 0, 1]]), torch.zeros(2))
    targets = torch.tensor([0, 1])
    loss = hybrid_rl_loss(out, targets, 1.0, beta=1.0)[0] + pure_rl_loss(out, targets, torch.rand(2), 1.0)[0]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all() and torch.isfinite(gate_logits.grad).all()


def test_pure_rl_samples_the_class_from_the_softmax_and_reinforces_right_answers():
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    draws = (torch.arange(1000) + 0.5) / 1000
    logits = probabilities.log().expand(1000, 3).clone().requires_grad_()
    out = SkipNetOutput(logits, torch.zeros(1000, 2), torch.ones(1000, 2), torch.zeros(1000))
    loss, _ = pure_rl_loss(out, torch.full((1000,), 1), draws, alpha=1.0, beta=1.0, reward="correct")
    loss.backward()
    expected = probabilities[1] * (F.one_hot(torch.tensor(1), 3) - probabilities)
    torch.testing.assert_close(-logits.grad.sum(0), expected, atol=1e-3, rtol=0)


def test_pure_rl_gives_every_logit_a_gradient_but_no_supervised_one():
    torch.manual_seed(0)
    logits = torch.zeros(2, 3, requires_grad=True)
    gate_logits = torch.randn(2, 2, requires_grad=True)
    out = SkipNetOutput(logits, gate_logits, torch.ones(2, 2), torch.zeros(2))
    draws = torch.tensor([0.0, 0.999999])
    pure_rl_loss(out, torch.tensor([1, 1]), draws, alpha=1.0, beta=1.0)[0].backward()
    # Reward -ln 3 for the sampled classes 0 and 2: they are pushed down, the target is not favoured over the other.
    assert logits.grad[0, 0] > 0 and logits.grad[0, 1] == logits.grad[0, 2] < 0
    assert logits.grad[1, 2] > 0 and logits.grad[1, 0] == logits.grad[1, 1] < 0
    assert gate_logits.grad.abs().min() > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": -0.1},
        {"alpha": math.nan},
        {"alpha": 1.0, "beta": -1.0},
        {"alpha": 1.0, "beta": "one"},
        {"alpha": 1.0, "rl_weight": -1.0},
        {"alpha": 1.0, "gamma": 0.0},
        {"alpha": 1.0, "block_costs": torch.ones(3)},
        {"alpha": 1.0, "reward_baseline": "mean"},
    ],
)
def test_arguments_out_of_range_are_refused_with_the_value_seen(arguments):
    out = output(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="got"):
        hybrid_rl_loss(out, torch.tensor([0, 1]), **arguments)


def test_an_output_without_gate_logits_is_refused():
    out = output(torch.zeros(2, 3), torch.zeros(2, 0), torch.ones(2, 4))
    with pytest.raises(ValueError, match="mode 'sample'"):
        hybrid_rl_loss(out, torch.tensor([0, 1]), 1.0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 3]), "\\[0, 3\\), got values from 0 to 3"),
        (torch.tensor([-1, 0]), "from -1 to 0"),
        (torch.tensor([], dtype=torch.int64), "at least 1"),
        (torch.tensor([0.0, 1.0]), "int64"),
    ],
)
def test_labels_out_of_range_and_empty_batches_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        check_targets(targets, 3)


def test_collapse_and_saturation_are_reported_and_healthy_gates_are_not():
    torch.manual_seed(0)
    healthy, logits = (torch.rand(50, 4) < 0.5).float(), torch.randn(50, 4)
    assert gate_warnings(healthy, logits) == []
    assert "only 0.0%" in gate_warnings(torch.zeros(50, 4), logits)[0]
    assert "every block executes" in gate_warnings(torch.ones(50, 4), logits)[0]
    dead = healthy.clone()
    dead[:, 1] = 0
    assert "block 3 never executes" in gate_warnings(dead, logits)[0]
    assert "saturated" in gate_warnings(healthy, torch.full((50, 4), -9.0))[0]
    assert gate_warnings(healthy, torch.empty(50, 0)) == [] == gate_warnings(torch.empty(0, 4), torch.empty(0, 4))


def test_alpha_above_ln_k_minus_the_full_loss_is_reported_for_beta_1_only():
    assert skip_all_warning(1.5, 1.0, 10, 0.3) is None
    assert "above 2.00" in skip_all_warning(4.0, 1.0, 10, math.log(10) - 2)
    assert skip_all_warning(4.0, "alpha_over_n", 10, 0.3) is None
