"""Losses of SkipNet and the diagnosis of gates that stopped deciding.

Source: spec skipnet sections 2.5 to 2.7 and 10. N is the number of gates, B the batch, K the number of classes.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dataeff.dynamic.skipnet.model import SkipNetOutput

Beta = Literal["alpha_over_n"] | float
Baseline = Literal["none", "batch_mean"]
BatchMean = Callable[[Tensor], Tensor]

ALL_SKIP_SHARE = 0.02
SATURATED_LOGIT = 8.0


def _local_mean(rewards: Tensor) -> Tensor:
    return rewards.mean(0)


def straight_through(prob: Tensor) -> Tensor:
    """1 where prob >= 0.5 else 0, with the gradient of prob (Eq. 2.7).

    `prob - prob.detach()` is exactly 0, so that the forward value is exactly 0 or 1.
    """
    return (prob >= 0.5).to(prob.dtype) + (prob - prob.detach())


def reward_to_go(gates: Tensor, block_costs: Tensor | None, alpha: float, gamma: float = 1.0) -> Tensor:
    """Skip reward still to come at each gate: (alpha/N) * sum_{j>=i} gamma^(j-i) (1 - g_j) C_j (Eq. 2.6).

    Args:
        gates: executed blocks 0 or 1, (B, N).
        block_costs: C, (N,); None for ones.
        alpha: weight of the skip reward, at least 0.
        gamma: discount in (0, 1].

    Returns:
        (B, N), without gradient.

    Raises:
        ValueError: for alpha, gamma or block_costs outside the above.
    """
    _check_reward(gates, block_costs, alpha, gamma)
    rewards = (1 - gates.detach()) * (alpha / gates.shape[1])
    if block_costs is not None:
        rewards = rewards * block_costs.to(rewards)
    return _discounted_to_go(rewards, gamma)


def hybrid_rl_loss(
    output: "SkipNetOutput",
    targets: Tensor,
    alpha: float,
    beta: Beta = "alpha_over_n",
    rl_weight: float = 0.01,
    reward_baseline: Baseline = "none",
    block_costs: Tensor | None = None,
    gamma: float = 1.0,
    batch_mean: BatchMean = _local_mean,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the sampled path plus REINFORCE for the gates (surrogate of spec section 2.6).

        loss = mean_b L_b - rl_weight * sum_i mean_b( log p(g_bi) * rhat_bi )
        rhat_bi = (alpha/N) * sum_{j>=i} (1 - g_bj) C_j - beta * L_b        (no gradient)

    Log-probabilities come from the logits and stay finite for logits of +-100. With gamma < 1 the loss L counts as
    a reward that arrives with the last gate.

    Args:
        output: of a forward pass in mode "sample".
        targets: int64 (B,) in [0, K).
        alpha: weight of the skip reward, at least 0.
        beta: weight of L in the reward, "alpha_over_n" (the source) or a number (1 optimises Eq. 2.5 exactly).
        rl_weight: weight of the policy gradient, at least 0.
        reward_baseline: "none", or "batch_mean" to subtract the batch mean of rhat per gate.
        block_costs: C, (N,); None for ones.
        gamma: discount in (0, 1].
        batch_mean: the mean over the first axis; with several workers, over all of them.

    Returns:
        The loss to minimise and its parts as detached scalars: "cross_entropy", "policy" (the second term with its
        weight), "skip_reward" ((alpha/N) * sum of the skip rewards) and "executed_share" of the N blocks.

    Raises:
        ValueError: for arguments outside the above, targets outside [0, K), or an output without gate logits.

    Example:
        output = model(images, mode="sample", draws=torch.rand(len(images), model.num_gates))
        loss, parts = hybrid_rl_loss(output, labels, alpha=1.0)
        loss.backward()
    """
    _check_rl(output, rl_weight)
    check_targets(targets, output.logits.shape[1])
    cross_entropy = F.cross_entropy(output.logits, targets, reduction="none")
    skip = reward_to_go(output.gates, block_costs, alpha, gamma)
    weight = _loss_weight(beta, alpha, skip.shape[1])
    rewards = skip - _discounts(skip, gamma) * (weight * cross_entropy.detach())[:, None]
    policy = rl_weight * _policy_loss(output, _subtract_baseline(rewards, reward_baseline, batch_mean)).mean()
    loss = cross_entropy.mean() + policy
    return loss, _parts(output, cross_entropy, policy, skip)


