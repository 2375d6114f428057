"""How uncertain predictions are (spec initial_pools section 2.3, table). Larger is more uncertain; all in float64.

Probabilities are arrays (..., C) over C classes that sum to one; scores have the shape of what stands before C.
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

LOG_FLOOR = 1e-12


def softmax(logits: np.ndarray) -> FloatArray:
    """Class probabilities (..., C) of logits of any size: the largest is taken off first, in float64."""
    values = np.asarray(logits, dtype=np.float64)
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def least_confidence(probabilities: np.ndarray) -> FloatArray:
    """1 - p_(1), from 0 to 1 - 1 / C."""
    return np.asarray(1 - np.asarray(probabilities, dtype=np.float64).max(axis=-1))


def entropy(probabilities: np.ndarray) -> FloatArray:
    """-sum_c p_c log p_c in nats, from 0 to log C. The logarithm's argument is at least 1e-12."""
    p = np.asarray(probabilities, dtype=np.float64)
    return np.asarray(-(p * np.log(np.maximum(p, LOG_FLOOR))).sum(axis=-1))


def margin(probabilities: np.ndarray) -> FloatArray:
    """-(p_(1) - p_(2)), from -1 to 0."""
    top = np.partition(np.asarray(probabilities, dtype=np.float64), -2, axis=-1)
    return np.asarray(top[..., -2] - top[..., -1])


def variation_ratio(probabilities: np.ndarray) -> FloatArray:
    """1 - f_m / M, the share of members that do not vote for the modal class.

    Args:
        probabilities: of each member, (M, N, C), M at least 2; a member votes for its first most likely class.

    Returns:
        float64 [N] in {0, 1 / M, ..., (M - 1) / M}.

    Raises:
        ValueError: fewer than 2 members, which cannot disagree.
    """
    members, _, classes = probabilities.shape
    if members < 2:
        raise ValueError(f"{members} ensemble member: ens_varr counts disagreement, so give at least 2")
    votes = np.asarray(probabilities).argmax(axis=-1)
    counts = np.stack([(votes == label).sum(axis=0) for label in range(classes)])
    # The difference of whole numbers first: 1 - 2 / 3 and 1 / 3 differ in the last bit.
    return np.asarray((members - counts.max(axis=0)) / members)
