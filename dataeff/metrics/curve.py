"""Points of an accuracy-cost curve."""

from collections.abc import Sequence
from typing import Protocol, TypeVar


class CostPoint(Protocol):
    """An operating point: its accuracy, and its cost over that of the dearest way to answer."""

    @property
    def accuracy(self) -> float: ...
    @property
    def relative_cost(self) -> float: ...


P = TypeVar("P", bound=CostPoint)


def pick_point(curve: Sequence[P], accuracy: float | None = None, relative_cost: float | None = None) -> P:
    """The cheapest point of at least this accuracy, or the most accurate of at most this cost.

    A wish beyond the curve's end gets that end. With both, the cost wins.

    Raises:
        ValueError: neither is given, or the curve is empty.
    """
    if not curve or (accuracy is None and relative_cost is None):
        raise ValueError("give an accuracy or a cost, for a cascade of at least two stages")
    within = [point for point in curve if relative_cost is None or point.relative_cost <= relative_cost]
    if not within:
        return min(curve, key=lambda point: point.relative_cost)
    good = [point for point in within if accuracy is not None and point.accuracy >= accuracy]
    if good:
        return min(good, key=lambda point: point.relative_cost)
    return max(within, key=lambda point: (point.accuracy, -point.relative_cost))