def pure_rl_loss(
    output: "SkipNetOutput",
    targets: Tensor,
    class_draws: Tensor,
    alpha: float,
    beta: Beta = "alpha_over_n",
    reward: Literal["loss", "correct"] = "loss",
    reward_baseline: Baseline = "none",
    block_costs: Tensor | None = None,
    gamma: float = 1.0,
    batch_mean: BatchMean = _local_mean,
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE only: the class is sampled too and no supervised gradient is used (ablation "SkipNet+RL").

    The prediction is the last action. Its reward is -L or 1[correct], weighted by beta; the gates get that reward
    and their skip rewards to go.

    Args:
        output: of a forward pass in mode "sample".
        targets: int64 (B,) in [0, K).
        class_draws: uniform numbers in [0, 1), (B,), that choose the class by inversion.
        reward: "loss" for -L, "correct" for 1 where the sampled class is right.
        alpha, beta, reward_baseline, block_costs, gamma, batch_mean: as for `hybrid_rl_loss`.

    Returns:
        The loss and the parts of `hybrid_rl_loss`.
    """
    _check_rl(output, 1.0)
    check_targets(targets, output.logits.shape[1])
    log_probs = F.log_softmax(output.logits, 1)
    cumulative = log_probs.detach().double().exp().cumsum(1)
    # Sums can end just below 1; the last class takes what is left.
    chosen = (cumulative[:, :-1] <= class_draws.double()[:, None]).sum(1)
    cross_entropy = F.nll_loss(log_probs, targets, reduction="none").detach()
    if reward == "loss":
        terminal = -cross_entropy
    elif reward == "correct":
        terminal = (chosen == targets).to(cross_entropy.dtype)
    else:
        raise ValueError(f"reward must be 'loss' or 'correct', got {reward!r}")
    skip = reward_to_go(output.gates, block_costs, alpha, gamma)
    terminal = _loss_weight(beta, alpha, skip.shape[1]) * terminal
    rewards = _subtract_baseline(skip + _discounts(skip, gamma) * terminal[:, None], reward_baseline, batch_mean)
    class_reward = _subtract_baseline(terminal, reward_baseline, batch_mean)
    class_loss = -log_probs.gather(1, chosen[:, None]).view(-1) * class_reward
    loss = (class_loss + _policy_loss(output, rewards)).mean()
    return loss, _parts(output, cross_entropy, loss, skip)


def check_targets(targets: Tensor, num_classes: int) -> None:
    """Refuse an empty batch or labels that are not int64 in [0, num_classes).

    On an accelerator the values are not read, because every step would wait for the device; check them once on the
    CPU when the data set is opened.
    """
    if targets.dim() != 1 or len(targets) == 0:
        raise ValueError(f"targets must be int64 (B,) with B at least 1, got shape {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if targets.device.type == "cpu":
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must be in [0, {num_classes}), got values from {low} to {high}")


def gate_warnings(gates: Tensor, gate_logits: Tensor) -> list[str]:
    """Say what is wrong with the decisions of a window of images; an empty list means nothing is.

    Args:
        gates: executed blocks 0 or 1, (B, N).
        gate_logits: (B, N), or (B, 0) if the gates were not asked.
    """
    if gates.numel() == 0:
        return []
    ratios = gates.detach().float().mean(0)
    share = float(ratios.mean())
    listed = " ".join(f"{ratio:.2f}" for ratio in ratios.tolist())
    advice = "try gate_bias_init, gate_temperature or a smaller rl_weight"
    dead = [str(block) for block, ratio in enumerate(ratios.tolist(), start=2) if ratio == 0]
    found = []
    if share < ALL_SKIP_SHARE:
        found.append(f"gate collapse: only {share:.1%} of the blocks execute (per block: {listed}); {advice}")
    elif share == 1:
        found.append(f"gate collapse: every block executes for every image (per block: {listed}); {advice}")
    elif dead:
        found.append(
            f"gate collapse: block {', '.join(dead)} never executes and gets no gradient any more "
            f"(per block: {listed}); {advice}"
        )
    if gate_logits.numel() and float(gate_logits.detach().abs().min()) > SATURATED_LOGIT:
        found.append(
            f"saturated gates: every |logit| is above {SATURATED_LOGIT:g}, so that sampling explores nothing; "
            "use a gate_temperature above 1"
        )
    return found


def skip_all_warning(alpha: float, beta: Beta, num_classes: int, full_loss: float) -> str | None:
    """Warn when skipping every block is the true optimum: alpha > beta * (ln K - L_full) (spec section 2.6).

    None for beta "alpha_over_n", whose trade-off comes from a short refinement and not from its optimum.

    Args:
        full_loss: mean cross-entropy of the network that executes every block, in nats.
    """
    if beta == "alpha_over_n":
        return None
    limit = float(beta) * (math.log(num_classes) - full_loss)
    if alpha <= limit:
        return None
    return (
        f"alpha {alpha:g} is above {limit:.2f} = beta * (ln {num_classes} - full loss {full_loss:.2f}): "
        "skipping every block is the optimum of this objective; use a smaller alpha"
    )


def _check_reward(gates: Tensor, block_costs: Tensor | None, alpha: float, gamma: float) -> None:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")
    if block_costs is not None and block_costs.shape != (gates.shape[1],):
        raise ValueError(f"block_costs needs one cost per gate, {gates.shape[1]}, got shape {tuple(block_costs.shape)}")


def _check_rl(output: "SkipNetOutput", rl_weight: float) -> None:
    if not 0 <= rl_weight < math.inf:
        raise ValueError(f"rl_weight must be a finite number of at least 0, got {rl_weight}")
    if output.gate_logits.shape != output.gates.shape:
        raise ValueError("the output has no gate logits: run the network in mode 'sample'")


def _loss_weight(beta: Beta, alpha: float, num_gates: int) -> float:
    if beta == "alpha_over_n":
        return alpha / num_gates
    if isinstance(beta, str) or not 0 <= beta < math.inf:
        raise ValueError(f"beta must be 'alpha_over_n' or a finite number of at least 0, got {beta!r}")
    return float(beta)


def _discounted_to_go(rewards: Tensor, gamma: float) -> Tensor:
    if gamma == 1:
        return rewards.flip(1).cumsum(1).flip(1)
    total = torch.zeros_like(rewards[:, 0])
    columns = []
    for reward in reversed(rewards.unbind(1)):
        total = reward + gamma * total
        columns.append(total)
    return torch.stack(columns[::-1], 1)


def _discounts(rewards: Tensor, gamma: float) -> Tensor:
    """gamma^(N-i) for the gates i = 1..N, (N,)."""
    count = rewards.shape[1]
    return gamma ** torch.arange(count - 1, -1, -1, device=rewards.device, dtype=rewards.dtype)


def _subtract_baseline(rewards: Tensor, baseline: Baseline, batch_mean: BatchMean) -> Tensor:
    if baseline not in ("none", "batch_mean"):
        raise ValueError(f"reward_baseline must be 'none' or 'batch_mean', got {baseline!r}")
    return rewards - batch_mean(rewards) if baseline == "batch_mean" else rewards


def _policy_loss(output: "SkipNetOutput", rewards: Tensor) -> Tensor:
    """-sum_i log p(g_i) * reward_i per image, (B,)."""
    negative_log_prob = F.binary_cross_entropy_with_logits(output.gate_logits, output.gates.detach(), reduction="none")
    return (negative_log_prob * rewards).sum(1)


def _parts(output: "SkipNetOutput", cross_entropy: Tensor, policy: Tensor, skip: Tensor) -> dict[str, Tensor]:
    return {
        "cross_entropy": cross_entropy.detach().mean(),
        "policy": policy.detach(),
        "skip_reward": skip[:, 0].mean(),
        "executed_share": output.gates.detach().mean(),
    }
