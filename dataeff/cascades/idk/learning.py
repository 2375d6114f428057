"""Learned add-ons: the cost-regularised loss of N models, and the cost-oblivious twins (spec sections 2.5, 2.6, 2.8).

With N = 2, dJ/dh_i = (wrong_acc_i - wrong_fast_i + lambda c_acc) / n: IDK is favoured where P(fast wrong) less
P(acc wrong) exceeds lambda c_acc. So lambda c_acc >= 1 always ends in "never IDK", and lambda = 0 in (nearly) "always
IDK" where the accurate model is better on average; both are legitimate solutions.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dataeff.cascades.idk.uncertainty import MIN_STD, IDKClassifier, confidence_loss, entropy

ALPHA_1 = 4.0
NEURAL_BATCH = 256


def two_stage_loss(h: Tensor, wrong_fast: Tensor, wrong_accurate: Tensor, costs: Tensor, weight: float) -> Tensor:
    """J of Eq. 4.12 to 4.14 for h (n,), zero-one losses (n,) and costs (2,); the fast model is always paid."""
    loss = (1 - h) * wrong_fast + h * wrong_accurate
    return (loss + weight * (costs[0] + h * costs[1])).mean()


def joint_loss(h: Sequence[Tensor], wrong: Tensor, costs: Tensor, weight: Tensor | float) -> Tensor:
    """J of Eq. 4.15 and 4.16 with p_N = 0, so that the last model answers; per row of leading dimensions.

    Args:
        h: of the N - 1 add-ons, each (..., n). wrong: zero-one losses (N, n).
        costs: (N,). weight: lambda, (...) or one.
    """
    return _expected(h, wrong, costs, weight)[0].mean(-1)


def joint_gradient(h: Sequence[Tensor], wrong: Tensor, costs: Tensor, weight: Tensor | float) -> list[Tensor]:
    """dJ/dh of `joint_loss`, shaped as h: what stage j + 1 is expected to lose and cost, less what j loses, times the
    probability of reaching j."""
    expected = _expected(h, wrong, costs, weight)
    reach = torch.ones_like(expected[0]) / wrong.shape[1]
    slopes = []
    for stage, passed in enumerate(h):
        slopes.append(reach * (expected[stage + 1] - wrong[stage]))
        reach = reach * passed
    return slopes


def _expected(h: Sequence[Tensor], wrong: Tensor, costs: Tensor, weight: Tensor | float) -> list[Tensor]:
    """Loss and weighted cost from each stage on, given that it is reached: N of (..., n)."""
    price = torch.as_tensor(weight, dtype=torch.float64)[..., None, None] * costs[:, None]
    expected = [wrong[-1] + price[..., -1, :]]
    for stage in range(len(h) - 1, -1, -1):
        following = (1 - h[stage]) * wrong[stage] + price[..., stage, :] + h[stage] * expected[0]
        expected.insert(0, following)
    return expected


def fit_cost_aware(
    classifier: IDKClassifier,
    probabilities: Tensor,
    wrong_fast: Tensor,
    wrong_next: Tensor,
    costs: tuple[float, float],
    cost_weight: float,
    steps: int = 2000,
    lr: float = 0.05,
    seed: int = 0,
    standardise: bool = False,
) -> None:
    """Learn one add-on between two models; `fit_joint` with N = 2.

    Args:
        probabilities: of the fast model (n, k). wrong_fast, wrong_next: (n,) zero or one.
        costs: of both models, in the unit of 1 / cost_weight.
    """
    fit_joint(
        [classifier],
        [probabilities],
        torch.stack([wrong_fast, wrong_next]),
        costs,
        cost_weight,
        steps,
        lr,
        seed,
        standardise,
    )


def fit_joint(
    classifiers: Sequence[IDKClassifier],
    probabilities: Sequence[Tensor],
    wrong: Tensor,
    costs: Sequence[float],
    cost_weight: float,
    steps: int = 2000,
    lr: float = 0.05,
    seed: int = 0,
    standardise: bool = False,
) -> None:
    """Learn all N - 1 add-ons at once, in place.

    Args:
        classifiers: of kind "cost". probabilities: of models 1 to N - 1, each (n, k). wrong: (N, n) zero or one.
        seed: decides the mini-batches of the neural feature. standardise: the entropy feature.

    Raises:
        ValueError: a negative cost weight.
    """
    check_cost_weight(cost_weight)
    wrong, cost = wrong.double(), torch.tensor(list(costs), dtype=torch.float64)
    if classifiers[0].network is None:
        features = [prepare_feature(c, p, standardise) for c, p in zip(classifiers, probabilities, strict=True)]
        alphas = fit_scalars(features, wrong, cost, torch.tensor([cost_weight]), steps, lr)
        set_scalars(classifiers, alphas[0])
        return

    def loss(scores: list[Tensor], rows: Tensor) -> Tensor:
        return joint_loss([torch.sigmoid(score) for score in scores], wrong[:, rows], cost, cost_weight)

    _fit_networks(classifiers, probabilities, loss, steps, lr, seed)


def fit_cost_oblivious(
    classifier: IDKClassifier,
    probabilities: Tensor,
    wrong: Tensor,
    steps: int = 2000,
    lr: float = 0.05,
    seed: int = 0,
    standardise: bool = False,
) -> None:
    """Learn whether the model is wrong, by cross-entropy, with no cost and no other model (spec section 2.6)."""
    wrong = wrong.double()
    if classifier.network is None:
        feature = prepare_feature(classifier, probabilities, standardise)
        alphas = _descend(lambda h: [(h[0] - wrong) / len(wrong)], [feature], 1, steps, lr)
        set_scalars([classifier], alphas[0])
        return
    _fit_networks(
        [classifier],
        [probabilities],
        lambda scores, rows: confidence_loss(scores[0], wrong[rows]).mean(),
        steps,
        lr,
        seed,
    )


def fit_scalars(
    features: Sequence[Tensor], wrong: Tensor, costs: Tensor, weights: Tensor, steps: int, lr: float
) -> Tensor:
    """alpha_0 and alpha_1 of every add-on for every cost weight, (L, N - 1, 2), by Adam on the whole set at once.

    Args:
        features: N - 1 of (n,). weights: (L,); each is a problem of its own.
    """

    def slopes(h: list[Tensor]) -> list[Tensor]:
        return [slope * p * (1 - p) for slope, p in zip(joint_gradient(h, wrong, costs, weights), h, strict=True)]

    return _descend(slopes, features, len(weights), steps, lr)


def check_cost_weight(value: float) -> None:
    if not value >= 0:
        raise ValueError(f"cost_weight = {value:g} must be at least 0")


def set_scalars(classifiers: Sequence[IDKClassifier], alphas: Tensor) -> None:
    """Write (N - 1, 2) numbers alpha_0, alpha_1 into the add-ons."""
    with torch.no_grad():
        for classifier, (alpha_0, alpha_1) in zip(classifiers, alphas.tolist(), strict=True):
            classifier.alpha_0.fill_(alpha_0)
            classifier.alpha_1.fill_(alpha_1)


@torch.no_grad()
def _descend(
    slopes: Callable[[list[Tensor]], list[Tensor]], features: Sequence[Tensor], problems: int, steps: int, lr: float
) -> Tensor:
    """Follow the gradient with respect to the scores alpha_1 f + alpha_0, given as a function of h, each (L, n).

    It is written out, because building a graph takes ten times as long as these few numbers need. At the start about
    half of the set is on either side.
    """
    start = torch.tensor([[-ALPHA_1 * float(feature.median()), ALPHA_1] for feature in features], dtype=torch.float64)
    alphas = torch.nn.Parameter(start.repeat(problems, 1, 1))
    alphas.grad = torch.zeros_like(alphas)
    optimizer = torch.optim.Adam([alphas], lr=lr)
    for _ in range(steps):
        h = [
            torch.sigmoid(torch.addcmul(alphas[:, s, :1], alphas[:, s, 1:], feature))
            for s, feature in enumerate(features)
        ]
        for s, (slope, feature) in enumerate(zip(slopes(h), features, strict=True)):
            alphas.grad[:, s, 0] = slope.sum(-1)
            alphas.grad[:, s, 1] = slope @ feature
        optimizer.step()
    return alphas.detach()


def prepare_feature(classifier: IDKClassifier, probabilities: Tensor, standardise: bool = False) -> Tensor:
    """The entropy feature (n,), on request standardised; its scale is stored in the classifier."""
    values = entropy(probabilities.double())
    if standardise:
        classifier.scale_feature(values)
    if float(values.std(correction=0)) < MIN_STD:
        warnings.warn(
            "constant entropy: the model is equally certain of every calibration image, so that an IDK classifier "
            "cannot tell them apart",
            stacklevel=2,
        )
    return classifier.feature_of(probabilities).detach()


def _fit_networks(
    classifiers: Sequence[IDKClassifier],
    probabilities: Sequence[Tensor],
    loss: Callable[[list[Tensor], Tensor], Tensor],
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """SGD with momentum on mini-batches of scores, for the neural feature; BatchNorm needs two images or more."""
    order = np.random.default_rng(seed)
    parameters = [parameter for classifier in classifiers for parameter in classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    count = len(probabilities[0])
    for classifier in classifiers:
        classifier.train()
    for _ in range(steps):
        rows = torch.from_numpy(order.choice(count, min(count, NEURAL_BATCH), replace=False))
        optimizer.zero_grad()
        loss([c.score(p[rows]) for c, p in zip(classifiers, probabilities, strict=True)], rows).backward()
        optimizer.step()
    for classifier in classifiers:
        classifier.eval()
