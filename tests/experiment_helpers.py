"""What tests of experiments share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dataeff
from dataeff.core.artifact import Prediction
from dataeff.core.experiment import Experiment
from dataeff.supervised import SupervisedExperiment


def finish(experiment: Experiment) -> list[dict[str, float]]:
    """The rows of all steps that are left."""
    return [experiment.step() for _ in range(experiment.total_steps - experiment.steps_done)]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal weights, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def answers(
    experiment: SupervisedExperiment, directory: Path, as_evaluated: bool = True
) -> tuple[Any, Tensor, Prediction]:
    """The predictor of the exported artifact, the test images as its inputs, and its answers.

    They are as accurate as the evaluation was, or `as_evaluated` is False: such networks draw anew for each image.
    """
    experiment.export(directory)
    predictor, test = dataeff.load(directory), experiment.splits.test
    inputs = experiment.preprocess(test.images(range(len(test))))
    prediction = predictor.predict(inputs)
    accuracy = float((prediction.probabilities.argmax(1).numpy() == test.labels).mean())
    assert not as_evaluated or accuracy == pytest.approx(predictor.card.metrics["test_accuracy"], abs=2e-3)
    return predictor, inputs, prediction


def assert_resumes_at_any_step(make: Callable[[], SupervisedExperiment]) -> None:
    """A run whose state is loaded into a fresh one after any step ends with the rows and weights of the undisturbed."""
    undisturbed = make()
    rows = finish(undisturbed)
    for step in range(1, undisturbed.total_steps):
        interrupted, fresh = make(), make()
        for _ in range(step):
            interrupted.step()
        fresh.load_state_dict(interrupted.state_dict())
        assert finish(fresh) == rows[step:]
        assert same(fresh.model.state_dict(), undisturbed.model.state_dict())
