"""The three-term loss of DeepMoE, lambda's schedule, the baselines' losses, and what is warned of."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.dynamic.deepmoe.analysis import balance_totals, expressive_power_probability, gate_balance_report
from dataeff.dynamic.deepmoe.baselines import NoisyTopKHeads, PruningOutput, importance_loss, q_loss
from dataeff.dynamic.deepmoe.losses import adapted, deepmoe_loss, gate_loss, gate_warnings, ramped
from dataeff.dynamic.deepmoe.model import MoEOutput

GATES = [torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[0.0, 0.0, 3.0, 0.0], [0.5, 0.5, 0.5, 0.5]])]


def output(logits: Tensor | None = None, embedding_logits: Tensor | None = None) -> MoEOutput:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]) if logits is None else logits
    head = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 2.0]]) if embedding_logits is None else embedding_logits
    return MoEOutput(logits, GATES, torch.zeros(2, 3), head, torch.zeros(2), torch.tensor([0.375, 1.0]))


def test_the_gate_loss_is_the_sum_of_the_gates_or_their_mean_over_layers() -> None:
    assert float(gate_loss(GATES, "sum")) == pytest.approx((1 + 3 + 3 + 2 + 2) / 2)
    assert float(gate_loss(GATES, "mean")) == pytest.approx((6 / 4 + 5 / 8) / 2)


def test_the_loss_adds_the_three_terms_with_their_weights() -> None:
    labels = torch.tensor([0, 2])
    out = output()
    loss, parts = deepmoe_loss(out, labels, lam=0.5, mu=2.0)
    base, embedding = F.cross_entropy(out.logits, labels), F.cross_entropy(out.embedding_logits, labels)
    torch.testing.assert_close(loss, base + 0.5 * gate_loss(GATES) + 2 * embedding)
    assert float(parts["active_share"]) == pytest.approx(0.6875)
    assert float(parts["mean_gate"]) == pytest.approx((1 + 3 + 2 + 3 + 2) / 8)


def test_without_mu_the_embedding_classifier_takes_no_part() -> None:
    head = torch.full((2, 3), torch.nan)
    loss, parts = deepmoe_loss(output(embedding_logits=head), torch.tensor([0, 1]), lam=1.0, mu=0.0)
    assert bool(loss.isfinite()) and float(parts["embedding"]) == 0


def test_presence_is_the_binary_cross_entropy_of_the_classes_in_an_image() -> None:
    labels = torch.tensor([[[0, 1], [255, 1]], [[2, 2], [2, 2]]])
    out = output(logits=torch.zeros(2, 3, 2, 2))
    present = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    _, parts = deepmoe_loss(out, labels, 0.0, 1.0, mu_mode="presence")
    torch.testing.assert_close(parts["embedding"], F.binary_cross_entropy_with_logits(out.embedding_logits, present))
    assert float(parts["base"]) == pytest.approx(float(torch.tensor(3.0).log()))


def test_dense_labels_need_mu_zero_or_presence() -> None:
    with pytest.raises(ValueError, match="mu_mode='presence' or mu = 0"):
        deepmoe_loss(output(logits=torch.zeros(2, 3, 2, 2)), torch.zeros(2, 2, 2, dtype=torch.int64), 0.0, 1.0)


def test_a_batch_of_ignored_pixels_costs_nothing_and_warns() -> None:
    logits = torch.zeros(2, 3, 2, 2, requires_grad=True)
    labels = torch.full((2, 2, 2), 255)
    with pytest.warns(UserWarning, match="ignore label 255"):
        loss, _ = deepmoe_loss(output(logits=logits), labels, 0.0, 0.0)
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 3], {}, r"\[0, 3\), got values from 0 to 3"),
        ([-1, 0], {}, "got values from -1 to 0"),
        ([0, 1], {"lam": -0.1}, "lambda must be a finite number of at least 0, got -0.1"),
        ([0, 1], {"mu": -1.0}, "mu must be a finite number of at least 0, got -1"),
        ([0, 1], {"mu": float("nan")}, "mu must be"),
        ([0, 1], {"reduction": "max"}, "gate_loss_reduction must be 'mean' or 'sum', got 'max'"),
        ([0], {}, r"int64 \(2,\), got shape \(1,\)"),
        ([0.0, 1.0], {}, "targets must be int64, got torch.float32"),
    ],
)
def test_bad_labels_and_weights_are_refused(labels: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deepmoe_loss(output(), torch.tensor(labels), **{"lam": 1.0, "mu": 1.0, **options})


def test_lambda_rises_from_zero_over_the_ramp() -> None:
    assert [ramped(6.0, progress, 0.3) for progress in (0, 0.15, 0.3, 0.9)] == pytest.approx([0, 3, 6, 6])
    assert ramped(6.0, 0, 0.0) == 6


def test_lambda_follows_the_target_share() -> None:
    assert adapted(2.0, 0.6, 0.5) == pytest.approx(2.2) and adapted(2.0, 0.4, 0.5) == pytest.approx(2 / 1.1)
    with pytest.raises(ValueError, match=r"target_share must be in \(0, 1\], got 0"):
        adapted(2.0, 0.6, 0)


def test_channels_are_dead_always_on_or_depend_on_the_image() -> None:
    shares = [torch.tensor([0.0, 1.0, 0.5, 0.99]), torch.tensor([0.0, 0.0])]
    report = gate_balance_report(shares)
    assert report.dead.tolist() == [0.25, 1] and report.always_on.tolist() == [0.25, 0]
    assert report.input_dependent.tolist() == [0.25, 0]
    assert balance_totals(shares) == {
        "dead_share": 0.5, "always_on_share": pytest.approx(1 / 6), "input_dependent_share": pytest.approx(1 / 6)
    }  # fmt: skip


def test_static_gating_collapse_and_dead_layers_are_named() -> None:
    healthy = [torch.tensor([0.5, 0.6, 1.0])]
    assert gate_warnings(healthy, 0) == []
    assert ["static gating" in text for text in gate_warnings([torch.tensor([0.0, 1.0])], 0)] == [True]
    assert gate_warnings([torch.tensor([0.0, 1.0])], 0, learns=False) == []
    collapsed = gate_warnings([torch.full((10,), 0.01)], 3)
    assert [text.split(":")[0] for text in collapsed] == ["lambda collapse", "static gating", "dead layer"]


@pytest.mark.parametrize(("n", "m", "layers", "choices"), [(4, 2, 2, 36), (5, 2, 1, 10)])
def test_two_random_patterns_coincide_as_often_as_expressive_power_says(
    n: int, m: int, layers: int, choices: int
) -> None:
    trials = 100_000
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.rand(trials, layers, n, generator=generator).argsort(-1)[..., :m].sort(-1).values for _ in "ab"]
    frequency = float((chosen[0] == chosen[1]).all(-1).all(-1).double().mean())
    expected = 1 - expressive_power_probability(n, m, layers)
    assert expected == pytest.approx(1 / choices)
    assert abs(frequency - expected) < 3 * (expected * (1 - expected) / trials) ** 0.5


def test_expressive_power_is_computed_in_log_space_and_refuses_more_than_all_channels() -> None:
    assert 0.999999 < expressive_power_probability(2048, 1024, 50) <= 1
    with pytest.raises(ValueError, match="n = 2, m = 4"):
        expressive_power_probability(2, 4, 1)


def test_noisy_top_k_keeps_k_channels_of_a_layer_that_are_one_on_average() -> None:
    torch.manual_seed(0)
    heads = NoisyTopKHeads([8, 6], 5, share=0.5)
    e = torch.rand(3, 5)
    first, second = heads(e)
    assert (first > 0).sum(1).tolist() == [4] * 3 and (second > 0).sum(1).tolist() == [3] * 3
    torch.testing.assert_close(first.sum(1), torch.full((3,), 4.0))
    noisy = heads(e, torch.rand(3, 14))
    assert not torch.equal(noisy[0], first) and torch.equal(heads(e, torch.full((3, 14), 0.5))[0], first)


def test_the_importance_loss_is_zero_for_balanced_channels_and_adds_up_over_workers() -> None:
    balanced = [torch.tensor([[1.0, 0.0], [0.0, 1.0]])]
    assert float(importance_loss(balanced, [balanced[0].mean(0)])) == 0
    gate = torch.tensor([[1.0, 0.2], [3.0, 0.5], [0.3, 0.1], [2.0, 2.0]], requires_grad=True)
    mean = gate.detach().mean(0)
    importance_loss([gate], [mean]).backward()
    assert gate.grad is not None
    whole = gate.grad.clone()
    gate.grad = None
    for half in gate.split(2):
        (importance_loss([half], [mean]) / 2).backward()
    torch.testing.assert_close(gate.grad, whole)


def test_q_values_are_drawn_to_reward_plus_the_best_that_follows() -> None:
    q = torch.tensor([[[1.0, 2.0], [0.5, 0.1]]], requires_grad=True)
    out = PruningOutput(torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 4), q, torch.tensor([[1, 0]]))
    loss = q_loss(out, torch.tensor([0.7]), alpha=2.0)
    first, second = -2.0 * 2 / 4 + 0.5, -2.0 * 1 / 4 - 0.7
    assert float(loss.detach()) == pytest.approx(((2.0 - first) ** 2 + (0.5 - second) ** 2) / 2)
    loss.backward()
    assert q.grad is not None and q.grad[0, 0, 0] == 0 and q.grad[0, 1, 1] == 0
