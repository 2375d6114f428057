"""The probability of the true class under FGSM: the formula, bad input, and the files of a run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dataeff
from dataeff.data import Preprocess, open_splits
from dataeff.nas.attacks import attack
from dataeff.nas.experiment_train import CURVE_IMAGES, NasTrainExperiment
from dataeff.nas.fgsm_curve import EPS_GRID, FGSM, fgsm_probability_curve, mean_curve
from dataeff.nas.threat import AttackConfig, GradientMaskingError
from ray_jobs.claims import Result, load_claims
from tests.robustness_helpers import digits, images_and_labels, trained

SMALL = {
    "cells": 2,
    "channels": 4,
    "aux_weight": 0.0,
    "cutout": 0,
    "report_every": 30,
    "stage": {"iterations": 30, "batch": 64, "lr": 0.05},
}


class Slope(nn.Module):
    """Two classes whose logits are the mean pixel, times 10, and 0."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        value = 10 * x.flatten(1).mean(1, keepdim=True)
        return torch.cat([value, torch.zeros_like(value)], 1)


def test_the_curve_of_a_linear_network_is_the_logistic_function() -> None:
    x, y = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])
    curve = fgsm_probability_curve(Slope(), x, y, [0.0, 0.1, 0.6])
    logistic = [1 / (1 + math.exp(-10 * value)) for value in (0.5, 0.4, 0.0)]
    torch.testing.assert_close(curve["p_true"][:, 0], torch.tensor(logistic))
    falling = [1 - 1 / (1 + math.exp(-10 * value)) for value in (0.5, 0.6, 1.0)]
    torch.testing.assert_close(curve["p_true"][:, 1], torch.tensor(falling))
    assert curve["pred"][:2].tolist() == [[0, 0], [0, 0]]
    torch.testing.assert_close(curve["p_pred"][0], torch.tensor([logistic[0]] * 2))


def test_each_budget_is_that_of_the_fgsm_attack() -> None:
    model, (x, y) = trained("vgg"), images_and_labels(digits()[1].spread(50))
    curve = fgsm_probability_curve(model, x, y)
    assert curve["p_true"].shape == (len(EPS_GRID), 50) and EPS_GRID[0] == 0
    with torch.no_grad():
        torch.testing.assert_close(curve["p_pred"][0], model(x).softmax(1).amax(1))
    for number, eps in enumerate(EPS_GRID[1:], 1):
        moved = attack(model, x, y, AttackConfig(name="fgsm", eps=eps))
        with torch.no_grad():
            p = model(moved).softmax(1).as_subclass(Tensor)
        torch.testing.assert_close(curve["p_true"][number], p[range(50), y])
        assert torch.equal(curve["pred"][number], p.argmax(1))


def test_means_do_not_depend_on_the_chunk() -> None:
    model, source = trained("vgg"), digits()[1].spread(70)
    whole, parts = (mean_curve(model, source, (8, 8), torch.device("cpu"), chunk) for chunk in (100, 32))
    np.testing.assert_allclose(whole["p_true"], parts["p_true"], atol=1e-6)
    assert whole["n"] == 70 and whole["accuracy"] == parts["accuracy"]
    assert whole["accuracy"][0] > 90 and whole["p_true"][0] > whole["p_true"][-1] + 0.05


def test_a_network_in_training_mode_is_put_back_with_its_statistics() -> None:
    model, (x, y) = nn.Sequential(nn.BatchNorm2d(1), Slope()).train(), images_and_labels(digits()[1].spread(4))
    with pytest.warns(UserWarning, match="training mode"):
        fgsm_probability_curve(model, x, y.clamp(max=1))
    assert model.training and model[0].num_batches_tracked == 0


class Rounded(nn.Module):
    """Preprocessing that is not differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        return trained("vgg")(x.detach().round())


X, Y = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("model", "x", "y", "grid", "message"),
    [
        (Rounded().eval(), X, Y, EPS_GRID, "no gradient to the input"),
        (Slope(), 255 * X, Y, EPS_GRID, r"must lie in \[0, 1\] in pixel space"),
        (Slope(), X.byte(), Y, EPS_GRID, "must be float"),
        (Slope(), X, Y + 1, EPS_GRID, "labels must be 0 to 1"),
        (Slope(), X, Y[:1], EPS_GRID, r"labels must be int64 \(2,\)"),
        (Slope(), X, Y, [0.1, -0.1], "budgets of at least 0"),
        (Slope(), X, Y, [], "budgets of at least 0"),
    ],
)
def test_what_has_no_curve_is_refused(model: nn.Module, x: Tensor, y: Tensor, grid: list[float], message: str) -> None:
    with pytest.raises((ValueError, GradientMaskingError), match=message):
        fgsm_probability_curve(model, x, y, grid)


def test_a_run_has_its_curve_and_several_have_one_picture(tmp_path: Path) -> None:
    for seed in (0, 1):
        dataeff.train("nas_train", "digits", tmp_path / f"run{seed}", {**SMALL, "genotype": "random", "seed": seed})
    curves = [json.loads((tmp_path / f"run{seed}" / FGSM).read_text()) for seed in (0, 1)]
    assert curves[0]["eps_255"] == [0, 1, 2, 4, 8, 12, 16, 24, 32] and curves[0]["p_true"] != curves[1]["p_true"]
    test = open_splits("digits").test.spread(CURVE_IMAGES)
    predictor = dataeff.load(tmp_path / "run0" / "artifact")
    x = Preprocess.from_dict(predictor.card.preprocess)(test.images(range(len(test))))
    right = predictor.predict(x).probabilities.argmax(1).numpy() == test.labels
    assert curves[0]["n"] == len(test) and curves[0]["accuracy"][0] == pytest.approx(100 * right.mean(), abs=0.3)
    NasTrainExperiment.compare([tmp_path / "run0", tmp_path / "run1", tmp_path / "absent"], tmp_path / "both")
    for picture in ("run0/fgsm.png", "both/fgsm_curves.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    NasTrainExperiment.compare([tmp_path / "absent"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_claim_compares_curves_budget_by_budget(tmp_path: Path) -> None:
    claim = next(claim for claim in load_claims("nas_search", "cpu", None) if claim.id == "N9")
    results = {}
    for name, p_true in (("pcp", [0.9, 0.5, 0.4, 0.3]), ("pcp_ss1", [0.1, 0.6, 0.5, 1e-5])):
        (tmp_path / name).mkdir()
        (tmp_path / name / FGSM).write_text(json.dumps({"eps_255": [0, 1, 2, 4], "p_true": p_true}))
        results[name] = Result(tmp_path / name)
    figures = claim.measure(results)
    assert figures["budgets_ahead"] == pytest.approx(2 / 3)
    assert figures["mean_lead"] == pytest.approx(1.10001 / 3 - 0.4)
