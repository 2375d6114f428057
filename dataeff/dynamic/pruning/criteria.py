"""Which filters a static pruning method removes, and what it does to the weights that stay.

Source: spec skipnet section 5 (PEFC, EP) and spec deepmoe section 5 (Li et al., He et al., ThiNet, SSS). The functions
that reconstruct a layer see its input channels through their contributions Z (n, C', C): what channel c adds to output
o at sampled position n. Everything that is decided from them needs only Z^T Z and Z^T y.
"""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import lars_path_gram
from torch import Tensor

ENTROPY_BINS = 100
CHUNK = 256
RIDGE = 1e-6  # relative to the mean diagonal, so that channels that are never active do no harm


def l1_scores(weight: Tensor) -> Tensor:
    """L1 norm of each filter of (C', C, k, k), (C',)."""
    return weight.detach().abs().flatten(1).sum(1)


def entropy_scores(pooled: Tensor, bins: int = ENTROPY_BINS) -> Tensor:
    """Entropy in nats of the histogram of each filter's pooled activation over images, (N, C) -> float64 (C,).

    A filter that answers every image alike has entropy 0.
    """
    scores = []
    for column in pooled.detach().double().cpu().unbind(1):
        counts = torch.from_numpy(np.histogram(column.numpy(), bins)[0]).double()
        share = counts[counts > 0] / counts.sum()
        scores.append(-(share * share.log()).sum())
    return torch.stack(scores)


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Ascending numbers of the `count` largest scores; ties keep the earlier one. int64 (count,)."""
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


@dataclass
class Contributions:
    """Second moments of a layer's contributions over n sampled positions and all output channels.

    Attributes:
        gram: Z^T Z, float64 (C, C).
        correlation: Z^T y with y the output to be reconstructed, float64 (C,).
        rows: n * C'.
    """

    gram: Tensor
    correlation: Tensor
    rows: int


def contributions(patches: Tensor, weight: Tensor, target: Tensor) -> Contributions:
    """Moments of a layer.

    Args:
        patches: input at sampled positions, (n, k*k, C).
        weight: of the convolution, (C', C, k, k).
        target: output to be reconstructed at these positions, (n, C').
    """
    filters = weight.detach().flatten(2).double()
    gram = filters.new_zeros(weight.shape[1], weight.shape[1])
    correlation = gram.new_zeros(weight.shape[1])
    for patch, wanted in zip(patches.double().split(CHUNK), target.double().split(CHUNK), strict=True):
        z = torch.einsum("nuc,ocu->noc", patch, filters).flatten(0, 1)
        gram += z.T @ z
        correlation += z.T @ wanted.flatten()
    return Contributions(gram, correlation, patches.shape[0] * weight.shape[0])


def lasso_channels(moments: Contributions, count: int) -> Tensor:
    """The input channels that LASSO keeps when its penalty is lowered until `count` remain (He et al., Eq. 1-2).

    Where the path jumps past `count`, those that enter next fill up. Ascending, int64 (count,).
    """
    gram, correlation = moments.gram.cpu().numpy(), moments.correlation.cpu().numpy()
    # copy_Gram, since the path permutes its argument in place.
    _, _, path = lars_path_gram(correlation, gram, n_samples=moments.rows, method="lasso", copy_Gram=True)
    on = path != 0
    sizes = on.sum(0)
    column = int(np.flatnonzero(sizes <= count)[-1])
    entered = np.where(on[:, column:].any(1), on[:, column:].argmax(1), on.shape[1])
    order = np.lexsort((-np.diag(gram), entered))
    return torch.from_numpy(np.sort(order[:count]))


def thinet_channels(moments: Contributions, count: int) -> Tensor:
    """The input channels left when those with the least effect on the output are removed one by one (ThiNet, Eq. 6).

    The removed set T minimises the sum over samples of (sum of T's contributions)^2, greedily. Ascending, int64
    (count,).
    """
    gram = moments.gram
    left = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    with_removed = torch.zeros(len(gram), dtype=gram.dtype, device=gram.device)  # G 1_T
    for _ in range(len(gram) - count):
        rise = gram.diagonal() + 2 * with_removed
        worst = int(torch.where(left, rise, torch.inf).argmin())
        left[worst] = False
        with_removed += gram[worst]
    return left.nonzero()[:, 0].cpu()


def thinet_scales(moments: Contributions, kept: Tensor) -> Tensor:
    """Factors of the kept channels that give back the layer's own output best, float64 (len(kept),) (ThiNet, Eq. 7)."""
    kept = kept.to(moments.gram.device)
    return _solve(moments.gram[kept][:, kept], moments.gram[kept].sum(1))


def reconstructed_weight(patches: Tensor, kept: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The layer's weights on the kept input channels by least squares, the others zero, (C', C, k, k).

    Args: as for `contributions`; `kept` int64, ascending.
    """
    kept = kept.to(patches.device)
    x, y = patches[:, :, kept].double().flatten(1), target.double()
    solution = _solve(x.T @ x, x.T @ y)  # (k*k*kept, C'), rows ordered by tap, channel
    new = torch.zeros_like(weight)
    taps = solution.T.reshape(len(weight), patches.shape[1], len(kept)).transpose(1, 2)
    new[:, kept] = taps.reshape(len(weight), len(kept), *weight.shape[2:]).to(weight.dtype)
    return new


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """sign(x) * max(|x| - threshold, 0)."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)


def proximal_step(
    factor: Tensor, gradient: Tensor, velocity: Tensor, lr: float, penalty: float, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of accelerated proximal gradient on L + penalty * |factor|_1 (SSS, Eq. 9 to 11).

    Args:
        factor: the look-ahead point at which the gradient was taken.
        velocity: of the last step.

    Returns:
        The next look-ahead point, the next velocity, and the iterate itself, which holds the exact zeros.
    """
    iterate = soft_threshold(factor - lr * gradient, lr * penalty)
    velocity = iterate - factor + momentum * velocity
    return iterate + momentum * velocity, velocity, iterate


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    ridge = RIDGE * matrix.diagonal().mean().clamp(min=1e-12)
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    solution: Tensor = torch.linalg.solve(matrix + ridge * eye, right)
    return solution
