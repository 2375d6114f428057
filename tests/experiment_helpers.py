"""What tests of experiments share."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dataeff.core.experiment import Experiment


def finish(experiment: Experiment) -> list[dict[str, float]]:
    """The rows of all steps that are left."""
    return [experiment.step() for _ in range(experiment.total_steps - experiment.steps_done)]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal weights, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
