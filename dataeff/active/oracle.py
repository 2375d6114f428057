"""The oracle of pool-based active learning: labels by index, each sold once, and counted (spec section 2.1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataeff.core.experiment import LabelsNeeded
from dataeff.data import ImageSource
from dataeff.data.sources import UNKNOWN
from dataeff.data.subsets import IntArray

_SHOWN = 10


class Oracle:
    """Knows the label of every image of the pool and tells it only when asked, one image once.

    Args:
        labels: int64 [N], by position in the original pool; `UNKNOWN` where people have not labelled an image yet.

    Attributes:
        n_calls: labels that were told so far; equals the number of labelled images.

    Example:
        >>> oracle = Oracle(np.array([3, 1, 4]))
        >>> oracle.label([2])
        array([4])
    """

    def __init__(self, labels: IntArray) -> None:
        self._labels = np.asarray(labels, dtype=np.int64)
        self._told = np.zeros(len(labels), dtype=bool)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def n_calls(self) -> int:
        return int(self._told.sum())

    @property
    def told(self) -> NDArray[np.bool_]:
        """Which images are labelled, bool [N]."""
        return self._told.copy()

    def label(self, indices: Sequence[int] | IntArray) -> IntArray:
        """Labels of `indices`, int64 [n], in their order; from now on these images count as labelled.

        Raises:
            ValueError: an index outside the pool, named twice, or labelled already; the indices are named and none of
                the request is labelled.
            LabelsNeeded: people have not labelled all of them yet.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise ValueError(f"labels asked for outside the pool (0 to {len(self) - 1}): {listed(outside)}")
        values, counts = np.unique(chosen, return_counts=True)
        if counts.max(initial=0) > 1:
            raise ValueError(f"labels asked for twice in one request: {listed(values[counts > 1])}")
        again = chosen[self._told[chosen]]
        if len(again):
            raise ValueError(f"labels asked for that are known already: {listed(again)}")
        waiting = chosen[self._labels[chosen] == UNKNOWN]
        if len(waiting):
            raise LabelsNeeded(waiting.tolist())
        self._told[chosen] = True
        answers: IntArray = self._labels[chosen]
        return answers

    def known(self, indices: Sequence[int] | IntArray) -> IntArray:
        """Labels that were told before, int64 [n].

        Raises:
            ValueError: images that were never asked for; the indices are named.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        untold = chosen[~self._told[chosen]]
        if len(untold):
            raise ValueError(f"labels read outside the oracle, they were never asked for: {listed(untold)}")
        answers: IntArray = self._labels[chosen]
        return answers

    def state_dict(self) -> dict[str, Any]:
        return {"told": torch.from_numpy(np.flatnonzero(self._told))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._told[:] = False
        self._told[state["told"].numpy()] = True


def without_labels(source: ImageSource) -> ImageSource:
    """The same images with every label `UNKNOWN`: what pools and queries may see."""
    hidden = source.subset(np.arange(len(source)))
    hidden.labels = np.full(len(source), UNKNOWN, dtype=np.int64)
    return hidden


def with_labels(source: ImageSource, indices: IntArray, labels: IntArray) -> ImageSource:
    """The images of `source` at `indices`, with the labels that the oracle told."""
    labelled = source.subset(indices)
    labelled.labels = np.asarray(labels, dtype=np.int64)
    return labelled


def listed(indices: IntArray) -> str:
    """Indices for a message, the first few of many."""
    shown = ", ".join(str(index) for index in indices[:_SHOWN].tolist())
    return shown + (f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else "")
