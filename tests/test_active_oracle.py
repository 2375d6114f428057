"""The oracle: labels by index, each told once and counted, and never read past it."""

import numpy as np
import pytest
import torch

from dataeff.active.oracle import Oracle, with_labels, without_labels
from dataeff.core.experiment import LabelsNeeded
from dataeff.data import open_splits
from dataeff.data.sources import UNKNOWN


def oracle() -> Oracle:
    return Oracle(np.array([5, 6, 7, 8, 9]))


def test_the_oracle_tells_labels_in_the_order_asked_and_counts_them() -> None:
    asked = oracle()
    assert asked.label([3, 0]).tolist() == [8, 5]
    assert asked.label(np.array([4])).tolist() == [9]
    assert asked.n_calls == 3
    assert asked.told.tolist() == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 7], "outside the pool.*7"),
        ([-1], "outside the pool.*-1"),
        ([2, 1, 2], "twice in one request: 2"),
        ([1, 3, 4], "known already: 3, 4"),
    ],
)
def test_a_wrong_request_names_its_indices_and_labels_nothing(indices: list[int], message: str) -> None:
    asked = oracle()
    asked.label([3, 4])
    with pytest.raises(ValueError, match=message):
        asked.label(indices)
    assert asked.n_calls == 2


def test_a_label_that_was_not_asked_for_cannot_be_read() -> None:
    asked = oracle()
    asked.label([1, 2])
    assert asked.known([2, 1]).tolist() == [7, 6]
    with pytest.raises(ValueError, match=r"outside the oracle, they were never asked for: 0, 4"):
        asked.known([0, 1, 4])


def test_many_wrong_indices_are_cut_short() -> None:
    with pytest.raises(ValueError, match=r"20, 21, .*, 29 and 10 more"):
        Oracle(np.zeros(20, np.int64)).label(np.arange(20, 40))


def test_images_that_nobody_has_labelled_yet_are_asked_of_people() -> None:
    waiting = Oracle(np.array([0, UNKNOWN, 1, UNKNOWN]))
    with pytest.raises(LabelsNeeded) as caught:
        waiting.label([0, 1, 3])
    assert caught.value.indices == [1, 3]
    assert waiting.n_calls == 0


def test_the_count_survives_a_checkpoint() -> None:
    before, after = oracle(), oracle()
    before.label([4, 2])
    after.load_state_dict(before.state_dict())
    assert after.n_calls == 2
    with pytest.raises(ValueError, match="known already: 2"):
        after.label([2])


def test_a_pool_without_labels_shows_pixels_but_no_label() -> None:
    source = open_splits("digits").train
    hidden = without_labels(source)
    assert set(hidden.labels.tolist()) == {UNKNOWN}
    assert torch.equal(hidden.images([3, 5]), source.images([3, 5]))
    assert hidden.subset([3]).labels.tolist() == [UNKNOWN]
    bought = with_labels(hidden, np.array([5, 3]), np.array([7, 8]))
    assert bought.labels.tolist() == [7, 8]
    assert torch.equal(bought.images([0, 1]), source.images([5, 3]))
